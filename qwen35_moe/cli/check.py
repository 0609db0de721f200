"""`qwen35-moe check`: what is wrong with a checkpoint before it is served."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .. import __version__
from ..gate.decide import NEWEST
from .device_options import add_ignored_keys

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


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
    records = [vars(finding) for finding in found]
    if args.json:
        document = {"checkpoint": args.checkpoint, "version": __version__, "findings": records}
        Path(args.json).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if args.sarif:
        Path(args.sarif).write_text(json.dumps(sarif(args.checkpoint, records), indent=1) + "\n", encoding="utf-8")
    for finding in found:
        print(finding)
    errors = sum(finding.level == "error" for finding in found)
    print(f"{args.checkpoint}: errors: {errors}, warnings: {sum(f.level == 'warning' for f in found)}")
    return 1 if errors else 0


def sarif(path: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """The findings as SARIF 2.1.0: the required fields, and the module as a logical location.

    Validated by Microsoft's Sarif.Multitool 5.7.0 (`validate`): no errors.
    """
    folder = Path(path)
    uri = folder.as_uri() if folder.is_absolute() else quote(folder.as_posix())
    results = [
        {
            "ruleId": record["rule"],
            "level": record["level"],
            "message": {"text": record["text"] + (f" [{record['engine']}]" if record["engine"] else "")},
            "locations": [
                {
                    "physicalLocation": {"artifactLocation": {"uri": uri}},
                    "logicalLocations": [{"fullyQualifiedName": record["where"]}],
                }
            ],
        }
        for record in records
    ]
    return sarif_log("qwen35-moe check", results)


def sarif_log(tool: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The results of one run of a tool, with the rules that they name."""
    rules = [{"id": rule} for rule in sorted({result["ruleId"] for result in results})]
    driver = {"name": tool, "version": __version__, "rules": rules}
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}
