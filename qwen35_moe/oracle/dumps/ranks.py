"""What several ranks hold of one value: replicas, shares of columns, partial sums. Which ranks are lost; how the others
join."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...errors import Qwen35Error
from ...numerics.tap_keys import base_name
from .engine_names import features, width
from .pieces import Piece, Source

Blocks = tuple[tuple[str, str], ...]
Sources = Mapping[str, Mapping[int, Source]]  # tap -> step -> where it comes from
SOME = 8  # lost ranks that a message names
RANK_FILES = {
    "sglang dumper": "step=*___rank={}___*.pt",
    "sglang passes": "TP*_Rank{}_pid*/Pass*.pt",
    "atom": "layer*_rank{}*.pt",
}


def join_ranks(key: str, ranks: list[Tensor], join: str, blocks: Blocks, sizes: Mapping[str, int]) -> Tensor:
    """One tap's rows from those of all ranks: "same" (replicated), "sum", "cat" (columns) or "rows" (tokens)."""
    full, first = features(base_name(key), sizes), ranks[0]
    if join in ("sum", "same") and len({x.shape for x in ranks}) > 1:
        found = ", ".join(str(list(x.shape)) for x in ranks)
        raise Qwen35Error("ranks have different shapes", where=key, found=found, do="dump all ranks in one run")
    same = len(ranks) > 1 and all(x.shape == first.shape and torch.equal(x, first) for x in ranks[1:])
    if same and (join != "cat" or (len(blocks) == 1 and first.shape[1] == full)):
        ranks = ranks[:1]  # replicated, or reduced already
    if len(ranks) == 1 or join == "sum":
        whole = first if len(ranks) == 1 else torch.stack([x.to(torch.float64) for x in ranks]).sum(0)
        return _columns(key, [whole], blocks, sizes)
    if join == "rows":
        return torch.cat(ranks)
    if join == "same" and first.shape[1] * len(ranks) != full:
        found = f"{len(ranks)} ranks, largest difference {max((x - first).abs().max().item() for x in ranks)}"
        do = "if they are shares or partial sums, dump dims that say so"
        raise Qwen35Error("replicated ranks differ", where=key, found=found, do=do)
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
    known = [w for _, e in blocks if (w := width(e, sizes)) is not None]
    if len(known) < len(blocks):
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
    """[tokens, features] of any of [T, ...], [B, T, ...], [T * heads, width]; its own rows if `count` does not fit."""
    if not x.numel():
        raise Qwen35Error("an empty tensor", expected=f"{count or 'some'} rows", found=list(x.shape))
    lead = 1
    for k, size in enumerate(x.shape):
        lead *= size
        if lead == count:
            return x.reshape(count, -1) if k + 1 < x.dim() else x.reshape(count, 1)
    if count and x.dim() == 2 and x.shape[0] % count == 0:
        return x.reshape(count, -1)
    return x.reshape(x.shape[0] if x.dim() else 1, -1)


def joining(source: Source) -> tuple[str, list[Piece]]:
    """How the pieces join, and which, in order: as the dump's dims say, "t (n*h)[attn_tp] # moe_ep:replicated", or the
    rule of the tap."""
    pieces = source.pieces
    if not pieces[0].dims or len(pieces) == 1:
        return source.rule.join, pieces
    join, axes = "same", []
    body = pieces[0].dims.partition("#")[0]
    for index, (_, modifiers) in enumerate(re.findall(r"(\([^)]*\)|[\w*]+)(?:\[([^\]]*)\])?", body)):
        for modifier in filter(None, modifiers.split(",")):
            axis, _, qualifier = modifier.strip().partition(":")
            if int(pieces[0].parallel.get(f"{axis}_size", len(pieces))) > 1:
                join = "sum" if "partial" in qualifier else "rows" if index == 0 else "cat"
                axes.append(axis)
    seen: dict[tuple[int, ...], Piece] = {}
    for piece in pieces:
        seen.setdefault(tuple(int(piece.parallel.get(f"{axis}_rank", piece.rank)) for axis in axes), piece)
    return join, [seen[place] for place in sorted(seen)]


def check_ranks(source: Source, world: int, format: str, path: Path) -> None:
    """Raises Qwen35Error, the same one for all taps, if shares of a rank are not here. world: how many there were, if
    the dump does not say more."""
    first = source.pieces[0]
    stages = int(first.parallel.get("pp_size", 1))
    world = max(int(first.parallel.get("world_size", 1)) // stages, world)
    here = [piece.rank for piece in source.pieces]
    if source.rule.join == "same" or len(here) >= world:
        return
    ranks = [str(rank) for rank in range(world) if stages == 1 and rank not in here]
    lost = ", ".join(ranks[:SOME]) + (", ..." if len(ranks) > SOME else "")
    files = RANK_FILES.get(format, "").format(lost if lost.isdigit() else "N")
    found = f"rank {', '.join(map(str, here))} of {world}"
    raise Qwen35Error(f"rank {lost or '?'} is missing", where=path, found=found, expected=files,
                      do="copy the dumps of all ranks to one place")  # fmt: skip


def world_of(sources: Sources, sizes: Mapping[str, int], count: Callable[[int], int | None]) -> int:
    """How many ranks there were, if only one is here and does not say: by the shares of fused columns it holds."""
    found: dict[Blocks, int] = {}
    for steps in sources.values():
        step, source = next(iter(steps.items()))
        blocks = source.rule.blocks
        widths = [None if w.isdigit() else width(w, sizes) for _, w in blocks]
        # Key and value heads are no measure: several ranks may hold the same ones.
        alone = len(source.pieces) == 1 and source.rule.join == "cat" and not any("g" in w for _, w in blocks)
        if alone and blocks not in found and len(blocks) > 1 and None not in widths:
            try:
                columns = by_row(source.pieces[0].load(), count(step)).shape[1]
            except Qwen35Error:
                continue
            whole = sum(w or 0 for w in widths)
            found[blocks] = whole // columns if columns and whole % columns == 0 else 1
    return found.popitem()[1] if len(set(found.values())) == 1 else 1
