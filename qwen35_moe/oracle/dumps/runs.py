"""Which tokens a dump holds, run by run: a run is one sequence's part of one step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .dump import Dump, StepTokens


@dataclass
class Run:
    """rows of the step, their ids and (where the dump has them) positions; request is the engine's name for it."""

    step: int
    rows: Tensor
    ids: Tensor
    positions: Tensor | None
    request: object

    @property
    def start(self) -> int | None:
        return None if self.positions is None else int(self.positions[0])

    @property
    def undivided(self) -> bool:
        """Whether nothing says where one sequence ends and the next begins."""
        return self.positions is None and self.request is None

    def __len__(self) -> int:
        return len(self.ids)

    def after(self, count: int) -> Run:
        """The run without its first tokens."""
        positions = None if self.positions is None else self.positions[count:]
        return Run(self.step, self.rows[count:], self.ids[count:], positions, self.request)


def runs(dump: Dump, steps: Iterable[int] | None = None) -> Iterator[Run]:
    """All runs of some steps (default: the target's), in order."""
    for step in dump.target_steps if steps is None else steps:
        tokens = dump.tokens.get(step)
        if tokens is not None and tokens.ids is not None:
            for rows, request in split_runs(tokens):
                at = None if tokens.positions is None else tokens.positions[rows]
                yield Run(step, rows, tokens.ids[rows], at, request)


def split_runs(tokens: StepTokens) -> Iterator[tuple[Tensor, object]]:
    """(rows, request) of each run of a step."""
    assert tokens.ids is not None
    positions = None if tokens.positions is None else tokens.positions.tolist()
    if tokens.batch is not None:
        yield from _split_batch(tokens, positions)
        return
    if (size := tree_size(tokens)) and tokens.positions is not None:
        for index, start in enumerate(range(0, tokens.ids.numel(), size)):
            for rows in _paths(tokens.positions[start : start + size]):
                yield rows + start, tokens.requests[index] if tokens.requests else index
        return
    stops = _stops(tokens)
    one_each = tokens.requests is not None and len(tokens.requests) == len(stops)
    for index, (start, stop) in enumerate(zip([0, *stops], stops, strict=False)):
        yield torch.arange(start, stop), tokens.requests[index] if one_each and tokens.requests else None


def tree_size(tokens: StepTokens) -> int:
    """Rows of each request, in a step that verifies trees of drafts: several stand at one position, after the first. 0:
    no such step."""
    ids, at, several = tokens.ids, tokens.positions, len(tokens.seq_lens or tokens.requests or ())
    if ids is None or at is None or tokens.batch is not None or not several or len(ids) % several:
        return 0
    if len(_stops(tokens)) == several:
        return 0
    trees = at.view(several, -1)
    rooted = (trees[:, 1:] > trees[:, :1]).all() and (trees.sort(1).values.diff(dim=1) <= 1).all()
    return trees.shape[1] if rooted else 0


def uncertain(tokens: StepTokens) -> int:
    """Rows of trees of drafts that are in no run."""
    return (tokens.count or 0) - len({r for x, _ in split_runs(tokens) for r in x.tolist()}) if tree_size(tokens) else 0


def _paths(positions_T: Tensor) -> list[Tensor]:
    """Rows of a tree from its root on, as far as their parents are certain: a parent stands at the position before, and
    no other row does."""
    depths_T, path = positions_T - positions_T[0], list[Tensor]()
    for depth in range(int(depths_T.max()) + 1):
        rows = (depths_T == depth).nonzero()
        if len(rows) > 1:
            return [torch.cat((*path, row)) for row in rows]
        path.append(rows[0])
    return [torch.cat(path)]


def _split_batch(tokens: StepTokens, positions: Sequence[int] | None) -> Iterator[tuple[Tensor, object]]:
    """Rows of a padded batch; several sequences that are packed into one are split where positions go back."""
    (B, T), mask = tokens.batch or (1, 0), tokens.mask
    for b in range(B):
        rows = torch.arange(b * T, (b + 1) * T)
        rows = rows if mask is None else rows[mask[rows]]
        if not len(rows):
            continue
        at = None if positions is None else [positions[r] for r in rows.tolist()]
        stops = [*([] if at is None else [i for i in range(1, len(at)) if at[i] <= at[i - 1]]), len(rows)]
        for k, (start, stop) in enumerate(zip([0, *stops], stops, strict=False)):
            yield rows[start:stop], ("row", b) if len(stops) == 1 else ("row", b, k)


def _stops(tokens: StepTokens) -> list[int]:
    """Where sequences end in a flat step. `seq_lens` counts cached tokens too, and may or may not count the step's."""
    seq_lens, requests, count = tokens.seq_lens, tokens.requests, tokens.count or 0
    positions = None if tokens.positions is None else tokens.positions.tolist()
    if seq_lens and sum(seq_lens) == count:
        return [sum(seq_lens[: i + 1]) for i in range(len(seq_lens))]
    if positions is not None and seq_lens and (stops := _by_ends(positions, seq_lens, count)):
        return stops
    several = len(seq_lens or requests or ())
    size = count // several if several and count % several == 0 else 0
    if size and (size == 1 or (positions is not None and _consecutive(positions, size))):
        return list(range(size, count + 1, size))
    if positions is None:
        return [count]
    return [i for i in range(1, count) if positions[i] != positions[i - 1] + 1] + [count]


def _by_ends(positions: list[int], seq_lens: list[int], count: int) -> list[int]:
    """A sequence's last token stands at position seq_len - 1."""
    stops, at = [], 0
    for length in seq_lens:
        at = next((i + 1 for i in range(at, count) if positions[i] == length - 1), count + 1)
        stops.append(at)
    return stops if stops[-1] == count else []


def _consecutive(positions: list[int], size: int) -> bool:
    return all(positions[i] == positions[i - 1] + 1 for i in range(1, len(positions)) if i % size)
