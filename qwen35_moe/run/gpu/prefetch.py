"""Reading from disk to a device ahead of use: threads read into pinned buffers, and copy to the device from there.

A `Layout` says where the bytes of many rows lie in files, and where they go in one buffer on the device. A `Fetch` is
the future of such a buffer: threads take chunk after chunk from one queue. `preadv` and the wait for a copy let other
threads of Python run; the rest of a chunk is a few calls. On a CPU the same code runs without streams and without
pinned memory.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import local
from typing import NamedTuple

import torch
from torch import Tensor

from ...checkpoint.header import TensorEntry
from ...checkpoint.reader import STORED_DTYPES, Reader, Rows
from ...checkpoint.weight import StoredWeight
from ...errors import Qwen35Error

READ_AT_ONCE = 8 * 2**20  # bytes that a thread reads, and copies, at a time: more leave the cache, fewer cost calls
BUFFERS = 2  # of this size that it has
READER_THREADS = max(1, min(12, (os.cpu_count() or 1) * 3 // 4))  # threads; the other cores are left to what computes
ALIGN = 256  # bytes; each part begins at a multiple, as memory that torch allocates: kernels choose by it


class Extent(NamedTuple):
    """Bytes of a stored tensor, from `at` on, that go to begin .. end of the buffer."""

    stored: TensorEntry
    at: int
    begin: int
    end: int


class Layout:
    """Where the rows of n items lie in files, and where they go in a buffer. Each part of all items is a strided view.

    The buffer has the order of the file if all items follow each other alike there, and one read then covers many of
    them; otherwise it has item after item.
    items: each has the same parts, alike in dtype and shape. room: the number of items that the views have.
    """

    def __init__(self, reader: Reader, items: Sequence[Sequence[Rows]], room: int = 0):
        self.reader, self.parts, self.room = reader, items[0], max(room, len(items))
        self.sizes = [rows.span()[1] for rows in self.parts]
        found = {(i, p): (rows.stored, rows.span()[0]) for i, item in enumerate(items) for p, rows in enumerate(item)}
        order = sorted(found, key=lambda key: (found[key][0].file, found[key][0].begin + found[key][1]))
        if not self._place(order):
            first = [part for i, part in order if i == 0]
            order = [(i, part) for i in range(len(items)) for part in first]
            self._place(order)
        self.nbytes = max(begin + self.room * step for begin, step in self.strided)
        self.chunks = list(_chunks(Extent(*found[k], self.at[k], self.at[k] + self.sizes[k[1]]) for k in order))

    def _place(self, order: Sequence[tuple[int, int]]) -> bool:
        """Sets the place `at` of each (item, part), one behind the other. -> whether each part is a strided view"""
        self.at, end = dict[tuple[int, int], int](), 0
        for key in order:
            self.at[key] = end
            end += -(-self.sizes[key[1]] // ALIGN) * ALIGN
        firsts = [self.at[0, part] for part in range(len(self.sizes))]
        self.strided = [(first, self.at.get((1, part), end) - first) for part, first in enumerate(firsts)]
        alike = all(at == self.strided[part][0] + i * self.strided[part][1] for (i, part), at in self.at.items())
        return alike and all(step > 0 for _, step in self.strided)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Each part of all items, [room, count, *size] in the dtype that is stored."""
        found = []
        for rows, size, (first, step) in zip(self.parts, self.sizes, self.strided, strict=True):
            part = buffer.as_strided((self.room, size), (step, 1), first).contiguous()
            found.append(part.view(STORED_DTYPES[rows.stored.dtype]).view(self.room, rows.count, *rows.size))
        return found


def _chunks(extents: Iterable[Extent]) -> Iterator[list[Extent]]:
    """The extents, cut so that no chunk spans more than READ_AT_ONCE bytes of the buffer. What adjoins in the file and
    in the buffer is one extent."""
    chunk = list[Extent]()
    for stored, at, begin, end in extents:
        while begin < end:
            if chunk and begin >= chunk[0].begin + READ_AT_ONCE:
                yield chunk
                chunk = []
            stop = min(end, (chunk[0].begin if chunk else begin) + READ_AT_ONCE)
            last = chunk[-1] if chunk else None
            behind = last and last.stored.begin + last.at + last.end - last.begin == stored.begin + at
            if last and behind and last.end == begin and last.stored.file == stored.file:
                chunk[-1] = last._replace(end=stop)
            else:
                chunk.append(Extent(stored, at, begin, stop))
            at, begin = at + stop - begin, stop
    if chunk:
        yield chunk


class Buffer:
    """Host memory of one reader thread. It may be written to again once its last copy is done."""

    def __init__(self, pinned: bool):
        self.memory = torch.empty(READ_AT_ONCE, dtype=torch.uint8, pin_memory=pinned)
        self.values = self.memory.numpy().data
        self.copied = torch.cuda.Event(blocking=True) if pinned else None  # who waits leaves its core to others


class Readers:
    """The reader threads of a device. Each has some buffers: it reads into one while the others are copied."""

    def __init__(self, device: torch.device):
        self.own, self.stream = local(), torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pool = ThreadPoolExecutor(READER_THREADS, thread_name_prefix="qwen35-moe-reader")

    def load(self, reader: Reader, chunks: deque[Sequence[Extent]], target: Tensor) -> torch.cuda.Event | None:
        """Takes chunks from the queue until there is none: reads each and starts its copy into the target.
        -> the event that they are there; None on a CPU."""
        if "buffers" not in self.own.__dict__:
            self.own.buffers = deque(Buffer(self.stream is not None) for _ in range(BUFFERS))
        with torch.cuda.stream(self.stream):
            while chunks:
                try:
                    chunk = chunks.popleft()
                except IndexError:  # another thread was quicker
                    break
                self.own.buffers.rotate(-1)
                buffer, begin, end = self.own.buffers[0], chunk[0].begin, chunk[-1].end
                if buffer.copied is not None and not buffer.copied.query():  # to wait hands on Python's lock
                    buffer.copied.synchronize()
                for extent in chunk:
                    reader.read(extent.stored, extent.at, buffer.values[extent.begin - begin : extent.end - begin])
                target[begin:end].copy_(buffer.memory[: end - begin], non_blocking=True)
                if buffer.copied is not None:
                    buffer.copied.record(self.stream)
            return None if self.stream is None else self.stream.record_event()


readers = cache(Readers)  # device -> its threads, which stay, as does their pinned memory


class Fetch:
    """The future of a layout's buffer. Reading begins at once, after what was asked for before."""

    def __init__(self, layout: Layout, device: torch.device):
        self.layout, self.device, own = layout, device, readers(device)
        with torch.inference_mode(False), torch.cuda.stream(own.stream):  # readers write to it outside of that mode
            self.target = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
        chunks: deque[Sequence[Extent]] = deque(layout.chunks)
        count = min(READER_THREADS, len(chunks))
        self.copies = [own.pool.submit(own.load, layout.reader, chunks, self.target) for _ in range(count)]

    def result(self) -> list[Tensor]:
        """`Layout.views`, for use on the present stream. Error: what cannot be read."""
        for copied in [copy.result() for copy in self.copies]:
            if copied is not None:
                torch.cuda.current_stream(self.device).wait_event(copied)
        if self.target.is_cuda:
            self.target.record_stream(torch.cuda.current_stream(self.device))
        return self.layout.views(self.target)


def one_ahead(fetches: Iterable[Fetch]) -> Iterator[Fetch]:
    """The fetches in their order; each is handed out once the next has begun."""
    before: Fetch | None = None
    for fetch in fetches:
        if before is not None:
            yield before
        before = fetch
    if before is not None:
        yield before


class PendingScaleCheck:
    """Whether scales of some weights are NaN or infinite: the answer is on its way from the device.

    doubts: what `Weight.of` added for these weights.
    """

    def __init__(self, doubts: Sequence[Tensor], weights: Iterable[StoredWeight]):
        self.weights, self.broken, self.known = weights, None, None
        if doubts:
            broken = torch.stack(list(doubts)).any()
            self.broken = torch.empty((), dtype=torch.bool, pin_memory=broken.is_cuda).copy_(broken, non_blocking=True)
            self.known = torch.cuda.current_stream(broken.device).record_event() if broken.is_cuda else None

    def settle(self, later: list[PendingScaleCheck] | None) -> None:
        """Appends itself to `later`, whose owner will wait; waits at once where there is no such list."""
        if later is None:
            self.wait()
        else:
            later.append(self)

    def wait(self) -> None:
        """Error if a scale is broken: the weights are read once more, to say where."""
        if self.known is not None:
            self.known.synchronize()
        if self.broken is not None and self.broken:
            for weight in self.weights:
                weight.read()
            expected, found = "the same bytes when they are read again", "finite ones by now"
            raise Qwen35Error("a scale was NaN or infinite", expected=expected, found=found, do="run it again")
