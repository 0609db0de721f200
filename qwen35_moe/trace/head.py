"""The head of a trace: what it says of itself, checked before anything is believed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from torch import Tensor

from ..errors import MOST_LAYERS, Qwen35Error
from ..numerics.taps import Site
from ..untrusted import parse_json, read_json, tensor_file

FORMAT, VERSION = "qwen35-moe-trace", 1
HEAD_FILE = "trace.json"  # written last
PARTIAL = "partial"  # folder of an unfinished trace, in that of the trace
RESUME = "resume.safetensors"  # the state that `--resume` continues from (folder.py); no part of the trace
DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
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


_KINDS = {name: kind for name, kind in get_type_hints(Entry).items() if name != "shape"}


def read_head(path: Path, partial: bool) -> dict[str, Any]:
    if (path / HEAD_FILE).is_file():
        head = read_json(path / HEAD_FILE)
        said = [head.get(key) for key in ("format", "version")] if isinstance(head, dict) else [type(head).__name__]
        if said != [FORMAT, VERSION]:
            expected, found = f"{FORMAT} {VERSION}", " ".join(map(str, said))
            raise Qwen35Error("trace.json is of another format", where=path, expected=expected, found=found)
        return dict(head)
    unfinished = path if partial else path / PARTIAL
    chunks = sorted(p for p in unfinished.glob("*.safetensors") if CHUNK_NAME.fullmatch(p.name))
    if not chunks:
        raise Qwen35Error("no trace here", where=path, expected="a folder with trace.json", do="run `qwen35-moe trace`")
    if not partial:
        do = "run the trace again, or open what is there with partial=True"
        raise Qwen35Error("trace is unfinished", where=path, found=f"{len(chunks)} files and no trace.json", do=do)
    return {"meta": {}, "tensors": [record for chunk in chunks for record in records_of(chunk)]}


def check_meta(meta: Any, where: Path) -> None:
    """Error where what a trace says of its run has not the types that file.py's docstring gives."""
    if not isinstance(meta, dict):
        raise Qwen35Error("trace.json has no meta", where=where, expected="{...}", do="write the trace again")
    kinds = {"config": dict, "checkpoint": dict, "arithmetic": str, "fused": list, "layers": int, "steps": list,
             "images": dict, "draft_ids": list, "branches": list}  # fmt: skip
    for key, kind in kinds.items():
        if meta.get(key) is not None and not isinstance(meta[key], kind):
            raise bad_head(where, f"meta.{key}", kind.__name__, meta[key])
    if not isinstance(path := (meta.get("checkpoint") or {}).get("path") or "", str):
        raise bad_head(where, "meta.checkpoint.path", "a path", path)
    for i, step in enumerate(meta.get("steps") or ()):
        found = step if isinstance(step, dict) else {}
        axes = found.get("axes", [])
        shapes = {_shape(found.get("ids"), 0), _shape(found.get("positions")), _shape(found.get("mask"))}
        shapes |= {*map(_shape, axes)} if isinstance(axes, list) and len(axes) in (0, 3) else {None}
        if None in shapes or len(shapes) != 1:
            raise bad_head(where, f"meta.steps.{i}", "ids, positions and mask, each [B][T] whole numbers", step)
    if bad := [ids for ids in meta.get("draft_ids") or () if _shape(ids, -1) is None]:
        raise bad_head(where, "meta.draft_ids", "[B][T] token ids a draft", bad[0])
    if (branches := meta.get("branches")) and (_shape(branches, 0) or (0, 0))[1] != 2:
        raise bad_head(where, "meta.branches", "[n][2]: a sequence, and how many of its tokens a branch has", branches)
    if (images := meta.get("images")) is not None:
        grids, ids = images.get("grids"), images.get("placeholders")
        sizes = [_shape(grid, 1) for grid in grids.values()] if isinstance(grids, dict) else [None]
        if any(size is None or size[1] != 3 for size in sizes) or _shape([ids], 0) is None:
            raise bad_head(where, "meta.images", "{grids: {image: [n][3]}, placeholders: token ids}", images)


def _shape(x: Any, least: int = -(2**63)) -> tuple[int, int] | None:
    """[B, T] of a table of whole numbers from `least` on that fit an int64; None where it is none."""
    rows = isinstance(x, list) and bool(x) and all(isinstance(row, list) and len(row) == len(x[0]) for row in x)
    return (len(x), len(x[0])) if rows and all(type(i) is int and least <= i < 2**63 for r in x for i in r) else None


def check_tokens(entries: list[Entry], steps: list[dict[str, Any]], where: Path) -> None:
    """Error where values of tokens are not of as many tokens as the trace says."""
    if not steps or not entries:
        return
    if (last := max(entry.step for entry in entries)) != len(steps) - 1:
        raise bad_head(where, "meta.steps", f"{last + 1} steps, as many as the tensors are of", len(steps))
    for entry in entries:
        if entry.part or entry.expert is not None or not entry.dims.startswith(("b t", "t ")):
            continue
        B, T = len(ids := steps[entry.step]["ids"]), len(ids[0])
        wanted = (B, T) if entry.dims.startswith("b") else (B * T,)
        if entry.shape[: len(wanted)] != wanted:
            raise bad_head(where, f"shape of {entry.key}", f"{list(wanted)} tokens", list(entry.shape))


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
            value = vars(entry)[key]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise bad_head(where, f"{key} of a tensor", str(kind), value)
        counts = (*entry.shape, entry.step, entry.layer or 0, entry.expert or 0)
        if not all(type(n) is int and 0 <= n < 2**63 for n in counts) or (entry.layer or 0) >= MOST_LAYERS:
            raise bad_head(where, f"shape or place of {entry.key}", "whole numbers", counts)
        if entry.dtype not in DTYPES:
            raise bad_head(where, f"dtype of {entry.key}", ", ".join(DTYPES), entry.dtype)
        if entry.file and not CHUNK_NAME.fullmatch(entry.file):
            raise bad_head(where, f"file of {entry.key}", "00000.safetensors, ...", entry.file)
    return entries


def records_of(chunk: Path) -> Any:
    """What a file says of its tensors."""
    with tensor_file(chunk, "write the trace again") as file:
        return parse_json((file.metadata() or {}).get("tensors", "").encode(), chunk)
