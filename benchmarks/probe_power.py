"""What `probe` can see: each fault of the catalogue, in all layers and in one, at 40, 400 and 4,000 prompt tokens.

    python -m benchmarks.probe_power a b c --tokens 40 400 --clean 500 --save power.jsonl [--processes 12] [--drawn 3]
    python -m benchmarks.probe_power --table power.jsonl ...

An engine is a run in an arithmetic that is left out of the judge's own (transformers-bf16 with its products split in
another order), with a fault or none, on prompts that the judge is given. `found`: share of (fault, layer) that diverge;
`named`: among those found, the planted hypothesis is best, or cannot be told from the best. Clean runs are every legal
arithmetic and the clean variants of the oracle's own benchmark, each on prompts of its own; none may diverge.
--drawn draws the weights of a checkpoint anew. --again plants only what a file of records says was not found at fewer
tokens, and one in ten of what was. --num-experts gives a checkpoint so many, and plants nothing but two of them
exchanged, in one layer after the other: the busiest two, two of the middle, and two between.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.oracle_score.__main__ import CHECKPOINTS
from benchmarks.oracle_score.variants import Variant, variants
from qwen35_moe.model.cache import Cache
from qwen35_moe.numerics.arithmetics import Arithmetic, get
from qwen35_moe.numerics.tables import SGLANG_BF16, TRANSFORMERS_BF16
from qwen35_moe.numerics.taps import attach
from qwen35_moe.oracle.diagnose.faults import FaultSite
from qwen35_moe.oracle.judge.envelope import ALL_BF16, legal
from qwen35_moe.oracle.judge.rerun import CPU
from qwen35_moe.oracle.judge.split_k import split_products, splitting
from qwen35_moe.oracle.servers.answer import Answer, row
from qwen35_moe.oracle.servers.hypotheses import PlacedFault, placed_faults
from qwen35_moe.oracle.servers.probe import How, Prepared, drawn_prompts, prepare
from qwen35_moe.oracle.servers.replay import Branch, Replay
from qwen35_moe.oracle.servers.verdict import Verdict
from qwen35_moe.oracle.truth import open_checkpoint
from qwen35_moe.run.load import build as build_model
from qwen35_moe.run.prompt import padded
from qwen35_moe.run.source import WeightSource
from weights.build import build

PROMPTS = {40: (4, 10), 400: (10, 40), 4000: (50, 80)}  # tokens in all: prompts, and tokens of each
PARTS = 3  # of the clean engines, among processes
ENGINES: tuple[Arithmetic, ...] = tuple(
    split_products(table, parts, order)
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
def engine(source: WeightSource, ids: list[list[int]], table: Arithmetic, h: PlacedFault | None = None) -> Tensor:
    """log p [B, T, V] of an engine in this arithmetic, with a fault or none."""
    rows = torch.tensor(ids)
    if h is None:
        model = build_model(source, table, unfused(source), CPU, "decoded")
        with splitting(table):
            return model(rows).double().log_softmax(-1)
    positions = torch.arange(rows.shape[1]).expand_as(rows)
    place = FaultSite(source.config, positions, None if h.layer is None else frozenset({h.layer}), h.expert)
    fused = [h.fault.fused and place.covers(i) for i in range(source.config.num_hidden_layers)]
    model = build_model(h.fault.source(source, place), h.fault.arithmetic(table), fused, CPU, "decoded")
    with splitting(table), attach(*h.fault.handlers(place)):
        return model(rows).double().log_softmax(-1)


def exchanged(which: tuple[int, int]) -> list[dict[str, Any]]:
    """Two experts of a layer in each other's place: the n-th busiest, and the next."""
    assert HERE.known is not None
    layer, n = which
    busy = HERE.known.branches[0].routing[layer][1].flatten().bincount(minlength=HERE.source.config.num_experts)
    a, b = busy.argsort(descending=True, stable=True)[n : n + 2].tolist()
    model = build_model(HERE.source, ENGINES[1], unfused(HERE.source), CPU, "decoded")
    experts = model.layers[layer].mlp.experts
    right = experts.at
    setattr(experts, "at", lambda e: right({a: b, b: a}.get(e, e)))  # noqa: B010
    with splitting(ENGINES[1]):
        log_p = model(torch.tensor(HERE.ids)).double().log_softmax(-1)
    verdict = HERE.known.judge(answers(HERE.ids, log_p, 20))
    named = {(x.layer, x.expert) for x in verdict.experts} <= {(layer, a), (layer, b)} and bool(verdict.experts)
    return [{"kind": "planted", "checkpoint": HERE.name, "tokens": sum(map(len, HERE.ids)), "top": 20,
             "name": f"experts {a} and {b} of {int(busy[a])} and {int(busy[b])} tokens exchanged, layer {layer}",
             "layer": layer, "fault": "experts exchanged", "named": named, **seen(verdict)}]  # fmt: skip


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


@dataclass
class Setting:
    """A checkpoint and its prompts. Set before processes are forked: they find it here."""

    name: str
    source: WeightSource
    ids: list[list[int]]
    tops: list[int]
    known: Prepared | None = None
    listed: list[PlacedFault] = field(default_factory=list)


HERE: Setting


def unfused(source: WeightSource) -> list[bool]:
    return [False] * source.config.num_hidden_layers


def streams(listed: list[int]) -> list[tuple[int, int, Tensor]]:
    """What some hypotheses make of the last stream: (number, expert, stream) of each."""
    all_of = placed_faults(HERE.source)
    rows, mask = padded([torch.tensor(one) for one in HERE.ids])
    found = Replay(HERE.source, unfused(HERE.source), rows, mask).run("exact", [], [all_of[n] for n in listed])[1:]
    by_name = {(b.hypothesis.fault.name, b.hypothesis.layer): b for b in found if b.hypothesis}
    made = [(n, by_name[all_of[n].fault.name, all_of[n].layer]) for n in listed]
    return [(n, b.hypothesis.expert if b.hypothesis else 0, b.stream) for n, b in made]


def prepared(processes: int) -> Prepared:
    """`prepare`, its hypotheses shared among processes."""
    listed = placed_faults(HERE.source)
    known = prepare(HERE.source, unfused(HERE.source), HERE.ids, How(faults="none"))
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        parts = pool.map(streams, [list(range(n, len(listed), processes)) for n in range(processes)], chunksize=1)
    for n, expert, stream in sorted((one for part in parts for one in part), key=lambda one: one[0]):
        h = PlacedFault(listed[n].fault, listed[n].layer, expert)
        known.branches.append(Branch(str(h), get("float32"), stream, h))
    return known


def planted(n: int) -> list[dict[str, Any]]:
    """One hypothesis planted: what came out with each number of likeliest tokens."""
    assert HERE.known is not None
    h = HERE.listed[n]
    log_p, tokens = engine(HERE.source, HERE.ids, ENGINES[1], h), sum(map(len, HERE.ids))
    found = []
    for top in HERE.tops:
        verdict = HERE.known.judge(answers(HERE.ids, log_p, top))
        found.append({"kind": "planted", "checkpoint": HERE.name, "tokens": tokens, "top": top, "name": str(h),
                      "layer": h.layer, "fault": h.fault.name, "named": named(verdict, h),
                      **seen(verdict)})  # fmt: skip
    return found


def named(verdict: Verdict, h: PlacedFault) -> bool:
    return any(e.name.split(" (")[0].split(",")[0] == h.fault.name.split(",")[0] for e in verdict.alike)


def seen(verdict: Verdict) -> dict[str, Any]:
    return {"finding": verdict.finding, "median": verdict.quantiles[0].ratio, "why": verdict.why,
            "nats": verdict.suspect.sure if verdict.suspect else None}  # fmt: skip


def engines(tokens: int) -> list[Arithmetic | Variant]:
    return [*legal("exact"), *ENGINES, *(v for v in variants("", tokens) if not v.batch)]


def round_of(which: tuple[int, int]) -> list[dict[str, Any]]:
    """A part of the clean engines on the prompts of one seed."""
    source, size, (seed, part) = HERE.source, (len(HERE.ids), len(HERE.ids[0])), which
    ids = drawn_prompts(source.config, *size, seed=seed)
    known = prepare(source, unfused(source), ids)
    found = []
    for e in engines(size[1])[part::PARTS]:
        log_p, name = variant(source, ids, e) if isinstance(e, Variant) else engine(source, ids, e), e.name
        for top in HERE.tops:
            verdict = known.judge(answers(ids, log_p, top))
            found.append({"kind": "clean", "checkpoint": HERE.name, "tokens": size[0] * size[1], "top": top,
                          "name": name, "seed": seed, **seen(verdict)})  # fmt: skip
    return found


def some(listed: list[PlacedFault], records: list[dict[str, Any]], checkpoint: str) -> list[PlacedFault]:
    """What was not found before, and one in ten of what was."""
    mine = [r for r in records if r["kind"] == "planted" and r["checkpoint"] == checkpoint and r["top"]]
    done = {(r["fault"], r["layer"]) for r in mine if r["finding"] == "diverges"}
    return [h for n, h in enumerate(listed) if (h.fault.name, h.layer) not in done or n % 10 == 0]


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    global HERE
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    for name in options.names:
        _, recipe, seed, sizes = CHECKPOINTS[name]
        sizes = {**sizes, "num_experts": options.num_experts} if options.num_experts else sizes
        folder = options.folder / f"{name}-{options.drawn}-{options.num_experts or ''}"
        path = build(recipe, folder, jobs=1, seed=seed + 1000 * options.drawn, text_config=sizes)
        source, label = open_checkpoint(path)[1].source, f"{name}-{options.drawn}"
        for tokens in options.tokens:
            HERE = Setting(
                label, source, drawn_prompts(source.config, *PROMPTS[tokens], seed=77 + options.drawn), options.top
            )
            start = time.time()
            if options.num_experts:
                HERE.known = prepare(source, unfused(source), HERE.ids, How(faults="none"))
                places = product(
                    range(source.config.num_hidden_layers), (0, options.num_experts // 4, options.num_experts // 2)
                )
                with fork.Pool(options.processes) as pool:
                    for records in pool.imap_unordered(exchanged, places, chunksize=1):
                        yield from records
                continue
            HERE.known = prepared(options.processes)
            listed = [b.hypothesis for b in HERE.known.branches if b.hypothesis]  # with the expert that is busiest
            HERE.listed = some(listed, read(options.again), label) if options.again else listed
            print(f"{label}, {tokens} tokens: {len(HERE.listed)} to plant, prepared in {time.time() - start:.0f} s")
            with fork.Pool(options.processes) as pool:
                for records in pool.imap_unordered(planted, range(len(HERE.listed)), chunksize=1):
                    yield from records
        if options.num_experts:
            continue
        HERE = Setting(label, source, drawn_prompts(source.config, *PROMPTS[options.clean_tokens]), options.top)
        rounds, first = -(-options.clean // len(engines(40))), 10_000 * (1 + options.drawn)
        parts = [(first + n, part) for n in range(rounds) for part in range(PARTS)]
        with fork.Pool(options.processes) as pool:
            for records in pool.imap_unordered(round_of, parts, chunksize=1):
                yield from records


def read(paths: list[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def table(records: list[dict[str, Any]]) -> str:
    """Shares found, and what was not; clean runs and the worst of them."""
    lines = []
    keys = sorted({(r["checkpoint"], r["tokens"], r["top"]) for r in records})
    for key in keys:
        mine = [r for r in records if (r["checkpoint"], r["tokens"], r["top"]) == key]
        label = f"{key[0]:8} {key[1]:5} tokens, top {key[2]:2}"
        for kind in ("all layers", "one layer"):
            rows = [r for r in mine if r["kind"] == "planted" and (r["layer"] is None) == (kind == "all layers")]
            found = [r for r in rows if r["finding"] == "diverges"]
            if rows:
                missed = [f"{r['name']} ({r['finding'][:6]})" for r in rows if r["finding"] != "diverges"]
                lines.append(f"{label}, {kind}: found {len(found)} of {len(rows)}, named "
                             f"{sum(r['named'] for r in found)}; not found: {'; '.join(missed) or 'none'}")  # fmt: skip
        if clean := [r for r in mine if r["kind"] == "clean"]:
            count = {f: sum(r["finding"] == f for r in clean) for f in ("agrees", "diverges")}
            worst, loud = (max(clean, key=lambda r: r[k] or 0) for k in ("median", "nats"))
            lines.append(f"{label}, clean: {len(clean)} runs of {len({r['name'] for r in clean})} engines, "
                         f"{count['diverges']} diverge, {count['agrees']} agree; largest median {worst['median']:.2f} "
                         f"({worst['name']}), gain {loud['nats'] or 0:.1f} nats ({loud['name']})")  # fmt: skip
            lines += [f"  ACCUSED {r['name']}, seed {r['seed']}: {r['why']}" for r in clean
                      if r["finding"] == "diverges"]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="checkpoints of benchmarks.oracle_score: a b c d")
    parser.add_argument("--tokens", type=int, nargs="*", default=[40, 400], choices=PROMPTS)
    parser.add_argument("--top", type=int, nargs="*", default=[0, 20])
    parser.add_argument("--clean", type=int, default=500, help="clean runs (default: %(default)s)")
    parser.add_argument("--clean-tokens", type=int, default=400, choices=PROMPTS)
    parser.add_argument("--drawn", type=int, default=0, help="which draw of the weights and prompts")
    parser.add_argument("--num-experts", type=int, help="another number of experts, two of which are exchanged")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--again", type=Path, nargs="*", default=[], help="records of fewer tokens")
    parser.add_argument("--save", type=Path, default=Path("probe_power.jsonl"))
    parser.add_argument("--table", type=Path, nargs="*", default=[], help="print records, measure nothing")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "oracle-score")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with options.save.open("a", encoding="utf-8") if options.names else open("/dev/null", "w") as file:
        for record in measure(options):
            file.write(json.dumps(record) + "\n")
            file.flush()
    print(table(read(options.table or [options.save])))


if __name__ == "__main__":
    main()
