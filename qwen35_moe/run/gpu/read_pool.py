"""Processes that read from files into memory that they share with this one, and that a GPU can copy from.

(Threads of Python wait for each other at each operation: with some that read, a model took two to four times as long.)
A chunk is read by all of them, by each into its own part of a slot. So a process writes little memory, again and again,
which stays near its core (12 processes read 5 GB in 84 to 87 ms with 4 MiB for each, in 112 with 16), and there are few
chunks to ask for and to copy: beside a model that computes, that counts most. But all wait for the last, which is late
where two share a core: on 16 cores, 12 processes streamed a model of 8.9 GB in 190 ms (median 207), 15 in 202 (214).
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from select import select
from typing import Any, cast

import torch
from torch import Tensor

from ...errors import Qwen35Error
from . import plan, read_process
from .read_process import ANSWER, ASK

READERS = max(1, min(15, (os.cpu_count() or 1) * 3 // 4))  # processes; the rest of the cores for who computes
SLOTS = 8  # chunks: some are read into while others are copied


class Slot:
    """Memory for one chunk."""

    def __init__(self, number: int, memory: Tensor):
        self.number, self.memory = number, memory
        self.left, self.complete = 0, True  # processes that have not answered; whether the others had all bytes
        self.holds: Any = None  # what it is read for


class ReadPool:
    """Its processes end with it, or with this process. Error: another system than Linux."""

    def __init__(self, device: torch.device):
        if not hasattr(os, "memfd_create"):  # the processes also take their files from /proc
            what, do = "streaming to a GPU needs Linux", 'mode="packed" or "decoded", or stream to the CPU'
            raise Qwen35Error(what, where=str(device), found=sys.platform, do=do)
        size = SLOTS * plan.CHUNK
        descriptor = os.memfd_create("qwen35-moe")
        self.answered, answer = os.pipe()
        try:
            os.ftruncate(descriptor, size)
            memory = torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
            self.processes: list[subprocess.Popen[bytes]] = []
            pinned = memory if device.type == "cuda" else None
            self.close = weakref.finalize(self, _end, self.processes, self.answered, pinned)
            if pinned is not None:
                with torch.cuda.device(device):
                    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(pinned.data_ptr(), size, 0))
            script = [sys.executable, "-I", "-S", str(Path(read_process.__file__))]
            for i in range(READERS):  # in sessions of their own: Ctrl-C is for this one
                numbers = (descriptor, SLOTS, plan.CHUNK, i, READERS, answer, os.getpid())
                self.processes.append(
                    subprocess.Popen(
                        [*script, *map(str, numbers)],
                        stdin=subprocess.PIPE,
                        bufsize=0,
                        pass_fds=(descriptor, answer),
                        start_new_session=True,
                    )
                )
        finally:
            os.close(answer)
            os.close(descriptor)
        self.slots = [Slot(i, part) for i, part in enumerate(memory.split(plan.CHUNK))]
        self.reading = 0  # slots

    def ask(self, wanted: Iterable[tuple[Slot, bytes]]) -> None:
        """Has slots read, each by a list of `read_process.TASK`s."""
        asks = b""
        for slot, tasks in wanted:
            slot.left, slot.complete, self.reading = len(self.processes), True, self.reading + 1
            asks += ASK.pack(slot.number, len(tasks)) + tasks
        try:
            for process in self.processes:
                left = asks
                while left:
                    left = left[cast(Any, process.stdin).write(left) :]
        except BrokenPipeError:
            self._lost()

    def take(self, wait: float) -> list[Slot]:
        """Slots that have been read, all at once; waits so many seconds for the first."""
        if not self.reading:
            return []
        if not select([self.answered], [], [], wait)[0]:
            if wait >= 1 and any(process.poll() is not None for process in self.processes):
                self._lost()
            return []
        if not (answers := os.read(self.answered, 256 * ANSWER.size)):  # all have ended
            self._lost()
        read = []
        for number, complete in ANSWER.iter_unpack(answers):
            slot = self.slots[number]
            slot.left, slot.complete = slot.left - 1, slot.complete and bool(complete)
            if not slot.left:
                read.append(slot)
        self.reading -= len(read)
        return read

    def _lost(self) -> None:
        """Error: a process has ended, and nobody knows what it was at."""
        found = sorted({code for process in self.processes if (code := process.poll()) is not None})
        raise Qwen35Error("a process that reads has ended", found=f"status {found}", do="try again")


def _end(processes: Sequence[subprocess.Popen[bytes]], answered: int, pinned: Tensor | None) -> None:
    for process in processes:
        if process.stdin:
            process.stdin.close()
        process.terminate()
    for process in processes:
        process.wait()
    os.close(answered)
    if pinned is not None:
        torch.cuda.cudart().cudaHostUnregister(pinned.data_ptr())
