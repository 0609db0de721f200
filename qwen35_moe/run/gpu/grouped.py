"""All experts of a layer in a few products, for GPUs: what `model.moe` computes expert by expert.

Rows are sorted by expert on the device, both products are grouped matrix products over contiguous rows, and each
token's slots are added in the order that the table asks for. In bf16 nothing waits for the device, so that a forward
pass can be captured as a graph.

Two runs on one GPU give the same bits: there are no atomics, every element is written once, and sorts are stable. What
may change bits is what chooses among a library's kernels: another card, driver or torch; other lengths, batch sizes or
capacities of a cache; several streams at once, which share cuBLAS's workspace unless CUBLAS_WORKSPACE_CONFIG says so.
torch lists two of the operations used here, `cumsum` and `index_put`, as not deterministic. Here the sums stay within
one block, and no index occurs twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ...model.ops import accumulation_dtype, one_wide, promote
from ...numerics import arithmetics as arithmetic

PADDED_ROWS = 1 << 15  # of one product of all experts: fewer rows cost less than the calls of single products


def add_in_order(y_ND: Tensor, ids_TA: Tensor, rows_TA: Tensor, weights_TA: Tensor) -> Tensor:
    """sum_a weights_a y[rows_a] in the order that the switch `moe_sum_order` says.  -> [T, D]"""
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


def has_grouped_mm(dtype: torch.dtype, device: torch.device, columns: int = 8) -> bool:
    """PyTorch's grouped product has bf16 operands and result, fp32 sums, and rows of whole 16 bytes.

    On a CPU the loop is as fast.
    """
    return dtype == torch.bfloat16 and device.type == "cuda" and columns % 8 == 0


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
        y_NO = _grouped_mm(x_NI, weight_EOI.mT, offs=ends_E)
    else:
        y_NO = looped_linear(x_NI.to(dtype), weight_EOI, ends_E)
    return _rounded(name, y_NO)


def looped_linear(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Rows ends[e-1] .. ends[e] of x times weight[e]^T in the dtype of x, one product each; on a GPU one product of all
    where that is little work. A mode may override it as a whole.  -> [N, O]"""
    if has_torch_function((x_NI,)):
        return handle_torch_function(looped_linear, (x_NI,), x_NI, weight_EOI, ends_E)
    counts = [stop - start for start, stop in pairwise([0, *ends_E.tolist()])]
    if x_NI.is_cuda and max(counts) * len(counts) <= PADDED_ROWS:
        return padded_linear(x_NI, weight_EOI.to(x_NI.dtype), counts)
    y_NO = x_NI.new_empty(len(x_NI), weight_EOI.shape[1])
    for x_nI, y_nO, weight_OI in zip(x_NI.split(counts), y_NO.split(counts), weight_EOI, strict=True):
        if len(x_nI):
            y_nO.copy_(F.linear(x_nI, weight_OI.to(x_NI.dtype)))
    return y_NO


def padded_linear(x_NI: Tensor, weight_EOI: Tensor, counts: Sequence[int]) -> Tensor:
    """The first counts[0] rows of x times weight[0]^T, and so on, as one product of as many rows for each."""
    count_E = torch.tensor(counts, device=x_NI.device)
    expert_N = torch.arange(len(counts), device=x_NI.device).repeat_interleave(count_E, output_size=len(x_NI))
    row_N = torch.arange(len(x_NI), device=x_NI.device) - (count_E.cumsum(0) - count_E)[expert_N]
    padded_EnI = x_NI.new_zeros(len(counts), max(counts), x_NI.shape[1])
    padded_EnI[expert_N, row_N] = x_NI
    return torch.bmm(padded_EnI, weight_EOI.mT)[expert_N, row_N]


# Public since torch 2.10, the same operation under a private name before.
_grouped_mm = vars(F).get("grouped_mm") or torch._grouped_mm


def add_slots(y_ND: Tensor, rows_TA: Tensor, weights_TA: Tensor) -> Tensor:
    """The running sum over slots of weight * y, rounded at `moe_expert_weighted` and `moe_partial_sum`.  -> [T, D]"""
    table = arithmetic.current()
    wide = promote(y_ND[:0]).dtype
    kept = (table.rounding(name) for name in ("moe_expert_weighted", "moe_partial_sum"))
    dtypes = [wide if r is arithmetic.KEEP else r for r in kept if r is arithmetic.KEEP or isinstance(r, torch.dtype)]
    if table.switch("moe_weight") == "product" and len(dtypes) == 2:
        return promote(sum_of_slots(y_ND, rows_TA, weights_TA, *dtypes))
    total_TD = promote(y_ND.new_zeros(len(rows_TA), y_ND.shape[1]))
    for rows_T, weights_T in zip(rows_TA.T, weights_TA.T, strict=True):
        if table.switch("moe_weight") == "fma":  # the product of fp32 and bf16 is exact in float64
            term_TD = weights_T.double()[:, None] * y_ND[rows_T].double()
        else:
            term_TD = _product("moe_expert_weighted", weights_T[:, None], y_ND[rows_T])
        total_TD = promote(_rounded("moe_partial_sum", (total_TD + term_TD).to(total_TD.dtype)))
    return total_TD


def sum_of_slots(y_ND: Tensor, rows_TA: Tensor, weights_TA: Tensor, product: torch.dtype, total: torch.dtype) -> Tensor:
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
