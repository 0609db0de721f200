"""Experts that are not one decoded tensor: packed ones, decoded when a token hits them, and views of a mapped file."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import groupby, islice
from math import prod
from threading import local
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint.weight import Verdict, Weight
from ..quant.packed import Float, Packed, Stacked, adjoined
from .gpu.feed import feed
from .gpu.plan import Plan

CPU = torch.device("cpu")
FEW = 32  # experts that are decoded as so many, more of them as those of a batch
BATCH = 2**31  # bytes of decoded experts that a GPU holds at a time
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


def moved(packed: Packed, device: torch.device) -> Packed:
    """The same on another device."""
    if device.type == "cpu":
        return packed
    if isinstance(packed, Stacked):
        return Stacked(tuple(moved(part, device) for part in packed.parts))
    return type(packed)(**{name: x.to(device) for name, x in vars(packed).items()})


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
            gate_up, down = (moved(packed, self.device).decode(self.dtype) for packed in slot)
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


class Group(NamedTuple):
    """Experts that are stored alike, to be read and decoded at once. weights: of the first. plan: None for a slot that
    is not as it is stored."""

    experts: Sequence[int]
    weights: tuple[Weight, ...]
    plan: Plan | None


class PassingExperts(PackedExperts):
    """Packed experts that do not stay on a GPU: some are read from disk while it decodes and multiplies others.

    Where nearly all experts are hit, all are read: those of a layer that comes next can then be begun with `begin`,
    before it is known which it will hit.
    """

    def __init__(self, *packed: Any, stored: Callable[[int], tuple[Weight, ...]]):
        """As `PackedExperts`. stored: the weights of an expert, (gate_up, down) or (gate, up, down); none where `read`
        changes them."""
        super().__init__(*packed)
        self.stored, self.nearly_all = cache(stored), False
        self.all: list[Group] = []
        self.coming: list[Callable[[], list[Tensor]]] = []
        self.later: list[Verdict] | None = None  # where verdicts go that somebody else waits for

    def begin(self) -> None:
        """Has all of them read, unless that has begun."""
        self.all = self.all or self._groups(range(self.count))
        self.coming = self.coming or [self._order(group) for group in self.all]

    def batches(self, hit: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
        """Some experts and their gate_up [n, 2F, D] and down [n, D, F], until all that are hit have been had.

        Error: what cannot be read; a scale that is NaN or infinite (or `later`).
        """
        self.nearly_all = 8 * len(hit) > 7 * self.count
        if self.nearly_all:
            self.begin()
        groups = self.all if self.nearly_all else self._groups(hit)
        coming = deque(self.coming if self.nearly_all else [self._order(group) for group in groups])
        self.coming, doubts = [], list[Tensor]()
        for group in groups:
            read = coming.popleft()()
            yield group.experts, *self._decoded(group, read, doubts)
            feed(self.device).go_on()
        weights = (weight for group in groups for e in group.experts for weight in self.stored(e))
        Verdict(doubts, weights).settle(self.later)

    def listed(self, x: Tensor) -> list[int]:
        return feed(self.device).listed(x)

    def _groups(self, which: Sequence[int]) -> list[Group]:
        found = []
        for _, run in groupby(which, key=lambda e: [weight.form for weight in self.stored(e)]):
            alike = list(run)
            weights = self.stored(alike[0])
            if not weights:
                found += [Group([e], (), None) for e in alike]
                continue
            nbytes = sum(prod(weight.shape) for weight in weights) * self.dtype.itemsize
            size = -(-self.count // -(-self.count * nbytes // BATCH))  # in all, about equal ones
            for some in (alike[i : i + size] for i in range(0, len(alike), size)):
                items = [[rows for weight in self.stored(e) for rows in weight.parts] for e in some]
                room = size if len(some) > FEW else min(size, FEW)  # each number of experts would be compiled
                found.append(Group(some, weights, Plan(weights[0].reader, items, room)))
        return found

    def _order(self, group: Group) -> Callable[[], list[Tensor]]:
        if group.plan is not None:
            return feed(self.device).order(group.plan).result
        return lambda: [x[None] for x in self.at(group.experts[0])]

    def _decoded(self, group: Group, read: list[Tensor], doubts: list[Tensor]) -> tuple[Tensor, Tensor]:
        n, parts = len(group.experts), iter(read)
        if not group.weights:
            return read[0], read[1]
        found = []
        for weight in group.weights:
            stacks = list(islice(parts, len(weight.parts)))
            if weight.kind.startswith("fp8"):
                each = zip(*(x[:n] for x in stacks), strict=True)
                found.append(torch.stack([weight.of(one, doubts).decode(self.dtype) for one in each]))
            else:
                found.append(weight.of(stacks, doubts, n).decode(self.dtype)[:n])
            feed(self.device).go_on()  # no taps are called here
        *first, down = found
        return first[0] if len(first) == 1 else torch.cat(first, 1), down
