"""What `probe` can see: each fault of the catalogue, in all layers and in one, at 40, 400 and 4,000 prompt tokens.

    python -m benchmarks.probe_power [a b c] [--tokens 40 400] [--clean 500] [--top 0 20] [--folder DIR]

An engine is a run in an arithmetic that is left out of the judge's own (transformers-bf16 with its products split in
another order), with a fault or none, on prompts that the judge is given. `found`: share of (fault, layer) that diverge;
`named`: among those found, the planted hypothesis is best, or cannot be told from the best. Clean runs are every legal
arithmetic and the clean variants of the oracle's own benchmark, each on prompts of its own; none may diverge.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.oracle_score.__main__ import CHECKPOINTS
from benchmarks.oracle_score.variants import Variant, variants
from qwen35_moe.model.cache import Cache
from qwen35_moe.numerics.arithmetics import Arithmetic
from qwen35_moe.numerics.tables import SGLANG_BF16, TRANSFORMERS_BF16
from qwen35_moe.numerics.taps import attach
from qwen35_moe.oracle.diagnose.faults import Place
from qwen35_moe.oracle.judge.envelope import ALL_BF16, legal
from qwen35_moe.oracle.judge.split_k import split, splitting
from qwen35_moe.oracle.servers.answer import Answer, row
from qwen35_moe.oracle.servers.probe import Prepared, prepare
from qwen35_moe.oracle.servers.prompts import drawn
from qwen35_moe.oracle.servers.replay import CPU, Hypothesis, hypotheses
from qwen35_moe.oracle.servers.verdict import Verdict
from qwen35_moe.oracle.truth import open_checkpoint
from qwen35_moe.run.load import build as build_model
from qwen35_moe.run.source import WeightSource
from weights.build import build

PROMPTS = {40: (4, 10), 400: (10, 40), 4000: (50, 80)}  # tokens in all: prompts, and tokens of each
ENGINES: tuple[Arithmetic, ...] = tuple(
    split(table, parts, order)
    for parts, order in ((8, 901), (4, 902), (2, 903), (16, 904))
    for table in (SGLANG_BF16, TRANSFORMERS_BF16, ALL_BF16)
)


def answers(ids: list[list[int]], log_p: Tensor, top: int) -> list[Answer]:
    """What a server tells of log p [B, T, V]: the prompt's tokens and the `top` likeliest."""
    found = []
    for known, x in zip(ids, log_p, strict=True):
        rows = []
        for t in range(len(known) - 1):
            likely = x[t].topk(top).indices.tolist() if top else []
            pairs = [(i, float(x[t, i])) for i in dict.fromkeys([known[t + 1], *likely])]
            rows.append(row(t + 1, pairs, top > 0))
        found.append(Answer("benchmark", known, rows))
    return found


@torch.inference_mode()
def engine(source: WeightSource, ids: list[list[int]], table: Arithmetic, h: Hypothesis | None = None) -> Tensor:
    """log p [B, T, V] of an engine in this arithmetic, with a fault or none."""
    rows, unfused = torch.tensor(ids), [False] * source.config.num_hidden_layers
    if h is None:
        model = build_model(source, table, unfused, CPU, "decoded")
        with splitting(table):
            return model(rows).double().log_softmax(-1)
    positions = torch.arange(rows.shape[1]).expand_as(rows)
    place = Place(source.config, positions, None if h.layer is None else frozenset({h.layer}), h.expert)
    fused = [h.fault.fused and place.covers(i) for i in range(len(unfused))]
    model = build_model(h.fault.source(source, place), h.fault.arithmetic(table), fused, CPU, "decoded")
    with splitting(table), attach(*h.fault.handlers(place)):
        return model(rows).double().log_softmax(-1)


@torch.inference_mode()
def variant(source: WeightSource, ids: list[list[int]], v: Variant) -> Tensor:
    """log p of a clean variant."""
    rows, fused = torch.tensor(ids), [v.fused] * source.config.num_hidden_layers
    with v.products():
        model, cache, parts, start = build_model(source, v.table, fused, CPU, "decoded"), Cache(), [], 0
        for size in v.chunks or (rows.shape[1],):
            parts.append(model(rows[:, start : start + size], cache=cache))
            start += size
    return torch.cat(parts, 1).double().log_softmax(-1)


def named(verdict: Verdict, h: Hypothesis) -> bool:
    return any(e.name.split(" (")[0].split(",")[0] == h.fault.name for e in verdict.alike)


def power(source: WeightSource, tokens: int, top: int, table: Arithmetic) -> Iterator[tuple[Hypothesis, bool, Verdict]]:
    """Each hypothesis planted; whether it had been promised; and what came out."""
    ids = drawn(source.config, *PROMPTS[tokens], seed=77)
    known = prepare(source, [False] * source.config.num_hidden_layers, ids)
    promised, _ = known.expect(max(top, 1)).power()
    busy = {b.hypothesis.layer: b.hypothesis for b in known.branches if b.hypothesis and b.hypothesis.fault.single}
    for h in hypotheses(source):
        if h.fault.single:
            h = Hypothesis(h.fault, h.layer, busy[h.layer].expert)
        yield h, str(h) in promised, known.judge(answers(ids, engine(source, ids, table, h), top))


def clean(source: WeightSource, tokens: int, top: int, runs: int) -> Iterator[tuple[str, Verdict]]:
    """Clean engines: `runs` verdicts, on new prompts for each round of all engines."""
    done, seed = 0, 1000
    unfused = [False] * source.config.num_hidden_layers
    while done < runs:
        ids = drawn(source.config, *PROMPTS[tokens], seed=seed)
        known: Prepared = prepare(source, unfused, ids)
        tables = [*legal("exact"), *ENGINES]
        each = [(t.name, engine(source, ids, t)) for t in tables]
        each += [(v.name, variant(source, ids, v)) for v in variants(False, len(ids[0])) if not v.batch]
        for name, log_p in each[: runs - done]:
            yield name, known.judge(answers(ids, log_p, top))
        done, seed = done + len(each), seed + 1


def show_power(source: WeightSource, tokens: int, top: int) -> None:
    lines: dict[str, list[tuple[str, bool, bool, bool]]] = {"all layers": [], "one layer": []}
    for h, promised, verdict in power(source, tokens, top, ENGINES[1]):
        found = verdict.finding == "diverges"
        lines["all layers" if h.layer is None else "one layer"].append((str(h), promised, found, named(verdict, h)))
    for kind, rows in lines.items():
        found = [r for r in rows if r[2]]
        kept = sum(r[2] for r in rows if r[1])
        print(f"  {tokens} tokens, top {top}, {kind}: found {len(found)} of {len(rows)}; of {sum(r[1] for r in rows)} "
              f"promised {kept}; named {sum(r[3] for r in found)} of {len(found)}")  # fmt: skip
        missed = [name for name, _, found_, _ in rows if not found_]
        print(f"    not found: {'; '.join(missed) or 'none'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", choices=["a", "b", "c", []], default=[])
    parser.add_argument("--tokens", type=int, nargs="*", default=[40, 400], choices=PROMPTS)
    parser.add_argument("--top", type=int, nargs="*", default=[0, 20])
    parser.add_argument("--clean", type=int, default=500, help="clean runs (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "oracle-score")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.names or ["a", "b", "c"]:
        _, recipe, seed, sizes = CHECKPOINTS[name]
        path = build(recipe, options.folder / name, jobs=1, seed=seed, text_config=sizes)
        source, start = open_checkpoint(path)[1].source, time.time()
        print(f"{name}: {recipe}, {sizes['layer_types']}", flush=True)
        for tokens in options.tokens:
            for top in options.top:
                show_power(source, tokens, top)
        for top in options.top if options.clean else []:
            seen = list(clean(source, options.tokens[-1], top, options.clean))
            findings = [v.finding for _, v in seen]
            worst = max(seen, key=lambda x: x[1].quantiles[0].ratio)
            gain = max(v.suspect.sure for _, v in seen if v.suspect)
            print(f"  clean, {options.tokens[-1]} tokens, top {top}: {len(seen)} runs, {findings.count('diverges')} "
                  f"diverge, {findings.count('agrees')} agree; largest median {worst[1].quantiles[0].ratio:.2f} "
                  f"({worst[0]}), gain {gain:.1f} nats; {time.time() - start:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
