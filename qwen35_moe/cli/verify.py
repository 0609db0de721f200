"""`qwen35-moe verify`: are the bytes of a truth those that were written?"""

from __future__ import annotations

import argparse

from ..oracle.judge.envelope_file import check_envelope
from ..trace.file import Trace


def configure(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Reads all files of a trace and of its envelope, and compares their checksums with those in the trace."
    )
    p.add_argument("truth", help="folder that `trace` wrote")


def run(args: argparse.Namespace) -> int:
    truth = Trace.open(args.truth)
    truth.verify()
    beside = "and an envelope" if check_envelope(truth) else "without an envelope"
    print(f"{args.truth}: {len(truth)} tensors in {len(truth.files)} files {beside}, as they were written")
    return 0
