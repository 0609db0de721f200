"""`qwen35-moe diagnose`: the truth is computed for the tokens of the dump. Exit codes as of `compare`."""

from __future__ import annotations

import argparse
import tempfile

from ..errors import Qwen35Error
from ..oracle.dumps.readers import read_dump
from ..oracle.truth import open_checkpoint, truth_of, write_truth
from .report_options import add_report_options, add_shared, judge, show


def configure(p: argparse.ArgumentParser) -> None:
    p.add_argument("checkpoint")
    p.add_argument("dump")
    p.add_argument(
        "--arithmetic", default="exact", help="of the truth: exact+a4-round-up for W4A4 (default: %(default)s)"
    )
    p.add_argument("--layer", type=int, action="append", help="judge this layer only; may be given again")
    add_shared(p)
    add_report_options(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
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
        return show(judge(truth, dump, loaded, args, args.layer), args)
