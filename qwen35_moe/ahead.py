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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from select import select
from threading import Event, Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checkpoint import read_process
from .checkpoint.header import Stored
from .checkpoint.read_process import ANSWER, ASK
from .checkpoint.reader import DTYPES, Reader, Rows
from .errors import Qwen35Error

READERS = max(1, min(12, (os.cpu_count() or 1) - 2))  # processes: with 10 or 14 it took as long (16 cores, an H100)
SLOTS = 2  # pieces of memory of each: one is read into while the other is copied
CHUNK = 2**22  # bytes of a piece
MANY = 256  # reads of a piece: what is asked must fit into a pipe
AHEAD = 2**30  # bytes under way, beside what is asked for
ALIGN = 256  # of each part on the device, as of memory that torch allocates: kernels choose by it


class Read(NamedTuple):
    """Bytes at `at` of a tensor, to begin .. end of a buffer."""

    stored: Stored
    at: int
    begin: int
    end: int


Chunk = tuple[int, int, list[Read]]  # first byte on the device, bytes, where they come from


class Plan:
    """Where the rows of n items lie, and where they go: in the order of the file, if all items follow each other alike
    there, or else item after item. So a part of all items is one strided view.

    items: of each the same parts, alike but for their place. room: for how many items there is to be memory.
    """

    def __init__(self, reader: Reader, items: Sequence[Sequence[Rows]], room: int = 0):
        self.reader, self.parts, self.room = reader, items[0], max(room, len(items))
        self.sizes = [rows.span()[1] for rows in self.parts]
        found = [
            (i, part, rows.stored, rows.span()[0]) for i, item in enumerate(items) for part, rows in enumerate(item)
        ]
        found.sort(key=lambda extent: (extent[2].file, extent[2].begin + extent[3]))
        if not self._place(found):
            order = [part for i, part, *_ in found if i == 0]
            found.sort(key=lambda extent: (extent[0], order.index(extent[1])))
            self._place(found)
        self.nbytes = max(first + self.room * step for first, step in self.strided)
        self.chunks = list(_chunks((stored, at, self.sizes[part], self.at[i, part]) for i, part, stored, at in found))

    def _place(self, extents: Sequence[tuple[int, int, Stored, int]]) -> bool:
        """One behind the other. -> whether each part of all items is a strided view"""
        self.at, end = dict[tuple[int, int], int](), 0
        for i, part, _, _ in extents:
            self.at[i, part] = end
            end += -(-self.sizes[part] // ALIGN) * ALIGN
        parts = range(len(self.sizes))
        self.strided = [(self.at[0, part], self.at.get((1, part), end) - self.at[0, part]) for part in parts]
        alike = all(self.at[i, part] == self.strided[part][0] + i * self.strided[part][1] for i, part in self.at)
        return alike and all(step > 0 for _, step in self.strided)

    def views(self, target: Tensor) -> list[Tensor]:
        """Each part of all items, [room, count, *size] in the dtype that is stored."""
        found = []
        for rows, size, (first, step) in zip(self.parts, self.sizes, self.strided, strict=True):
            part = target.as_strided((self.room, size), (step, 1), first).contiguous()
            found.append(part.view(DTYPES[rows.stored.dtype]).view(self.room, rows.count, *rows.size))
        return found


def _chunks(extents: Iterator[tuple[Stored, int, int, int]]) -> Iterator[Chunk]:
    """Extents (tensor, first byte in it, bytes, first byte on the device), cut and put together to chunks. What adjoins
    in the file and on the device is read at once."""
    start, reads = 0, list[Read]()
    for stored, at, left, position in extents:
        while left:
            if reads and (position - start >= CHUNK or len(reads) == MANY):
                yield start, reads[-1].end, reads
                reads = []
            start = start if reads else position
            begin = position - start
            count = min(left, CHUNK - begin)
            last = reads[-1] if reads else None
            if last and last.end == begin and _follows(last, stored, at):
                reads[-1] = last._replace(end=begin + count)
            else:
                reads.append(Read(stored, at, begin, begin + count))
            at, left, position = at + count, left - count, position + count
    if reads:
        yield start, reads[-1].end, reads


def _follows(last: Read, stored: Stored, at: int) -> bool:
    ends = last.stored.begin + last.at + last.end - last.begin
    return last.stored.file == stored.file and ends == stored.begin + at


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
        begin = number * CHUNK
        self.number, self.begin, self.process = number, begin, feed.processes[number % READERS]
        self.stdin: Any = self.process.stdin
        self.memory, self.bytes = feed.memory[begin : begin + CHUNK], memoryview(feed.shared)[begin : begin + CHUNK]
        self.copied: Any = torch.cuda.Event() if feed.side else None
        self.left, self.complete = 0, True
        self.order: Order | None = None
        self.chunk: Chunk = (0, 0, [])


class Feed:
    """What a device will need, in that order. (On a CPU the same without streams.)"""

    def __init__(self, device: torch.device):
        self.device = device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waiting: deque[weakref.ref[Order]] = deque()
        self.begun: weakref.WeakSet[Order] = weakref.WeakSet()
        self.chunks: deque[tuple[weakref.ref[Order], Chunk]] = deque()
        self.thread, self.lock, self.running = ThreadPoolExecutor(1), Lock(), False
        size = READERS * SLOTS * CHUNK
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
        weakref.finalize(self, _end, self.processes, self.answers)
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
            for read in chunk[2]:
                descriptor = order.plan.reader.descriptor(read.stored)
                at, begin, count = read.stored.begin + read.at, slot.begin + read.begin, read.end - read.begin
                slot.stdin.write(ASK.pack(slot.number, descriptor, at, begin, count))
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
                    order.plan.reader.bytes_read += read.end - read.begin
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
