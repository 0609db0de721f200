"""Which experts a kernel chose, and with what weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..model.router import route
from ..numerics.arithmetics import Arithmetic, get
from ..numerics.taps import REPLAY, FunctionHandler, Handler, Site, attach
from ..oracle.judge.envelope import envelope
from ..oracle.judge.routing import Flip, compare_ids
from .case import Case, Compute, Inputs, Outputs, WrongKernel, narrowed, widened
from .judging import Check, announce, check_legal, require

TOPK_IDS, TOPK_WEIGHTS, ROUTER_LOGITS = "moe_topk_ids", "moe_topk_weights", "moe_router_logits"


class ReplayIds(Handler):
    """Puts given ids in the place of the router's own."""

    stage = REPLAY

    def __init__(self, ids: Tensor):
        self.ids = ids

    def __call__(self, site: Site, x: Tensor) -> Tensor | None:
        return self.ids if site.name == TOPK_IDS else None


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
    exact, *members = (_logits(case, table, inputs) for table, inputs in _runs(case))
    delta = envelope(exact, members, torch.bfloat16).max
    truth = exact.sort(dim=-1, descending=True, stable=True).indices[:, :A]
    routing = compare_ids(truth, ids, exact, delta)
    check = Check(case.name, TOPK_IDS, "bit-equal" if not routing.flips else "within rounding", rows=0)
    if routing.nonsense:
        check.verdict, check.ratio = "wrong", float("inf")
        note = f"{routing.nonsense} of {routing.tokens} rows with an id twice or out of range"
        check.note = f"{note}, first row {routing.senseless}: {ids[routing.senseless or 0].tolist()}"
        return announce([check])
    if routing.flips:
        worst = max(routing.flips, key=lambda flip: flip.margin - flip.noise)
        check.ratio = worst.margin / worst.noise if worst.noise else float("inf")
        check.row, check.note = (worst.row,), _words(routing.illegal, len(routing.flips), worst)
        check.verdict = "wrong" if routing.illegal else "within rounding"
    return [*announce([check]), *check_legal([weights], weights_case(case, ids))]


def assert_routing(ids: Tensor, weights: Tensor, case: Case) -> None:
    """`check_routing` as an assertion."""
    require(check_routing(ids, weights, case))


def _words(illegal: list[Flip], flips: int, worst: Flip) -> str:
    text = f"{len(illegal)} choices beyond the noise of the logits, {flips - len(illegal)} legal flips; worst row "
    return text + (f"{worst.row}: {list(worst.won)} chosen, expected {list(worst.lost)}, margin {worst.margin:.3g}, "
                   f"noise {worst.noise:.3g}")  # fmt: skip


def _runs(case: Case) -> Iterator[tuple[Arithmetic, Inputs]]:
    inputs = {name: case[name] for name in ("x", "router")}
    yield get("exact"), widened(inputs)
    for table in case.legal():
        yield table, narrowed(inputs)


def _logits(case: Case, table: Arithmetic, inputs: Inputs) -> Tensor:
    """The router's logits as the table stores them."""
    kept: list[Tensor] = []

    def keep(site: Site, x: Tensor) -> None:
        if site.name == ROUTER_LOGITS:
            kept.append(x)

    case.run(
        table, inputs, lambda i: {TOPK_WEIGHTS: route(i["x"], i["router"], case.top_k)[1]}, [FunctionHandler(keep)]
    )
    return kept[0]


def weights_case(case: Case, ids: Tensor) -> Case:
    """The weights of these ids: p at the ids, divided by their sum."""
    A = case.top_k

    def compute(i: Inputs) -> Outputs:
        with attach(ReplayIds(i["ids"])):
            return {TOPK_WEIGHTS: route(i["x"], i["router"], A)[1]}

    def by(probabilities: Callable[[Tensor, Tensor], Tensor]) -> Compute:
        return lambda i: {TOPK_WEIGHTS: probabilities(i["x"] @ i["router"].T, i["ids"])}

    def softmax(logits: Tensor, ids: Tensor) -> Tensor:
        return logits.softmax(-1).gather(-1, ids)

    def sigmoid(logits: Tensor, ids: Tensor) -> Tensor:
        p = logits.sigmoid().gather(-1, ids)
        return p / p.sum(-1, keepdim=True)

    wrong = (
        WrongKernel("routing weights not renormalised", compute=by(softmax)),
        WrongKernel("sigmoid for softmax", compute=by(sigmoid)),
        WrongKernel("weights in another order than ids", outputs=lambda o, i: {TOPK_WEIGHTS: o[TOPK_WEIGHTS].flip(1)}),
        WrongKernel("routing weights times 2.5", outputs=lambda o, i: {TOPK_WEIGHTS: 2.5 * o[TOPK_WEIGHTS]}),
        WrongKernel("all weights equal", outputs=lambda o, i: {TOPK_WEIGHTS: torch.full_like(o[TOPK_WEIGHTS], 1 / A)}),
    )
    inputs = {"x": case["x"], "router": case["router"], "ids": ids}
    return Case(
        case.name, (TOPK_WEIGHTS,), lambda: inputs, compute, wrong=wrong, rowwise=("x", "ids"), config=case.config
    )
