"""Experts that are not one decoded tensor: packed ones, decoded when a token hits them, and views of a mapped file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from threading import local

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import grouped
from .ahead import fetch_ahead
from .quant.mxfp4 import decode
from .quant.packed import Float, Packed, Stacked, adjoined

CPU = torch.device("cpu")
Slot = tuple[Packed, Packed]  # gate_up [2F, D] (F rows of gate, then F of up), down [D, F]


class ViewedExperts(nn.Module):
    """Experts whose bytes are what the model computes with: handed out where they lie, without a copy.

    Only where gate and up do not adjoin, they are put together when hit.
    """

    def __init__(self, slots: Sequence[Slot], dtype: torch.dtype):
        super().__init__()
        self.slots, self.dtype, self.quantised = slots, dtype, False
        self.count, self.intermediate = len(slots), slots[0][1].shape[1]

    def at(self, e: int) -> tuple[Tensor, Tensor]:
        gate_up, down = self.slots[e]
        return gate_up.decode(self.dtype), down.decode(self.dtype)


def as_one(weights: Sequence[Packed]) -> Tensor | None:
    """The view [E, O, I] of matrices [O, I] that lie one after another in memory; None where they do not."""
    view = adjoined([weight.values if isinstance(weight, Float) else None for weight in weights])
    return None if view is None else view.view(len(weights), -1, view.shape[-1])


def is_plain(weight: Packed, dtype: torch.dtype) -> bool:
    """Whether a weight is stored as values of this dtype."""
    parts = weight.parts if isinstance(weight, Stacked) else (weight,)
    return all(isinstance(part, Float) and part.values.dtype == dtype for part in parts)


def moved(slot: Sequence[Packed], device: torch.device) -> list[Packed]:
    """The same on another device. What was read into one piece of memory goes there in one copy, unless most of that is
    not asked for, as of a mapped file."""
    if device.type == "cpu":
        return list(slot)
    own = sum(packed.nbytes for packed in slot)
    copies: dict[int, Tensor] = {}

    def there(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.nbytes() > own or storage.nbytes() == x.nbytes or not x.is_contiguous():
            return x.to(device, non_blocking=True)
        if storage.data_ptr() not in copies:
            flat = torch.empty(0, dtype=torch.uint8).set_(storage)
            copies[storage.data_ptr()] = flat.to(device, non_blocking=True)
        begin = x.storage_offset() * x.element_size()
        copy = copies[storage.data_ptr()][begin : begin + x.nbytes]
        return (copy if x.dtype == torch.uint8 else copy.view(x.dtype)).view(x.shape)

    return [_each(packed, there) for packed in slot]


def _each(packed: Packed, change: Callable[[Tensor], Tensor]) -> Packed:
    if isinstance(packed, Stacked):
        return Stacked(tuple(_each(part, change) for part in packed.parts))
    return type(packed)(**{name: change(x) for name, x in vars(packed).items()})


def tensors(slot: Iterable[Packed]) -> Iterator[Tensor]:
    """What the weights are stored in."""
    for packed in slot:
        yield from tensors(packed.parts) if isinstance(packed, Stacked) else vars(packed).values()


class PackedExperts(nn.Module):
    """Hands out experts as `Experts` does. `read(e)` gives a slot, from memory or from disk.

    On a CPU they are decoded into memory that a thread uses again and again; for a GPU they are decoded there.
    """

    def __init__(
        self,
        count: int,
        intermediate: int,
        read: Callable[[int], Slot],
        dtype: torch.dtype,
        quantised: bool,
        device: torch.device = CPU,
    ):
        super().__init__()
        self.count, self.intermediate, self.read = count, intermediate, read
        self.dtype, self.quantised, self.device = dtype, quantised, device

    @torch.inference_mode()
    def at(self, e: int) -> tuple[Tensor, Tensor]:
        slot = self.read(e)
        if self.device.type != "cpu":
            gate_up, down = (packed.decode(self.dtype) for packed in moved(slot, self.device))
        else:
            gate_up, down = (p.decode(self.dtype, scratch(i, p.shape, self.dtype)) for i, p in enumerate(slot))
        return gate_up, down


_own = local()


def scratch(which: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Memory of this thread, the same at each call that has the same arguments as the one before."""
    kept: dict[int, Tensor] = _own.__dict__.setdefault("kept", {})
    if which not in kept or (kept[which].shape, kept[which].dtype) != (shape, dtype):
        kept[which] = torch.empty(shape, dtype=dtype)
    return kept[which]


class PassingExperts(PackedExperts):
    """Packed experts that do not stay on a GPU: threads read some of them ahead, from memory or from disk, while it
    decodes and multiplies a batch of others."""

    def batches(self, hit: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """gate_up [n, 2F, D] and down [n, D, F] of the next n experts, until all have been had."""
        coming = fetch_ahead(lambda e: moved(self.read(e), self.device), hit, tensors, self.device, 2 * grouped.BATCH)
        while slots := list(islice(coming, grouped.BATCH)):
            gate_up, down = (self._decoded([slot[i] for slot in slots]) for i in (0, 1))
            yield gate_up, down

    def _decoded(self, weights: list[Packed]) -> Tensor:
        stack = grouped.as_one_mxfp4(weights, self.device)
        if stack is None:
            return torch.stack([weight.decode(self.dtype) for weight in weights])
        empty = (0, 0, 0, 0, 0, grouped.BATCH - len(weights))  # each size of batch would be compiled
        codes, scales = F.pad(stack.codes, empty), F.pad(stack.scales, empty)
        return decode(codes, scales, self.dtype)[: len(weights)]
