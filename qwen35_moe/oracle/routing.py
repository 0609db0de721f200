"""Which experts were chosen: compared as sets, with the margin of each difference against the noise of the logits.

A flip is legal iff the truth's logits of the two experts are closer than the noise of both: margin <= 2 delta, with
delta the largest error that legal roundings make on a router logit of that token (the envelope of
`moe_router_logits`). A flip with a larger margin is the sign of an error before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Flip:
    """A token whose experts differ. `lost` are the truth's, `won` the engine's; margin between them, noise 2 delta."""

    row: int
    lost: tuple[int, ...]
    won: tuple[int, ...]
    margin: float
    noise: float
    rank: int  # the worst rank, in the truth's order, of an expert that the engine chose

    @property
    def legal(self) -> bool:
        return self.margin <= self.noise


@dataclass
class Routing:
    """Agreement of one layer's routing. `nonsense` counts rows with ids out of range or repeated."""

    layer: int | None
    tokens: int
    flips: list[Flip] = field(default_factory=list)
    nonsense: int = 0

    @property
    def illegal(self) -> list[Flip]:
        return [flip for flip in self.flips if not flip.legal]

    @property
    def agree(self) -> int:
        return self.tokens - len(self.flips) - self.nonsense


def compare_ids(
    truth_RA: Tensor, engine_RA: Tensor, logits_RE: Tensor, delta_R: Tensor, layer: int | None = None
) -> Routing:
    """Compare ids [R, A] as sets, given the truth's logits [R, E] and the largest legal error of a logit [R]."""
    E = logits_RE.shape[1]
    routing = Routing(layer, len(truth_RA))
    truth_RA, engine_RA = truth_RA.long(), engine_RA.long()
    for row in (truth_RA.sort(1).values != engine_RA.sort(1).values).any(1).nonzero().flatten().tolist():
        ours, theirs = set(truth_RA[row].tolist()), set(engine_RA[row].tolist())
        if len(theirs) < engine_RA.shape[1] or not all(0 <= e < E for e in theirs):
            routing.nonsense += 1
            continue
        lost, won = sorted(ours - theirs), sorted(theirs - ours)
        logits = logits_RE[row].to(torch.float64)
        margin = float(logits[lost].max() - logits[won].min())
        rank = int((logits > logits[won].min()).sum()) + 1
        routing.flips.append(Flip(row, tuple(lost), tuple(won), margin, 2 * float(delta_R[row]), rank))
    return routing


def could_flip(logits_RE: Tensor, delta_R: Tensor, top_k: int) -> Tensor:
    """Rows whose choice is within the noise: where the engine's ids are not known, their experts cannot be judged."""
    best = logits_RE.to(torch.float64).topk(min(top_k + 1, logits_RE.shape[1]), 1).values
    if best.shape[1] <= top_k:
        return torch.zeros(len(best), dtype=torch.bool)
    return best[:, top_k - 1] - best[:, top_k] <= 2 * delta_R


def by_id(values_RA: Tensor, ids_RA: Tensor, like_RA: Tensor) -> Tensor:
    """Values of one order of ids in that of another; rows whose sets differ come in the order of their ids."""
    order, target = ids_RA.long().argsort(1), like_RA.long().argsort(1)
    return values_RA.gather(1, order).scatter(1, target, values_RA.gather(1, order))
