"""Writing traces (trace_file.py has the format): a layer at a time, under temporary names that are then changed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..files import check_claim, save_whole, whole
from ..taps import Site
from .trace_file import CHUNK_BYTES, FORMAT, RESUME, VERSION, Entry, Trace, in_utf8, records_of

_OURS = re.compile(r"(\d{5}|envelope|envelope-state|resume)\.safetensors")  # envelope: envelope_file.py
# What a kill leaves of a file that was being written: ours, and those that safetensors writes first, with random names.
_LEFT = re.compile(_OURS.pattern + r"\.tmp|trace\.json\.tmp|\.tmp\w{6}")


# Groups of prompts that a run has not joined yet, each a trace, and those that it has joined (shares.py).
PARTS, JOINED, PARTS_RUN = "parts", "parts-joined", "run.json"
_FILES = {"": (re.compile(rf"{_OURS.pattern}|{_LEFT.pattern}|trace\.json"), re.compile(f"{PARTS}|{JOINED}"))}
_FILES[PARTS] = _FILES[JOINED] = re.compile(r"run\.json(\.tmp)?"), re.compile(r"\d{5}")


def check_ours(path: Path) -> None:
    """Error if a directory holds anything that this program did not put there."""
    files, folders = _FILES.get(path.name, _FILES[""])
    for there in sorted(path.iterdir()) if path.is_dir() else ():
        if not (folders if there.is_dir() else files).fullmatch(there.name):
            do = "choose an empty directory"
            raise Qwen35Error("directory is not a trace", where=path, found=there.name, do=do)
        if there.is_dir():
            check_ours(there)


def remove_parts(path: Path) -> None:
    """The parts of a trace. Their folder's name goes first: what is left of it is no state to resume."""
    check_claim(path)
    for name in (JOINED, PARTS):
        if (path / name).is_dir():
            check_ours(path / name)
            (path / name).rename(path / JOINED)
            shutil.rmtree(path / JOINED)


def sweep(path: Path) -> None:
    """Removes what a kill has left of files that were being written."""
    for name in [p.name for p in path.iterdir() if _LEFT.fullmatch(p.name)]:
        (path / name).unlink()


def write(trace: Trace, path: str | Path) -> Trace:
    """Write a trace to a directory and return the one read from there."""
    with TraceWriter(path, trace.meta) as writer:
        for key, entry in trace.sites.items():
            writer.add(entry, trace[key])
    return Trace.open(path)


def _header(entry: Entry, nbytes: int) -> bytes:
    """The first bytes of a safetensors file that holds one tensor, padded so that the values are aligned."""
    tensor = {"dtype": _DTYPES[entry.dtype], "shape": entry.shape, "data_offsets": [0, nbytes]}
    text = json.dumps({"__metadata__": {"tensors": json.dumps([asdict(entry)])}, entry.key: tensor}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


_DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class TraceWriter:
    """Write a trace to a directory, a layer at a time. Use as a context manager: it is finished by a clean exit only.

    A directory that holds anything but a trace is refused. An older trace stays until the first layer is there to be
    written: what is wrong with a run shows before that.
    """

    def __init__(self, path: str | Path, meta: dict[str, Any] | None = None, keep: int = 0, joins: bool = False):
        """keep: how many files of an unfinished trace there are kept, to be continued; joins: and its parts."""
        self.path, self.meta = in_utf8(path), dict(meta or {})
        self.entries: list[Entry] = []
        self._keys: set[str] = set()
        self._buffer: dict[str, Tensor] = {}
        self._open: list[Entry] = []
        self.files = keep
        self._begun, self._joins = False, joins
        self.path.mkdir(parents=True, exist_ok=True)
        check_ours(self.path)
        self._kept = [f"{i:05d}.safetensors" for i in range(keep)]
        for name in self._kept:
            self.entries += [Entry(**{**r, "shape": tuple(r["shape"])}) for r in records_of(self.path / name)]
        self._kept += [RESUME] if keep else []
        self._keys.update(entry.key for entry in self.entries)

    def _begin(self) -> None:
        """Removes what an older trace has left."""
        if self._begun:
            return
        check_claim(self.path)
        for old in sorted(self.path.iterdir(), reverse=True):  # trace.json first
            if not old.is_dir() and old.name not in self._kept:
                old.unlink()
        if not self._joins:
            remove_parts(self.path)
        self._begun = True

    def add(self, entry: Entry, x: Tensor) -> None:
        """Append one tensor. It must not change until the layer is written."""
        if entry.key in self._keys:
            raise Qwen35Error("key is in the trace already", where=self.path, found=entry.key)
        place = (entry.step, entry.part, entry.layer)
        size = sum(t.nbytes for t in self._buffer.values())
        if self._open and (
            (self._open[-1].step, self._open[-1].part, self._open[-1].layer) != place or size > CHUNK_BYTES
        ):
            self.flush()
        self._keys.add(entry.key)
        self._buffer[entry.key] = x.detach().cpu().contiguous()
        self._open.append(entry)

    def flush(self) -> None:
        """Write what is held as the next file."""
        self._begin()
        if not self._open:
            return
        name = f"{self.files:05d}.safetensors"
        done = [Entry(**{**asdict(entry), "file": name}) for entry in self._open]
        save_whole(self._buffer, self.path / name, {"tensors": json.dumps([asdict(entry) for entry in done])})
        self.entries += done
        self.files += 1
        self._buffer, self._open = {}, []

    def add_blocks(self, site: Site, dims: str, shape: tuple[int, ...], blocks: Iterator[tuple[slice, Tensor]]) -> None:
        """Append one large tensor as a file of its own, block by block of its last dimension."""
        self.flush()
        name, rows = f"{self.files:05d}.safetensors", prod(shape[:-1])
        at = 0
        with whole(self.path / name) as temporary, open(temporary, "wb") as file:
            for which, block in blocks:
                if not at:
                    width = block.element_size()
                    done = replace(Entry.of(site, block, dims), shape=shape, file=name)
                    at = file.write(_header(done, prod(shape) * width))
                    file.truncate(at + prod(shape) * width)
                for row, values in enumerate(block.reshape(rows, -1).cpu().contiguous().view(torch.uint8).numpy()):
                    file.seek(at + (row * shape[-1] + which.start) * width)
                    file.write(values.data)
        self.entries.append(done)
        self.files += 1

    def close(self) -> None:
        """Write the rest, and trace.json last."""
        self.flush()
        head = {"format": FORMAT, "version": VERSION, "meta": self.meta, "tensors": [asdict(e) for e in self.entries]}
        with whole(self.path / "trace.json") as temporary:
            temporary.write_text(json.dumps(head))

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
