"""Experts that are not one decoded tensor: they are decoded when they are chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from threading import local

import torch
from torch import Tensor

from ..model.moe import ExpertOutput, Experts, expert, hit_experts
from ..numerics.taps import experts_watched, scope
from ..quant.packed import Float, Packed, Stacked, adjoined
from .side_by_side import side_by_side

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
