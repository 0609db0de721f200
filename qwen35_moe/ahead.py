"""Weights on their way from disk to a GPU: what it will need next is read and copied while it computes.

Processes read, into pinned memory that they share with this one, and the thread that computes starts the copies as it
goes, at each tap (`Feed.go_on`); on the device all that is left is to view them. (Threads of Python wait for each other
at each operation: with some that read, a model took two to four times as long.) Each process has its own part of the
pinned memory, and all of it is small beside a large cache: reading into more memory, or into what another core has
written, takes up to twice as long.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from select import select
from threading import Lock, RLock
from typing import Any, cast

import torch
from torch import Tensor

from .checkpoint import plan as plans
from .checkpoint import read_process
from .checkpoint.plan import Chunk, Plan
from .checkpoint.read_process import ANSWER, ASK
from .errors import Qwen35Error
from .taps import OBSERVE, Site, attach

READERS = max(1, min(12, (os.cpu_count() or 1) - 2))  # processes
SLOTS = 2  # pieces of memory of each: one is read into while the other is copied
PAUSE = 2e-4  # seconds between two looks at what has been read
AHEAD = 2**30  # bytes under way, beside what is asked for


class Order:
    """A plan under way; begun when it is its turn, forgotten when nobody holds it any more."""

    def __init__(self, feed: Feed, plan: Plan):
        self.feed, self.plan = feed, plan
        self.target: Tensor | None = None
        self.left, self.arrived = len(plan.chunks), None
        self.error: Exception | None = None

    def result(self) -> list[Tensor]:
        """`Plan.views`, for use on the present stream. Error: what cannot be read."""
        return self.plan.views(self.arrive())

    def arrive(self) -> Tensor:
        """All of it as bytes."""
        self.feed.begin(self)
        while self.left and self.error is None:
            if self.feed.broken:
                return feed(self.feed.device).order(self.plan).arrive()
            self.feed.go_on(wait=1)
        if self.error is not None:
            raise self.error
        assert self.target is not None
        if self.arrived is not None:
            present = torch.cuda.current_stream(self.feed.device)
            present.wait_event(self.arrived)
            self.target.record_stream(present)
        return self.target


class Slot:
    """A piece of the memory that a process reads into, for a chunk of an order."""

    def __init__(self, feed: Feed, number: int):
        self.number, self.stdin = number, cast(Any, feed.processes[number % READERS].stdin)
        self.memory = feed.memory[number * plans.CHUNK : (number + 1) * plans.CHUNK]
        self.copied: Any = torch.cuda.Event() if feed.side else None
        self.order: Order | None = None
        self.chunk: Chunk = (0, 0, [])


class Feed:
    """What a device will need, in that order. (On a CPU the same without streams.) As a tap handler, it goes on."""

    stage, wants_experts = OBSERVE, False

    def __init__(self, device: torch.device):
        if not hasattr(os, "memfd_create"):  # the readers also take their files from /proc
            what, do = "streaming to a GPU needs Linux", 'mode="packed" or "decoded", or stream to the CPU'
            raise Qwen35Error(what, where=str(device), found=sys.platform, do=do)
        self.device = device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waiting: deque[weakref.ref[Order]] = deque()
        self.begun: weakref.WeakSet[Order] = weakref.WeakSet()
        self.chunks: deque[tuple[weakref.ref[Order], Chunk]] = deque()
        self.lock, self.next_look, self.broken = RLock(), 0.0, False
        slots = READERS * SLOTS
        size = slots * plans.CHUNK
        descriptor = os.memfd_create("qwen35-moe")
        self.answers, answer = os.pipe()
        try:
            os.ftruncate(descriptor, size)
            self.memory = torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
            self.processes: list[subprocess.Popen[bytes]] = []
            registered = self.memory if self.side else None
            self.close = weakref.finalize(self, _end, self.processes, self.answers, registered)
            if self.side:
                with torch.cuda.device(device):
                    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), size, 0))
            script = [sys.executable, "-I", "-S", str(Path(read_process.__file__))]
            arguments = [str(x) for x in (descriptor, slots, plans.CHUNK, answer, os.getpid())]
            for _ in range(READERS):  # in sessions of their own: Ctrl-C is for this one
                self.processes.append(
                    subprocess.Popen(
                        [*script, *arguments],
                        stdin=subprocess.PIPE,
                        bufsize=0,
                        pass_fds=(descriptor, answer),
                        start_new_session=True,
                    )
                )
        finally:
            os.close(answer)
            os.close(descriptor)
        self.slots = [Slot(self, number) for number in range(slots)]
        self.free, self.copying = deque(self.slots), deque[Slot]()

    def order(self, plan: Plan) -> Order:
        order = Order(self, plan)
        self.waiting.append(weakref.ref(order))
        self.begin()
        return order

    def begin(self, asked: Order | None = None) -> None:
        """Begins what is asked for, before all else, and what is next, as much as may be under way."""
        with self._at_work():
            if self.broken:
                return
            if asked:
                self.begun.discard(asked)
                if asked.target is None:
                    self.chunks.extendleft(reversed(self._begin(asked)))
            while self.waiting and sum(order.plan.nbytes for order in self.begun) < AHEAD:
                order = self.waiting[0]()
                if order and order.target is None:
                    try:
                        self.chunks.extend(self._begin(order))
                    except torch.OutOfMemoryError:  # it can wait until it is asked for
                        break
                    self.begun.add(order)
                self.waiting.popleft()
        self.go_on()

    def _begin(self, order: Order) -> list[tuple[weakref.ref[Order], Chunk]]:
        """Makes room for it. -> what is to be read"""
        with torch.inference_mode(False), torch.cuda.stream(self.side):  # it is copied into in whichever mode
            order.target = torch.empty(order.plan.nbytes, dtype=torch.uint8, device=self.device)
        return [(weakref.ref(order), chunk) for chunk in order.plan.chunks]

    def go_on(self, wait: float = 0) -> None:
        """Starts copies of what has been read, and asks for more. wait: seconds for something to happen, at most."""
        if not wait and time.perf_counter() < self.next_look:
            return
        with self._at_work():
            if self.broken:
                return
            if wait:
                self._ask_for_more()
            self._take(wait)
            self._ask_for_more()
        self.next_look = time.perf_counter() + PAUSE

    def listed(self, x: Tensor) -> list[int]:
        """`x.tolist()`; while the device is waited for, copies go on."""
        if not self.side:
            return x.tolist()
        host = torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
        known = torch.cuda.current_stream(self.device).record_event()
        while not known.query():
            self.go_on(wait=PAUSE)
        return host.tolist()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """One thread at a time; where it is interrupted, nobody knows what is under way."""
        with self.lock:
            try:
                yield
            except BaseException:
                self.broken = True
                raise

    def __call__(self, site: Site, x: Tensor) -> None:
        self.go_on()

    def beside(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The same method; while it computes, copies are started. It does not keep its module."""
        method = weakref.WeakMethod(forward)

        def run(*args: Any) -> Tensor:
            computed = method()
            assert computed is not None
            with attach(self):
                return computed(*args)

        return run

    def _ask_for_more(self) -> None:
        while self.copying and (not self.side or self.copying[0].copied.query()):
            self.free.append(self.copying.popleft())
        while self.chunks and self.free:
            self._ask(*self.chunks.popleft())

    def _ask(self, which: weakref.ref[Order], chunk: Chunk) -> None:
        if (order := which()) is None or order.error:
            return
        slot = self.free.popleft()
        slot.order, slot.chunk = order, chunk
        try:
            tasks = order.plan.tasks(chunk[2])
            left = ASK.pack(slot.number, len(tasks)) + tasks
            while left:
                left = left[slot.stdin.write(left) :]
        except BrokenPipeError:
            self._lost()
        except Qwen35Error as error:
            self._fail(slot, error)

    def _take(self, wait: float) -> None:
        """Answers of processes; what has been read is copied."""
        if len(self.free) + len(self.copying) == len(self.slots):  # nothing is being read
            if wait and self.copying and self.side:
                self.copying[0].copied.synchronize()
            return
        if not select([self.answers], [], [], wait)[0]:
            if wait >= 1 and any(process.poll() is not None for process in self.processes):
                self._lost()
            return
        if not (answers := os.read(self.answers, 256 * ANSWER.size)):  # all have ended
            self._lost()
        with torch.cuda.stream(self.side):
            for number, complete in ANSWER.iter_unpack(answers):
                self._copy(self.slots[number], bool(complete))

    def _copy(self, slot: Slot, complete: bool) -> None:
        order, (begin, count, reads) = slot.order, slot.chunk
        assert order is not None and order.target is not None
        try:
            for read in () if complete else reads:  # once more, which says what is wrong
                order.plan.reader.read(read.stored, read.at, slot.memory[read.begin : read.end].numpy().data)
        except Qwen35Error as error:
            self._fail(slot, error)
            return
        source = slot.memory if count == len(slot.memory) else slot.memory[:count]
        order.target[begin : begin + count].copy_(source, non_blocking=True)
        if self.side:
            slot.copied.record(self.side)
        order.left -= 1
        if not order.left:
            order.arrived = self.side.record_event() if self.side else None
            order.plan.reader.count(order.plan.read_bytes)
        slot.order = None
        self.copying.append(slot)

    def _lost(self) -> None:
        """Error: a process has ended, and nobody knows what it was at."""
        found = sorted({code for process in self.processes if (code := process.poll()) is not None})
        raise Qwen35Error("a process that reads has ended", found=f"status {found}", do="try again")

    def _fail(self, slot: Slot, error: Exception) -> None:
        if slot.order:
            slot.order.error = error
        slot.order = None
        self.free.append(slot)


def _end(processes: Sequence[subprocess.Popen[bytes]], answers: int, registered: Tensor | None) -> None:
    for process in processes:
        if process.stdin:
            process.stdin.close()
        process.terminate()
    for process in processes:
        process.wait()
    os.close(answers)
    if registered is not None:
        torch.cuda.cudart().cudaHostUnregister(registered.data_ptr())


_feeds: dict[torch.device, Feed] = {}
_making = Lock()


def feed(device: torch.device) -> Feed:
    """The one of a device. Its processes stay, and so does its pinned memory."""
    with _making:
        if device in _feeds and _feeds[device].broken:
            broken = _feeds.pop(device)
            with broken.lock:
                if broken.side:
                    broken.side.synchronize()
                broken.close()
        if device not in _feeds:
            _feeds[device] = Feed(device)
        return _feeds[device]
