"""`qwen35-moe check`: what is wrong with a checkpoint before it is served."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from urllib.parse import quote

from .. import __version__
from ..gate.decide import NEWEST
from .device_options import add_ignored_keys
from .sarif import sarif_log


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Looks for what would crash, load garbage or be dropped, engine by engine, without computing anything. "
        "Exit code 0: no errors, 1: errors, 2: the checkpoint cannot be read."
    )
    parser.add_argument("checkpoint", help="checkpoint folder or .safetensors file")
    parser.add_argument("--engine", choices=(*NEWEST, "all"), default="all",
                        help="check for this engine's loader (default: %(default)s)")  # fmt: skip
    parser.add_argument("--bytes", action="store_true", help="also read every value: NaN, infinity, zero scales")
    parser.add_argument("--sarif", metavar="FILE", help="write the findings as SARIF 2.1.0, required fields only")
    parser.add_argument("--json", metavar="FILE", help="write the findings as JSON")
    add_ignored_keys(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the findings, the worst first; 1 if there are errors. Error: a checkpoint that cannot be read."""
    from ..checkpoint import Checkpoint
    from ..run.lint import lint
    from ..run.lint_files import check_bytes

    engines = tuple(NEWEST) if args.engine == "all" else (args.engine,)
    with Checkpoint.open(args.checkpoint) as checkpoint:
        found = lint(checkpoint, engines, args.ignore_config_keys)
        found += check_bytes(checkpoint) if args.bytes else []
    if args.json:
        document = {"checkpoint": args.checkpoint, "version": __version__, "findings": list(map(vars, found))}
        Path(args.json).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if args.sarif:
        folder = Path(args.checkpoint)
        uri = folder.as_uri() if folder.is_absolute() else quote(folder.as_posix())
        texts = (f.text + (f" [{f.engine}]" if f.engine else "") for f in found)
        results = [(f.rule, f.level, text, uri, f.where) for f, text in zip(found, texts, strict=True)]
        log = sarif_log("qwen35-moe check", results)
        Path(args.sarif).write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    for finding in found:
        print(finding)
    errors = sum(finding.level == "error" for finding in found)
    print(f"{args.checkpoint}: errors: {errors}, warnings: {sum(f.level == 'warning' for f in found)}")
    return 1 if errors else 0
