"""Mixture of experts with a shared expert, unfused and fused.

Unfused:  y = sum_a w_a expert_{id_a}(x) + sigmoid(gate . x) shared_expert(x)
Fused:    the shared expert is expert number E of E + 1, appended to every token's list with weight sigmoid(gate . x).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import Qwen35Error
from ..numerics import arithmetics as arithmetic
from ..numerics.taps import scope, tap
from ..run.gpu import grouped
from ..run.side_by_side import side_by_side
from .config import Config
from .ops import Linear, add, apply, linear, multiply, promote
from .router import append_shared, route, shared_gate

# Outputs of an expert, or of all tokens' experts in a slot: its id, or the slot; the tokens [N]; their (token, slot)
# pairs [N], as token * A + slot; the outputs [N, D].
Term = tuple[int, Tensor | slice, Tensor | slice, Tensor]


class ExpertSource(Protocol):
    """Whatever can hand out experts: decoded ones in memory, packed ones decoded when hit, ones still on disk."""

    @property
    def count(self) -> int: ...

    @property
    def intermediate(self) -> int:
        """F, the width of an expert."""

    @property
    def quantised(self) -> bool:
        """Whether engines would quantise the inputs of these experts, too."""

    def at(self, e: int) -> tuple[Tensor, Tensor]:
        """(gate_up [2F, D], down [D, F]) of an expert, until the same thread asks for the next. Rows of gate_up: F of
        gate, then F of up."""


class Experts(nn.Module):
    """Experts in memory, in the layout of the hub's BF16 checkpoints: gate_up [E, 2F, D] and down [E, D, F]."""

    def __init__(self, gate_up: Tensor, down: Tensor, quantised: bool = False):
        super().__init__()
        self.quantised = quantised
        self.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
        self.down_proj = nn.Parameter(down, requires_grad=False)

    @property
    def count(self) -> int:
        return self.gate_up_proj.shape[0]

    @property
    def intermediate(self) -> int:
        return self.down_proj.shape[2]

    def stack(self, which: slice) -> tuple[Tensor, Tensor]:
        """Some of the experts: gate_up [n, 2F, D], down [n, D, F]."""
        return self.gate_up_proj[which], self.down_proj[which]

    def at(self, e: int) -> tuple[Tensor, Tensor]:
        return self.gate_up_proj[e], self.down_proj[e]


def expert(x_ND: Tensor, gate_up_2FD: Tensor, down_DF: Tensor, quantised: bool = False) -> Tensor:
    """down (silu(gate x) * up x).  x [N, D] -> [N, D]."""
    gate, up = linear("moe_expert_gate_up", x_ND, gate_up_2FD).chunk(2, -1)
    act = multiply("moe_expert_act", apply("moe_expert_silu", F.silu, gate), up)
    return linear("moe_expert_down", tap("moe_a2", act) if quantised else act, down_DF)


def combine_experts(x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor, experts: ExpertSource) -> Tensor:
    """sum_a weights_a expert_{ids_a}(x), each hit expert once.  -> [T, D]

    The taps `moe_a1` and `moe_a2`, where engines quantise the inputs of both products, exist for quantised experts.
    The sum runs by expert id or by slot (switch `moe_sum_order`) and rounds each partial sum at `moe_partial_sum`.
    On a GPU all experts are computed at once, unless somebody watches single ones (`grouped.py`).
    """
    table = arithmetic.current()
    if table.for_experts and (other := table.for_experts(len(x_TD), x_TD.shape[1], experts.intermediate)):
        with arithmetic.using(other):
            return combine_experts(x_TD, ids_TA, weights_TA, experts)
    if grouped.applies(experts, x_TD):
        return grouped.combine(x_TD, ids_TA, weights_TA, experts)
    order = table.switch("moe_sum_order")
    terms = _expert_outputs(x_TD, ids_TA, experts)
    terms = terms if order == "expert" else _by_slot(terms, x_TD, ids_TA.shape[1], backwards=order == "slot-reversed")
    total_TD, weighted_TD, by_pair = promote(torch.zeros_like(x_TD)), [], promote(weights_TA).reshape(-1, 1)
    for index, token, pair, y_ND in terms:  # a token meets an expert, or a slot, once
        weight_N1 = by_pair[pair]
        with scope(index=index):
            if order == "torch.sum":
                weighted_TD.append(promote(tap("moe_expert_weighted", weight_N1 * y_ND)))
            else:
                total_TD[token] = _add(total_TD[token], weight_N1, y_ND)
    return promote(tap("moe_partial_sum", torch.stack(weighted_TD, 1).sum(1))) if weighted_TD else total_TD


def _expert_outputs(x_TD: Tensor, ids_TA: Tensor, experts: ExpertSource) -> Iterator[Term]:
    """The outputs of each hit expert, for its tokens.

    On a CPU experts are computed side by side, one after the other where somebody watches single ones.
    """
    x_TD = tap("moe_a1", x_TD) if experts.quantised else x_TD
    pairs = ids_TA.flatten().argsort(stable=True)  # grouped by expert
    counts = ids_TA.flatten().bincount(minlength=experts.count).tolist()
    if len(counts) > experts.count:
        raise Qwen35Error("no such expert", where="moe_topk_ids", expected=f"< {experts.count}", found=len(counts) - 1)
    hit = [e for e, count in enumerate(counts) if count]
    sizes = [counts[e] for e in hit]
    groups = zip(hit, pairs.split(sizes), (pairs // ids_TA.shape[1]).split(sizes), strict=True)

    def compute(group: tuple[int, Tensor, Tensor]) -> Term:
        e, pair, token = group
        with scope(expert=e):
            return e, token, pair, expert(x_TD[token], *experts.at(e), experts.quantised)

    yield from map(compute, groups) if x_TD.is_cuda else side_by_side(compute, groups, one_by_one=grouped.watched())


def _by_slot(terms: Iterable[Term], x_TD: Tensor, A: int, backwards: bool) -> Iterator[Term]:
    """The same outputs, slot by slot: all tokens' first, all tokens' second, ..."""
    y_PD = promote(x_TD.new_empty(len(x_TD) * A, x_TD.shape[1]))
    for _, _, pair, y_ND in terms:
        y_PD[pair] = promote(y_ND)
    for a in reversed(range(A)) if backwards else range(A):
        yield a, slice(None), slice(a, None, A), y_PD[a::A]


def _add(total_ND: Tensor, weight_N1: Tensor, y_ND: Tensor) -> Tensor:
    """total + weight * y, one step of the running sum."""
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
    """`mlp`. `fused` says whether the shared expert is slot E of `experts` or stands beside them."""

    def __init__(self, config: Config, fused: bool = False):
        super().__init__()
        D, E, F = config.hidden_size, config.num_experts, config.moe_intermediate_size
        self.top_k, self.renormalise, self.routed = config.num_experts_per_tok, config.norm_topk_prob, E
        self.fused, self.ep_scale = fused, 1.0
        if fused and config.shared_expert_intermediate_size != F:
            where, expected = "config.json: shared_expert_intermediate_size", f"moe_intermediate_size = {F}"
            found, do = config.shared_expert_intermediate_size, 'load with shared_expert="unfused"'
            raise Qwen35Error("the shared expert cannot be fused", where=where, expected=expected, found=found, do=do)
        self.gate = Linear(D, E)
        self.experts: ExpertSource = Experts(torch.empty(E + fused, 2 * F, D), torch.empty(E + fused, D, F))
        self.shared_expert = None if fused else MLP(D, config.shared_expert_intermediate_size)
        self.shared_expert_gate = Linear(D, 1)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_TD = x_BTD.flatten(0, 1)
        ids_TA, weights_TA = route(x_TD, self.gate.weight, self.top_k, self.renormalise)
        gate_T1 = shared_gate(x_TD, self.shared_expert_gate.weight)
        if self.shared_expert is None:
            ids_TX, weights_TX = append_shared(ids_TA, weights_TA, gate_T1, self.routed, self.ep_scale)
            return tap("mlp_output", combine_experts(x_TD, ids_TX, weights_TX, self.experts)).view_as(x_BTD)
        routed_TD = tap("moe_routed_output", combine_experts(x_TD, ids_TA, weights_TA, self.experts))
        shared_TD = multiply("moe_shared_gated", gate_T1, self.shared_expert(x_TD))
        return add("mlp_output", routed_TD, shared_TD).view_as(x_BTD)


def fuse(
    gate_up: Tensor, down: Tensor, shared_gate: Tensor, shared_up: Tensor, shared_down: Tensor
) -> tuple[Tensor, Tensor]:
    """Appends the shared expert as slot E: [E, 2F, D], [E, D, F] -> [E+1, 2F, D], [E+1, D, F]. Moves bits only."""
    slot = torch.cat((shared_gate, shared_up))
    for name, ours, theirs in (("gate_up_proj", slot, gate_up), ("down_proj", shared_down, down)):
        if ours.shape != theirs.shape[1:] or ours.dtype != theirs.dtype:
            where, expected = f"experts.{name}[{len(theirs)}]", f"{list(theirs.shape[1:])} {theirs.dtype}"
            what, found = "the shared expert does not fit the experts' slot", f"{list(ours.shape)} {ours.dtype}"
            raise Qwen35Error(what, where=where, expected=expected, found=found, do="run unfused")
    return torch.cat((gate_up, slot[None])), torch.cat((down, shared_down[None]))


def unfuse(gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The inverse of `fuse`, bit for bit."""
    shared_gate, shared_up = gate_up[-1].chunk(2)
    return gate_up[:-1], down[:-1], shared_gate, shared_up, down[-1]
