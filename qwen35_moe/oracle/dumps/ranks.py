"""Which ranks a dump holds, which are lost, and which of them a column came from."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...errors import Qwen35Error
from .engine_names import width
from .join import by_row, declared_join, join_ranks
from .pieces import Source

SOME = 8  # lost ranks that a message names
RANK_FILES = {
    "sglang dumper": "step=*___rank={}___*.pt",
    "sglang passes": "TP*_Rank{}_pid*/Pass*.pt",
    "atom": "layer*_rank{}*.pt",
}


class RankedDump(Protocol):
    """What is needed here of a `Dump`."""

    format: str
    path: Path
    world: int
    sizes: dict[str, int]
    sources: dict[str, dict[int, Source]]

    def count(self, step: int) -> int | None: ...


def check_ranks(dump: RankedDump, source: Source) -> None:
    """Raises Qwen35Error, the same one for all taps, if shares of a rank are not here."""
    first = source.pieces[0]
    stages = int(first.parallel.get("pp_size", 1))
    world = max(int(first.parallel.get("world_size", 1)) // stages, _world(dump))
    here = [piece.rank for piece in source.pieces]
    if source.rule.join == "same" or len(here) >= world:
        return
    ranks = [str(rank) for rank in range(world) if stages == 1 and rank not in here]
    lost = ", ".join(ranks[:SOME]) + (", ..." if len(ranks) > SOME else "")
    files = RANK_FILES.get(dump.format, "").format(lost if lost.isdigit() else "N")
    raise Qwen35Error(f"rank {lost or '?'} is missing", where=dump.path,
                      found=f"rank {', '.join(map(str, here))} of {world}", expected=files,
                      do="copy the dumps of all ranks to one place")  # fmt: skip


def _world(dump: RankedDump) -> int:
    """How many ranks there were, if only one is here and does not say: by the shares of fused columns it holds."""
    if dump.world == 0:
        found: dict[tuple[tuple[str, str], ...], int] = {}
        for steps in dump.sources.values():
            step, source = next(iter(steps.items()))
            blocks = source.rule.blocks
            widths = [None if w.isdigit() else width(w, dump.sizes) for _, w in blocks]
            # Key and value heads are no measure: several ranks may hold the same ones.
            alone = len(source.pieces) == 1 and source.rule.join == "cat" and not any("g" in w for _, w in blocks)
            if alone and blocks not in found and len(blocks) > 1 and None not in widths:
                try:
                    columns = by_row(source.pieces[0].load(), dump.count(step)).shape[1]
                except Qwen35Error:
                    continue
                whole = sum(w or 0 for w in widths)
                found[blocks] = whole // columns if columns and whole % columns == 0 else 1
        dump.world = found.popitem()[1] if len(set(found.values())) == 1 else 1
    return dump.world


def owners(dump: RankedDump, key: str) -> Tensor | None:
    """[features] the rank that each column of a tap came from; None where ranks hold no columns of it."""
    step, source = next(iter(dump.sources[key].items()))
    join, order = declared_join(source.pieces) or (source.rule.join, list(range(len(source.pieces))))
    if join != "cat" or len(source.pieces) < 2:
        return None
    count = None if source.pieces[0].rows is not None else dump.count(step)
    pieces = [source.pieces[i] for i in order]
    ranks = [torch.full_like(by_row(p.load(), count), p.rank, dtype=torch.float64) for p in pieces]
    return join_ranks(key, ranks, join, source.rule.blocks, dump.sizes)[0]
