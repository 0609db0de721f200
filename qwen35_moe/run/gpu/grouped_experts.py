"""Classes of experts that a GPU computes all at once (`grouped.py`), unless somebody watches single ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ...model.moe import DecodedExperts
from ...numerics.taps import experts_watched, tap
from ...quant import mxfp4
from ...quant.packed import Packed, Stacked
from ..experts import ThreadedExperts
from .grouped import add_in_order, has_grouped_mm, run_experts

# Up to so many (token, slot) pairs, packed experts are decoded pair by pair; beyond, all of a layer (1.6 GB in the 35B,
# for a moment), or some at a time where their dtype has no grouped product (in float64 all are four times as much).
FEW_PAIRS = 64
EXPERTS_PER_BATCH = 32


class GroupedExperts(ThreadedExperts):
    """A subclass says in `sorted_outputs` how its weights get to the grouped products."""

    def combine(self, x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
        if x_TD.is_cuda and not experts_watched():
            return self.combine_grouped(x_TD, ids_TA, weights_TA)
        return super().combine(x_TD, ids_TA, weights_TA)

    def combine_grouped(self, x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
        """As `combine`, on any device. Rounds where the loop rounds."""
        x_TD = tap("moe_a1", x_TD) if self.quantised else x_TD
        y_ND, rows_TA = self.pair_outputs(x_TD, ids_TA)
        return add_in_order(y_ND, ids_TA, rows_TA, weights_TA)

    def pair_outputs(self, x_TD: Tensor, ids_TA: Tensor) -> tuple[Tensor, Tensor]:
        """What each (token, slot) pair's expert makes of the token, unweighted, in some order, and the row of each
        pair.  -> y [T*A, D], rows [T, A]"""
        (T, A), E = ids_TA.shape, self.count
        sorted_N, pairs_N = ids_TA.flatten().to(torch.int16).sort(stable=True)  # narrow: a radix sort goes by bits
        ids_E = torch.arange(E, dtype=torch.int16, device=x_TD.device)
        ends_E = torch.searchsorted(sorted_N, ids_E, right=True, out_int32=True)
        y_ND = self.sorted_outputs(x_TD[pairs_N // A], ends_E)
        rows_N = torch.empty_like(pairs_N)
        rows_N[pairs_N] = torch.arange(T * A, device=x_TD.device)
        return y_ND, rows_N.view(T, A)

    def sorted_outputs(self, x_ND: Tensor, ends_E: Tensor) -> Tensor:
        """Expert e on rows ends[e-1] .. ends[e], for all e.  x [N, D] -> [N, D]."""
        raise NotImplementedError


class ResidentExperts(GroupedExperts, DecodedExperts):
    """Decoded experts in memory."""

    def sorted_outputs(self, x_ND: Tensor, ends_E: Tensor) -> Tensor:
        return run_experts(x_ND, self.gate_up_proj, self.down_proj, ends_E, self.quantised)


class BatchedExperts(GroupedExperts):
    """Experts that can be had some at a time."""

    def batches(self, hit: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
        """Experts in ascending order, their gate_up [n, 2F, D] and down [n, D, F]; until all that are hit, and maybe
        others, have been had."""
        raise NotImplementedError

    def sorted_outputs(self, x_ND: Tensor, ends_E: Tensor) -> Tensor:
        ends = [0, *ends_E.tolist()]
        hit = [e for e, (start, stop) in enumerate(pairwise(ends)) if stop > start]
        outputs = []
        for some, gate_up, down in self.batches(hit):
            start, stop = ends[some[0]], ends[some[-1] + 1]
            if stop > start:
                in_a_row = some[-1] - some[0] + 1 == len(some)  # an index from the host would wait for the device
                which = slice(some[0], some[-1] + 1) if in_a_row else torch.tensor(some, device=ends_E.device)
                outputs.append(run_experts(x_ND[start:stop], gate_up, down, ends_E[which] - start, self.quantised))
        return torch.cat(outputs)


class StackedExperts(BatchedExperts):
    """MXFP4 experts that stay packed on the device, stacked: codes [E, 2F, Z], scales [E, 2F, Q], and so for down."""

    def __init__(self, gate_up: mxfp4.PackedMXFP4, down: mxfp4.PackedMXFP4, dtype: torch.dtype, quantised: bool = True):
        super().__init__(gate_up.shape[0], down.shape[-1], quantised)
        self.gate_up, self.down, self.dtype = gate_up, down, dtype

    def decoded(self, which: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Some of the experts: gate_up [n, 2F, D], down [n, D, F]."""
        gate_up, down = (
            mxfp4.decode(packed.codes[which], packed.scales[which], self.dtype, often=True)
            for packed in (self.gate_up, self.down)
        )
        return gate_up, down

    def at(self, e: int) -> tuple[Tensor, Tensor]:
        gate_up, down = self.decoded(slice(e, e + 1))
        return gate_up[0], down[0]

    def batches(self, hit: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
        for some in (hit[i : i + EXPERTS_PER_BATCH] for i in range(0, len(hit), EXPERTS_PER_BATCH)):
            filled = [*some, *[some[-1]] * (EXPERTS_PER_BATCH - len(some))]  # each size of batch would be compiled
            gate_up, down = self.decoded(torch.tensor(filled, device=self.gate_up.codes.device))
            yield some, gate_up[: len(some)], down[: len(some)]

    def pair_outputs(self, x_TD: Tensor, ids_TA: Tensor) -> tuple[Tensor, Tensor]:
        T, A = ids_TA.shape
        if T * A > FEW_PAIRS:
            return super().pair_outputs(x_TD, ids_TA)
        ends = torch.arange(1, T * A + 1, dtype=torch.int32, device=x_TD.device)  # decode no more than what is hit
        y_ND = run_experts(x_TD.repeat_interleave(A, 0), *self.decoded(ids_TA.flatten()), ends, self.quantised)
        return y_ND, torch.arange(T * A, device=x_TD.device).view(T, A)

    def sorted_outputs(self, x_ND: Tensor, ends_E: Tensor) -> Tensor:
        if not has_grouped_mm(self.dtype, x_ND.device):
            return super().sorted_outputs(x_ND, ends_E)
        return run_experts(x_ND, *self.decoded(slice(None)), ends_E, self.quantised)


def stack_experts(
    stored: Sequence[tuple[Packed, Packed]], dtype: torch.dtype, device: torch.device, quantised: bool
) -> StackedExperts | None:
    """Experts (gate_up, down) as `StackedExperts` on the device; None unless all are MXFP4."""
    stacks = []
    for weights in zip(*stored, strict=True):
        parts = [part for weight in weights for part in (weight.parts if isinstance(weight, Stacked) else (weight,))]
        packed = [part for part in parts if isinstance(part, mxfp4.PackedMXFP4)]
        if len(packed) < len(parts):
            return None
        both = ([p.codes.to(device) for p in packed], [p.scales.to(device) for p in packed])
        stacks.append(mxfp4.PackedMXFP4(*(torch.cat(xs).view(len(weights), -1, xs[0].shape[-1]) for xs in both)))
    gate_up, down = stacks
    return StackedExperts(gate_up, down, dtype, quantised)
