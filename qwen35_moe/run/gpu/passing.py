"""Experts of a streamed model on a GPU: read on demand or ahead, and decoded a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import groupby, islice
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...checkpoint.weight import StoredWeight
from ...quant.mxfp4 import PackedMXFP4
from ...quant.packed import Packed
from ..experts import PackedExperts, moved
from .grouped_experts import BatchedExperts, ResidentExperts
from .prefetch import Fetch, Layout, PendingScaleCheck

BATCH_BYTES = 2**31  # bytes of decoded experts that a GPU holds at a time
FEW_EXPERTS = 32  # up to so many experts are decoded as that many, more of them as those of a batch
Change = Callable[[Packed], Packed]


def unchanged(packed: Packed) -> Packed:
    return packed


class Batch(NamedTuple):
    """Experts that are stored alike, to be read and decoded at once. weights: those of the first expert. layout: None
    for an expert that is not as it is stored."""

    experts: Sequence[int]
    weights: tuple[StoredWeight, ...]
    layout: Layout | None


class PassingExperts(BatchedExperts, PackedExperts):
    """Packed experts that do not stay on a GPU: the next ones are read while it decodes and multiplies others.

    Where nearly all experts of a layer are hit, all are read. `begin` has those of the next layer read before its
    router has chosen.
    """

    def __init__(self, *packed: Any, stored: Callable[[int], tuple[StoredWeight, ...]]):
        """As `PackedExperts`. stored: the weights of an expert, (gate_up, down) or (gate, up, down); none where `read`
        changes them."""
        super().__init__(*packed)
        self.stored, self.nearly_all = cache(stored), False
        self.all: list[Batch] = []
        self.coming: list[Fetch | None] = []  # of each batch in `all`, once `begin` was called
        self.later: list[PendingScaleCheck] | None = None  # who owns this list waits for the checks
        self.stay = False  # what was read stays on the GPU

    def begin(self) -> None:
        """Has all experts read, unless that has begun."""
        self.all = self.all or self._batches(range(self.count))
        self.coming = self.coming or self._fetches(self.all)

    def stay_with(self, first: PassingExperts) -> None:
        """Has all experts read once, by `first`, to stay as they are stored; these are decoded from there."""
        first.begin()
        self.all, self.coming, self.stay = first.all, first.coming, True

    def batches(self, hit: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
        """Some experts and their gate_up [n, 2F, D] and down [n, D, F], until all that are hit have been had.

        Error: what cannot be read; a scale that is NaN or infinite (or a check in `later`).
        """
        self.nearly_all = self.stay or 8 * len(hit) > 7 * self.count
        if self.nearly_all:
            self.begin()
        batches = self.all if self.nearly_all else self._batches(hit)
        coming = self.coming if self.nearly_all else self._fetches(batches)
        doubts = list[Tensor]()
        if not self.stay:
            self.coming = []
        for i, batch in enumerate(batches):
            fetch = coming[i]
            if not self.stay:
                coming[i] = None  # its buffer is free once it is decoded
            yield batch.experts, *self._decoded(batch, fetch, doubts, self.dtype)
        self._check(batches, doubts)

    def resident(self, dtype: torch.dtype, quantised: bool, change: Change = unchanged) -> ResidentExperts:
        """All of them, decoded from what stays on the GPU. change: of each stored weight before it is decoded, [O, I]
        or a stack [n, O, I]."""
        self.begin()
        doubts = list[Tensor]()
        found = [self._decoded(*each, doubts, dtype, change) for each in zip(self.all, self.coming, strict=True)]
        self._check(self.all, doubts)
        gate_up, down = map(torch.cat, zip(*found, strict=True))
        return ResidentExperts(gate_up, down, quantised)

    def _check(self, batches: Sequence[Batch], doubts: Sequence[Tensor]) -> None:
        weights = (weight for batch in batches for e in batch.experts for weight in self.stored(e))
        PendingScaleCheck(doubts, weights).settle(self.later)

    def _fetches(self, batches: Sequence[Batch]) -> list[Fetch | None]:
        return [None if batch.layout is None else Fetch(batch.layout, self.device) for batch in batches]

    def _batches(self, which: Sequence[int]) -> list[Batch]:
        found = []
        for _, run in groupby(which, key=lambda e: [weight.form for weight in self.stored(e)]):
            alike = list(run)
            weights = self.stored(alike[0])
            if not weights:
                found += [Batch([e], (), None) for e in alike]
                continue
            nbytes = sum(prod(weight.shape) for weight in weights) * self.dtype.itemsize
            size = -(-self.count // -(-self.count * nbytes // BATCH_BYTES))  # in all, about equal ones
            for some in (alike[i : i + size] for i in range(0, len(alike), size)):
                items = [[rows for weight in self.stored(e) for rows in weight.parts] for e in some]
                room = size if len(some) > FEW_EXPERTS else min(size, FEW_EXPERTS)  # each number would be compiled
                found.append(Batch(some, weights, Layout(weights[0].reader, items, room)))
        return found

    def _decoded(
        self, batch: Batch, fetch: Fetch | None, doubts: list[Tensor], dtype: torch.dtype,
        change: Change = unchanged,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """gate_up and down of a batch; the scales' doubts are added to `doubts`."""
        if fetch is None:  # made of other weights, for one expert
            gate_up, down = (moved(part, self.device).decode(dtype)[None] for part in self.read(batch.experts[0]))
            return gate_up, down
        n, parts, found = len(batch.experts), iter(fetch.result()), []
        for weight in batch.weights:
            stacks = list(islice(parts, len(weight.parts)))
            if weight.kind.startswith("fp8"):
                each = zip(*(x[:n] for x in stacks), strict=True)
                found.append(torch.stack([change(weight.of(one, doubts)).decode(dtype) for one in each]))
                continue
            packed = change(weight.of(stacks, doubts, n))
            if isinstance(packed, PackedMXFP4):
                found.append(packed.decode(dtype, often=not self.stay)[:n])
            else:
                found.append(packed.decode(dtype)[:n])
        *first, down = found
        return first[0] if len(first) == 1 else torch.cat(first, 1), down
