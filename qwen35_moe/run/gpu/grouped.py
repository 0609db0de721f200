"""All experts of a layer in a few launches, for GPUs: what `moe.combine_experts` computes expert by expert.

Tokens are sorted by expert on the device, both products are grouped matrix products over contiguous rows, and each
token's slots are added in the order that the table asks for. In bf16 nothing waits for the device, so that a forward
pass can be captured as a graph.

Two runs on one GPU give the same bits: there are no atomics, every element is written once, and sorts are stable. What
may change bits is what chooses among a library's kernels: another card, driver or torch; other lengths, batch sizes or
capacities of a cache; several streams at once, which share cuBLAS's workspace unless CUBLAS_WORKSPACE_CONFIG says so.
Of the operations used here torch lists `cumsum` and `index_put` as not deterministic: the sums are over rows of 64 and
of positions, each within one block, and no index occurs twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model.ops import accumulation_dtype, one_wide, promote
from ...numerics import arithmetics as arithmetic
from ...numerics.taps import attached, tap
from ...quant import mxfp4
from ...quant.packed import Packed, Stacked
from .fused import one_pass

# Up to FEW (token, slot) pairs, packed experts are decoded pair by pair; beyond, all of a layer (1.6 GB in the 35B, for
# a moment), or BATCH at a time where their dtype has no grouped product (in float64 all are four times as much).
FEW = 64
BATCH = 32


class Stackable(Protocol):
    """Experts that can be had as two stacks."""

    @property
    def count(self) -> int: ...

    @property
    def quantised(self) -> bool: ...

    def stack(self, which: Any) -> tuple[Tensor, Tensor]: ...


class Batched(Protocol):
    """Experts that can be had some at a time."""

    @property
    def count(self) -> int: ...

    @property
    def quantised(self) -> bool: ...

    def batches(self, hit: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
        """Experts in ascending order, their gate_up [n, 2F, D] and down [n, D, F]; until all that are hit, and maybe
        others, have been had."""
        ...


class StackedExperts(nn.Module):
    """MXFP4 experts that stay packed on the device, stacked: codes [E, 2F, Z], scales [E, 2F, Q], and so for down."""

    def __init__(self, gate_up: mxfp4.MXFP4, down: mxfp4.MXFP4, dtype: torch.dtype, quantised: bool = True):
        super().__init__()
        self.gate_up, self.down, self.dtype, self.quantised = gate_up, down, dtype, quantised
        self.count, self.intermediate = gate_up.shape[0], down.shape[-1]

    def stack(self, which: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Some of the experts, decoded: gate_up [n, 2F, D], down [n, D, F]."""
        gate_up, down = (
            mxfp4.decode(packed.codes[which], packed.scales[which], self.dtype) for packed in (self.gate_up, self.down)
        )
        return gate_up, down

    def batches(self, hit: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
        for some in (hit[i : i + BATCH] for i in range(0, len(hit), BATCH)):
            filled = [*some, *[some[-1]] * (BATCH - len(some))]  # each size of batch would be compiled
            gate_up, down = self.stack(torch.tensor(filled, device=self.gate_up.codes.device))
            yield some, gate_up[: len(some)], down[: len(some)]

    def at(self, e: int) -> tuple[Tensor, Tensor]:
        gate_up, down = self.stack(slice(e, e + 1))
        return gate_up[0], down[0]


def stack_slots(
    slots: Sequence[tuple[Packed, Packed]], dtype: torch.dtype, device: torch.device, quantised: bool
) -> StackedExperts | None:
    """Slots (gate_up, down) as `StackedExperts` on the device; None unless all are MXFP4."""
    gate_up, down = (as_one_mxfp4([slot[i] for slot in slots], device) for i in (0, 1))
    return None if gate_up is None or down is None else StackedExperts(gate_up, down, dtype, quantised)


def as_one_mxfp4(weights: Sequence[Packed], device: torch.device) -> mxfp4.MXFP4 | None:
    """Weights [O, I] of equal shape as one [n, O, I] on the device; None unless all are MXFP4."""
    parts = [part for weight in weights for part in (weight.parts if isinstance(weight, Stacked) else (weight,))]
    stored = [part for part in parts if isinstance(part, mxfp4.MXFP4)]
    if len(stored) < len(parts):
        return None
    codes, scales = ([x.to(device) for x in xs] for xs in zip(*((p.codes, p.scales) for p in stored), strict=True))
    n = len(weights)
    return mxfp4.MXFP4(*(torch.cat(xs).view(n, -1, xs[0].shape[-1]) for xs in (codes, scales)))


def applies(experts: object, x_TD: Tensor) -> TypeGuard[Stackable | Batched]:
    """Whether to take this form: on a GPU, with experts that can be had stacked, and nobody watching single experts."""
    return x_TD.is_cuda and (hasattr(experts, "stack") or hasattr(experts, "batches")) and not watched()


def watched() -> bool:
    """Whether a handler other than the arithmetic may want to see, or change, values inside of single experts."""
    table = arithmetic.current()
    return any(handler is not table and getattr(handler, "wants_experts", True) for handler in attached())


def combine(x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor, experts: Stackable | Batched) -> Tensor:
    """sum_a weights_a expert_{ids_a}(x), as `moe.combine_experts`. Rounds where the loop rounds.  -> [T, D]"""
    x_TD = tap("moe_a1", x_TD) if experts.quantised else x_TD
    y_ND, rows_TA = pair_outputs(x_TD, ids_TA, experts)
    order = arithmetic.current().switch("moe_sum_order")
    if order == "expert":
        by_id_TA = ids_TA.argsort(-1)
        weights_TA, rows_TA = weights_TA.gather(-1, by_id_TA), rows_TA.gather(-1, by_id_TA)
    elif order == "slot-reversed":
        weights_TA, rows_TA = weights_TA.flip(1), rows_TA.flip(1)
    elif order == "torch.sum":
        terms_TAD = _product("moe_expert_weighted", weights_TA[..., None], y_ND[rows_TA])
        return promote(_rounded("moe_partial_sum", terms_TAD.sum(1, dtype=promote(terms_TAD[:0]).dtype)))
    return add_slots(y_ND, rows_TA, weights_TA)


def pair_outputs(x_TD: Tensor, ids_TA: Tensor, experts: Stackable | Batched) -> tuple[Tensor, Tensor]:
    """What each (token, slot) pair's expert makes of the token, unweighted, in some order, and the row of each pair.

    -> y [T*A, D], rows [T, A]
    """
    (T, A), E = ids_TA.shape, experts.count
    ids_N = ids_TA.flatten()
    if isinstance(experts, StackedExperts) and T * A <= FEW:  # decode no more than what is hit
        ends = torch.arange(1, T * A + 1, dtype=torch.int32, device=x_TD.device)
        x_ND = x_TD.repeat_interleave(A, 0)
        y_ND = run_experts(x_ND, *experts.stack(ids_N), ends, experts.quantised)
        return y_ND, torch.arange(T * A, device=x_TD.device).view(T, A)
    sorted_N, pairs_N = ids_N.to(torch.int16).sort(stable=True)  # narrow: a radix sort's time goes with the bits
    ids_E = torch.arange(E, dtype=torch.int16, device=x_TD.device)
    ends_E = torch.searchsorted(sorted_N, ids_E, right=True, out_int32=True)
    x_ND = x_TD[pairs_N // A]
    stack = getattr(experts, "stack", None)
    if stack is None or (isinstance(experts, StackedExperts) and not has_grouped_mm(experts.dtype, x_TD.device)):
        y_ND = _in_batches(x_ND, ends_E, cast(Batched, experts))
    else:
        gate_up, down = stack(slice(None))
        y_ND = run_experts(x_ND, gate_up, down, ends_E, experts.quantised)
    rows_N = torch.empty_like(pairs_N)
    rows_N[pairs_N] = torch.arange(T * A, device=x_TD.device)
    return y_ND, rows_N.view(T, A)


def has_grouped_mm(dtype: torch.dtype, device: torch.device, columns: int = 8) -> bool:
    """PyTorch's grouped product has bf16 operands and result, fp32 sums, and rows of whole 16 bytes.

    On a CPU the loop is as fast.
    """
    return dtype == torch.bfloat16 and device.type == "cuda" and columns % 8 == 0


def _in_batches(x_ND: Tensor, ends_E: Tensor, experts: Batched) -> Tensor:
    """As `run_experts`, with some of the experts at a time."""
    ends = [0, *ends_E.tolist()]
    hit = [e for e, (start, stop) in enumerate(pairwise(ends)) if stop > start]
    outputs = []
    for some, gate_up, down in experts.batches(hit):
        start, stop = ends[some[0]], ends[some[-1] + 1]
        if stop > start:
            in_a_row = some[-1] - some[0] + 1 == len(some)  # an index from the host would wait for the device
            which = slice(some[0], some[-1] + 1) if in_a_row else torch.tensor(some, device=ends_E.device)
            outputs.append(run_experts(x_ND[start:stop], gate_up, down, ends_E[which] - start, experts.quantised))
    return torch.cat(outputs)


def run_experts(x_ND: Tensor, gate_up: Tensor, down: Tensor, ends_E: Tensor, quantised: bool) -> Tensor:
    """Expert e on rows ends[e-1] .. ends[e], for all e.  x [N, D], gate_up [E, 2F, D], down [E, D, F] -> [N, D]."""
    gate_NF, up_NF = grouped_linear("moe_expert_gate_up", x_ND, gate_up, ends_E).chunk(2, -1)
    act_NF = _product("moe_expert_act", _silu(gate_NF), up_NF)
    return grouped_linear("moe_expert_down", _rounded("moe_a2", act_NF) if quantised else act_NF, down, ends_E)


def grouped_linear(name: str, x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Rows ends[e-1] .. ends[e] of x times weight[e]^T, rounded as `name`.  -> [N, O].

    Where the table wants another dtype than `has_grouped_mm`, this is a loop that has to know the counts on the host.
    """
    dtype = accumulation_dtype(name, x_NI, weight_EOI)
    if has_grouped_mm(dtype, x_NI.device, x_NI.shape[1]):
        y_NO = _grouped_mm(x_NI, weight_EOI.mT, ends_E)
    else:
        y_NO, start = x_NI.new_empty(len(x_NI), weight_EOI.shape[1], dtype=dtype), 0
        for end, weight_OI in zip(ends_E.tolist(), weight_EOI, strict=True):
            if end > start:
                y_NO[start:end] = F.linear(x_NI[start:end].to(dtype), weight_OI.to(dtype))
            start = end
    return _rounded(name, y_NO)


# Public since torch 2.10, the same operation under a private name before.
_grouped_mm = (
    (lambda x, w, ends: F.grouped_mm(x, w, offs=ends))
    if hasattr(F, "grouped_mm")
    else (lambda x, w, ends: torch._grouped_mm(x, w, offs=ends))
)


def add_slots(y_ND: Tensor, rows_TA: Tensor, weights_TA: Tensor) -> Tensor:
    """The running sum over slots of weight * y, rounded at `moe_expert_weighted` and `moe_partial_sum`.  -> [T, D]"""
    table = arithmetic.current()
    roundings = [table.rounding(name) for name in ("moe_expert_weighted", "moe_partial_sum")]
    if table.switch("moe_weight") == "product" and not any(callable(r) for r in roundings):
        product, total = (promote(y_ND[:0]).dtype if r is arithmetic.KEEP else r for r in roundings)
        return promote(_sum_of_slots(y_ND, rows_TA, weights_TA, product, total))
    total_TD = promote(y_ND.new_zeros(len(rows_TA), y_ND.shape[1]))
    for rows_T, weights_T in zip(rows_TA.T, weights_TA.T, strict=True):
        if table.switch("moe_weight") == "fma":  # the product of fp32 and bf16 is exact in float64
            term_TD = weights_T.double()[:, None] * y_ND[rows_T].double()
        else:
            term_TD = _product("moe_expert_weighted", weights_T[:, None], y_ND[rows_T])
        total_TD = promote(_rounded("moe_partial_sum", (total_TD + term_TD).to(total_TD.dtype)))
    return total_TD


@one_pass
def _sum_of_slots(
    y_ND: Tensor, rows_TA: Tensor, weights_TA: Tensor, product: torch.dtype, total: torch.dtype
) -> Tensor:
    """The same, where both roundings are dtypes: the products in one, the sums in the other."""
    sum_TD = y_ND.new_zeros(len(rows_TA), y_ND.shape[1], dtype=total)
    for a in range(rows_TA.shape[1]):
        y_TD, weight_T1 = y_ND[rows_TA[:, a]], weights_TA[:, a, None]
        wide = torch.promote_types(weight_T1.dtype, product)  # never narrower: fp32 products may be stored in bf16
        term_TD = (weight_T1.to(wide) * y_TD).to(product)
        sum_TD = (sum_TD + term_TD).to(total)
    return sum_TD


def _product(name: str, a: Tensor, b: Tensor) -> Tensor:
    """As `ops.multiply`, without the tap."""
    return _rounded(name, one_wide(name, a, b) * b)


def _silu(x: Tensor) -> Tensor:
    return _rounded("moe_expert_silu", F.silu(x.to(accumulation_dtype("moe_expert_silu", x))))


def _rounded(name: str, x: Tensor) -> Tensor:
    """As the table rounds at a tap of that name. No tap: these values belong to many experts."""
    return arithmetic.current().round(name, x)
