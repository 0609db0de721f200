"""Joining what several ranks hold of one value: replicas, shares of columns, partial sums."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import Qwen35Error
from ...numerics.tap_keys import base_name
from .engine_names import features, width

Blocks = tuple[tuple[str, str], ...]


class Ranked(Protocol):
    """What is asked of a piece here: its rank, its declared dims, its place in the parallel groups."""

    rank: int
    dims: str
    parallel: Mapping[str, Any]


def join_ranks(key: str, ranks: list[Tensor], join: str, blocks: Blocks, sizes: Mapping[str, int]) -> Tensor:
    """One tap's rows from those of all ranks: "same" (replicated), "sum", "cat" (columns) or "rows" (tokens)."""
    full = features(base_name(key), sizes)
    if join in ("sum", "same") and len({x.shape for x in ranks}) > 1:
        found = ", ".join(str(list(x.shape)) for x in ranks)
        raise Qwen35Error("ranks have different shapes", where=key, found=found, do="dump all ranks in one run")
    same = len(ranks) > 1 and all(x.shape == ranks[0].shape and torch.equal(x, ranks[0]) for x in ranks[1:])
    if same and (join != "cat" or (len(blocks) == 1 and ranks[0].shape[1] == full)):
        ranks = ranks[:1]  # replicated, or reduced already
    if len(ranks) == 1 or join == "sum":
        whole = ranks[0] if len(ranks) == 1 else torch.stack([x.to(torch.float64) for x in ranks]).sum(0)
        return _columns(key, [whole], blocks, sizes)
    if join == "rows":
        return torch.cat(ranks)
    if join == "same" and ranks[0].shape[1] * len(ranks) != full:
        raise Qwen35Error(
            "replicated ranks differ",
            where=key,
            found=f"{len(ranks)} ranks, largest difference {max((x - ranks[0]).abs().max().item() for x in ranks)}",
            do="if they are shares or partial sums, dump dims that say so",
        )
    return _columns(key, ranks, blocks, sizes)


def _columns(key: str, ranks: list[Tensor], blocks: Blocks, sizes: Mapping[str, int]) -> Tensor:
    """The blocks of this tap, each rank's share side by side."""
    name, count = base_name(key), len(ranks)
    if len({n for n, _ in blocks}) == 1 and (count == 1 or len(blocks) == 1):
        parts = [ranks]
    else:
        shares = _shares(key, blocks, count, ranks[0].shape[1], sizes)
        split = [x.split(shares, 1) for x in ranks]
        parts = [[x[i] for x in split] for i, (n, _) in enumerate(blocks) if n == name]
        blocks = tuple(b for b in blocks if b[0] == name)
    heads = sizes.get("g", count)
    # Fewer key/value heads than ranks: each head is held by several, one after another.
    thin = [x[:: count // heads] if "g" in w and count > heads else x for x, (_, w) in zip(parts, blocks)]  # noqa: B905
    columns = [x for part in thin for x in part]
    return torch.cat(columns, 1) if len(columns) > 1 else columns[0]


def _shares(key: str, blocks: Blocks, count: int, columns: int, sizes: Mapping[str, int]) -> list[int]:
    """How wide each block is on one of `count` ranks."""
    widths = [width(w, sizes) for _, w in blocks]
    known = [w for w in widths if w is not None]
    if len(known) < len(widths):
        do = "give the checkpoint's config.json"
        raise Qwen35Error("fused columns cannot be split without the model's sizes", where=key, do=do)
    if all(w.isdigit() for _, w in blocks):
        shares = [w * columns // sum(known) for w in known]
    else:
        heads = sizes.get("g", count)
        shares = [w // (min(count, heads) if "g" in e else count) for w, (_, e) in zip(known, blocks, strict=True)]
    if sum(shares) != columns:
        expected = f"{sum(shares)} ({' + '.join(w for _, w in blocks)} over {count} ranks)"
        raise Qwen35Error("fused columns do not add up", where=key, expected=expected, found=columns,
                          do="check that the dump has all ranks and is of this model")  # fmt: skip
    return shares


def by_row(x: Tensor, count: int | None) -> Tensor:
    """[tokens, features] of any of [T, ...], [B, T, ...], [T * heads, width]; left in rows where tokens do not fit."""
    if not x.numel():
        raise Qwen35Error("an empty tensor", expected=f"{count or 'some'} rows", found=list(x.shape))
    lead = 1
    for k, size in enumerate(x.shape):
        lead *= size
        if lead == count:
            return x.reshape(count, -1) if k + 1 < x.dim() else x.reshape(count, 1)
    if count and x.dim() == 2 and x.shape[0] % count == 0:
        return x.reshape(count, -1)
    return x.reshape(x.shape[0], -1) if x.dim() else x.reshape(1, 1)


def declared_join(pieces: Sequence[Ranked]) -> tuple[str, list[int]] | None:
    """What the dump's own dims say, "t (n*h)[attn_tp] # moe_ep:replicated": the join, and which pieces, in order."""
    dims = pieces[0].dims
    if not dims or len(pieces) == 1:
        return None
    body = dims.partition("#")[0]
    join, axes = "same", []
    for index, (_, modifiers) in enumerate(re.findall(r"(\([^)]*\)|[\w*]+)(?:\[([^\]]*)\])?", body)):
        for modifier in filter(None, modifiers.split(",")):
            axis, _, qualifier = modifier.strip().partition(":")
            if int(pieces[0].parallel.get(f"{axis}_size", len(pieces))) > 1:
                join = "sum" if "partial" in qualifier else "rows" if index == 0 else "cat"
                axes.append(axis)
    seen: dict[tuple[int, ...], int] = {}
    for i, piece in enumerate(pieces):
        seen.setdefault(tuple(int(piece.parallel.get(f"{axis}_rank", piece.rank)) for axis in axes), i)
    return join, [seen[place] for place in sorted(seen)]
