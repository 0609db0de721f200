"""The command line: `qwen35-moe COMMAND`. Each command lives in the module that owns its subject.

Exit codes: 0 done or agree, 1 diverge, 2 could not be done (bad input, nothing to compare).
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
import traceback
from collections.abc import Sequence

from .errors import Qwen35Error

# Modules with an `add_parser(subparsers)`, which sets `run(args) -> int` as the default of its parser.
COMMANDS = ("info_cli", "gate_cli", "trace_cli", "generate_cli", "oracle.dump_config", "oracle.oracle_cli")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="qwen35-moe", description="A reference and an oracle for Qwen3.5 MoE.")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"{__package__}.{name}").add_parser(subparsers)
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold what the terminal cannot show
    try:
        return args.run(args)
    except Qwen35Error as error:
        print(f"qwen35-moe: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 2
    except KeyboardInterrupt:
        print("qwen35-moe: interrupted", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"qwen35-moe: {error}", file=sys.stderr)
        return 2
    except Exception:  # left alone it would exit with 1, and a caller would read a verdict
        traceback.print_exc()
        print("qwen35-moe: a bug in qwen35-moe; please report it with the lines above", file=sys.stderr)
        return 2
