"""The head of a trace: what it says of itself, checked before anything is believed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import Qwen35Error
from ..numerics.taps import Site
from ..untrusted import parse_json, read_json, tensor_file

FORMAT, VERSION = "qwen35-moe-trace", 1
HEAD_FILE = "trace.json"  # written last
PARTIAL = "partial"  # folder of an unfinished trace, in that of the trace
RESUME = "resume.safetensors"  # the state that `--resume` continues from (resume.py); no part of the trace
DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
_KINDS = {
    "key": str, "name": str, "dims": str, "dtype": str, "file": str, "part": str, "step": int, "layer": int | None,
    "expert": int | None,
}  # fmt: skip


CHUNK_NAME = re.compile(r"\d{5}\.safetensors")


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


def read_head(path: Path, partial: bool) -> dict[str, Any]:
    unfinished = path if partial else path / PARTIAL
    chunks = sorted(p for p in unfinished.glob("*.safetensors") if CHUNK_NAME.fullmatch(p.name))
    if (path / HEAD_FILE).is_file():
        head = read_json(path / HEAD_FILE)
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
    return {"meta": {}, "tensors": [record for chunk in chunks for record in records_of(chunk)]}


def check_meta(meta: Any, where: Path) -> None:
    """Error where what a trace says of its run has not the types that this module's docstring gives."""
    if not isinstance(meta, dict):
        raise Qwen35Error("trace.json has no meta", where=where, expected="{...}", do="write the trace again")
    kinds = {"config": dict, "checkpoint": dict, "arithmetic": str, "fused": list, "layers": int, "steps": list}
    for key, kind in kinds.items():
        if meta.get(key) is not None and not isinstance(meta[key], kind):
            raise bad_head(where, f"meta.{key}", kind.__name__, meta[key])
    for i, step in enumerate(meta.get("steps") or ()):
        tables = [step.get(name) for name in ("ids", "positions", "mask")] if isinstance(step, dict) else [None]
        if not all(map(_is_table, tables)) or len({(len(x), len(x[0])) for x in tables if x}) != 1:
            raise bad_head(where, f"meta.steps.{i}", "ids, positions and mask, each [B][T] whole numbers", step)


def _is_table(x: Any) -> bool:
    """Whether this is [B][T] of whole numbers that fit an int64."""
    rows = isinstance(x, list) and bool(x) and all(isinstance(row, list) and len(row) == len(x[0]) for row in x)
    return rows and all(type(i) is int and -(2**63) <= i < 2**63 for row in x for i in row)


def bad_head(where: Path, key: str, expected: str, found: Any) -> Qwen35Error:
    what, do = f"trace.json: {key} is not what it should be", "write the trace again"
    return Qwen35Error(what, where=where, expected=expected, found=repr(found)[:100], do=do)


def entries_of(records: Any, where: Path) -> list[Entry]:
    """Entries from their records in JSON. Error: a field of another type, a file that is not beside the trace."""
    try:
        entries = [Entry(**{**record, "shape": tuple(record["shape"])}) for record in records]
    except (TypeError, KeyError) as error:
        what, expected = "no records of tensors", "a list of {key, name, dims, dtype, shape, ...}"
        raise Qwen35Error(what, where=where, expected=expected, found=error, do="write the trace again") from error
    for entry in entries:
        for key, kind in _KINDS.items():
            value = entry.__dict__[key]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise bad_head(where, f"{key} of a tensor", str(kind), value)
        if not all(type(n) is int and n >= 0 for n in entry.shape) or entry.step < 0:
            raise bad_head(where, f"shape or step of {entry.key}", "whole numbers", [entry.shape, entry.step])
        if entry.dtype not in DTYPES:
            raise bad_head(where, f"dtype of {entry.key}", ", ".join(DTYPES), entry.dtype)
        if entry.file and not CHUNK_NAME.fullmatch(entry.file):
            raise bad_head(where, f"file of {entry.key}", "00000.safetensors, ...", entry.file)
    return entries


def records_of(chunk: Path) -> Any:
    """What a file says of its tensors."""
    with tensor_file(chunk, "write the trace again") as file:
        return parse_json((file.metadata() or {}).get("tensors", "").encode(), chunk)
