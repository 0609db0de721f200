"""Where the bytes of many rows lie in files, and where they go on a device: what `ahead.Feed` carries out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from ...checkpoint.header import Stored
from ...checkpoint.reader import DTYPES, Reader, Rows
from .read_process import TASK

CHUNK = 15 * 2**20  # bytes that are read, and copied, at a time
ALIGN = 256  # of each part on the device, as of memory that torch allocates: kernels choose by it


class Read(NamedTuple):
    """Bytes at `at` of a tensor, to begin .. end of a buffer."""

    stored: Stored
    at: int
    begin: int
    end: int


class Chunk(NamedTuple):
    """CHUNK bytes of the device's memory, the number-th, and where the first `nbytes` of them come from."""

    number: int
    nbytes: int
    reads: list[Read]


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
        self.read_bytes = len(items) * sum(self.sizes)
        self.nbytes = max(first + self.room * step for first, step in self.strided)
        self.chunks = list(_chunks((stored, at, self.sizes[part], self.at[i, part]) for i, part, stored, at in found))
        self.asked = dict[int, tuple[tuple[int, ...], bytes]]()  # of each chunk: descriptors, and what `tasks` said

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

    def tasks(self, chunk: Chunk) -> bytes:
        """What a process is asked to read, as `TASK`s. Error: a file that cannot be opened."""
        descriptors = tuple(self.reader.descriptor(read.stored) for read in chunk.reads)  # of a file that is open now
        if chunk.number not in self.asked or self.asked[chunk.number][0] != descriptors:
            tasks = (
                TASK.pack(descriptor, stored.begin + at, begin, end - begin)
                for descriptor, (stored, at, begin, end) in zip(descriptors, chunk.reads, strict=True)
            )
            self.asked[chunk.number] = descriptors, b"".join(tasks)
        return self.asked[chunk.number][1]

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
    number, reads = 0, list[Read]()
    for stored, at, left, position in extents:
        while left:
            if reads and position // CHUNK != number:
                yield Chunk(number, reads[-1].end, reads)
                reads = []
            number, begin = divmod(position, CHUNK)
            count = min(left, CHUNK - begin)
            last = reads[-1] if reads else None
            if last and last.end == begin and _follows(last, stored, at):
                reads[-1] = last._replace(end=begin + count)
            else:
                reads.append(Read(stored, at, begin, begin + count))
            at, left, position = at + count, left - count, position + count
    if reads:
        yield Chunk(number, reads[-1].end, reads)


def _follows(last: Read, stored: Stored, at: int) -> bool:
    ends = last.stored.begin + last.at + last.end - last.begin
    return last.stored.file == stored.file and ends == stored.begin + at
