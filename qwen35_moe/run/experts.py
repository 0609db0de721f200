"""Experts that are not one decoded tensor: packed ones, decoded when they are chosen, and views of mapped files."""

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


class ViewedExperts(ThreadedExperts):
    """Experts whose stored bytes are already in the dtype of the computation: views, without a copy.

    If gate and up are not adjacent, they are joined when the expert is chosen.
    """

    def __init__(self, packed: Sequence[PackedExpert], dtype: torch.dtype):
        super().__init__(len(packed), packed[0][1].shape[1])
        self.packed, self.dtype = packed, dtype

    def at(self, e: int) -> tuple[Tensor, Tensor]:
        gate_up, down = self.packed[e]
        return gate_up.decode(self.dtype), down.decode(self.dtype)


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

    On a CPU, each thread decodes into one buffer of its own. For a GPU, they are decoded there.
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
        stored = self.read(e)
        if self.device.type != "cpu":
            gate_up, down = (moved(packed, self.device).decode(self.dtype) for packed in stored)
        else:
            gate_up, down = (p.decode(self.dtype, scratch(i, p.shape, self.dtype)) for i, p in enumerate(stored))
        return gate_up, down


_own = local()


def scratch(which: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A buffer of this thread: the same one at each call with the same arguments."""
    kept: dict[int, Tensor] = _own.__dict__.setdefault("kept", {})
    if which not in kept or (kept[which].shape, kept[which].dtype) != (shape, dtype):
        kept[which] = torch.empty(shape, dtype=dtype)
    return kept[which]
