"""Which known bug is it? Each hypothesis of the catalogue is run on the guilty block's own input, and ranked.

What a hypothesis explains is the share of the squared error that goes away when its output stands in for the truth:
1 - |engine - broken truth|^2 / |engine - truth|^2. Rounding noise is never explained, so the share of the right answer
is about 1 - 1 / ratio^2, and an answer that leaves no more than roundings is one even where the error was small. Scales
of the MoE block's parts are solved for directly: engine = a R + b gS + c S, by least squares, with R the routed sum, S
the shared expert's output and g its gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..tap_names import base_name
from .catalogue import FAULTS
from .envelope import LIMIT, envelope
from .faults import Fault
from .records import Diagnosis, Hypothesis, Record
from .rerun import Rerun

# The share that an answer must explain to be named; else it is "unknown". Measured by `qwen35-moe mutants`.
ENOUGH = 0.8
OUTPUT = {"mlp": "mlp_output", "gdn": "attn_output", "attn": "attn_output"}
DIAGNOSED = (*OUTPUT, "input_layernorm", "post_attention_layernorm", "final_norm", "stream")
# Where the output of a norm was not captured, the block that follows starts before it.
BEFORE = {
    "mlp": ("post_attention_layernorm", "pre_mlp_layernorm_output"),
    "gdn": ("input_layernorm", "input_layernorm"),
    "attn": ("input_layernorm", "input_layernorm"),
}


# A state rounded at every token errs no more than its inputs' roundings do, until hundreds of tokens have gone by; but
# its digits show it.
BF16_GRID = "all its values are bf16, where every legal arithmetic keeps more digits"


def diagnose(
    rerun: Rerun,
    layer: int | None,
    bad: Sequence[Record],
    work: Any,
    seen: Sequence[dict[str, Tensor]],
    faults: Sequence[Fault] = FAULTS,
) -> Diagnosis:
    """Why the first of the bad records of a layer is bad."""
    first = bad[0]
    output = f"layers.{layer}.{OUTPUT.get(first.block, '')}"
    key = next((r.key for r in bad if r.key == output), first.key)
    if base_name(key) == "moe_topk_ids":
        key = next((r.key for r in bad if r.key != key), key)
    pair = work.alignment.pair(key)
    if pair.engine is None or base_name(key) == "moe_topk_ids" or first.block not in DIAGNOSED:
        return Diagnosis(layer, first.block, first.key, [], False, note="nothing that can be recomputed was captured")
    truth, engine = work.rows(seen[0][key], pair).to(torch.float64), pair.engine.to(torch.float64)
    finite = engine.isfinite().all(1) & truth.isfinite().all(1)
    if not finite.any():
        return Diagnosis(layer, first.block, key, [], False, note="every row holds NaN or infinity")
    error = (engine - truth)[finite]
    unit = error.abs().max()  # squares of an error that explodes would not be finite

    def explains(y: Tensor) -> float:
        left = (engine - work.rows(y, pair).to(torch.float64))[finite]
        share = 1 - float((left / unit).square().sum() / (error / unit).square().sum())
        return share if share == share else float("-inf")

    table, stream = rerun.tables[0], rerun.streams[0]
    found = []
    for fault, expert in _candidates(rerun, layer, first.block, table.name, error, pair, work, seen, finite, faults):
        taps = rerun.fault(layer, fault, table, stream, expert)
        if key in taps:
            name = f"{fault.name} (expert {expert})" if fault.single else fault.name
            found.append(Hypothesis(name, explains(taps[key]), fault.seen, fault.doc))
    diagnosis = Diagnosis(layer, first.block, key, found, False)
    members = [work.rows(s[key], pair)[finite] for s in seen[1:]]
    noise = float(envelope(truth[finite], members, pair.dtype).l2.norm())
    if layer is not None and base_name(key) == "mlp_output":
        taps = rerun.run_layer(layer, table, stream, fused=False)[0]
        parts = [taps[f"layers.{layer}.{n}"] for n in ("moe_routed_output", "moe_shared_gated", "moe_shared_output")]
        _solve(diagnosis, [work.rows(x, pair).to(torch.float64)[finite] for x in parts], engine[finite], error, noise)
    diagnosis.hypotheses.sort(key=lambda h: -h.explains)
    if first.note == BF16_GRID:
        diagnosis.hypotheses.sort(key=lambda h: h.name != "state in bf16")
        diagnosis.named, diagnosis.note = True, BF16_GRID
        return diagnosis
    if diagnosis.hypotheses:
        share = diagnosis.hypotheses[0].explains
        rest = max(0.0, 1 - share) ** 0.5 * float(error.norm())
        diagnosis.named = share >= ENOUGH or (share > 0.5 and rest <= 1.5 * noise)
    return diagnosis


def _candidates(
    rerun: Rerun, layer: int | None, block: str, truth: str, error: Tensor, pair: Any, work: Any,
    seen: Sequence[dict[str, Tensor]], finite: Tensor, faults: Sequence[Fault],
) -> Iterator[tuple[Fault, int]]:  # fmt: skip
    """The faults of a block, with the experts that a fault of one expert could be of."""
    if layer is None:
        yield from ((fault, 0) for fault in faults if fault.block == block)
        return
    kind = work.result.layers[layer]
    blocks = {block}
    if block == "stream":
        blocks = {kind, "mlp", "input_layernorm", "post_attention_layernorm"}
    elif block in BEFORE and f"layers.{layer}.{BEFORE[block][1]}" not in rerun.captured:
        blocks.add(BEFORE[block][0])
    mxfp4 = rerun.source.spec(f"layers.{layer}.mlp.experts").kind == "mxfp4"
    suspects = _suspects(error, f"layers.{layer}.moe_topk_ids", pair, work, seen, finite) if "mlp" in blocks else []
    for fault in faults:
        if fault.block in blocks and fault.applies(mxfp4, "a4" in truth):
            for expert in suspects if fault.single else [0]:
                yield fault, expert


def _suspects(
    error: Tensor, ids_key: str, pair: Any, work: Any, seen: Sequence[dict[str, Tensor]], finite: Tensor
) -> list[int]:
    """Experts whose tokens hold nearly all of the error, those with the fewest tokens first."""
    ids = work.alignment.pair(ids_key).engine if ids_key in work.alignment.keys else None
    if ids is None or len(ids) != len(finite):
        if ids_key not in seen[0]:
            return []
        ids = work.rows(seen[0][ids_key], pair)
    ids, energy = ids[finite].long(), error.square().sum(1)
    found = []
    for e in ids.unique().tolist():
        hit = (ids == e).any(1)
        if energy[hit].sum() >= 0.95 * energy.sum():
            found.append((int(hit.sum()), e))
    return [e for _, e in sorted(found)[:3]]


def _solve(diagnosis: Diagnosis, parts: list[Tensor], engine: Tensor, error: Tensor, noise: float) -> None:
    """Fit engine = a R + b gS + c S; add it as a hypothesis where it says more than the catalogue does, and leaves no
    more than roundings unexplained: free numbers always explain something. One number is tried before three."""
    R, gS, S = (x.flatten() for x in parts)
    y, total = engine.flatten(), float(error.square().sum())

    def fit(base: Tensor | float, *columns: Tensor) -> tuple[list[float], float]:
        matrix = torch.stack(columns, 1)
        solution = torch.linalg.lstsq(matrix, (y - base)[:, None]).solution.flatten()
        return solution.tolist(), float((y - base - matrix @ solution).norm())

    (a, b, c), rest = fit(0.0, R, gS, S)
    diagnosis.fit, diagnosis.fit_left = (a, b, c), rest**2 / total
    name = f"routed x {a:.3g}, gated shared x {b:.3g}, ungated shared x {c:.3g}"
    one = {"shared expert times": fit(R, gS), "routed experts times": fit(gS, R), "whole block times": fit(0.0, R + gS)}
    simplest = min(one, key=lambda n: one[n][1])
    if one[simplest][1] <= 1.1 * rest:
        rest, name = one[simplest][1], f"{simplest} {one[simplest][0][0]:.3g}"
    explains, best = 1 - rest**2 / total, max((h.explains for h in diagnosis.hypotheses), default=0.0)
    if rest <= LIMIT * noise and explains > best + 0.5 * (1 - best):
        diagnosis.hypotheses.append(Hypothesis(name, explains, "", "least squares"))
