"""Options of `compare` and `diagnose`, and what both do with the result."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import Qwen35Error, printable
from ..numerics.choices import STATE_DTYPES
from ..oracle.judge.envelope import LIMIT
from ..oracle.judge.records import Comparison
from ..oracle.judge.where import Where
from ..oracle.report import report
from ..run.files import whole
from ..run.load import MODES, SHARED_EXPERT_MODES
from ..run.prompt import read_ids
from .device_options import add_device_options, device_options
from .parsing import layers, within


def add_shared(p: argparse.ArgumentParser) -> None:
    p.add_argument("--shared-expert", default="unfused", choices=SHARED_EXPERT_MODES,
                   help="how to compute the shared expert (default: %(default)s)")  # fmt: skip


def add_common(p: argparse.ArgumentParser) -> None:
    """Options of all that compares."""
    p.add_argument("--json", type=new_file, help="write the records, one JSON object a line")
    p.add_argument("--width", type=within(int, 20, 10_000), default=80, help="width of the text in columns, 20 or more "
                   "(default: %(default)s)")  # fmt: skip
    p.add_argument("--limit", type=within(float, 1e-6, 1e6), default=LIMIT, help="largest error that passes, in units "
                   "of the legal error (default: %(default)s)")  # fmt: skip


def add_report_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--html", type=new_file, help="write the report as one self-contained page")
    add_common(p)
    p.add_argument("--engine", help="the engine's arithmetic, a name of `trace --list`: its errors are legal, "
                   "too (of float32: they alone)")  # fmt: skip
    p.add_argument("--layer", metavar="LAYERS", action="append", help="judge only these layers: 3, or 1,2, or 1-3")
    p.add_argument(
        "--layer-ids", type=partial(layers, where="--layer-ids"), help="the layer ids that you gave to vLLM: 2,18,33"
    )
    p.add_argument("--name-map", help="JSON file for plain tensors: {engine's name or regular expression: key}")
    p.add_argument("--ids", help="token ids, if the dump holds none: 1,2,3, or a file with a list of ids, or with "
                   "one list a request, in the order of the dump's rows")  # fmt: skip
    p.add_argument("--partial", action="store_true", help="exit with 0 although the dump lacks tokens of the truth")
    p.add_argument("--kv-cache", metavar="fp8_e4m3[:SCALE]", help="the engine's dtype for keys and values")
    p.add_argument("--state", choices=STATE_DTYPES, help="the engine's dtype for DeltaNet's state")
    add_device_options(p)
    p.add_argument("--mode", choices=MODES, help="how weights are held in memory (default: by size)")
    p.add_argument("--quiet", action="store_true", help="print no progress to stderr")


def check_outputs(args: argparse.Namespace) -> None:
    """Error: two outputs have one path, or an output has the path of an input."""
    given = {name: Path(value).resolve() for name, value in vars(args).items() if isinstance(value, str | Path)}
    new = [given[name] for name in ("html", "json", "save", "out") if name in given]
    read = {given[name] for name in ("truth", "checkpoint", "dump", "a", "b", "ids", "name_map") if name in given}
    folders = {given[name] for name in ("truth", "checkpoint") if name in given}
    for path in new:
        if new.count(path) > 1 or path in read or path.is_file() and not folders.isdisjoint(path.parents):
            found = "two outputs" if new.count(path) > 1 else "what this command reads"
            raise Qwen35Error("this would be overwritten", where=path, found=found, do="choose another name")


def chosen(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `compare` and `diagnose` that both commands have."""
    ids = None if args.ids is None else read_ids(args.ids, "--ids")
    some = None if args.layer is None else layers(",".join(args.layer))
    return {"layers": some, "engine": args.engine, "limit": args.limit, "partial": args.partial, "ids": ids,
            "kv_cache": args.kv_cache, "state": args.state, "where": where(args)}  # fmt: skip


def where(args: argparse.Namespace) -> Where:
    """Where blocks run again. Error: what `trace` refuses, and limits of memory: one layer is held at a time."""
    options = device_options(args)
    if options.get("max_memory"):
        raise Qwen35Error("one layer is held at a time", where="--max-memory", do="leave it out")
    return Where(args.device, options.get("device_map"), args.mode, args.quiet, args.ignore_config_keys)


def new_file(text: str) -> Path:
    path = Path(text)
    is_device = path.exists() and not path.is_file()  # /dev/stdout, which whole() writes to as it is
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder")
    if not os.access(path if is_device else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: its folder is missing or read-only")
    return path


def print_comparison(result: Comparison, args: argparse.Namespace) -> int:
    print(report(result, width=args.width))
    made = {"version": f"qwen35-moe {__version__}", "command": shlex.join(["qwen35-moe", *sys.argv[1:]]),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}  # fmt: skip
    files = {path: partial(report, result, form, made=made)
             for path, form in ((args.json, "json"), (args.html, "html")) if path is not None}  # fmt: skip
    return write_outputs(result.exit_code, files, args.html)


def write_outputs(code: int, files: Mapping[Path, Callable[[], str]], page: Path | None = None) -> int:
    """Writes files (path -> what makes its text), and prints the path of the page. Returns the exit code: `code`, or 2
    instead of 0 if a file cannot be written."""
    for path, content in files.items():
        try:
            text = content()
            with whole(path) as temporary:
                temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # of paths that are not UTF-8
            if path == page:
                print(f"\n{path}")
        except Exception as error:  # a page that cannot be made takes no verdict with it
            print(f"qwen35-moe: cannot write {printable(str(path))}: {printable(str(error))}", file=sys.stderr)
            code = code or 2
    return code
