"""Processes of their own, forked from one that has the package imported: a start takes hundredths of a second."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["accelerate.commands.launch", "qwen35_moe.cli.main", "qwen35_moe.cli.trace"])


class Child:
    """function(*arguments) in a process; its result is the exit code, and all that it prints goes to the file `said`.

    function: of an importable module. environment: variables that it gets beside those of this process.
    """

    def __init__(self, said: Path, function: Callable[..., Any], *arguments: Any, **environment: str):
        self.said = said
        self.process = SERVER.Process(target=_run, args=(said, function, arguments, environment))
        self.process.start()

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        assert self.process.pid is not None
        if self.running:
            os.kill(self.process.pid, how)

    def wait(self) -> int:
        """The exit code; of a process that was killed, minus the signal's number."""
        self.process.join(120)
        assert self.process.exitcode is not None, "the process does not end"
        return self.process.exitcode


def _run(said: Path, function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    sys.exit(function(*arguments))
