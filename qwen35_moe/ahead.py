"""Weights on their way from disk to a GPU: what it will need next is read and copied while it computes.

Processes read, into pinned memory that they share with this one, and a thread here starts the copies; on the device all
that is left is to view them. (Threads of Python wait for each other at each operation: with them a model took two to
four times as long.) The pinned memory is small enough to stay in the cores' caches: what is read into more of it has to
go to memory and back, at half the speed.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from select import select
from threading import Event, Lock
from typing import Any

import torch
from torch import Tensor

from .checkpoint import plan as plans
from .checkpoint import read_process
from .checkpoint.plan import Chunk, Plan, Read
from .checkpoint.read_process import ANSWER, ASK
from .checkpoint.reader import Reader
from .errors import Qwen35Error

READERS = max(1, min(12, (os.cpu_count() or 1) - 2))  # processes: with 10 or 14 it took as long (16 cores, an H100)
SLOTS = 2  # pieces of memory of each: one is read into while the other is copied
AHEAD = 2**30  # bytes under way, beside what is asked for


class Order:
    """A plan under way; begun when it is its turn, forgotten when nobody holds it any more."""

    def __init__(self, feed: Feed, plan: Plan):
        self.feed, self.plan = feed, plan
        self.target: Tensor | None = None
        self.left, self.done, self.arrived = len(plan.chunks), Event(), None
        self.error: Exception | None = None

    def result(self) -> list[Tensor]:
        """`Plan.views`, for use on the present stream. Error: what cannot be read."""
        return self.plan.views(self.arrive())

    def arrive(self) -> Tensor:
        """All of it as bytes."""
        self.feed.begin(self)
        while not self.done.wait(1):
            self.feed.check()
        assert self.target is not None
        if self.error is not None:
            raise self.error
        if self.arrived is not None:
            present = torch.cuda.current_stream(self.feed.device)
            present.wait_event(self.arrived)
            self.target.record_stream(present)
        return self.target


class Slot:
    """A piece of the memory that a process reads into."""

    def __init__(self, feed: Feed, number: int):
        begin, end = number * plans.CHUNK, (number + 1) * plans.CHUNK
        self.number, self.begin, self.process = number, begin, feed.processes[number % READERS]
        self.stdin: Any = self.process.stdin
        self.memory, self.bytes = feed.memory[begin:end], memoryview(feed.shared)[begin:end]
        self.copied: Any = torch.cuda.Event() if feed.side else None
        self.left, self.complete = 0, True
        self.order: Order | None = None
        self.chunk: Chunk = (0, 0, [])

    def task(self, reader: Reader, read: Read) -> bytes:
        at, begin = read.stored.begin + read.at, self.begin + read.begin
        return ASK.pack(self.number, reader.descriptor(read.stored), at, begin, read.end - read.begin)


class Feed:
    """What a device will need, in that order. (On a CPU the same without streams.)"""

    def __init__(self, device: torch.device):
        if not hasattr(os, "memfd_create"):  # the readers also take their files from /proc
            what, do = "streaming to a GPU needs Linux", 'mode="packed" or "decoded", or stream to the CPU'
            raise Qwen35Error(what, where=str(device), found=sys.platform, do=do)
        self.device = device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waiting: deque[weakref.ref[Order]] = deque()
        self.begun: weakref.WeakSet[Order] = weakref.WeakSet()
        self.chunks: deque[tuple[weakref.ref[Order], Chunk]] = deque()
        self.thread, self.lock, self.running = ThreadPoolExecutor(1), Lock(), False
        size = READERS * SLOTS * plans.CHUNK
        descriptor = os.memfd_create("qwen35-moe")
        os.ftruncate(descriptor, size)
        self.shared = mmap.mmap(descriptor, size)
        self.memory = torch.frombuffer(self.shared, dtype=torch.uint8)
        if self.side:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), size, 0))
        self.answers, answer = os.pipe()
        script = [sys.executable, "-I", "-S", str(Path(read_process.__file__))]
        arguments = [str(x) for x in (descriptor, size, answer, os.getpid())]
        self.processes = [
            subprocess.Popen([*script, *arguments], stdin=subprocess.PIPE, bufsize=0, pass_fds=(descriptor, answer))
            for _ in range(READERS)
        ]
        os.close(answer)
        os.close(descriptor)
        self.close = weakref.finalize(self, _end, self.processes, self.answers)
        self.slots = [Slot(self, number) for number in range(READERS * SLOTS)]
        self.free, self.copying = deque(self.slots), deque[Slot]()

    def order(self, plan: Plan) -> Order:
        order = Order(self, plan)
        self.waiting.append(weakref.ref(order))
        self.begin()
        return order

    def begin(self, asked: Order | None = None) -> None:
        """Begins what is next, as much as may be under way; and whatever comes before that which is asked for."""
        if asked:
            self.begun.discard(asked)
        while self.waiting:
            late = asked is not None and asked.target is None
            if not late and sum(order.plan.nbytes for order in self.begun) >= AHEAD:
                break
            if order := self.waiting.popleft()():
                self._begin(order)
                if order is not asked:
                    self.begun.add(order)

    def _begin(self, order: Order) -> None:
        with torch.inference_mode(False), torch.cuda.stream(self.side):  # the thread is in no such mode
            order.target = torch.empty(order.plan.nbytes, dtype=torch.uint8, device=self.device)
        with self.lock:
            self.chunks.extend((weakref.ref(order), chunk) for chunk in order.plan.chunks)
            idle, self.running = not self.running, True
        if idle:
            self.work = self.thread.submit(self._work)

    def check(self) -> None:
        """Error if the thread has failed."""
        if self.work.done():
            self.work.result()

    def _work(self) -> None:
        """Until all that has begun is on its way to the device."""
        with torch.cuda.stream(self.side):
            while True:
                while self.copying and (not self.side or self.copying[0].copied.query()):
                    self.free.append(self.copying.popleft())
                while self.chunks and self.free:
                    self._ask(*self.chunks.popleft())
                if len(self.free) + len(self.copying) < len(self.slots):
                    self._take()
                elif self.chunks:
                    self.copying[0].copied.synchronize()
                else:
                    with self.lock:
                        if not self.chunks:
                            self.running = False
                            return

    def _ask(self, which: weakref.ref[Order], chunk: Chunk) -> None:
        if (order := which()) is None or order.error:
            return
        slot = self.free.popleft()
        slot.order, slot.chunk, slot.left, slot.complete = order, chunk, len(chunk[2]), True
        try:
            tasks = [slot.task(order.plan.reader, read) for read in chunk[2]]  # all, before the first is asked for
            for task in tasks:
                slot.stdin.write(task)
        except BrokenPipeError:
            self._fail(slot, Qwen35Error("a process that reads has ended", found=slot.process.poll()))
        except Exception as error:
            self._fail(slot, error)

    def _take(self) -> None:
        """Answers of processes; what has been read is copied."""
        while not select([self.answers], [], [], 1)[0]:
            for slot in self.slots:
                if slot.left and slot.process.poll() is not None:
                    self._fail(slot, Qwen35Error("a process that reads has ended", found=slot.process.returncode))
                    return
        for number, complete in ANSWER.iter_unpack(os.read(self.answers, 256 * ANSWER.size)):
            slot = self.slots[number]
            slot.left, slot.complete = slot.left - 1, slot.complete and bool(complete)
            if not slot.left and slot.order:
                self._copy(slot, slot.order)

    def _copy(self, slot: Slot, order: Order) -> None:
        begin, count, reads = slot.chunk
        try:
            for read in reads:
                if slot.complete:
                    order.plan.reader.count(read.end - read.begin)
                else:  # which says what is wrong
                    order.plan.reader.read(read.stored, read.at, slot.bytes[read.begin : read.end])
        except Exception as error:
            self._fail(slot, error)
            return
        assert order.target is not None
        order.target[begin : begin + count].copy_(slot.memory[:count], non_blocking=True)
        if self.side:
            slot.copied.record(self.side)
        order.left -= 1
        if not order.left:
            order.arrived = self.side.record_event() if self.side else None
            order.done.set()
        slot.order = None
        self.copying.append(slot)

    def _fail(self, slot: Slot, error: Exception) -> None:
        if slot.order:
            slot.order.error = error
            slot.order.done.set()
        slot.order, slot.left = None, 0
        self.free.append(slot)


def _end(processes: Sequence[subprocess.Popen[bytes]], answers: int) -> None:
    for process in processes:
        if process.stdin:
            process.stdin.close()
    for process in processes:
        process.wait()
    os.close(answers)


@cache
def feed(device: torch.device) -> Feed:
    """The one of a device. Its processes stay, and so does its pinned memory."""
    return Feed(device)
