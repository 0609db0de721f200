"""Writing traces (trace_file.py has the format): a layer at a time, under temporary names that are then changed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..numerics.taps import Site
from ..run.files import check_claim, check_sha256, file_sha256, save, whole
from ..untrusted import tensor_file
from .file import CHUNK_BYTES, FORMAT, RESUME, SUM_BEGINS, VERSION, Entry, Trace, entries_of, in_utf8, records_of

_OURS = re.compile(r"(\d{5}|envelope|envelope-state|resume)\.safetensors")  # envelope: envelope_file.py
# What a kill leaves of a file that was being written: ours, and those that safetensors writes first, with random names.
_LEFT = re.compile(rf"({_OURS.pattern}|trace\.json)(\.\d+)?\.tmp|\.tmp\w{{6}}")

# Groups of prompts that a run has not joined yet (shares.py): parts/<run>/00000 .., each a trace.
PARTS, PARTS_RUN, JOINED = "parts", "run.json", ".joined"
_RUN = re.compile(rf"[0-9a-f]{{16}}({re.escape(JOINED)})?")


def check_ours(path: Path) -> None:
    """Error if a directory holds anything that no trace has, or what has such a name only."""
    for there in path.iterdir() if path.is_dir() else ():
        if there.is_dir() and there.name == PARTS and not there.is_symlink():
            for run in there.iterdir():
                _need(run.is_dir() and not run.is_symlink() and _RUN.fullmatch(run.name), run)
                for part in run.iterdir():
                    is_part = part.is_dir() and not part.is_symlink() and re.fullmatch(r"\d{5}", part.name)
                    _need(is_part or re.fullmatch(r"run\.json(\.\d+\.tmp)?", part.name), part)
                    check_ours(part)
            continue
        _need(there.is_file() and not there.is_symlink(), there)
        if there.name == "trace.json":
            with open(there, "rb") as file:
                _need(FORMAT.encode() in file.read(64), there)
        elif _OURS.fullmatch(there.name):
            _need(_is_ours(there), there)
        else:
            _need(_LEFT.fullmatch(there.name), there)


def _is_ours(file: Path) -> bool:
    """Whether a file of one of our names holds what that says: of an envelope, six numbers for each row."""
    try:
        with tensor_file(file) as opened:
            if file.stem != "envelope":
                return bool({"tensors", "state", "done", "run"} & (opened.metadata() or {}).keys())
            first = next(iter(opened.keys()), None)
            return first is not None and opened.get_slice(first).get_shape()[-1:] == [6]
    except Qwen35Error:
        return False


def _need(known: object, there: Path) -> None:
    if not known:
        is_checkpoint = (there.parent / "config.json").is_file()
        do = "this is a checkpoint: choose another directory" if is_checkpoint else "choose an empty directory"
        raise Qwen35Error("directory is not a trace", where=there.parent, found=there.name, do=do)


def remove_parts(path: Path) -> None:
    """The parts of a trace, of all runs. Their name goes first: what is left of it is no state to resume."""
    if not (path / PARTS).is_dir():
        return
    check_ours(path)
    check_claim(path)
    remove_joined(path)
    for run in list((path / PARTS).glob("*")):
        run.rename(run.with_name(run.name + JOINED))
    remove_joined(path)


def remove_joined(path: Path) -> None:
    """What a kill has left of parts that were being removed."""
    for old in list((path / PARTS).glob(f"*{JOINED}")):
        shutil.rmtree(old)
    with suppress(OSError):  # not there, or not empty
        (path / PARTS).rmdir()


def sweep(path: Path) -> None:
    """Removes what a kill has left of files that were being written, and of parts that were being removed."""
    remove_joined(path)
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


def _name(number: int) -> str:
    return f"{number:05d}.safetensors"


def _nbytes(held: dict[str, tuple[Entry, Tensor]]) -> int:
    return sum(x.nbytes for _, x in held.values())


_DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class TraceWriter:
    """Write a trace to a directory, a layer at a time. Use as a context manager: it is finished by a clean exit only.

    A directory that holds anything but a trace is refused. An older trace, or the state of a run, stays until the first
    layer is written (or CHUNK_BYTES of it are): what is wrong with a run shows before that.
    """

    def __init__(
        self,
        path: str | Path,
        meta: dict[str, Any] | None = None,
        keep: dict[str, str] | None = None,
        joins: bool = False,
    ):
        """keep: the files of an unfinished trace there that are kept, with their checksums, and its state, to be
        continued; joins: and parts of a trace, which become this one. Error: a kept file is damaged."""
        self.path, self.meta = in_utf8(path), dict(meta or {})
        self.entries: list[Entry] = []
        self._keys: set[str] = set()
        self._open: dict[str, tuple[Entry, Tensor]] = {}
        self._ready: list[dict[str, tuple[Entry, Tensor]]] = []  # files, but for writing
        self.sums: dict[str, str] = dict(keep or {})  # file -> sha256
        self._joins = joins
        self.path.mkdir(parents=True, exist_ok=True)
        check_ours(self.path)
        for name, known in self.sums.items():
            check_sha256(self.path / name, known, "leave out --resume to start anew")
            self.entries += entries_of(records_of(self.path / name), self.path / name)
        self._kept = {*self.sums, *([RESUME] if keep is not None else [])}
        self._begun = all(there.is_dir() or there.name in self._kept for there in self.path.iterdir())
        self._keys.update(entry.key for entry in self.entries)

    @property
    def files(self) -> int:
        """How many are written."""
        return len(self.sums)

    def add(self, entry: Entry, x: Tensor) -> None:
        """Append one tensor. It must not change until the layer is written."""
        if entry.key in self._keys:
            raise Qwen35Error("key is in the trace already", where=self.path, found=entry.key)
        last = next(reversed(self._open.values()), (entry,))[0]
        place = (entry.step, entry.part, entry.layer)
        if (last.step, last.part, last.layer) != place or _nbytes(self._open) > CHUNK_BYTES:
            self._cut()
            if self._begun or sum(map(_nbytes, self._ready)) > CHUNK_BYTES:
                self.flush()
        self._keys.add(entry.key)
        self._open[entry.key] = entry, x.detach().cpu().contiguous()

    def _cut(self) -> None:
        if self._open:
            self._ready.append(self._open)
            self._open = {}

    def flush(self) -> None:
        """Write what is held, as the next files: all of them or none."""
        self._cut()
        with ExitStack() as files:
            for i, held in enumerate(self._ready, self.files):
                name = _name(i)
                done = [replace(entry, file=name) for entry, _ in held.values()]
                temporary = files.enter_context(whole(self.path / name))
                metadata = {"tensors": json.dumps([asdict(entry) for entry in done])}
                save({key: x for key, (_, x) in held.items()}, temporary, metadata)
                self.entries += done
            if self._ready:
                self._begin()
        if self._ready:
            for name in map(_name, range(self.files, self.files + len(self._ready))):
                self.sums[name] = file_sha256(self.path / name)
            self._ready = []
            self._clear()

    def keep_state(self) -> None:
        """The state beside it is that of this run from now on."""
        self._kept.add(RESUME)

    def _begin(self) -> None:
        """Makes the older trace invalid, now that the new files are complete under temporary names."""
        if self._begun:
            return
        check_claim(self.path)
        for name in {"trace.json", RESUME} - self._kept:
            (self.path / name).unlink(missing_ok=True)

    def _clear(self, *more: str) -> None:
        """Removes what an older trace has left, now that files of this one are in their places; more: of them."""
        if self._begun:
            return
        kept = {*self._kept, *more, *self.sums}
        for old in list(self.path.iterdir()):
            if not old.is_dir() and old.name not in kept:
                old.unlink()
        self._begun = True

    def add_blocks(self, site: Site, dims: str, shape: tuple[int, ...], blocks: Iterator[tuple[slice, Tensor]]) -> None:
        """Append one large tensor as a file of its own, block by block of its last dimension."""
        self.flush()
        name, rows = _name(self.files), prod(shape[:-1])
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
            self._begin()
        self.entries.append(done)
        self.sums[name] = file_sha256(self.path / name)
        self._clear()

    def close(self) -> None:
        """Write the rest, and trace.json last. Parts of older runs are gone with it."""
        self.flush()
        head = {"format": FORMAT, "version": VERSION, "meta": self.meta, "files": self.sums,
                "tensors": [asdict(e) for e in self.entries]}  # fmt: skip
        text = json.dumps(head)[:-1]
        with whole(self.path / "trace.json") as temporary:
            temporary.write_text(f'{text}{SUM_BEGINS}"{sha256(text.encode()).hexdigest()}"}}')
            self._begin()
        self._clear("trace.json")
        if not self._joins:
            remove_parts(self.path)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
