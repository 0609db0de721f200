"""Which known bug is it? Each fault of the catalogue is tried: planted in the block that went wrong first, which runs
on the engine's own input.

A fault explains the share 1 - |engine - faulty|^2 / |engine - truth|^2 of the squared error; `faulty` is what the block
gives with the fault. Each row counts in units of its size, so that no row outweighs the others. The share ranks the
faults. It does not decide: a fault is named only if |engine - faulty| is within rounding, by the ratio and the limit of
the verdict, with an envelope of runs that all have the fault. Otherwise the bug is "unknown", however much a similar
fault explains.

For the MoE block, factors of its parts are tried, too: engine = rest + a R + b gS + c S by least squares. R is the
routed sum, S the shared expert's output, g its gate, and rest what the tap holds beside them (of the stream after the
block: the stream before it). The factors are named by the same rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...numerics.arithmetics import Arithmetic
from ...numerics.tap_keys import base_name
from ..judge.diagnosis import Diagnosis, Hypothesis
from ..judge.records import BF16_GRID, BlockId, Record, span
from ..judge.rerun import Rerun, Taps
from .at_sight import known_at_sight
from .catalogue import FAULTS
from .faults import Fault
from .guilty import OTHERS, GuiltyTap, solved
from .rank_shares import blame, faults_of_sums
from .steps import hypotheses, in_engine_steps
from .vision_faults import ANGLES

WORTH, TRIES = 0.4, 3  # the rule is applied to the best three hypotheses that explain more than this
WORTH_OF_ROUNDING = 0.2  # the same where the fault is a coarser format: legal roundings make much of such an error
EXPLAINED = 0.9  # of the error: no rare fault, and no other step, is tried after that
NEARLY = 0.05  # a fault of the catalogue goes before experts that were solved for, if it explains nearly as much
OUTPUT = {"mlp": "mlp_output", "gdn": "attn_output", "attn": "attn_output"}
DIAGNOSED = (*OUTPUT, "input_layernorm", "post_attention_layernorm", "final_norm", "stream", "mtp", "vision")
MLP_PARTS = ("moe_routed_output", "moe_shared_gated", "moe_shared_output")
HOLD_MLP = ("mlp_output", "layer_input", "layer_output_sum")


def explain(rerun: Rerun, layer: int | None, bad: Sequence[Record], work: Any, seen: Sequence[Taps]) -> Diagnosis:
    """Why a layer went wrong. bad: its bad records; work: the `Judgement`; seen: its taps, one dict a table of rerun,
    the truth's first."""
    order = {key: i for i, key in enumerate(seen[0])}
    bad = sorted(bad, key=lambda r: order.get(r.key, len(order)))
    first = bad[0]
    if (known := known_at_sight(layer, first)) is not None:
        return known
    keys, output = [r.key for r in bad], f"layers.{layer}.{OUTPUT.get(first.block, '')}"
    key = output if output in keys else first.key
    if base_name(key) == "moe_topk_ids":
        key = next((other for other in keys if other != key), key)
    if key == "rope_cos" and "rope_sin" in keys:  # a small angle is lost in the rounding of its cosine
        key = "rope_sin"
    last = rerun.config.num_hidden_layers - 1
    if layer is None and {i for i, _ in first.suspects} == {last, None}:
        places = first.suspects  # of the last layer, whose output no next one's input shows
    else:
        places = [place for place in first.suspects if place[0] == layer] or [(layer, first.block)]
    if sees := layer is None and not rerun.after_layers and rerun.tokens.images is not None:
        places = [(None, "vision")]
    blocks = [block for _, block in places]
    where = span(places) if layer is None else " to ".join(dict.fromkeys((blocks[0], blocks[-1])))
    computed = base_name(key) != "moe_topk_ids" and not {first.block, *blocks}.isdisjoint(DIAGNOSED)
    if not computed or work.alignment.pair(key).engine is None:
        return Diagnosis(layer, where, first.key, [], False, note="nothing that can be recomputed was captured")
    # Where a tap has no finite number, another one of the block may have kept some, as states of other heads do.
    cases = (GuiltyTap(one, work, rerun, layer, seen) for one in (key, first.key))
    case = next((case for case in cases if case.used.any()), None)
    if case is None:
        return Diagnosis(layer, where, first.key, [], False, note="every number of it is NaN or infinity")
    case.blamed = blame(first.key, work, rerun, layer, seen)
    tried = list[Tried]()
    for at, fault, expert in _candidates(case, places, {} if sees else case.first_bad(seen[1:]), tried):
        made = case.output(at, fault, expert, 0, rerun.tables[0])
        if made is not None:
            name = f"{fault.name} (expert {expert})" if fault.single else fault.name
            told = Hypothesis(name, case.explains(made), fault.seen, fault.doc, fault.where)
            tried.append(Tried(told, at, fault, expert))
    tried.sort(key=lambda one: (one.told.name == OTHERS) * NEARLY - one.told.explains)
    diagnosis = Diagnosis(layer, first.block, case.key, [one.told for one in tried], False)
    if case.blamed is not None and case.blamed.reduced:
        rank = Hypothesis(str(case.blamed), 1.0, "", "it goes on with its own share of the sum")
        diagnosis.hypotheses.insert(0, rank)
        diagnosis.named = True
    elif first.note == BF16_GRID:
        diagnosis.hypotheses.sort(key=lambda told: told.name != "state in bf16")
        diagnosis.named, diagnosis.note = True, BF16_GRID
    else:
        answer = _answer(diagnosis, tried, first, case)
        diagnosis.layer, diagnosis.block = (layer, where) if answer is None else (answer.at, answer.fault.block)
        if sees:
            diagnosis.layer, diagnosis.block = None, first.block.replace("stream", "images")
    return diagnosis


@dataclass
class Tried:
    """A fault that was tried, in which layer, on which expert (where it is the fault of one), and what came out."""

    told: Hypothesis
    at: int | None
    fault: Fault
    expert: int = 0

    def leaves_rounding(self, case: GuiltyTap) -> bool:
        """Whether no more than rounding is left of the error."""
        if self.told.explains <= (WORTH_OF_ROUNDING if self.fault.rounds else WORTH):
            return False
        ways = in_engine_steps(self.fault, case.rerun, case.work.alignment)
        return any(case.settled(partial(case.output, self.at, way, self.expert)) <= case.work.limit for way in ways)


def _answer(diagnosis: Diagnosis, tried: Sequence[Tried], first: Record, case: GuiltyTap) -> Tried | None:
    """The hypothesis that leaves no more than rounding, if one does; it moves to the front of the diagnosis."""
    answer = next((one for one in tried[:TRIES] if one.leaves_rounding(case)), None)
    layer, limit = diagnosis.layer, case.work.limit
    if layer is not None and base_name(case.key) in HOLD_MLP:
        fitted, leaves = _fit(diagnosis, case, layer)
        in_all_rows = first.by_rows <= limit  # and in none alone: see patterns.py
        if answer is None and (fitted.explains > WORTH or in_all_rows) and leaves <= limit:
            answer = Tried(fitted, layer, Fault("", "mlp"))
            diagnosis.hypotheses.append(fitted)
    diagnosis.hypotheses.sort(key=lambda told: (answer is None or told is not answer.told, -told.explains))
    diagnosis.named = answer is not None
    diagnosis.note = "" if answer is not None or case.blamed is None else str(case.blamed)
    return answer


def _candidates(
    case: GuiltyTap, places: Sequence[BlockId], bad: Mapping[int, int], tried: Sequence[Tried]
) -> Iterator[tuple[int | None, Fault, int]]:
    """(layer, fault, expert) of all that is to be tried in some blocks (`places`): faults of the catalogue, then those
    that name a rank or experts, then those between steps. bad: sequence -> index of its first bad token. tried: what
    came out so far; the caller appends to it."""
    rerun, alignment = case.rerun, case.work.alignment
    a4, images = "a4" in rerun.tables[0].name, rerun.tokens.images is not None

    def known() -> str:
        best = max((one.told for one in tried), key=lambda told: told.explains, default=None)
        return best.name if best is not None and best.explains > EXPLAINED else ""

    catalogue = (*FAULTS, *ANGLES) if case.key.startswith("rope_") else FAULTS
    for at, fault in ((at, fault) for at, block in places for fault in catalogue if fault.block == block):
        if (at is None or fault.applies(rerun.source, at, a4, images)) and not (fault.rare and known()):
            suspects = case.suspects(at) if fault.single and at is not None else [0]
            yield from ((at, fault, expert) for expert in suspects)
    for at, block in places:
        if at is not None and block == "mlp":
            sources = alignment.dump.sources.get(f"layers.{at}.mlp_output", {})
            sums = faults_of_sums(sources, case.blamed, case.energy, case.ids(at), rerun.config.num_experts)
            yield from ((at, fault, 0) for fault in (*sums, *solved(case, at)))
        if at is not None or block == "mtp":
            yield from ((at, fault, 0) for fault in hypotheses(rerun, at, block, alignment, bad, known))


def _fit(diagnosis: Diagnosis, case: GuiltyTap, layer: int) -> tuple[Hypothesis, float]:
    """Fit a, b and c. Returns the hypothesis of the best single factor, or of all three if that one leaves more than
    rounding; and the ratio that it leaves."""
    rerun = case.rerun

    def parts(i: int, table: Arithmetic) -> list[Tensor]:
        taps = rerun.run_layer(layer, table, rerun.streams[i], fused=False)[0]
        r, gs, s = (case.rows(taps[f"layers.{layer}.{name}"]) for name in MLP_PARTS)
        return [case.rows(taps[case.key]) - r - gs, r, gs, s]

    exact = rest, R, gS, S = parts(0, rerun.tables[0])

    def fit(base: Tensor, *columns: Tensor) -> tuple[list[float], float]:
        flat = [(x / case.size[:, None]).flatten() for x in (case.engine - base, *columns)]
        y, matrix = flat[0], torch.stack(flat[1:], 1)
        solution = torch.linalg.lstsq(matrix, y[:, None]).solution.flatten()
        return solution.tolist(), float((y - matrix @ solution).norm())

    def with_factors(a: float, b: float, c: float, told: str) -> tuple[Hypothesis, float]:
        def run(i: int, table: Arithmetic) -> Tensor:
            other, r, gs, s = exact if i == 0 else parts(i, table)
            return other + a * r + b * gs + c * s

        return Hypothesis(told, case.explains(run(0, rerun.tables[0])), "", "least squares"), case.settled(run)

    (a, b, c), left = fit(rest, R, gS, S)
    diagnosis.fit = (a, b, c)
    diagnosis.fit_left = (left / float((case.error / case.size[:, None]).norm())) ** 2
    singles = (
        (fit(rest + R, gS), "shared expert"),
        (fit(rest + gS, R), "routed experts"),
        (fit(rest, R + gS), "whole block"),
    )
    ((x,), _), name = min(singles, key=lambda one: one[0][1])
    of_routed, of_shared = 1.0 if name == "shared expert" else x, 1.0 if name == "routed experts" else x
    single = with_factors(of_routed, of_shared, 0.0, f"{name} times {_number(x)}")
    if single[1] <= case.work.limit:
        return single
    all_three = f"routed x {_number(a)}, gated shared x {_number(b)}, ungated shared x {_number(c)}"
    return with_factors(a, b, c, all_three)


def _number(x: float) -> str:
    return f"{x if abs(x) >= 0.0005 else 0:.3g}"
