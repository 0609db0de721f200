"""`qwen35-moe compare-dumps A B`: cold against warm, TP 1 against TP 2, batched against alone.

Exit codes: 0 bit-equal, or (with --checkpoint) all differences are legal; 1 they differ; 2 not comparable.
"""

from __future__ import annotations

import argparse
import json
import textwrap

from ..checkpoint import Checkpoint
from ..oracle.dumps.readers import read_dump
from ..oracle.judge.records import ratio_text
from ..oracle.two_dumps import Difference, TwoDumps, compare_dumps
from .report_options import add_common, add_shared, check_outputs, write_outputs

TAPS_SHOWN = 12


def configure(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Compares two dumps of the same tokens. It needs no truth. With --checkpoint it knows the legal errors."
    )
    p.add_argument("a", metavar="A", help="dump of an engine: a folder or a file")
    p.add_argument("b", metavar="B", help="another dump of the same tokens")
    p.add_argument("--checkpoint", help="divide differences by the legal error, and say which dump is wrong")
    p.add_argument("--arithmetic", help="arithmetic of the truth (default: exact; exact+a8 for an FP8 checkpoint)")
    p.add_argument("--engine", help="the engine's arithmetic, a name of `trace --list`: its errors are legal, too")
    add_shared(p)
    add_common(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    check_outputs(args)
    config = None if args.checkpoint is None else Checkpoint.open(args.checkpoint).config
    a, b = (read_dump(path, config=config) for path in (args.a, args.b))
    options = {"arithmetic": args.arithmetic, "shared_expert": args.shared_expert, "engine": args.engine}
    result = compare_dumps(a, b, args.checkpoint, args.limit, **(options if args.checkpoint else {}))
    print(two_dumps_text(result, args.a, args.b, args.width))
    records = "".join(json.dumps(row) + "\n" for row in result.rows())
    return write_outputs(result.exit_code, {args.json: lambda: records} if args.json else {})


def two_dumps_text(result: TwoDumps, a: str, b: str, width: int) -> str:
    """The report; no line is longer than `width`."""
    lines = [f"A        {a}", f"B        {b}", f"tokens   {result.tokens[1]} of {result.tokens[0]} are in both", ""]
    lines += textwrap.wrap(result.verdict, width)
    for name, one in (("A", result.a), ("B", result.b)):
        for said in [one.verdict, *map(str, one.diagnoses)] if one is not None and one.diverges else []:
            lines += textwrap.wrap(f"{name}: {said}", width, initial_indent="  ", subsequent_indent="  ")
    if result.differing:
        lines += ["", "tap                                   rows  first  relative   A x    B x"]
        lines += [_line(tap) for tap in result.differing[:TAPS_SHOWN]]
    if len(result.differing) > TAPS_SHOWN:
        lines.append(f"and {len(result.differing) - TAPS_SHOWN} taps more")
    for name, keys in zip("AB", result.only, strict=True):
        if keys:
            lines += textwrap.wrap(f"only in {name}: {len(keys)} taps: {', '.join(keys[:4])}", width)
    alike: dict[str, list[Difference]] = {}
    for tap in result.taps:
        alike.setdefault(" ".join(tap.problem.split()).partition(" where: ")[0], []).append(tap)
    for problem, taps in [(p, taps) for p, taps in alike.items() if p][:TAPS_SHOWN]:
        more = f" and {len(taps) - 1} taps more" if len(taps) > 1 else ""
        lines += textwrap.wrap(f"problem  {taps[0].key}{more}: {problem}", width)
    lines += [line for note in result.notes for line in textwrap.wrap(f"note     {note}", width)]
    return "\n".join(line[:width] for line in lines)


def _line(tap: Difference) -> str:
    first = "-" if tap.first is None else f"{tap.first[0]}:{tap.first[1]}"
    errors = "".join(f"{'-' if x is None else ratio_text(x):>7}" for x in (tap.error_a, tap.error_b))
    return f"{tap.key:<34.34}{tap.differ:>4}/{tap.rows:<5}{first:>6}{tap.rel:>9.1e}{errors}"
