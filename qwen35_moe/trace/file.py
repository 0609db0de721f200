"""Traces: named tensors of one run, in memory or on disk, readable from any language.

A trace on disk is a directory:

    00000.safetensors, 00001.safetensors, ...   tensors, in the order they were seen, about one layer a file
    trace.json                                  written last: a directory without it is an unfinished trace

trace.json is one JSON object:

    format    "qwen35-moe-trace"
    version   1
    meta      arithmetic, checkpoint (identity), steps: {ids, positions, mask} [B][T], and with images axes [3][B][T]
    files     name of each file -> the sha256 of its bytes (`qwen35-moe verify` compares)
    sha256    of the bytes of trace.json before `, "sha256"`
    tensors   list, in order, of {key, name, layer, expert, part, step, dims, dtype, shape, file}

`key` is the tensor's name in its file. `dims` names its dimensions (legend in tap_table.py): "b t d", "t e". `layer`
and `expert` are null where they do not apply; `part` is "", "mtp" or "visual"; keys of step 1 and later start with
"step.1.". `mask` is 1 for real tokens and 0 for padding. Each file carries its records a second time, as JSON in the
safetensors header's `__metadata__["tensors"]`, so that the files of an interrupted run can be read (`partial=True`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..run.files import check_sha256
from ..untrusted import read_bytes, tensor_file
from .head import CHUNK_NAME, HEAD_FILE, PARTIAL, Entry, bad_head, check_meta, check_tokens, entries_of, read_head

SUM_BEGINS = ', "sha256": '  # the checksum of all before it in trace.json
TURN = re.compile(r"\.\d+$")  # how the key of a turn of a loop ends
CHUNK_BYTES = 1 << 28  # a chunk is closed at a new layer, or here: bounds memory for the logits and for 397B layers


@dataclass
class Trace(Mapping[str, Tensor]):
    """Tensors by key, in the order of execution. From a directory they are read when asked for, and not kept."""

    sites: dict[str, Entry] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # file -> sha256, where it is on disk

    def __getitem__(self, key: str) -> Tensor:
        if key in self.memory:
            return self.memory[key]
        if self.path is None or key not in self.sites:
            raise KeyError(key)
        where = self.path / self.sites[key].file
        with tensor_file(where, "write the trace again") as file:
            return file.get_tensor(key)

    def columns(self, key: str, which: slice) -> Tensor:
        """Some of the last dimension of a large value [B, T, n]; the others are not read."""
        if self.path is None:
            return self[key][..., which]
        with tensor_file(self.path / self.sites[key].file) as file:
            return file.get_slice(key)[:, :, which]

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

    def is_of(self, identity: dict[str, Any] | None) -> bool:
        """Whether nothing that is known of its checkpoint is otherwise there (`Checkpoint.identity`)."""
        known = self.meta.get("checkpoint") or {}
        return all(known.get(key) in (None, value) for key, value in (identity or {}).items())

    @property
    def comparable(self) -> list[str]:
        """Keys of the first step, without turns of loops, which are experts to one arithmetic and slots to another, and
        without the scores of drafts, whose columns are no tokens that both sides need have."""
        return [
            key for key, entry in self.sites.items()
            if entry.step == 0 and not TURN.search(key) and not (entry.part.startswith("mtp") and "s" in entry.dims)
        ]  # fmt: skip

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

    @classmethod
    def open(cls, path: str | Path, *, partial: bool = False) -> Trace:
        """Open a trace directory; tensors stay on disk until they are asked for.

        Raises Qwen35Error where there is no trace, an unfinished one (unless `partial`), or another version.
        """
        path = in_utf8(path)
        if partial and not (path / HEAD_FILE).is_file():
            path = path / PARTIAL
        head = read_head(path, partial)
        entries = entries_of(head.get("tensors"), path / HEAD_FILE)
        check_meta(head.get("meta"), path / HEAD_FILE)
        check_tokens(entries, head["meta"].get("steps") or [], path / HEAD_FILE)
        lost = sorted({e.file for e in entries} - {p.name for p in path.iterdir()})
        if lost:
            raise Qwen35Error("trace has lost files", where=path, found=", ".join(lost), do="write the trace again")
        files = head.get("files") or {}
        named = isinstance(files, dict) and all(map(CHUNK_NAME.fullmatch, files))
        if not named or not all(isinstance(known, str) for known in files.values()):
            raise bad_head(path / HEAD_FILE, "files", "name of a file -> its sha256", files)
        return cls({entry.key: entry for entry in entries}, head["meta"], path, files=files)

    def verify(self) -> None:
        """Reads all files. Error: the bytes of one are not those that were written, or no checksum is known."""
        assert self.path is not None
        do = "write the trace again"
        for name in sorted({entry.file for entry in self.sites.values()}):
            if name not in self.files:
                raise Qwen35Error("no checksum is known of this file", where=self.path / name, do=do)
            check_sha256(self.path / name, self.files[name], do)
        head, _, known = read_bytes(self.path / HEAD_FILE).rpartition(SUM_BEGINS.encode())
        if (found := f'"{sha256(head).hexdigest()}"}}').encode() != known:
            what = "the file is damaged: its checksum is another"
            raise Qwen35Error(what, where=self.path / HEAD_FILE, expected=known[1:65].decode("ascii", "replace"),
                              found=found[1:-2], do=do)  # fmt: skip


def in_utf8(path: str | Path) -> Path:
    """The path, if safetensors can open files there: names that are not UTF-8 it cannot."""
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Qwen35Error("path is not UTF-8", where=ascii(str(path)), do="rename the folder") from error
    return Path(path)
