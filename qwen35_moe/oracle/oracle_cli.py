"""`qwen35-moe compare`, `diagnose` and `mutants`.

Exit codes: 0 all that was compared agrees, 1 something diverges, 2 it could not be compared, in part or at all.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..load import SHARED, load
from ..model import Model
from ..source import Source
from ..trace import trace
from . import mutants, report, report_html, score
from .catalogue import FAULTS
from .compare import compare
from .dump import Dump
from .envelope import LIMIT, legal
from .envelope_file import with_ids, write_envelope
from .match import runs
from .readers import read_dump
from .records import Comparison
from .trace_file import Trace
from .variants import SMALL


def add_parser(subparsers: Any) -> None:
    p = subparsers.add_parser("compare", help="an engine's dump against the truth: is it wrong, where first, and why")
    p.add_argument("truth", help="directory that `trace` wrote")
    p.add_argument("dump", help="directory or file of an engine")
    p.add_argument("--checkpoint", help="where the truth's checkpoint is now (default: where it was)")
    _reports(p)
    p.set_defaults(run=run_compare)

    p = subparsers.add_parser("diagnose", help="the same without a truth: it is computed for the tokens of the dump")
    p.add_argument("checkpoint")
    p.add_argument("dump")
    p.add_argument(
        "--arithmetic", default="exact", help="of the truth: exact+a4-round-up for W4A4 (default: %(default)s)"
    )
    p.add_argument("--layer", type=int, action="append", help="judge this layer only; may be given again")
    _shared(p)
    _reports(p)
    p.set_defaults(run=run_diagnose)

    p = subparsers.add_parser("mutants", help="plant every known bug and see that the oracle finds and names it")
    p.add_argument("checkpoint")
    p.add_argument("--tokens", type=int, default=48)
    p.add_argument("--regime", action="append", choices=mutants.REGIMES, help="default: all")
    p.add_argument("--a4", action="store_true", help="an engine that quantises activations to MXFP4")
    p.add_argument("--quick", action="store_true", help="a tenth of the listed faults; all unlisted and clean ones")
    p.set_defaults(run=run_mutants)


def _shared(p: argparse.ArgumentParser) -> None:
    p.add_argument("--shared-expert", default="unfused", choices=SHARED, help="default: %(default)s")


def _reports(p: argparse.ArgumentParser) -> None:
    p.add_argument("--html", type=new_file, help="write one self-contained page")
    p.add_argument("--json", type=new_file, help="write the records, one JSON object a line")
    p.add_argument("--width", type=width, default=80, help="of the text, 20 or more (default: %(default)s)")
    p.add_argument("--engine", help="the arithmetic that the engine has: joins the envelope (float32 replaces it)")
    p.add_argument("--layer-ids", type=layer_ids, help="those that vLLM was asked for: 2,18,33")
    p.add_argument("--name-map", help="JSON file for plain tensors: the engine's name or regular expression -> key")
    p.add_argument("--limit", type=limit, default=LIMIT, help="default: %(default)s")


def layer_ids(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def new_file(text: str) -> Path:
    path = Path(text)
    is_device = path.exists() and not path.is_file()  # /dev/stdout, which whole() writes to as it is
    if path.is_dir() or not os.access(path if is_device else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} is a folder, or in none that can be written to")
    return path


def width(text: str) -> int:
    if (number := int(text)) < 20:
        raise ValueError
    return number


def limit(text: str) -> float:
    if not 0 < (number := float(text)) < float("inf"):
        raise ValueError
    return number


@dataclass
class Loaded:
    source: Source
    fused: list[bool]


def open_checkpoint(
    path: str | Path, shared_expert: str = "unfused", arithmetic: str = "exact"
) -> tuple[Model, Loaded]:
    """A streamed model of a checkpoint, its weights, and which layers fuse the shared expert."""
    model = load(path, arithmetic, shared_expert, mode="stream", text_only=True)
    return model, Loaded(model.source, [layer.mlp.fused for layer in model.layers.empty])  # type: ignore[union-attr]


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """[B, T], zeros at the end, and the mask (None where nothing is padded)."""
    T = max(len(r) for r in rows)
    ids, mask = torch.zeros(len(rows), T, dtype=torch.long), torch.zeros(len(rows), T, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, : len(row)], mask[b, : len(row)] = row, 1
    return ids, None if bool(mask.all()) else mask


def write_truth(
    checkpoint: str | Path, ids: Tensor, mask: Tensor | None, out: str | Path, arithmetic: str = "exact",
    shared_expert: str = "unfused", taps: str = "*", with_envelope: bool = True,
) -> Trace:  # fmt: skip
    """Trace a checkpoint to a directory, layer by layer, and beside it the envelope."""
    model, loaded = open_checkpoint(checkpoint, shared_expert, arithmetic)
    meta = {"checkpoint": {**(model.identity or {}), "path": str(Path(checkpoint).resolve())}, "fused": loaded.fused}
    taps = with_ids(taps) if with_envelope else taps
    truth = trace(model, ids, taps=taps, attention_mask=mask, out=out, meta=meta)
    if with_envelope:
        write_envelope(truth, _legal_models(checkpoint, shared_expert, arithmetic))
    return truth


def _legal_models(path: str | Path, shared_expert: str, arithmetic: str) -> Iterator[Model]:
    for table in legal(arithmetic):
        yield load(path, table, shared_expert, mode="stream", text_only=True)


def truth_of(dump: Dump) -> tuple[Tensor, Tensor | None]:
    """The sequences that a dump holds: ids [B, T] and mask, joined over its steps."""
    rows: list[list[Tensor]] = []
    owner: dict[Any, int] = {}
    for step in dump.steps:
        tokens = dump.tokens.get(step)
        if tokens is None or tokens.ids is None:
            continue
        for run, start, request in runs(tokens):
            length = [sum(len(part) for part in row) for row in rows]
            known = owner.get(request) if request is not None else None
            if start in (0, None):
                known = None
            elif known is None or length[known] != start:
                known = next((b for b, n in enumerate(length) if n == start), None)
            if known is None:
                if start not in (0, None):
                    continue  # a cached prefix, whose ids the dump does not hold
                known, rows = len(rows), [*rows, []]
            rows[known].append(tokens.ids[run])
            if request is not None:
                owner[request] = known
    if not rows:
        raise Qwen35Error(
            "the dump does not say which tokens it is of", where=dump.path,
            do="write the truth with `qwen35-moe trace --ids`, then `qwen35-moe compare`",
        )  # fmt: skip
    return padded([torch.cat(row) for row in rows])


def run_compare(args: argparse.Namespace) -> int:
    truth = Trace.open(args.truth)
    dump = read_dump(args.dump, config=truth.meta.get("config"), name_map=args.name_map, layers=args.layer_ids)
    known = truth.meta.get("checkpoint") or {}
    path = args.checkpoint or known.get("path")
    loaded = None
    if path and (args.checkpoint or Path(path).exists()):
        model, loaded = open_checkpoint(path)
        if not truth.is_of(model.identity):
            do, was = "trace this checkpoint, or give the other one with --checkpoint", known.get("path")
            raise Qwen35Error("truth is of another checkpoint", where=args.truth, expected=was, found=path, do=do)
        loaded.fused = truth.meta.get("fused") or loaded.fused
    return _report(_compare(truth, dump, loaded, args), args)


def run_diagnose(args: argparse.Namespace) -> int:
    model, loaded = open_checkpoint(args.checkpoint, args.shared_expert)
    count = model.config.num_hidden_layers
    if strange := [i for i in args.layer or () if not 0 <= i < count]:
        raise Qwen35Error("no such layer", where=f"--layer {strange[0]}", expected=f"0 to {count - 1}")
    dump = read_dump(args.dump, config=model.config.raw, name_map=args.name_map, layers=args.layer_ids)
    ids, mask = truth_of(dump)
    with tempfile.TemporaryDirectory() as folder:
        truth = write_truth(
            args.checkpoint, ids, mask, folder, args.arithmetic, args.shared_expert, with_envelope=False
        )
        return _report(_compare(truth, dump, loaded, args, args.layer), args)


def _compare(
    truth: Trace, dump: Dump, loaded: Loaded | None, args: argparse.Namespace, layers: list[int] | None = None
) -> Comparison:
    source, fused = (loaded.source, loaded.fused) if loaded else (None, [])
    return compare(truth, dump, source, fused=fused, engine=args.engine, limit=args.limit, layers=layers)


def _report(result: Comparison, args: argparse.Namespace) -> int:
    print(report.text(result, args.width))
    if args.json:
        report.write(args.json, report.jsonl(result))
    if args.html:
        report.write(args.html, report_html.html(result))
        print(f"\n{args.html}")
    return result.exit_code


def run_mutants(args: argparse.Namespace) -> int:
    model, loaded = open_checkpoint(args.checkpoint)
    mxfp4 = loaded.source.spec("layers.0.mlp.experts").kind == "mxfp4"
    if args.a4 and not mxfp4:
        raise Qwen35Error("no activations are quantised here", where=args.checkpoint, expected="MXFP4 experts")
    ids = (torch.arange(args.tokens) * 7919 % 251 % model.config.vocab_size)[None]
    faults = (*FAULTS, *SMALL)
    done = 0

    def progress(_: object) -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            print(f"\r{done}", end="", file=sys.stderr)

    faults = faults[:: 10 if args.quick else 1]
    out = mutants.run(loaded.source, ids, args.regime or mutants.REGIMES, faults, args.a4, progress)
    print(score.table(*out))
    planted, foreign, clean = out
    found = all(o.found for o in (*planted, *foreign, *clean))
    named = sum(o.named_right for o in planted) >= 0.95 * len(planted)
    return 0 if found and named else 1
