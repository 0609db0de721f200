"""`qwen35-moe diagnose`: the truth is computed for the tokens of the dump. Exit codes as of `compare`."""

from __future__ import annotations

import argparse

from ..checkpoint import Checkpoint
from ..oracle.compare import diagnose
from ..oracle.dumps.readers import read_dump
from .device_options import add_image_options, given_images
from .parsing import check_order
from .report_options import add_report_options, add_shared, check_outputs, chosen, print_comparison


def configure(p: argparse.ArgumentParser) -> None:
    p.description = "Computes the truth for the tokens of a dump. Says whether the dump is wrong, where first, and why."
    p.add_argument("checkpoint", help="checkpoint folder or .safetensors file")
    p.add_argument("dump", help="dump of an engine: a folder or a file")
    p.add_argument("--arithmetic", help="arithmetic of the truth (default: exact; exact+a8 for an FP8 checkpoint)")
    p.add_argument("--out", metavar="TRUTH", help="keep the truth in this folder, for `compare`")
    add_image_options(p)
    add_shared(p)
    add_report_options(p)


def run(args: argparse.Namespace) -> int:
    check_order(args.checkpoint, args.dump, "diagnose")
    check_outputs(args)
    config = Checkpoint.open(args.checkpoint).config
    dump = read_dump(args.dump, config=config, name_map=args.name_map, layers=args.layer_ids)
    result = diagnose(args.checkpoint, dump, args.out, arithmetic=args.arithmetic, shared_expert=args.shared_expert,
                      images=given_images(args), **chosen(args))  # fmt: skip
    return print_comparison(result, args)
