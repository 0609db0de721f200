"""Writing a safetensors file without ever holding it: header first, then every tensor at its own offset."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import numpy as np

from .draw import WORD
from .layouts import Stored

WRITE = 8 << 20  # bytes gathered before a write; one expert matrix or so


def nbytes(tensor: Stored) -> int:
    return prod(tensor.size) * WORD[tensor.dtype].itemsize


def write(path: Path, tensors: list[Stored], jobs: int = 1) -> None:
    """8 bytes of header length, the JSON header padded with blanks to a multiple of 8, the data without gaps. Wide
    types come first, so that every tensor is aligned. `jobs` tensors are drawn at a time."""
    ordered = sorted(tensors, key=lambda t: -WORD[t.dtype].itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = [], 0
    for tensor in ordered:
        starts.append(end)
        end += nbytes(tensor)
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.size, "data_offsets": [starts[-1], end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)

    def fill(tensor: Stored, start: int) -> None:
        size = 0
        with open(path, "r+b", buffering=WRITE) as file:
            file.seek(8 + len(header) + start)
            for chunk in tensor.data():
                size += file.write(np.ascontiguousarray(chunk).data.cast("B"))
        if size != nbytes(tensor):
            raise AssertionError(f"{tensor.name}: {size} bytes written, {nbytes(tensor)} announced")

    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(fill, ordered, starts):
            pass


def read_header(path: Path) -> dict[str, dict]:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header


def read_tensors(path: Path) -> Iterator[tuple[str, dict, bytes]]:
    """(name, header entry, bytes) of every tensor, one in memory at a time."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        for name, entry in read_header(path).items():
            begin, end = entry["data_offsets"]
            file.seek(8 + length + begin)
            yield name, entry, file.read(end - begin)
