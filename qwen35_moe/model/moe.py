"""Mixture of experts with a shared expert, unfused and fused.

Unfused:  y = sum_a w_a expert_{id_a}(x) + sigmoid(gate . x) shared_expert(x)
Fused:    the shared expert is expert number E of E + 1, appended to every token's list with weight sigmoid(gate . x).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import Qwen35Error
from ..numerics import arithmetics as arithmetic
from ..numerics.taps import scope, tap
from .config import Config
from .ops import Linear, add, apply, linear, multiply, promote
from .router import append_shared, route, shared_gate


class ExpertOutput(NamedTuple):
    """The output of one expert. Row n belongs to token token_N[n], whose list has the expert at slot slot_N[n]."""

    expert: int
    token_N: Tensor
    slot_N: Tensor
    y_ND: Tensor


class Experts(nn.Module):
    """The experts of a layer. A subclass says where their weights are.

    count: the number of experts, including a fused shared expert. intermediate: F, the width of an expert.
    quantised: engines quantise the inputs of these experts as well; then the taps `moe_a1` and `moe_a2` exist.
    """

    def __init__(self, count: int, intermediate: int, quantised: bool = False):
        super().__init__()
        self.count, self.intermediate, self.quantised = count, intermediate, quantised

    def at(self, e: int) -> tuple[Tensor, Tensor]:
        """(gate_up [2F, D], down [D, F]) of expert e. They are valid until the same thread asks for the next expert.
        gate_up has F rows of gate, then F rows of up."""
        raise NotImplementedError

    def combine(self, x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
        """sum_a weights_a expert_{ids_a}(x).  -> [T, D]. Each chosen expert runs once, on all its tokens."""
        x_TD = tap("moe_a1", x_TD) if self.quantised else x_TD
        return add_up(self.outputs(x_TD, ids_TA), x_TD, weights_TA)

    def outputs(self, x_TD: Tensor, ids_TA: Tensor) -> Iterator[ExpertOutput]:
        """The outputs of all chosen experts, in ascending order of their ids."""
        for e, token_N, slot_N in hit_experts(ids_TA, self.count):
            with scope(expert=e):
                y_ND = expert(x_TD[token_N], *self.at(e), self.quantised)
            yield ExpertOutput(e, token_N, slot_N, y_ND)


class DecodedExperts(Experts):
    """Experts in memory, in the layout of the hub's BF16 checkpoints: gate_up [E, 2F, D] and down [E, D, F]."""

    def __init__(self, gate_up: Tensor, down: Tensor, quantised: bool = False):
        super().__init__(down.shape[0], down.shape[2], quantised)
        self.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
        self.down_proj = nn.Parameter(down, requires_grad=False)

    def at(self, e: int) -> tuple[Tensor, Tensor]:
        return self.gate_up_proj[e], self.down_proj[e]


def expert(x_ND: Tensor, gate_up_2FD: Tensor, down_DF: Tensor, quantised: bool = False) -> Tensor:
    """down (silu(gate x) * up x).  x [N, D] -> [N, D]."""
    gate, up = linear("moe_expert_gate_up", x_ND, gate_up_2FD).chunk(2, -1)
    act = multiply("moe_expert_act", apply("moe_expert_silu", F.silu, gate), up)
    return linear("moe_expert_down", tap("moe_a2", act) if quantised else act, down_DF)


def hit_experts(ids_TA: Tensor, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens [N], its slot in each token's list [N]), in ascending order. Error: an id beyond `count`."""
    pairs = ids_TA.flatten().argsort(stable=True)  # (token, slot) as token * A + slot, grouped by expert
    counts = ids_TA.flatten().bincount(minlength=count).tolist()
    if len(counts) > count:
        raise Qwen35Error("no such expert", where="moe_topk_ids", expected=f"< {count}", found=len(counts) - 1)
    hit = [e for e, tokens in enumerate(counts) if tokens]
    for e, pair_N in zip(hit, pairs.split([counts[e] for e in hit]), strict=True):
        yield e, pair_N // ids_TA.shape[1], pair_N % ids_TA.shape[1]


def add_up(outputs: Iterable[ExpertOutput], x_TD: Tensor, weights_TA: Tensor) -> Tensor:
    """The weighted sum of all outputs for each token.  -> [T, D]

    The switch `moe_sum_order` says in which order a token's outputs are added; `moe_partial_sum` rounds each step.
    """
    order = arithmetic.current().switch("moe_sum_order")
    total_TD, weights_TA = promote(torch.zeros_like(x_TD)), promote(weights_TA)
    if order == "expert":
        for e, token_N, slot_N, y_ND in outputs:
            with scope(index=e):
                total_TD[token_N] = add_weighted(total_TD[token_N], weights_TA[token_N, slot_N, None], y_ND)
        return total_TD
    y_TAD = promote(x_TD.new_empty(*weights_TA.shape, x_TD.shape[1]))
    for _, token_N, slot_N, y_ND in outputs:
        y_TAD[token_N, slot_N] = promote(y_ND)
    slots, weighted_TD = range(weights_TA.shape[1]), []
    for a in reversed(slots) if order == "slot-reversed" else slots:
        with scope(index=a):
            if order == "torch.sum":
                weighted_TD.append(promote(tap("moe_expert_weighted", weights_TA[:, a, None] * y_TAD[:, a])))
            else:
                total_TD = add_weighted(total_TD, weights_TA[:, a, None], y_TAD[:, a])
    return promote(tap("moe_partial_sum", torch.stack(weighted_TD, 1).sum(1))) if weighted_TD else total_TD


def add_weighted(total_ND: Tensor, weight_N1: Tensor, y_ND: Tensor) -> Tensor:
    """total + weight * y: one step of the running sum."""
    if arithmetic.current().switch("moe_weight") == "fma":  # the product of fp32 and bf16 is exact in float64
        total_ND = (total_ND.double() + weight_N1.double() * y_ND.double()).to(total_ND.dtype)
    else:
        total_ND = total_ND + promote(tap("moe_expert_weighted", weight_N1 * promote(y_ND)))
    return promote(tap("moe_partial_sum", total_ND))


class MLP(nn.Module):
    """The shared expert as a network of its own."""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.quantised = False
        self.gate_proj = Linear(hidden, intermediate)
        self.up_proj = Linear(hidden, intermediate)
        self.down_proj = Linear(intermediate, hidden)

    def forward(self, x_TD: Tensor) -> Tensor:
        x_TD = tap("moe_shared_a1", x_TD) if self.quantised else x_TD
        gate = apply("moe_shared_silu", F.silu, self.gate_proj("moe_shared_gate_proj", x_TD))
        up = self.up_proj("moe_shared_up_proj", x_TD)
        act = multiply("moe_shared_act", gate, up)
        return self.down_proj("moe_shared_output", tap("moe_shared_a2", act) if self.quantised else act)


class MoE(nn.Module):
    """`mlp`. fused: the shared expert is slot E of `experts`. Otherwise it stands beside them."""

    def __init__(self, config: Config, fused: bool = False):
        super().__init__()
        D, E, F = config.hidden_size, config.num_experts, config.moe_intermediate_size
        self.top_k, self.renormalise, self.routed = config.num_experts_per_tok, config.norm_topk_prob, E
        self.fused = fused
        if fused and config.shared_expert_intermediate_size != F:
            where, expected = "config.json: shared_expert_intermediate_size", f"moe_intermediate_size = {F}"
            found, do = config.shared_expert_intermediate_size, 'load with shared_expert="unfused"'
            raise Qwen35Error("the shared expert cannot be fused", where=where, expected=expected, found=found, do=do)
        self.gate = Linear(D, E)
        self.experts: Experts = DecodedExperts(torch.empty(E + fused, 2 * F, D), torch.empty(E + fused, D, F))
        self.shared_expert = None if fused else MLP(D, config.shared_expert_intermediate_size)
        self.shared_expert_gate = Linear(D, 1)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_TD = x_BTD.flatten(0, 1)
        ids_TA, weights_TA = route(x_TD, self.gate.weight, self.top_k, self.renormalise)
        gate_T1 = shared_gate(x_TD, self.shared_expert_gate.weight)
        if self.shared_expert is None:
            ids_TX, weights_TX = append_shared(ids_TA, weights_TA, gate_T1, self.routed)
            return tap("mlp_output", self.experts.combine(x_TD, ids_TX, weights_TX)).view_as(x_BTD)
        routed_TD = tap("moe_routed_output", self.experts.combine(x_TD, ids_TA, weights_TA))
        shared_TD = multiply("moe_shared_gated", gate_T1, self.shared_expert(x_TD))
        return add("mlp_output", routed_TD, shared_TD).view_as(x_BTD)
