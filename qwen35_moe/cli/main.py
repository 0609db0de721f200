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
from .parsing import Parser

CHECKPOINT = (
    "CHECKPOINT: a folder of safetensors with config.json (BF16, FP8, MXFP4 of Quark, compressed-tensors or gpt-oss)"
)
DUMP = ("DUMP: SGLang's dumper or Pass*.pt, vLLM's hidden states, ATOM's layer files, transformers' debug tree, "
        "llama.cpp's logits and KL base files, safetensors, npz, npy, pt")  # fmt: skip
TRUTH = "TRUTH: what `trace` wrote"
VERDICT = "0 all of it agrees, 1 something diverges, 2 something was not compared (docs/exit-codes.md)"
DONE = "0 done, 2 could not be done"
# command -> its help; an example, exit codes and formats, which end its `-h`. Its module has the command's name,
# `configure(parser)`, which adds its arguments, and `run(args) -> int`. A module is imported only when its command is
# called: importing torch takes seconds.
COMMANDS: dict[str, tuple[str, str, str, str]] = {
    "info": ("sizes, formats, the gate's decision, and the memory of a run", "CHECKPOINT --tokens 4096",
             "0 done, 1 a checksum differs, 2 could not be read", CHECKPOINT),
    "gate": ("may the shared expert be fused? layer by layer", "CHECKPOINT --all-rules",
             "0 decided, whatever the answer, 2 could not be read", CHECKPOINT + "; or a config.json alone"),
    "check": ("find defects of a checkpoint before it is served, engine by engine",
              "CHECKPOINT --engine sglang --sarif check.sarif", "0 no error, 1 errors, 2 could not be read",
              CHECKPOINT),
    "trace": ("write the truth: the value of every tap, and the errors of legal rounding",
              "CHECKPOINT --ids ids.json --out truth", DONE,
              CHECKPOINT + ". ids.json: [1, 2, 3] or [[1, 2], [3]]. The trace: docs/trace-format.md"),
    "generate": ("continue a prompt, or score an engine's tokens", "CHECKPOINT --ids 3,1,4 --top 3", DONE, CHECKPOINT),
    "dump-config": ("print the settings that make an engine dump its values", "sglang", DONE,
                    "prints text to paste; nothing is read"),
    "compare": ("compare an engine's dump with the truth: wrong or not, where first, and why",
                "truth DUMP --html report.html", VERDICT, f"{TRUTH}. {DUMP}"),
    "diagnose": ("compute the truth for the tokens of a dump, then do what `compare` does",
                 "CHECKPOINT DUMP --out truth", VERDICT, f"{CHECKPOINT}. {DUMP}"),
    "probe": ("ask a running server for log p, and compare with its checkpoint", "CHECKPOINT http://127.0.0.1:30000",
              "0 agrees, 1 diverges, 2 cannot tell or ask",
              CHECKPOINT + ". Servers: SGLang, vLLM, llama-server, OpenAI-like"),
    "build": ("build a checkpoint of the real structure from a recipe", "tiny-mxfp4 --out ckpt",
              "0 built, 1 not the pinned bytes, 2 could not be built",
              "RECIPE: a name above, or a .toml file of the same form"),
    "compare-dumps": ("compare two dumps of the same tokens, without a truth", "before after", VERDICT, DUMP),
    "verify": ("check the checksums of a truth", "truth", "0 all checksums hold, 2 a file differs or cannot be read",
               TRUTH),
    "demo": ("build tiny checkpoints, plant a known failure in an engine, and find it", "--out build/demo",
             "0 all claims hold, 1 a claim fails, 2 could not be run", "takes no files"),
}  # fmt: skip


def parser_for(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the arguments of the command that `argv` names."""
    epilog = "example: qwen35-moe demo\nexit codes: 0 done or agree, 1 diverge, 2 could not be done"
    parser = Parser(prog="qwen35-moe", description="A reference and an oracle for Qwen3.5 MoE.", epilog=epilog)
    parser.add_argument("--version", action="version", version=f"qwen35-moe {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    named = next((word.lower() for word in argv if not word.startswith("-")), None)
    for name, (text, example, codes, formats) in COMMANDS.items():
        epilog = f"example: qwen35-moe {name} {example}\nexit codes: {codes}\nformats: {formats}"
        command = subparsers.add_parser(name, help=text, epilog=epilog)
        if name == named:
            module = importlib.import_module(f"{__package__}.{name.replace('-', '_')}")
            module.configure(command)
            command.set_defaults(run=module.run)
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
