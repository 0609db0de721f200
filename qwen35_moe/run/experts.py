"""Experts that are not one decoded tensor: packed ones, decoded when a token hits them, and views of a mapped file."""

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
    """On a CPU, hit experts are computed side by side by threads; one after the other where somebody watches them."""

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
    """Experts whose bytes are what the model computes with: handed out where they lie, without a copy.

    Only where gate and up do not adjoin, they are put together when hit.
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
    """Experts that are decoded when they are hit. `read(e)` gives one as it is stored, from memory or from disk.

    On a CPU they are decoded into memory that a thread uses again and again; for a GPU they are decoded there.
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
    """Memory of this thread, the same at each call that has the same arguments as the one before."""
    kept: dict[int, Tensor] = _own.__dict__.setdefault("kept", {})
    if which not in kept or (kept[which].shape, kept[which].dtype) != (shape, dtype):
        kept[which] = torch.empty(shape, dtype=dtype)
    return kept[which]
