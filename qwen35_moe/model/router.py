"""Which experts a token visits, and with what weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import arithmetics as arithmetic
from ..numerics.taps import tap
from .ops import linear, promote


def route(x_TD: Tensor, weight_ED: Tensor, top_k: int, renormalise: bool = True) -> tuple[Tensor, Tensor]:
    """p = softmax(W x) over all experts; the top_k of them, their p divided by its sum.  -> ids, weights [T, A].

    Ids come in descending order of the logits. Ties happen, because engines rank logits rounded to bf16: the lowest
    id wins, as in SGLang and vLLM. Weights are p at the ids, so that replayed ids get this model's weights.
    """
    logits_TE = linear("moe_router_logits", x_TD, weight_ED)
    p_TE = promote(tap("moe_router_probs", promote(_for_sums(logits_TE)).softmax(-1)))
    if arithmetic.current().switch("moe_ties") == "torch.topk":
        ids_TA = p_TE.topk(top_k, -1).indices
    else:
        ids_TA = logits_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    ids_TA = tap("moe_topk_ids", ids_TA)
    w_TA = promote(tap("moe_topk_probs", p_TE.gather(-1, ids_TA)))
    if renormalise:
        w_TA = w_TA / w_TA.sum(-1, keepdim=True)
    return ids_TA, tap("moe_topk_weights", w_TA)


def shared_gate(x_TD: Tensor, weight_1D: Tensor) -> Tensor:
    """sigmoid(w . x): how much of the shared expert a token gets.  -> [T, 1].

    transformers rounds logit and sigmoid to bf16; SGLang's fused kernels keep both in fp32.
    """
    logit_T1 = linear("moe_shared_gate_logit", _for_sums(x_TD), weight_1D)
    return tap("moe_shared_gate", _for_sums(promote(logit_T1)).sigmoid())


def append_shared(
    ids_TA: Tensor, weights_TA: Tensor, gate_T1: Tensor, slot: int, ep_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The fused path's routing: one more column, last, with id `slot` (= E) and weight gate * ep_scale.  -> [T, A+1].

    The shared weight is never renormalised with the others. Where each of ep_size ranks holds the shared slot and
    their outputs are summed, ep_scale = 1/ep_size keeps it from counting ep_size times (sglang 23084, 26845).
    """
    ids = torch.cat((ids_TA, torch.full_like(ids_TA[:, :1], slot)), -1)
    weights = torch.cat((promote(weights_TA), promote(gate_T1) * ep_scale), -1)
    return tap("moe_slot_ids", ids), tap("moe_slot_weights", weights)


def _for_sums(x: Tensor) -> Tensor:
    """x in the dtype in which softmax and dot products are summed: float64 for the switch value "exact"."""
    return x.double() if arithmetic.current().switch("moe_router_sums") == "exact" else x
