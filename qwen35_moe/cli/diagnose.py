"""`qwen35-moe diagnose`: the truth is computed for the tokens of the dump. Exit codes as of `compare`."""

from __future__ import annotations

import argparse

from ..checkpoint import Checkpoint
from ..oracle.compare import diagnose
from ..oracle.dumps.readers import read_dump
from .report_options import add_report_options, add_shared, chosen, show


def configure(p: argparse.ArgumentParser) -> None:
    p.add_argument("checkpoint")
    p.add_argument("dump")
    p.add_argument("--arithmetic", help="of the truth (default: exact; exact+a8 of an FP8 checkpoint)")
    p.add_argument("--layer", type=int, action="append", help="judge this layer only; may be given again")
    add_shared(p)
    add_report_options(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    config = Checkpoint.open(args.checkpoint).config
    dump = read_dump(args.dump, config=config, name_map=args.name_map, layers=args.layer_ids)
    result = diagnose(
        args.checkpoint, dump, arithmetic=args.arithmetic, shared_expert=args.shared_expert,
        layers=args.layer, **chosen(args),
    )  # fmt: skip
    return show(result, args)
