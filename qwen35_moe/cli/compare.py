"""`qwen35-moe compare`.

Exit codes: 0 all of it agrees, 1 something diverges, 2 it could not be compared, in part or at all: docs/exit-codes.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..oracle.compare import compare
from ..oracle.dumps.readers import read_dump
from ..trace.file import Trace
from .parsing import check_order
from .report_options import add_report_options, check_outputs, chosen, print_comparison

ANSWERS = (".json", ".jsonl")


def configure(p: argparse.ArgumentParser) -> None:
    p.description = "Compares an engine's dump with a truth. Says whether the dump is wrong, where first, and why."
    p.add_argument("truth", help="folder that `trace` wrote")
    p.add_argument("dump", help="dump of an engine: a folder or a file; or answers of a server (JSON, JSONL)")
    p.add_argument("--checkpoint", help="the truth's checkpoint, if it was moved")
    add_report_options(p)


def run(args: argparse.Namespace) -> int:
    check_order(args.truth, args.dump, "compare")
    check_outputs(args)
    truth = Trace.open(args.truth)
    if args.dump.endswith(ANSWERS) and Path(args.dump).is_file():
        from .probe import saved  # here: few comparisons are of answers

        return saved(truth, Path(args.dump), args)
    dump = read_dump(args.dump, config=truth.meta.get("config"), name_map=args.name_map, layers=args.layer_ids)
    return print_comparison(compare(truth, dump, args.checkpoint, **chosen(args)), args)
