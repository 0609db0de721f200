"""Traces: named tensors of one run, in memory or on disk, readable from any language.

A trace on disk is a directory:

    00000.safetensors, 00001.safetensors, ...   tensors, in the order they were seen, about one layer a file
    trace.json                                  written last: a directory without it is an unfinished trace

trace.json is one JSON object:

    format    "qwen35-moe-trace"
    version   1
    meta      arithmetic, checkpoint (identity), steps: one {ids, positions, mask} a forward pass, each [B][T]
    tensors   list, in order, of {key, name, layer, expert, part, step, dims, dtype, shape, file}

`key` is the tensor's name in its file. `dims` names its dimensions (legend in tap_names.py): "b t d", "t e". `layer`
and `expert` are null where they do not apply; `part` is "", "mtp" or "visual"; keys of step 1 and later start with
"step.1.". `mask` is 1 for real tokens and 0 for padding. Each file carries its records a second time, as JSON in the
safetensors header's `__metadata__["tensors"]`, so that the files of an interrupted run can be read (`partial=True`).

Files are written under a temporary name and renamed; memory holds one layer.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import Qwen35Error
from ..taps import Site

FORMAT, VERSION = "qwen35-moe-trace", 1
RESUME = "resume.safetensors"  # what long_run.py needs to go on; no part of the trace
CHUNK_BYTES = 1 << 28  # a chunk is closed at a new layer, or here: bounds memory for the logits and for 397B layers


@dataclass(frozen=True)
class Entry:
    """What is known of one tensor of a trace beside its values."""

    key: str
    name: str
    dims: str
    dtype: str
    shape: tuple[int, ...]
    layer: int | None = None
    expert: int | None = None
    part: str = ""
    step: int = 0
    file: str = ""

    @classmethod
    def of(cls, site: Site, x: Tensor, dims: str, step: int = 0) -> Entry:
        key = site.key if step == 0 else f"step.{step}.{site.key}"
        dtype = str(x.dtype).removeprefix("torch.")
        return cls(key, site.name, dims, dtype, tuple(x.shape), site.layer, site.expert, site.part, step)


@dataclass
class Trace(Mapping[str, Tensor]):
    """Tensors by key, in the order of execution. From a directory they are read when asked for, and not kept."""

    sites: dict[str, Entry] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Tensor:
        if key in self.memory:
            return self.memory[key]
        if self.path is None or key not in self.sites:
            raise KeyError(key)
        where = self.path / self.sites[key].file
        try:
            with safe_open(where, framework="pt") as file:
                return file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise Qwen35Error(
                "trace file cannot be read", where=where, found=error, do="write the trace again"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __contains__(self, key: object) -> bool:
        return key in self.sites

    def __repr__(self) -> str:
        return f"Trace({len(self)} tensors, {len(self.steps)} steps, {self.path or 'in memory'})"

    def add(self, entry: Entry, x: Tensor) -> None:
        self.sites[entry.key], self.memory[entry.key] = entry, x

    @property
    def steps(self) -> list[dict[str, Any]]:
        return self.meta.get("steps", [])

    def _per_token(self, what: str) -> Tensor:
        if not self.steps:
            raise Qwen35Error(f"trace holds no {what}", where=self.path or "memory", do="record it with q.trace")
        return torch.cat([torch.tensor(step[what], dtype=torch.int64) for step in self.steps], dim=1)

    @property
    def ids(self) -> Tensor:
        """Token ids [B, T], all steps side by side; `positions` and `mask` (1 real, 0 padding) likewise."""
        return self._per_token("ids")

    @property
    def positions(self) -> Tensor:
        return self._per_token("positions")

    @property
    def mask(self) -> Tensor:
        return self._per_token("mask")

    def write(self, path: str | Path) -> Trace:
        """Write this trace to a directory and return the one read from there."""
        with TraceWriter(path, self.meta) as writer:
            for key, entry in self.sites.items():
                writer.add(entry, self[key])
        return Trace.open(path)

    @classmethod
    def open(cls, path: str | Path, *, partial: bool = False) -> Trace:
        """Open a trace directory; tensors stay on disk until they are asked for.

        Raises Qwen35Error where there is no trace, an unfinished one (unless `partial`), or another version.
        """
        path = Path(path)
        head = _read_head(path, partial)
        entries = [Entry(**{**record, "shape": tuple(record["shape"])}) for record in head["tensors"]]
        lost = sorted({e.file for e in entries} - {p.name for p in path.iterdir()})
        if lost:
            raise Qwen35Error("trace has lost files", where=path, found=", ".join(lost), do="write the trace again")
        return cls({entry.key: entry for entry in entries}, head["meta"], path)


def _read_head(path: Path, partial: bool) -> dict[str, Any]:
    chunks = sorted(p for p in path.glob("*.safetensors") if _CHUNK.fullmatch(p.name))
    if (path / "trace.json").is_file():
        try:
            head = json.loads((path / "trace.json").read_text())
        except ValueError as error:
            raise Qwen35Error("trace.json is not JSON", where=path, found=error, do="write the trace again") from error
        if not isinstance(head, dict) or (head.get("format"), head.get("version")) != (FORMAT, VERSION):
            found = f"{head.get('format')} {head.get('version')}" if isinstance(head, dict) else type(head).__name__
            raise Qwen35Error(
                "trace.json is of another format", where=path, expected=f"{FORMAT} {VERSION}", found=found
            )
        return head
    if not chunks:
        raise Qwen35Error(
            "no trace here", where=path, expected="a directory with trace.json", do="run `qwen35-moe trace`"
        )
    if not partial:
        raise Qwen35Error(
            "trace is unfinished",
            where=path,
            found=f"{len(chunks)} files and no trace.json",
            do="run the trace again, or open what is there with partial=True",
        )
    return {"meta": {}, "tensors": [record for chunk in chunks for record in _records(chunk)]}


def _records(chunk: Path) -> list[dict[str, Any]]:
    """What a file says of its tensors."""
    try:
        with safe_open(chunk, framework="pt") as file:
            return json.loads(file.metadata()["tensors"])
    except (OSError, SafetensorError) as error:
        raise Qwen35Error("trace file cannot be read", where=chunk, found=error, do="write the trace again") from error


_CHUNK = re.compile(r"\d{5}\.safetensors")
_OURS = re.compile(r"(\d{5}|envelope|envelope-state|resume)\.safetensors")  # envelope: envelope_file.py
# What a kill leaves of a file that was being written: ours, and those that safetensors writes first, with random names.
_LEFT = re.compile(_OURS.pattern + r"\.tmp|trace\.json\.tmp|\.tmp\w{6}")


def sweep(path: Path) -> None:
    """Removes what a kill has left of files that were being written."""
    for name in [p.name for p in path.iterdir() if _LEFT.fullmatch(p.name)]:
        (path / name).unlink()


def _header(entry: Entry, nbytes: int) -> bytes:
    """The first bytes of a safetensors file that holds one tensor, padded so that the values are aligned."""
    tensor = {"dtype": _DTYPES[entry.dtype], "shape": entry.shape, "data_offsets": [0, nbytes]}
    text = json.dumps({"__metadata__": {"tensors": json.dumps([asdict(entry)])}, entry.key: tensor}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


_DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class TraceWriter:
    """Write a trace to a directory, a layer at a time. Use as a context manager: it is finished by a clean exit only.

    A directory that holds anything but a trace is refused. An older trace there is unfinished from the first moment on.
    """

    def __init__(self, path: str | Path, meta: dict[str, Any] | None = None, keep: int = 0):
        """keep: how many files of an unfinished trace there are kept, to be continued."""
        self.path, self.meta = Path(path), dict(meta or {})
        self.entries: list[Entry] = []
        self._keys: set[str] = set()
        self._buffer: dict[str, Tensor] = {}
        self._open: list[Entry] = []
        self.files = keep
        self.path.mkdir(parents=True, exist_ok=True)
        names = [p.name for p in self.path.iterdir()]
        foreign = [n for n in names if n != "trace.json" and not _OURS.fullmatch(n) and not _LEFT.fullmatch(n)]
        if foreign:
            raise Qwen35Error(
                "directory is not a trace", where=self.path, found=foreign[0], do="choose an empty directory"
            )
        kept = [f"{i:05d}.safetensors" for i in range(keep)]
        for name in sorted(set(names) - {*kept, RESUME if keep else ""}, reverse=True):  # trace.json first
            (self.path / name).unlink()
        for name in kept:
            self.entries += [Entry(**{**r, "shape": tuple(r["shape"])}) for r in _records(self.path / name)]
        self._keys.update(entry.key for entry in self.entries)

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
        if not self._open:
            return
        name = f"{self.files:05d}.safetensors"
        done = [Entry(**{**asdict(entry), "file": name}) for entry in self._open]
        temporary = self.path / (name + ".tmp")
        save_file(self._buffer, temporary, metadata={"tensors": json.dumps([asdict(entry) for entry in done])})
        os.replace(temporary, self.path / name)
        self.entries += done
        self.files += 1
        self._buffer, self._open = {}, []

    def add_blocks(self, site: Site, dims: str, shape: tuple[int, ...], blocks: Iterator[tuple[slice, Tensor]]) -> None:
        """Append one large tensor as a file of its own, block by block of its last dimension."""
        self.flush()
        name, rows = f"{self.files:05d}.safetensors", prod(shape[:-1])
        temporary, at = self.path / (name + ".tmp"), 0
        with open(temporary, "wb") as file:
            for which, block in blocks:
                if not at:
                    width = block.element_size()
                    done = replace(Entry.of(site, block, dims), shape=shape, file=name)
                    at = file.write(_header(done, prod(shape) * width))
                    file.truncate(at + prod(shape) * width)
                for row, values in enumerate(block.reshape(rows, -1).cpu().contiguous().view(torch.uint8).numpy()):
                    file.seek(at + (row * shape[-1] + which.start) * width)
                    file.write(values.data)
        os.replace(temporary, self.path / name)
        self.entries.append(done)
        self.files += 1

    def close(self) -> None:
        """Write the rest, and trace.json last."""
        self.flush()
        head = {"format": FORMAT, "version": VERSION, "meta": self.meta, "tensors": [asdict(e) for e in self.entries]}
        temporary = self.path / "trace.json.tmp"
        temporary.write_text(json.dumps(head))
        os.replace(temporary, self.path / "trace.json")

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
