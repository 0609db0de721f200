"""Which experts a kernel chose, and with what weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..model.ops import linear
from ..model.router import route
from ..numerics.taps import attach
from ..oracle.judge.envelope import envelope
from ..oracle.judge.replay import ReplayRouting
from ..oracle.judge.routing import compare_ids
from .case import Case, Inputs, Outputs, known, out
from .checks import Check, announce, assertion, check_legal, wrong_check
from .moe import TOPK_WEIGHTS

TOPK_IDS, ROUTER_LOGITS = "moe_topk_ids", "moe_router_logits"


def check_routing(ids: Tensor, weights: Tensor, case: Case) -> list[Check]:
    """Ids [T, A] and weights [T, A] of a router, in any order, against a case with `x` and `router`.

    Another choice of an expert is legal if the truth's logits of the two experts are closer than the noise of legal
    roundings. Weights are judged for the experts that the kernel chose. A further column (a fused shared expert) is not
    judged here; see `append_case`.
    """
    if "router" not in case:
        raise Qwen35Error("the case has no router", where=case.name, expected="router_case or moe_case")
    A = case.top_k
    ids, weights = ids.detach().cpu()[:, :A].long(), weights.detach().cpu()[:, :A]
    inputs = {"x": case["x"], "router": case["router"]}
    logits = replace(case, make=lambda: inputs, outputs=(ROUTER_LOGITS,),
                     compute=lambda i: {ROUTER_LOGITS: linear(ROUTER_LOGITS, i["x"], i["router"])})  # fmt: skip
    exact = logits.truth[ROUTER_LOGITS]
    delta = envelope(exact, [member[ROUTER_LOGITS] for member in logits.members], torch.bfloat16).max
    routing = compare_ids(exact.sort(dim=-1, descending=True, stable=True).indices[:, :A], ids, exact, delta)
    if routing.nonsense:
        note = f"{routing.nonsense} of {routing.tokens} rows with an id twice or out of range, first row "
        note += f"{routing.senseless}: {ids[routing.senseless or 0].tolist()}"
        return announce(wrong_check(case.name, TOPK_IDS, note))
    check = Check(case.name, TOPK_IDS, "bit-equal")
    if routing.flips:
        worst = max(routing.flips, key=lambda flip: flip.margin - flip.noise)
        check.ratio = worst.margin / worst.noise if worst.noise else float("inf")
        check.verdict, check.row = "wrong" if routing.illegal else "within rounding", (worst.row,)
        check.note = (
            f"{len(routing.illegal)} choices beyond the noise of the logits, "
            f"{len(routing.flips) - len(routing.illegal)} legal flips; worst row {worst.row}: "
            f"{list(worst.won)} chosen, expected {list(worst.lost)}, margin {worst.margin:.3g}, noise {worst.noise:.3g}"
        )
    return [*announce(check), *check_legal([weights], weights_case(case, ids))]


assert_routing = assertion(check_routing)


def weights_case(case: Case, ids: Tensor) -> Case:
    """The weights of these ids: p at the ids, divided by their sum."""

    def compute(i: Inputs) -> Outputs:
        with attach(ReplayRouting({f"layers.0.{TOPK_IDS}": i["ids"]})):
            return {TOPK_WEIGHTS: route(i["x"], i["router"], case.top_k)[1]}

    def sigmoid(_: Tensor, i: Inputs) -> Tensor:
        p = (i["x"] @ i["router"].T).sigmoid().gather(-1, i["ids"])
        return p / p.sum(-1, keepdim=True)

    wrong = known("routing weights not renormalised") | {
        "sigmoid for softmax": out(TOPK_WEIGHTS, sigmoid),
        "weights in another order than ids": out(TOPK_WEIGHTS, lambda w, _: w.flip(1)),
        "routing weights times 2.5": out(TOPK_WEIGHTS, lambda w, _: 2.5 * w),
        "all weights equal": out(TOPK_WEIGHTS, lambda w, _: torch.full_like(w, 1 / case.top_k)),
    }
    inputs = {"x": case["x"], "router": case["router"], "ids": ids}
    return Case(case.name, (TOPK_WEIGHTS,), lambda: inputs, compute, wrong, ("x", "ids"), config=case.config)
