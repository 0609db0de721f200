"""`qwen35-moe compare`.

Exit codes: 0 all that was compared agrees, 1 something diverges, 2 it could not be compared, in part or at all.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import Qwen35Error
from ..oracle.dumps.readers import read_dump
from ..oracle.truth import open_checkpoint
from ..trace.file import Trace
from .report_options import add_report_options, judge, show


def configure(p: argparse.ArgumentParser) -> None:
    p.add_argument("truth", help="directory that `trace` wrote")
    p.add_argument("dump", help="directory or file of an engine")
    p.add_argument("--checkpoint", help="where the truth's checkpoint is now (default: where it was)")
    add_report_options(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
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
    return show(judge(truth, dump, loaded, args), args)
