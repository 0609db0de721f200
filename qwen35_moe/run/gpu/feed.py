"""Weights on their way from disk to a GPU: what it will need next is read and copied while it computes.

Processes read, and the thread that computes starts the copies as it goes, at each tap (`Feed.go_on`); on the device all
that is left is to view them.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from typing import Any

import torch
from torch import Tensor

from ...errors import Qwen35Error
from ...numerics.taps import OBSERVE, Site, attach
from . import plan as plans
from .plan import Chunk, Plan
from .read_pool import ReadPool, Slot

PAUSE = 5e-4  # seconds between two looks at what has been read
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


class Feed:
    """What a device will need, in that order. (On a CPU the same without streams.) As a tap handler, it goes on."""

    stage, wants_experts = OBSERVE, False

    def __init__(self, device: torch.device):
        self.device, self.pool = device, ReadPool(device)
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waiting: deque[weakref.ref[Order]] = deque()
        self.begun: weakref.WeakSet[Order] = weakref.WeakSet()
        self.chunks: deque[tuple[weakref.ref[Order], Chunk]] = deque()
        self.free = deque(self.pool.slots)
        self.copying: deque[tuple[Any, list[Slot]]] = deque()  # until an event
        self.lock, self.next_look, self.broken = RLock(), 0.0, False

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
                if not self.pool.reading and self.copying and self.side:
                    self.copying[0][0].synchronize()
            self._copy([slot for slot in self.pool.take(wait) if slot.complete or self._read_again(slot)])
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
        while self.copying and (not self.side or self.copying[0][0].query()):
            self.free += self.copying.popleft()[1]
        wanted = []
        while self.chunks and self.free:
            which, chunk = self.chunks.popleft()
            if (order := which()) and not order.error:
                try:
                    wanted.append((self.free[0], order.plan.tasks(chunk)))
                    self.free.popleft().holds = order, chunk
                except Qwen35Error as error:
                    order.error = error
        self.pool.ask(wanted)

    def _read_again(self, slot: Slot) -> bool:
        """Which says what is wrong. -> whether nothing is"""
        order, (_, _, reads) = slot.holds
        try:
            for read in reads:
                order.plan.reader.read(read.stored, read.at, slot.memory[read.begin : read.end].numpy().data)
        except Qwen35Error as error:
            order.error, slot.holds = error, None
            self.free.append(slot)
            return False
        return True

    def _copy(self, slots: list[Slot]) -> None:
        if not slots:
            return
        complete = []
        with torch.cuda.stream(self.side):
            for slot in slots:
                order, (number, nbytes, _) = slot.holds
                begin = number * plans.CHUNK
                source = slot.memory if nbytes == plans.CHUNK else slot.memory[:nbytes]
                order.target[begin : begin + nbytes].copy_(source, non_blocking=True)
                slot.holds, order.left = None, order.left - 1
                if not order.left:
                    complete.append(order)
            copied = self.side.record_event() if self.side else None
        self.copying.append((copied, slots))
        for order in complete:
            order.arrived = copied
            order.plan.reader.count(order.plan.read_bytes)


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
                broken.pool.close()
        if device not in _feeds:
            _feeds[device] = Feed(device)
        return _feeds[device]
