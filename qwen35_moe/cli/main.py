"""The command line: `qwen35-moe COMMAND`. Each command has a module of its own here, which parses and prints.

Exit codes: 0 done or agree, 1 diverge, 2 could not be done (bad input, nothing to compare).
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
import traceback
from collections.abc import Sequence

from .. import __version__
from ..errors import Qwen35Error

# command -> its module, with `configure(parser)` that sets `run(args) -> int` as a default; and its help. A module is
# imported only when its command is called: importing torch takes seconds.
COMMANDS = {
    "info": ("info", "sizes, formats, the gate's decision, and memory and time that a run will need"),
    "gate": ("gate", "whether the shared expert may be fused, layer by layer"),
    "trace": ("trace", "write the truth: what every tap holds, and how far legal roundings stray"),
    "generate": ("generate", "continue a prompt, or score an engine's tokens"),
    "dump-config": ("dump_config", "what to set in an engine to get a good dump, ready to paste"),
    "compare": ("compare", "an engine's dump against the truth: is it wrong, where first, and why"),
    "diagnose": ("diagnose", "the same without a truth: it is computed for the tokens of the dump"),
    "demo": ("demo", "build tiny checkpoints, plant a known failure in an engine, and find it"),
}


def parser_for(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the arguments of the command that `argv` names."""
    parser = argparse.ArgumentParser(
        prog="qwen35-moe", description="A reference and an oracle for Qwen3.5 MoE.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"qwen35-moe {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    named = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, text) in COMMANDS.items():
        command = subparsers.add_parser(name, help=text, allow_abbrev=False)
        if name == named:
            importlib.import_module(f"{__package__}.{module}").configure(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold what the terminal cannot show
    args = parser_for(argv).parse_args(argv)
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
