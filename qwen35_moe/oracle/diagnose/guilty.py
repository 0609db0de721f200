"""One tap that went wrong, and what a hypothesis leaves of its error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...numerics.arithmetics import Arithmetic
from ..judge.envelope import envelope, judge
from ..judge.rerun import Taps
from ..judge.suspects import DOUBTFUL_LIMITS, batches
from .rank_shares import Blame


class GuiltyTap:
    """One tap that went wrong: what the engine had, and what was right. Numbers that are not finite count as 0 in both,
    and rows without any other are left out."""

    def __init__(self, key: str, pair: Any, work: Any, truth: Tensor):
        self.key, self.pair, self.work = key, pair, work
        self.blamed: Blame | None = None
        engine, truth = pair.engine.to(torch.float64), self.of_all(truth).to(torch.float64)
        finite = engine.isfinite() & truth.isfinite()
        self.used, self.broken = finite.any(1), not finite.all()
        self.finite = finite[self.used]
        self.engine, self.truth = (torch.where(self.finite, x[self.used], 0.0) for x in (engine, truth))
        self.size = (self.engine.norm(dim=1) + self.truth.norm(dim=1)).clamp(min=torch.finfo(torch.float64).tiny)
        self.error = self.engine - self.truth

    def of_all(self, y: Tensor) -> Tensor:
        """Our value at all rows of the pair, on the CPU."""
        return self.work.rows(y, self.pair).cpu()

    def rows(self, y: Tensor) -> Tensor:
        """The same at the rows that are used, in float64."""
        return torch.where(self.finite, self.of_all(y).to(torch.float64)[self.used], 0.0)

    def first_bad(self, members: Sequence[Taps]) -> dict[int, int]:
        """Sequence -> index of its first real token that is beyond the limit. States that are not of one token are
        those after the last one."""
        legal = [self.rows(taps[self.key]) for taps in members if self.key in taps]
        bound = envelope(self.truth, legal, self.pair.dtype)
        bad = judge(self.engine, self.truth, bound, self.pair.dtype).ratios > self.work.limit
        index_BT = self.work.alignment.truth.mask.long().cumsum(1) - 1
        found: dict[int, int] = {}
        for b, t in self.pair.rows.long()[self.used][bad].tolist():
            at = int(index_BT[b, t])  # -1: the last
            found[b] = min(at, found.get(b, at))
        return dict(sorted(found.items(), key=lambda one: one[0]))

    def explains(self, y_Rn: Tensor) -> float:
        before, after = ((e.norm(dim=1) / self.size).square().sum() for e in (self.error, self.engine - y_Rn))
        share = 1 - float(after / before)
        return share if share == share else float("-inf")

    def left(self, outputs: Sequence[Tensor]) -> float:
        """The ratio of what a hypothesis leaves: its exact output first, then what legal arithmetics make of it."""
        good = torch.stack([y.isfinite() for y in outputs]).all(0)
        if not good.any():
            return float("inf")
        engine, y, *members = (torch.where(good, x, 0.0) for x in (self.engine, *outputs))
        return judge(engine, y, envelope(y, members, self.pair.dtype), self.pair.dtype).ratio

    def settled(self, run: Callable[[int, Arithmetic], Tensor], tables: Sequence[Arithmetic]) -> float:
        """The ratio that `run(i, table)` leaves under the tables, and under more where that could clear it."""
        outputs = [run(i, table) for i, table in enumerate(tables)]
        ratio, limit = self.left(outputs), self.work.limit
        more = batches(tables[1:], lambda some: [{self.key: run(i + 1, table)} for i, table in some])
        while limit < ratio <= DOUBTFUL_LIMITS * limit and (batch := next(more, None)):
            outputs += [taps[self.key] for taps in batch]
            ratio = self.left(outputs)
        return ratio
