"""Bytes from files into tensors: pread into memory of our own, or a view of the mapped file (`Reader.mapped`).

Both are equally fast (13 to 21 GB/s from a warm page cache, 1 to 6 MB a read). A streamed run uses pread for weights
that it drops after use: mapped pages count as resident until the system reclaims them. Weights that stay for the whole
run are mapped: that needs no copy and no memory of the process.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ..errors import Qwen35Error
from .header import TensorEntry, file_state

STORED_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32, "I64": torch.int64, "F64": torch.float64,
}  # fmt: skip


class Reader:
    """Reads from many files in many threads. Each read has its own position."""

    def __init__(self, known: Mapping[Path, tuple[int, int]]) -> None:
        """known: size and time of the last change of each file, as its header was read."""
        self._descriptors: dict[Path, int] = {}
        self._known = known
        self._lock = Lock()
        self.close = weakref.finalize(self, _close_all, self._descriptors)
        self.bytes_read = 0
        self.mapped = False
        self._maps: dict[Path, Tensor] = {}

    def map(self, stored: TensorEntry, begin: int, nbytes: int) -> Tensor:
        """A view (uint8) of these bytes of the tensor in its file. Writing to it changes memory, never the file.

        If the file is truncated later, touching the view ends the process (SIGBUS): see `check`.
        """
        self.descriptor(stored)
        with self._lock:
            if stored.file not in self._maps:
                try:
                    size = self._known[stored.file][0]
                    self._maps[stored.file] = torch.from_file(str(stored.file), False, size, dtype=torch.uint8)
                except (OSError, RuntimeError) as error:
                    raise _failed(stored, error) from error
        file, at = self._maps[stored.file], stored.begin + begin
        if at + nbytes > len(file):
            raise _failed(stored, f"the file ends at byte {len(file)}; was it changed after it was opened?")
        return file[at : at + nbytes]

    def __getstate__(self) -> dict[str, Any]:
        """For copies, also in other processes: they open the files anew."""
        kept = {"_known": dict(self._known), "bytes_read": self.bytes_read, "mapped": self.mapped}
        return {**kept, "_descriptors": {}, "_maps": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = Lock()
        self.close = weakref.finalize(self, _close_all, self._descriptors)

    def descriptor(self, stored: TensorEntry) -> int:
        """File descriptor of the tensor's file, which stays open."""
        with self._lock:
            if stored.file not in self._descriptors:
                try:
                    descriptor = os.open(stored.file, os.O_RDONLY | vars(os).get("O_CLOEXEC", 0))
                except OSError as error:
                    raise _failed(stored, error.strerror or error) from error
                self._descriptors[stored.file] = descriptor
                self._check(stored.file)
            return self._descriptors[stored.file]

    def check(self) -> None:
        """Error if a file was written to after its header was read: it may be truncated, or hold other weights.

        A removed or replaced file is no error: the open one stays readable.
        """
        for file in list(self._descriptors):
            self._check(file)

    def _check(self, file: Path) -> None:
        known, now = self._known[file], file_state(self._descriptors[file])
        if now != known:
            what, expected = "the file was written to while it was in use", f"{known[0]} bytes, as they were"
            do = "load the checkpoint again; write new files under another name and rename them"
            raise Qwen35Error(what, where=file, expected=expected, found=f"{now[0]} bytes", do=do)

    def read(self, stored: TensorEntry, begin: int, into: memoryview) -> None:
        """Fills `into` with the bytes that begin at `begin` of the tensor. Other threads run meanwhile."""
        descriptor = self._descriptors.get(stored.file) or self.descriptor(stored)
        at, rest = stored.begin + begin, into
        while len(rest):
            try:
                count = os.preadv(descriptor, [rest], at)
            except OSError as error:
                raise _failed(stored, error.strerror or error) from error
            if count == 0:
                raise _failed(stored, f"the file ends at byte {at}; was it changed after it was opened?")
            rest, at = rest[count:], at + count
        with self._lock:
            self.bytes_read += into.nbytes


def _close_all(descriptors: dict[Path, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _failed(stored: TensorEntry, found: object) -> Qwen35Error:
    return Qwen35Error("cannot read a tensor", where=f"{stored.file}: {stored.raw_name}", expected=stored, found=found)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a stored tensor: `count` of them, each of shape `size`, from row `first` on, every `step`-th.

    The leading dimensions of a 3-D tensor are flattened, so that one expert of it is a run of rows, and the rows of
    gpt-oss's gate are every second one.
    """

    stored: TensorEntry
    first: int
    count: int
    size: tuple[int, ...]
    step: int = 1

    @classmethod
    def of(cls, stored: TensorEntry, leading: int = 1) -> Rows:
        """All rows, with so many dimensions flattened."""
        return cls(stored, 0, prod(stored.shape[:leading]), stored.shape[leading:])

    @property
    def row_bytes(self) -> int:
        total = prod(self.stored.shape) // max(prod(self.size), 1)  # rows of the whole tensor
        return self.stored.nbytes // max(total, 1)

    def part(self, i: int, n: int) -> Rows:
        """Part i of n equal runs."""
        return replace(self, first=self.first + self.step * i * (self.count // n), count=self.count // n)

    def turn(self, i: int, n: int) -> Rows:
        """The rows of matrix i, if the rows of n matrices alternate."""
        return replace(self, first=self.first + i, count=self.count // n, step=n)

    def rows(self, rows: slice | None) -> Rows:
        start, stop, step = (rows or slice(None)).indices(self.count)
        if step != 1:
            raise self.stored.wrong("rows are read in a run", "step 1", rows)
        return replace(self, first=self.first + self.step * start, count=max(stop - start, 0))

    def span(self) -> tuple[int, int]:
        """(first byte, number of bytes) to read, counted from the tensor's begin."""
        rows = (self.count - 1) * self.step + 1 if self.count else 0
        return self.first * self.row_bytes, rows * self.row_bytes

    def read(self, reader: Reader) -> Tensor:
        """A tensor [count, *size] of the stored dtype: a copy, or a view of the file if the reader maps."""
        if self.stored.dtype not in STORED_DTYPES:
            raise self.stored.wrong("torch has no such dtype", ", ".join(STORED_DTYPES), self.stored.dtype)
        (begin, nbytes), dtype = self.span(), STORED_DTYPES[self.stored.dtype]
        aligned = (self.stored.begin + begin) % dtype.itemsize == 0
        if reader.mapped and self.step == 1 and nbytes and aligned:
            return reader.map(self.stored, begin, nbytes).view(dtype).view(self.count, *self.size)
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        reader.read(self.stored, begin, buffer.numpy().data)
        if self.step > 1:
            padded = torch.nn.functional.pad(buffer, (0, self.count * self.step * self.row_bytes - nbytes))
            buffer = padded.view(self.count, self.step, self.row_bytes)[:, 0].contiguous().view(-1)
        return buffer.view(dtype).view(self.count, *self.size)

    def gather(self, reader: Reader, runs: Sequence[slice]) -> Tensor:
        """Several runs of these rows, one after another: as `rows` and `read` of each, but much faster."""
        count, size, begin = sum(run.stop - run.start for run in runs), self.row_bytes, 0
        found = torch.empty(count * size, dtype=torch.uint8)
        for run in runs:
            end = begin + (run.stop - run.start) * size
            reader.read(self.stored, (self.first + run.start) * size, found.numpy().data[begin:end])
            begin = end
        return found.view(STORED_DTYPES[self.stored.dtype]).view(count, *self.size)
