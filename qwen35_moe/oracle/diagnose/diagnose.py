"""Which known bug is it? Each hypothesis of the catalogue is run on the guilty block's own input.

What a hypothesis explains is the share of the squared error that goes away when its output stands in for the truth,
1 - |engine - broken truth|^2 / |engine - truth|^2, each row in units of its own size, so that no row that explodes
outweighs the others. That ranks. It does not decide: an answer is named only if what it leaves is rounding, row by row,
by the same ratio and limit as the verdict (with the fault planted in every arithmetic of the envelope). Else the bug is
"unknown", however much a neighbour of it in the catalogue may explain.

Scales of the MoE block's parts are solved for: engine = a R + b gS + c S, by least squares, with R the routed sum, S
the shared expert's output and g its gate (of the stream after the block: what was added to it). They must leave no more
than rounding, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from .guilty import GuiltyTap
from .other_experts import OTHERS, solved
from .rank_shares import blame, faults_of_sums
from .steps import EXPLAINED, hypotheses, in_engine_steps
from .vision_faults import ANGLES

WORTH, TRIES = 0.4, 3  # hypotheses that explain less are not looked at closely, nor more than so many
WORTH_OF_ROUNDING = 0.2  # the same of a coarser format: legal rounding makes much of that error
NEARLY = 0.05  # a bug of the catalogue that explains so much less than experts that were solved for comes before them
OUTPUT = {"mlp": "mlp_output", "gdn": "attn_output", "attn": "attn_output"}
DIAGNOSED = (*OUTPUT, "input_layernorm", "post_attention_layernorm", "final_norm", "stream", "mtp", "vision")
MLP_PARTS = ("moe_routed_output", "moe_shared_gated", "moe_shared_output")
HOLD_MLP = ("mlp_output", "layer_input", "layer_output_sum")


def explain(rerun: Rerun, layer: int | None, bad: Sequence[Record], work: Any, seen: Sequence[Taps]) -> Diagnosis:
    """Why the first of the bad records of a layer is bad."""
    order = {key: i for i, key in enumerate(seen[0])}
    bad = sorted(bad, key=lambda r: order.get(r.key, len(order)))
    first = bad[0]
    if (known := known_at_sight(layer, first)) is not None:
        return known
    output = f"layers.{layer}.{OUTPUT.get(first.block, '')}"
    key = next((r.key for r in bad if r.key == output), first.key)
    if base_name(key) == "moe_topk_ids":
        key = next((r.key for r in bad if r.key != key), key)
    if key == "rope_cos":  # a small angle is lost in the rounding of its cosine, not of its sine
        key = next((r.key for r in bad if r.key == "rope_sin"), key)
    last = rerun.config.num_hidden_layers - 1
    if layer is None and {i for i, _ in first.suspects} == {last, None}:
        places = first.suspects  # of the last layer, whose output no next one's input shows
    else:
        places = [place for place in first.suspects if place[0] == layer] or [(layer, first.block)]
    if sees := layer is None and not rerun.after_layers and rerun.tokens.images is not None:
        places = [(None, "vision")]
    blocks = [block for _, block in places]
    where = span(places) if layer is None else " to ".join(dict.fromkeys((blocks[0], blocks[-1])))
    if (
        work.alignment.pair(key).engine is None
        or base_name(key) == "moe_topk_ids"
        or not {first.block, *blocks} & {*DIAGNOSED}
    ):
        return Diagnosis(layer, where, first.key, [], False, note="nothing that can be recomputed was captured")
    case = GuiltyTap(key, work.alignment.pair(key), work, seen[0][key])
    if not case.used.any():  # another tap of the block may have kept something, as states of other heads do
        key = first.key
        case = GuiltyTap(key, work.alignment.pair(key), work, seen[0][key])
    if not case.used.any():
        return Diagnosis(layer, where, key, [], False, note="every number of it is NaN or infinity")
    case.blamed = blame(first.key, work, rerun, layer, seen)
    bad_rows = {} if sees else case.first_bad(seen[1:])
    tried = _tried(rerun, layer, places, case, seen, bad_rows)
    diagnosis = Diagnosis(layer, first.block, key, [h for h, *_ in tried], False)
    return _named(diagnosis, tried, first, case, rerun, where, sees)


Tried = list[tuple[Hypothesis, int | None, Fault, int]]  # with the layer, and the expert where it is a fault of one


def _tried(
    rerun: Rerun, layer: int | None, places: Sequence[BlockId], case: GuiltyTap, seen: Sequence[Taps],
    bad_rows: Mapping[int, int],
) -> Tried:  # fmt: skip
    """What each fault that may be at work there explains of the error, the best first."""
    tried: Tried = []
    table = rerun.tables[0]
    for at, fault, expert in _candidates(rerun, places, table.name, case, seen, bad_rows, tried):
        taps = rerun.fault(at, fault, table, 0, expert, to_head=layer is None)
        if case.key in taps:
            name = f"{fault.name} (expert {expert})" if fault.single else fault.name
            share = case.explains(case.rows(taps[case.key]))
            tried.append((Hypothesis(name, share, fault.seen, fault.doc, fault.where), at, fault, expert))
    return sorted(tried, key=lambda one: (one[0].name == OTHERS) * NEARLY - one[0].explains)


def _named(
    diagnosis: Diagnosis, tried: Tried, first: Record, case: GuiltyTap, rerun: Rerun, where: str, sees: bool
) -> Diagnosis:
    """The diagnosis, with the fault that is the answer, if one is: it leaves no more than rounding. where: the block in
    words, without an answer; sees: it is the vision tower."""
    layer, limit = diagnosis.layer, case.work.limit
    diagnosis.note = "" if case.blamed is None else str(case.blamed)
    if case.blamed is not None and case.blamed.reduced:
        diagnosis.hypotheses.insert(0, Hypothesis(diagnosis.note, 1.0, "", "it goes on with its own share of the sum"))
        diagnosis.named, diagnosis.note = True, ""
        return diagnosis
    if first.note == BF16_GRID:
        diagnosis.hypotheses.sort(key=lambda h: h.name != "state in bf16")
        diagnosis.named, diagnosis.note = True, BF16_GRID
        return diagnosis
    answer = None
    for hypothesis, at, fault, expert in tried[:TRIES]:
        worth = WORTH_OF_ROUNDING if fault.rounds else WORTH
        for way in in_engine_steps(fault, rerun, case.work.alignment) if hypothesis.explains > worth else ():

            def run(i: int, table: Arithmetic, at: Any = at, fault: Fault = way, expert: int = expert) -> Tensor:
                return case.rows(rerun.fault(at, fault, table, i, expert, to_head=layer is None)[case.key])

            if answer is None and case.settled(run, rerun.tables) <= limit:
                answer = hypothesis
    if layer is not None and base_name(case.key) in HOLD_MLP:
        fitted, leaves = _fit(diagnosis, case, rerun, layer)
        in_all_rows = first.by_rows <= limit  # and in none alone: see patterns.py
        if answer is None and (fitted.explains > WORTH or in_all_rows) and leaves <= limit:
            answer = fitted
            diagnosis.hypotheses.append(fitted)
    diagnosis.hypotheses.sort(key=lambda h: (h is not answer, -h.explains))
    diagnosis.named = answer is not None
    diagnosis.note = "" if diagnosis.named else diagnosis.note
    own = (layer, where if answer is None else "mlp")
    found = ((at, fault.block) for hypothesis, at, fault, _ in tried if hypothesis is answer)
    diagnosis.layer, diagnosis.block = (None, first.block.replace("stream", "images")) if sees else next(found, own)
    return diagnosis


def _candidates(
    rerun: Rerun, places: Sequence[BlockId], truth: str, case: GuiltyTap, seen: Sequence[Taps], bad: Mapping[int, int],
    tried: Tried,
) -> Iterator[tuple[int | None, Fault, int]]:  # fmt: skip
    """The faults of the blocks that are suspect, with their layer, and the experts that a fault of one could be of;
    then those of the steps at which the sequences begin to go wrong (`bad`)."""
    catalogue = (*FAULTS, *ANGLES) if case.key.startswith("rope_") else FAULTS
    for at, fault in ((at, fault) for at, block in places for fault in catalogue if fault.block == block):
        if fault.rare and _best_of(tried) > EXPLAINED:
            continue
        if at is None or fault.applies(rerun.source, at, "a4" in truth, rerun.tokens.images is not None):
            suspects = _suspects(case, f"layers.{at}.moe_topk_ids", rerun, seen) if fault.single else [0]
            yield from ((at, fault, expert) for expert in suspects)
    for at, block in places:
        if at is not None and block == "mlp":
            sources = case.work.alignment.dump.sources.get(f"layers.{at}.mlp_output", {})
            ids, error_T = _ids(case, f"layers.{at}.moe_topk_ids", rerun, seen), case.error.square().sum(1)
            for fault in faults_of_sums(sources, case.blamed, error_T, ids, rerun.config.num_experts):
                yield at, fault, 0
            for fault in solved(case, rerun, at, seen[0], ids):
                yield at, fault, 0
        if at is not None or block == "mtp":
            best = partial(_best_of, tried)
            yield from ((at, fault, 0) for fault in hypotheses(rerun, at, block, case.work.alignment, bad, best))


def _best_of(tried: Tried) -> float:
    return max((hypothesis.explains for hypothesis, *_ in tried), default=0.0)


def _suspects(case: GuiltyTap, ids_key: str, rerun: Rerun, seen: Sequence[Taps]) -> list[int]:
    """Experts whose tokens hold nearly all of the error, those with the fewest tokens first."""
    ids, energy = _ids(case, ids_key, rerun, seen), case.error.square().sum(1)
    found = []
    for e in ids.unique().tolist():
        hit = (ids == e).any(1)
        if energy[hit].sum() >= 0.95 * energy.sum():
            found.append((int(hit.sum()), e))
    return [e for _, e in sorted(found)[:3]]


def _ids(case: GuiltyTap, ids_key: str, rerun: Rerun, seen: Sequence[Taps]) -> Tensor:
    """The experts of each row that is used: the engine's, or the truth's."""
    alignment = case.work.alignment
    ids = alignment.pair(ids_key).engine if ids_key in alignment.keys else None
    if ids is None or len(ids) != len(case.used):
        chosen = seen[0].get(ids_key, rerun.chosen)
        assert chosen is not None  # a layer has run
        ids = case.of_all(chosen)
    return ids[case.used].long()


def _fit(diagnosis: Diagnosis, case: GuiltyTap, rerun: Rerun, layer: int) -> tuple[Hypothesis, float]:
    """Fit engine = rest + a R + b gS + c S, rows in units of their size. Returns the hypothesis that fits, and the
    ratio that it leaves: the best single factor, or all three factors if none alone is enough."""
    names = [f"layers.{layer}.{name}" for name in MLP_PARTS]

    def parts(i: int, table: Arithmetic) -> list[Tensor]:
        taps = rerun.run_layer(layer, table, rerun.streams[i], fused=False)[0]
        r, gs, s = (case.rows(taps[name]) for name in names)
        return [case.rows(taps[case.key]) - r - gs, r, gs, s]

    rest, R, gS, S = parts(0, rerun.tables[0])

    def fit(base: Tensor, *columns: Tensor) -> tuple[list[float], float]:
        flat = [(x / case.size[:, None]).flatten() for x in (case.engine - base, *columns)]
        y, matrix = flat[0], torch.stack(flat[1:], 1)
        solution = torch.linalg.lstsq(matrix, y[:, None]).solution.flatten()
        return solution.tolist(), float((y - matrix @ solution).norm())

    abc, left = fit(rest, R, gS, S)
    diagnosis.fit, diagnosis.fit_left = (
        (abc[0], abc[1], abc[2]),
        (left / float((case.error / case.size[:, None]).norm())) ** 2,
    )
    one = {
        "shared expert times": fit(rest + R, gS),
        "routed experts times": fit(rest + gS, R),
        "whole block times": fit(rest, R + gS),
    }
    best = min(one, key=lambda n: one[n][1])
    x = one[best][0][0]
    weights = {"shared": (1.0, x, 0.0), "routed": (x, 1.0, 0.0), "whole": (x, x, 0.0)}[best.split()[0]]

    def settled(a: float, b: float, c: float, name: str) -> tuple[Hypothesis, float]:
        def run(i: int, table: Arithmetic) -> Tensor:
            other, r, gs, s = (rest, R, gS, S) if i == 0 else parts(i, table)
            return other + a * r + b * gs + c * s

        return Hypothesis(name, case.explains(run(0, rerun.tables[0])), "", "least squares"), case.settled(
            run, rerun.tables
        )

    found = settled(*weights, f"{best} {_number(x)}")
    if found[1] <= case.work.limit:
        return found
    a, b, c = abc
    return settled(a, b, c, f"routed x {_number(a)}, gated shared x {_number(b)}, ungated shared x {_number(c)}")


def _number(x: float) -> str:
    return f"{x if abs(x) >= 0.0005 else 0:.3g}"
