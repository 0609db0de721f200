"""`qwen35-moe trace`: the truth of a prompt, written to a directory layer by layer."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arithmetic import ARITHMETICS
from .device_options import add_device_options, device_options
from .errors import Qwen35Error
from .load import MODES, SHARED, load
from .long_run import trace_layers
from .model import Model
from .oracle.envelope import legal
from .oracle.envelope_file import write_envelope
from .oracle.oracle_cli import padded
from .tap_names import TAPS


def add_parser(subparsers: Any) -> None:
    p = subparsers.add_parser(
        "trace",
        help="write the truth: what every tap holds, and how far legal roundings stray",
        description="Computes layer by layer. What is done is on disk after each layer, and --resume goes on.",
    )
    p.add_argument("checkpoint", nargs="?")
    p.add_argument("--ids", help="1,2,3 or a JSON file: a list of token ids, or a list of lists (padded on the right)")
    p.add_argument("--out", help="directory to write")
    p.add_argument("--arithmetic", default="exact", help="default: %(default)s")
    p.add_argument("--taps", default="*", help="globs, separated by commas (default: all)")
    p.add_argument("--experts", action="store_true", help="values inside of every single expert, too")
    p.add_argument("--layers", metavar="0-N", help="only the first layers; --resume with a larger N goes on")
    p.add_argument("--resume", action="store_true", help="go on where an earlier run was stopped")
    p.add_argument("--mode", choices=MODES, help="what is held in memory (default: stream; packed with --device-map)")
    p.add_argument("--stream", dest="mode", action="store_const", const="stream", help="the same as --mode stream")
    add_device_options(p)
    p.add_argument("--shared-expert", default="unfused", choices=SHARED, help="default: %(default)s")
    p.add_argument("--no-envelope", action="store_true", help="the trace alone, not how far legal roundings stray")
    p.add_argument("--quiet", action="store_true", help="no progress on stderr")
    p.add_argument("--list", action="store_true", help="name all taps and arithmetics, and stop")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.list:
        for name, tap in TAPS.items():
            print(f"{name:<28}{tap.dims:<14}{tap.meaning}")
        print("\narithmetics: " + ", ".join(ARITHMETICS))
        return 0
    if not (args.checkpoint and args.ids and args.out):
        raise Qwen35Error("nothing to trace", expected="trace CHECKPOINT --ids FILE --out DIRECTORY")
    ids, mask = read_ids(args.ids)
    last = _last_layer(args.layers)
    model = _load(args, args.arithmetic)
    path = str(Path(args.checkpoint).resolve())
    meta = {
        "checkpoint": {**(model.identity or {}), "path": path},
        "shared_expert": args.shared_expert,
        "fused": model.fused,
    }
    try:
        truth, report = trace_layers(
            model, ids.to(args.device), args.out, mask=None if mask is None else mask.to(args.device), taps=args.taps,
            experts=args.experts, last=last, resume=args.resume, meta=meta, quiet=args.quiet,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("qwen35-moe: interrupted; the same command with --resume goes on", file=sys.stderr)
        return 2
    for mlp, cost in model.conversion.items():
        print(f"{mlp}: shared expert converted to MXFP4, relative error {cost:.4f}")
    if last is None and not args.no_envelope:
        write_envelope(truth, _legal_models(args))
    print(report)
    print(f"{args.out}: {len(truth)} tensors of {ids.numel()} tokens, arithmetic {args.arithmetic}")
    return 0


def read_ids(text: str) -> tuple[Tensor, Tensor | None]:
    """Token ids [B, T] and mask (None: no padding), from "1,2,3" or a JSON file: a list of ids, a list of such lists,
    or an object with `input_ids`."""
    found: Any
    if re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", text):
        found = [int(word) for word in text.split(",")]
    else:
        try:
            found = json.loads(Path(text).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise Qwen35Error("cannot read token ids", where=text, found=error, expected="JSON: [1, 2, 3]") from error
    found = found.get("input_ids") if isinstance(found, dict) else found
    rows = [found] if isinstance(found, list) and found and type(found[0]) is int else found
    if not (isinstance(rows, list) and rows and all(_is_row(row) for row in rows)):
        raise Qwen35Error(
            "not token ids", where=text, expected="[1, 2, 3] or [[1, 2], [3, 4, 5]]", found=str(found)[:60]
        )
    return padded([torch.tensor(row) for row in rows])


def _is_row(row: Any) -> bool:
    return isinstance(row, list) and bool(row) and all(type(i) is int and 0 <= i < 2**31 for i in row)


def _last_layer(text: str | None) -> int | None:
    """ "0-7" or "7" -> 7."""
    if text is None:
        return None
    if not (match := re.fullmatch(r"(?:0-)?(\d{1,5})", text)):
        expected = "0-7: a layer needs those before it"
        raise Qwen35Error("bad range of layers", where="--layers", expected=expected, found=text, do="--resume goes on")
    return int(match[1])


def _load(args: argparse.Namespace, arithmetic: Any) -> Model:
    mode = args.mode or ("stream" if args.device_map is None else "packed")
    return load(args.checkpoint, arithmetic, args.shared_expert, mode=mode, text_only=True, **device_options(args))


def _legal_models(args: argparse.Namespace) -> Iterator[Model]:
    for table in legal(args.arithmetic, None):
        yield _load(args, table)
