"""Which tokens a dump holds, run by run: a run is one sequence's part of one step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, repeat
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
    if tokens.batch is not None:
        yield from _split_batch(tokens)
        return
    if (size := tree_size(tokens)) and tokens.positions is not None:
        for index, positions in enumerate(tokens.positions.split(size)):
            for rows in _paths(positions):
                yield rows + index * size, tokens.requests[index] if tokens.requests else index
        return
    stops, requests = _stops(tokens), tokens.requests or []
    for start, stop, request in zip([0, *stops], stops, requests if len(requests) == len(stops) else repeat(None)):  # noqa: B905
        yield torch.arange(start, stop), request


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


def _split_batch(tokens: StepTokens) -> Iterator[tuple[Tensor, object]]:
    """Rows of a padded batch; several sequences that are packed into one are split where positions go back."""
    (B, T), mask, at = tokens.batch or (1, 0), tokens.mask, tokens.positions
    for b, rows in enumerate(torch.arange(B * T).split(T) if T else ()):
        rows = rows if mask is None else rows[mask[rows]]
        parts = [rows] if at is None else rows.tensor_split((at[rows].diff() <= 0).nonzero().flatten() + 1)
        for k, part in enumerate(parts if len(rows) else ()):
            yield part, ("row", b) if len(parts) == 1 else ("row", b, k)


def _stops(tokens: StepTokens) -> list[int]:
    """Where sequences end in a flat step. `seq_lens` counts cached tokens too, and may or may not count the step's."""
    seq_lens, at, count = tokens.seq_lens or [], tokens.positions, tokens.count or 0
    if seq_lens and sum(seq_lens) == count:
        return list(accumulate(seq_lens))
    if at is not None and seq_lens and (stops := _by_ends(at.tolist(), seq_lens, count)):
        return stops
    several = len(seq_lens or tokens.requests or ())
    size = count // several if several and count % several == 0 else 0
    if size == 1 or (size and at is not None and bool((at.view(several, size).diff(dim=1) == 1).all())):
        return list(range(size, count + 1, size))
    return [*([] if at is None else ((at.diff() != 1).nonzero().flatten() + 1).tolist()), count]


def _by_ends(positions: list[int], seq_lens: list[int], count: int) -> list[int]:
    """A sequence's last token stands at position seq_len - 1."""
    stops, at = [], 0
    for length in seq_lens:
        at = next((i + 1 for i in range(at, count) if positions[i] == length - 1), count + 1)
        stops.append(at)
    return stops if stops[-1] == count else []
