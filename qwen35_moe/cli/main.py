"""The command line: `qwen35-moe COMMAND`. Each command has a module of its own here, which parses and prints.

Exit codes: 0 done or agree, 1 diverge, 2 could not be done (bad input, nothing to compare).
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TextIO

from .. import __version__
from ..errors import Qwen35Error, printable
from .parsing import Parser, ending

# command -> its module, with `configure(parser)` that sets `run(args) -> int` as a default; and its help. A module is
# imported only when its command is called: importing torch takes seconds.
COMMANDS = {
    "info": ("info", "sizes, formats, the gate's decision, and the memory of a run"),
    "gate": ("gate", "may the shared expert be fused? layer by layer"),
    "check": ("check", "find defects of a checkpoint before it is served, engine by engine"),
    "trace": ("trace", "write the truth: the value of every tap, and the errors of legal rounding"),
    "generate": ("generate", "continue a prompt, or score an engine's tokens"),
    "dump-config": ("dump_config", "print the settings that make an engine dump its values"),
    "compare": ("compare", "compare an engine's dump with the truth: wrong or not, where first, and why"),
    "diagnose": ("diagnose", "compute the truth for the tokens of a dump, then do what `compare` does"),
    "probe": ("probe", "ask a running server for log p, and compare with its checkpoint"),
    "build": ("build", "build a checkpoint of the real structure from a recipe"),
    "compare-dumps": ("compare_dumps", "compare two dumps of the same tokens, without a truth"),
    "verify": ("verify", "check the checksums of a truth"),
    "demo": ("demo", "build tiny checkpoints, plant a known failure in an engine, and find it"),
}


def parser_for(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the arguments of the command that `argv` names."""
    codes = "example: qwen35-moe demo\nexit codes: 0 done or agree, 1 diverge, 2 could not be done"
    parser = Parser(prog="qwen35-moe", description="A reference and an oracle for Qwen3.5 MoE.", epilog=codes)
    parser.add_argument("--version", action="version", version=f"qwen35-moe {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    named = next((word.lower() for word in argv if not word.startswith("-")), None)
    for name, (module, text) in COMMANDS.items():
        command = subparsers.add_parser(name, help=text, epilog=ending(name))
        if name == named:
            importlib.import_module(f"{__package__}.{module}").configure(command)
    return parser


class _Escaped(io.TextIOBase):
    """A text stream whose control characters are shown as escapes."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(printable(text))

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold what the terminal cannot show
    with redirect_stdout(_Escaped(sys.stdout)):
        return _run(argv)


def _open_closed_streams() -> None:
    """A standard stream that the caller closed becomes the null device: the next file that is opened, or a message that
    nobody can see, must not cost the verdict."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest number that is free
    if sys.stdout is None:  # as Python has it for a closed stream, whatever its type says
        sys.stdout = os.fdopen(os.dup(1), "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.dup(2), "w")


def _run(argv: Sequence[str]) -> int:
    """The exit code of a command. Only a verdict is 1: whatever is raised, arguments and environment included, is 2."""
    try:
        with _stopped_at_once():
            parser = parser_for(argv)
        args = parser.parse_args(argv)
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return 2
    except KeyboardInterrupt:
        return _failed("interrupted")
    except (Qwen35Error, OSError) as error:
        return _failed(str(error))
    except MemoryError:
        return _failed("out of memory; --mode stream holds the least")
    except Exception:  # left alone it would exit with 1, and a caller would read a verdict
        print(printable(traceback.format_exc()), end="", file=sys.stderr)
        return _failed("a bug in qwen35-moe; please report it with the lines above")


@contextmanager
def _stopped_at_once() -> Iterator[None]:
    """An interrupt ends the process here. While modules are imported, a KeyboardInterrupt may be raised in a callback
    of torch or of the import system, which drops it."""

    def stop(*_: object) -> None:
        os.write(2, b"qwen35-moe: interrupted\n")
        os._exit(2)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _failed(text: str) -> int:
    with suppress(OSError, ValueError):  # stderr may be closed
        print(f"qwen35-moe: {printable(text)}", file=sys.stderr)
    return 2
