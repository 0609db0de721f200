"""Chosen experts are compared as sets. The margin of each difference is compared with the noise of the logits.

A flip is legal if the margin, the distance of the truth's logits of the two experts, is at most the noise, 2 delta.
delta is the largest error that legal roundings make on a router logit of that token (the envelope of
`moe_router_logits`). A flip with a larger margin is a sign of an earlier error.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Flip:
    """A token whose experts differ. `lost`: experts of the truth alone; `won`: experts of the engine alone; noise: 2
    delta."""

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
    """Agreement of one layer's routing. `nonsense` counts rows with ids out of range or repeated; `senseless` is the
    first of these."""

    layer: int | None
    tokens: int
    flips: list[Flip] = field(default_factory=list)
    nonsense: int = 0
    senseless: int | None = None

    @property
    def illegal(self) -> list[Flip]:
        return [flip for flip in self.flips if not flip.legal]

    @property
    def agree(self) -> int:
        return self.tokens - len(self.flips) - self.nonsense


def compare_ids(
    truth_RA: Tensor, engine_RA: Tensor, logits_RE: Tensor, delta_R: Tensor, layer: int | None = None
) -> Routing:
    """Compare ids [R, A] as sets, given the truth's logits [R, E] and the largest legal error of a logit [R]. A fused
    slot has an id, and no logit: no other expert can take its place."""
    routing = Routing(layer, len(truth_RA))
    slots = int(truth_RA.max()) + 1 - logits_RE.shape[1] if len(truth_RA) else 0
    logits_RE = torch.nn.functional.pad(logits_RE, (0, max(0, slots)), value=torch.inf)
    sets_RA = engine_RA.long().sort(1).values
    differ_R = (truth_RA.long().sort(1).values != sets_RA).any(1)
    nonsense_R = (sets_RA < 0).any(1) | (sets_RA >= logits_RE.shape[1]).any(1) | (sets_RA.diff(dim=1) == 0).any(1)
    broken = (differ_R & nonsense_R).nonzero().flatten().tolist()
    routing.nonsense, routing.senseless = len(broken), broken[0] if broken else None
    rows = (differ_R & ~nonsense_R).nonzero().flatten()
    if not len(rows):
        return routing
    logits_RE, noise_R = logits_RE[rows].to(torch.float64), 2 * delta_R[rows]
    ours_RE, theirs_RE = (
        torch.zeros(logits_RE.shape, dtype=torch.bool).scatter(1, ids_RA[rows].long(), True)
        for ids_RA in (truth_RA, engine_RA)
    )
    lost_RE, won_RE = ours_RE & ~theirs_RE, theirs_RE & ~ours_RE
    least_R1 = logits_RE.masked_fill(~won_RE, torch.inf).amin(1, keepdim=True)
    margin_R = logits_RE.masked_fill(~lost_RE, -torch.inf).amax(1) - least_R1.flatten()
    rank_R = (logits_RE > least_R1).sum(1) + 1
    lost, won = ([tuple(row.nonzero().flatten().tolist()) for row in x_RE] for x_RE in (lost_RE, won_RE))
    columns = (x.tolist() for x in (margin_R, noise_R, rank_R))
    routing.flips = [Flip(*flip) for flip in zip(rows.tolist(), lost, won, *columns, strict=True)]
    return routing


def could_flip(logits_RE: Tensor, delta_R: Tensor, top_k: int) -> Tensor:
    """Rows whose choice is within the noise. If the engine's ids are not known, the experts of these rows cannot be
    judged."""
    best = logits_RE.to(torch.float64).topk(min(top_k + 1, logits_RE.shape[1]), 1).values
    if best.shape[1] <= top_k:
        return torch.zeros(len(best), dtype=torch.bool)
    return best[:, top_k - 1] - best[:, top_k] <= 2 * delta_R
