"""SGLang's dumper (sglang 0.5.23, srt/debug_utils/dumper.py): one file a tensor, tags in the name and in `meta`.

    step=0___rank=0___dump_index=1___name=hidden___recompute_status=disabled___layer_id=0.pt

The payload is {"value": ..., "meta": {...}}; a bare tensor is accepted too, as SGLang's comparator does.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ....errors import Qwen35Error
from ..dump import Dump, Piece
from ..engine_names import family_of
from ..pieces import once, plain_values
from .common import a_dict, costs_itself, load_pt, load_tensor, step_tokens

HELD = 1 << 13  # files that stay mapped until they are used; a process may have 65,530 mappings
MOST_RANKS = 1 << 16
BATCH_FIELDS = ("input_ids", "positions", "seq_lens", "req_pool_indices", "rids")


def sniff(path: Path) -> bool:
    return path.is_dir() and bool(_files(path) or _experiments(path))


def read(path: Path, *, config: Mapping[str, Any] | None = None, **_: Any) -> Dump:
    """A dump directory, or the one directory above it (DUMPER_DIR), if it holds a single experiment."""
    if not _files(path):
        experiments = _experiments(path)
        if len(experiments) > 1:
            found = ", ".join(p.name for p in experiments[:4])
            raise Qwen35Error("several dumps lie here", where=path, found=found, do="name one of them")
        path = experiments[0]
    pieces, weights, problems = list[Piece](), dict[str, Piece](), list[Qwen35Error]()
    core: dict[tuple[int, int], dict[str, Any]] = {}
    for tags, file in sorted(((_tags(f), f) for f in _files(path)), key=lambda pair: int(pair[0]["dump_index"])):
        with costs_itself(problems, file):
            loaded = load_pt(file)
            wrapped = isinstance(loaded, dict) and set(loaded) == {"value", "meta"}
            value, meta = (loaded["value"], a_dict(loaded["meta"])) if wrapped else (loaded, {})
            name, step, rank = tags["name"], int(tags["step"]), int(tags["rank"])
            if name in BATCH_FIELDS:
                value = plain_values(value, str(file)) if name in BATCH_FIELDS[:2] else value
                here = core.setdefault((step, rank), {})  # again for every layer: the first counts
                here.setdefault(name, value)
                if name == "positions" and value.dim() == 2:
                    here.setdefault("rotary", value)
                continue
            layer = tags.get("layer_id", meta.get("layer_id"))
            load = partial(load_tensor, file, *(["value"] if wrapped else []))
            piece = Piece.named(name, once(value, load) if isinstance(value, Tensor) and len(pieces) < HELD else load,
                                None if layer in (None, "None") else int(layer), step=step, rank=rank,
                                dims=str(meta.get("dims") or ""), parallel=_parallel(meta, file),
                                where=str(file))  # fmt: skip
            if name.startswith("param__"):
                weights[f"{name.removeprefix('param__')}@{rank}"] = piece
            elif not name.startswith("grad__"):
                pieces.append(piece)
    problems += _unsupported(path, pieces)
    # The same on all ranks: the last of these to be set is the first rank's.
    known = sorted((k for k, found in core.items() if isinstance(found.get("input_ids"), Tensor)), reverse=True)
    tokens = {step: step_tokens(core[step, rank]) for step, rank in known}
    if lost := [error for error in problems if not tokens and "name=input_ids__" in str(error)]:
        raise lost[0]
    family = family_of(piece.path for piece in pieces)  # the dumper can hook any model
    return Dump("sglang dumper", path, pieces, tokens, problems, family=family, config=config, weights=weights)


def _parallel(meta: Mapping[Any, Any], file: Path) -> dict[str, int]:
    """Sizes of the groups of ranks, and the rank in each. Error: one that is no such number."""
    found = {"world_size": meta.get("world_size"), **a_dict(meta.get("megatron_parallel_info")),
             **a_dict(meta.get("sglang_parallel_info"))}  # fmt: skip
    told = {str(key): x for key, x in found.items() if str(key).endswith(("_size", "_rank")) and x is not None}
    for key, x in told.items():
        least = 1 if key.endswith("_size") else 0
        if type(x) is not int or not least <= x <= MOST_RANKS:
            expected = f"a whole number, {least} to {MOST_RANKS}"
            raise Qwen35Error(f"{key} is none", where=file, expected=expected, found=repr(x)[:100])
    return told


def known(file: Path) -> bool:
    tags = _tags(file)
    return {"step", "rank", "name"} <= set(tags) and tags.get("dump_index", "").isdecimal()


def _files(path: Path) -> list[Path]:
    return [p for p in path.glob("*.pt") if known(p)]


def _experiments(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and any(p.glob("step=*___name=*.pt")))


def _tags(file: Path) -> dict[str, str]:
    return dict(part.partition("=")[::2] for part in file.name.removesuffix(".pt").split("___"))


def _unsupported(path: Path, pieces: list[Piece]) -> list[Qwen35Error]:
    for axis, flag in (("attn_dp", "--dp-size 1"), ("attn_cp", "--attn-cp-size 1")):
        if any(int(piece.parallel.get(f"{axis}_size", 1)) > 1 for piece in pieces):
            return [Qwen35Error(f"tokens are split over ranks ({axis})", where=path, do=f"dump with {flag}")]
    return []
