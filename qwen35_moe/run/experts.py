"""Experts that are not one decoded tensor: they are decoded when they are chosen, and computed in parallel on a CPU.

A product with a few rows does not occupy two threads of torch, and between operations they wait for each other. So each
expert has threads of its own, the same number whether one runs at a time or several do: in float32 a product's last bit
may depend on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from threading import local
from typing import TypeVar

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from ..model.moe import ExpertOutput, Experts, expert, hit_experts
from ..numerics.taps import experts_watched, scope
from ..quant.packed import Float, Packed, Stacked, adjoined

WORKERS = 4  # each holds one decoded expert
In = TypeVar("In")
Out = TypeVar("Out")
HOST = torch.device("cpu")
PackedExpert = tuple[Packed, Packed]  # gate_up [2F, D] (F rows of gate, then F of up), down [D, F]


class ThreadedExperts(Experts):
    """On a CPU, threads compute the chosen experts in parallel; one after the other while a handler observes them."""

    def outputs(self, x_TD: Tensor, ids_TA: Tensor) -> Iterator[ExpertOutput]:
        if x_TD.is_cuda:
            yield from super().outputs(x_TD, ids_TA)
            return

        def compute(hit: tuple[int, Tensor, Tensor]) -> ExpertOutput:
            e, token_N, slot_N = hit
            with scope(expert=e):
                return ExpertOutput(e, token_N, slot_N, expert(x_TD[token_N], *self.at(e), self.quantised))

        yield from side_by_side(compute, hit_experts(ids_TA, self.count), one_by_one=experts_watched())


def as_one(weights: Sequence[Packed]) -> Tensor | None:
    """The view [E, O, I] of matrices [O, I] that lie one after another in memory; None where they do not."""
    view = adjoined([weight.values if isinstance(weight, Float) else None for weight in weights])
    return None if view is None else view.view(len(weights), -1, view.shape[-1])


def is_stored_as(weight: Packed, dtype: torch.dtype) -> bool:
    """Whether a weight is stored as values of this dtype."""
    parts = weight.parts if isinstance(weight, Stacked) else (weight,)
    return all(isinstance(part, Float) and part.values.dtype == dtype for part in parts)


def moved(packed: Packed, device: torch.device) -> Packed:
    """The same on another device."""
    if device.type == "cpu":
        return packed
    if isinstance(packed, Stacked):
        return Stacked(tuple(moved(part, device) for part in packed.parts))
    return type(packed)(**{name: x.to(device) for name, x in vars(packed).items()})


class PackedExperts(ThreadedExperts):
    """Experts that are decoded when a token chooses them. `read(e)` returns the stored expert, from memory or disk.

    On a CPU, each thread decodes into one buffer of its own; what has the dtype already, as in a mapped file, is used
    where it is. For a GPU, they are decoded there.
    """

    def __init__(
        self,
        count: int,
        intermediate: int,
        read: Callable[[int], PackedExpert],
        dtype: torch.dtype,
        quantised: bool,
        device: torch.device = HOST,
    ):
        super().__init__(count, intermediate, quantised)
        self.read, self.dtype, self.device = read, dtype, device

    @torch.inference_mode()
    def at(self, e: int) -> tuple[Tensor, Tensor]:
        gate_up, down = (self._decoded_one(which, packed) for which, packed in enumerate(self.read(e)))
        return gate_up, down

    def _decoded_one(self, which: int, packed: Packed) -> Tensor:
        if self.device.type != "cpu":
            return moved(packed, self.device).decode(self.dtype)
        there = isinstance(packed, Float) and packed.values.dtype == self.dtype
        return packed.decode(self.dtype, None if there else scratch(which, packed.shape, self.dtype))


_own = local()


def scratch(which: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A buffer of this thread: the same one at each call with the same arguments."""
    kept: dict[int, Tensor] = _own.__dict__.setdefault("kept", {})
    if which not in kept or (kept[which].shape, kept[which].dtype) != (shape, dtype):
        kept[which] = torch.empty(shape, dtype=dtype)
    return kept[which]


def fix_threads() -> None:
    """Sets torch's number of threads to its present value. After that MKL never chooses fewer threads, and so
    other last bits, for small products. `side_by_side` also sets the number, so this must come before the first
    product."""
    torch.set_num_threads(torch.get_num_threads())


def side_by_side(function: Callable[[In], Out], items: Iterable[In], one_by_one: bool = False) -> Iterator[Out]:
    """function(item) of each item, in their order. The calls overlap, unless `one_by_one`.

    Each runs in the context (`contextvars`) that was current when it was handed out, under the caller's function modes
    of torch, which a thread does not have by itself, and with torch's threads divided among at most `WORKERS`.
    """
    total, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    workers, modes = min(total, WORKERS), _get_current_function_mode_stack()

    def run(item: In) -> Out:
        with ExitStack() as entered:
            entered.enter_context(torch.inference_mode(inference))
            for mode in modes:
                entered.enter_context(mode)
            return function(item)

    if workers == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(total // workers,)) as pool:
        coming: deque[Future[Out]] = deque()
        torch.set_num_threads(total // workers)  # a team of threads that waits for its next turn takes a core
        try:
            for item in items:
                coming.append(pool.submit(copy_context().run, run, item))
                if one_by_one or len(coming) > 2 * workers:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()
            torch.set_num_threads(total)
