"""Writing traces (file.py has the format), a layer at a time.

Files are written to OUT/partial and move to OUT when the trace is complete. Until then an older trace in OUT is valid.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..numerics.taps import Site
from ..run.files import check_claim, check_sha256, checked, file_sha256, save, whole
from .file import CHUNK_BYTES, SUM_BEGINS, in_utf8
from .folder import START_ANEW, State, check_ours, finish, remove_older
from .head import FORMAT, HEAD_FILE, PARTIAL, RESUME, VERSION, Entry, entries_of, records_of


def _header(entry: Entry, nbytes: int) -> bytes:
    """The first bytes of a safetensors file that holds one tensor, padded so that the values are aligned."""
    tensor = {"dtype": _DTYPES[entry.dtype], "shape": entry.shape, "data_offsets": [0, nbytes]}
    text = json.dumps({"__metadata__": {"tensors": json.dumps([asdict(entry)])}, entry.key: tensor}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _name(number: int) -> str:
    return f"{number:05d}.safetensors"


_DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class TraceWriter:
    """Writes a trace, a layer at a time. Use as a context manager: a clean exit completes it.

    A directory that holds anything but a trace is refused. An older trace stays valid until this one is complete, and
    an older unfinished one until the first file of this one is written: errors of a run show before that.
    """

    def __init__(self, path: str | Path, meta: dict[str, Any] | None = None, keep: Mapping[str, str] | None = None):
        """keep: files in OUT/partial of the run to continue, with their checksums. Error: such a file is damaged."""
        self.out, self.meta, self._resumed = in_utf8(path), dict(meta or {}), keep is not None
        self.path = self.out / PARTIAL
        self.entries: list[Entry] = []
        self._open: dict[str, tuple[Entry, Tensor]] = {}
        self._begun = False
        self.sums: dict[str, str] = dict(keep or {})  # file -> sha256
        check_ours(self.out)
        for name, known in self.sums.items():
            check_sha256(self.path / name, known, START_ANEW)
            self.entries += entries_of(records_of(self.path / name), self.path / name)
        self._keys = {entry.key for entry in self.entries}

    @property
    def files(self) -> int:
        """How many are written."""
        return len(self.sums)

    def add(self, entry: Entry, x: Tensor) -> None:
        """Append one tensor. It must not change until the layer is written."""
        if entry.key in self._keys:
            raise Qwen35Error("key is in the trace already", where=self.out, found=entry.key)
        last = next(reversed(self._open.values()), (entry,))[0]
        place = (entry.step, entry.part, entry.layer)
        if (last.step, last.part, last.layer) != place or sum(x.nbytes for _, x in self._open.values()) > CHUNK_BYTES:
            self.flush()
        self._keys.add(entry.key)
        self._open[entry.key] = entry, x.detach().cpu().contiguous()

    def flush(self) -> None:
        """Write the open layer as the next file."""
        if self._open:
            name = _name(self.files)
            done = [replace(entry, file=name) for entry, _ in self._open.values()]
            tensors = {key: x for key, (_, x) in self._open.items()}
            with self._new(name) as temporary:
                save(tensors, temporary, {"tensors": json.dumps([asdict(entry) for entry in done])})
            self._open = {}
            self._done(name, done)

    def _done(self, name: str, entries: list[Entry]) -> None:
        self.entries += entries
        self.sums[name] = file_sha256(self.path / name)

    def save_state(self, state: State, sum_BTD: Tensor) -> None:
        """Write the state that a later run continues from."""
        tensors = {"sum": sum_BTD.cpu().contiguous()}
        with self._new(RESUME) as temporary:
            save(tensors, temporary, checked(tensors, {"state": json.dumps(asdict(state))}))

    @contextmanager
    def _new(self, name: str) -> Iterator[Path]:
        """A new file in OUT/partial, whole or not at all. The first one takes the place of what another run left."""
        check_claim(self.out)
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with whole(self.path / name) as temporary:
                yield temporary
                if not self._begun:
                    self._begin(temporary)
        except BaseException:
            with suppress(OSError):  # not empty
                self.path.rmdir()
            raise

    def _begin(self, new: Path) -> None:
        """Leaves in OUT/partial the kept files alone, with their state, and the new one."""
        kept = {new.name, *self.sums, *([RESUME] if self._resumed else [])}
        for old in [file for file in self.path.iterdir() if file.name not in kept]:
            old.unlink()
        self._begun = True

    def add_blocks(self, site: Site, dims: str, shape: tuple[int, ...], blocks: Iterator[tuple[slice, Tensor]]) -> None:
        """Append one large tensor as a file of its own, block by block of its last dimension."""
        self.flush()
        name, rows = _name(self.files), prod(shape[:-1])
        at = 0
        with self._new(name) as temporary, open(temporary, "wb") as file:
            for which, block in blocks:
                if not at:
                    width = block.element_size()
                    done = replace(Entry.of(site, block, dims), shape=shape, file=name)
                    at = file.write(_header(done, prod(shape) * width))
                    file.truncate(at + prod(shape) * width)
                for row, values in enumerate(block.reshape(rows, -1).cpu().contiguous().view(torch.uint8).numpy()):
                    file.seek(at + (row * shape[-1] + which.start) * width)
                    file.write(values.data)
        self._done(name, [done])

    def close(self, goes_on: bool = False) -> None:
        """Write the rest, and put the trace in the place of an older one. goes_on: a later run can add layers."""
        self.flush()
        head = {"format": FORMAT, "version": VERSION, "meta": self.meta, "files": self.sums,
                "tensors": [asdict(e) for e in self.entries]}  # fmt: skip
        text = json.dumps(head)[:-1]
        with self._new(HEAD_FILE) as temporary:
            temporary.write_text(f'{text}{SUM_BEGINS}"{sha256(text.encode()).hexdigest()}"}}')
            remove_older(self.out)
        if not goes_on:
            (self.path / RESUME).unlink(missing_ok=True)
        finish(self.out)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
