"""Faults of one expert: do the positions whose tokens chose it differ more than the others of their prompts?

Such a fault moves few positions, so no quantile shows it, and of its many kinds the catalogue holds a few. For each
expert of each layer

    S    = sum over its positions of (rank of z among the positions of the prompt, minus the mean rank)
    gain = -log P(normal >= S / sd),   sd^2 = sum over prompts of n (N - n) (N + 1) / 12

with n of a prompt's N positions (Wilcoxon's rank sum, in strata). Rounding does not know experts: then a gain of G or
more has a chance of e^-G. Ranks are those of one prompt, since a flip of an early token moves all that come after it.
Positions that follow the same two tokens count once: what repeats, as generated text does, repeats its errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .replay import Branch, Replay

# A clean engine is accused so often, by any of its experts. In 8,900 clean runs of four checkpoints (18 to 256 experts,
# 400 tokens, engines in 33 arithmetics) the largest gain had a chance of 1e-4.1: about what so many runs make.
CHANCE = 1e-5
LOUDER = 1.3  # least ratio of the medians of z: a legal engine's error may differ a little between experts
OF_LEGAL = 0.5  # of what legal arithmetics differ there: a quieter engine may round one expert's products more
MOST = 1e3  # a ratio that is larger, or infinite, counts as this


@dataclass(frozen=True)
class OneExpert:
    """`gain` in nats over chance; `sure`: without the prompt that speaks most against it. `ratio`: the median of z at
    its positions over that at all others; `legal`: over the largest that a legal arithmetic has there."""

    layer: int
    expert: int
    positions: int
    gain: float
    sure: float
    ratio: float
    legal: float

    def __str__(self) -> str:
        return f"expert {self.expert} of layer {self.layer}"


class SingleExperts:
    """The experts that the truth's tokens chose at positions (sequence, place [R]). `clean` [M, R]: z of the legal
    arithmetics. A gain decides that is above `need`. `shown` of `count` experts have positions enough for that."""

    def __init__(self, replay: Replay, truth: Branch, sequence: Tensor, place: Tensor, clean: Tensor):
        ids_BT, self.experts = replay.ids.cpu(), replay.config.num_experts
        self.rows = firsts(torch.where(place > 0, ids_BT[sequence, place - 1], -1), ids_BT[sequence, place])
        self.prompt = sequence[self.rows].unique(return_inverse=True)[1]
        flat = sequence[self.rows] * ids_BT.shape[1] + place[self.rows]
        self.chosen = [ids.flatten(0, -2)[flat] for _, ids in truth.routing]  # a layer: [R, A]
        size_P1 = self.prompt.bincount().double()[:, None]
        counts = [self._sums(ids, torch.ones(len(flat)).double()) for ids in self.chosen]
        self.variances = [n * (size_P1 - n) * (size_P1 + 1) / 12 for n in counts]
        self.positions = torch.stack([n.sum(0) for n in counts])  # [L, E]
        self.count = self.positions.numel()
        reached = max(float(self._gains(z)[0].max()) for z in clean)
        self.need = max(math.log(self.count / CHANCE), 2 * reached)
        self.clean = clean[:, self.rows]
        gain_LE, sure_LE = self._evidence([n * (size_P1 - n) / 2 for n in counts])  # the highest ranks of each prompt
        self.shown = int(((gain_LE > self.need) & (2 * sure_LE > self.need)).sum())

    def look(self, z: Tensor) -> tuple[list[OneExpert], OneExpert]:
        """Which experts z [R] accuses, and the one that it speaks most against; the worst first."""
        gain_LE, sure_LE = self._gains(z)
        order = gain_LE.flatten().argsort(descending=True, stable=True)[: 1 + int((gain_LE > self.need).sum())].tolist()
        found = [self._one(z[self.rows], divmod(k, self.experts), gain_LE, sure_LE) for k in order]
        sure = (x for x in found if x.gain > self.need < 2 * x.sure)
        return [x for x in sure if x.ratio >= LOUDER and x.legal >= OF_LEGAL], found[0]

    def _one(self, z: Tensor, at: tuple[int, int], gain_LE: Tensor, sure_LE: Tensor) -> OneExpert:
        own, ratio, legal = (self.chosen[at[0]] == at[1]).any(1), 1.0, 1.0
        if own.any() and not own.all():
            mine = z[own].median()
            ratio, legal = _over(mine, z[~own].median()), _over(mine, self.clean[:, own].median(1).values.max())
        return OneExpert(*at, int(self.positions[at]), float(gain_LE[at]), float(sure_LE[at]), ratio, legal)

    def _gains(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """gain, and the sure part of it, [L, E] each, of z [R]."""
        z, rank = z[self.rows], torch.zeros(len(self.rows), dtype=torch.float64)
        for p in self.prompt.unique():
            which = self.prompt == p
            _, kind, count = z[which].unique(return_inverse=True, return_counts=True)
            rank[which] = (count.cumsum(0) - count / 2)[kind].double() - int(which.sum()) / 2  # their mean is 0
        return self._evidence([self._sums(ids, rank) for ids in self.chosen])

    def _evidence(self, sums: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The same of S [P, E], one a layer."""
        gains, sure = [], []
        for S_PE, variance_PE in zip(sums, self.variances, strict=True):
            strongest = S_PE.argmax(0, keepdim=True)
            gains.append(_gain(S_PE.sum(0), variance_PE.sum(0)))
            sure.append(_gain(*(x.sum(0) - x.gather(0, strongest)[0] for x in (S_PE, variance_PE))))
        return torch.stack(gains), torch.stack(sure)

    def _sums(self, ids_RA: Tensor, value_R: Tensor) -> Tensor:
        """The sum of the values of each prompt's positions that chose an expert.  -> [P, E]"""
        E = self.experts + 1  # a fused shared expert is one more, which all positions have
        which = (self.prompt[:, None] * E + ids_RA).flatten()
        sums = torch.zeros((int(self.prompt.max()) + 1) * E, dtype=torch.float64)
        return sums.index_add(0, which, value_R.repeat_interleave(ids_RA.shape[1])).view(-1, E)[:, : self.experts]


def firsts(before: Tensor, last: Tensor) -> Tensor:
    """The first position of each pair of tokens, in order."""
    kind = torch.stack((before, last)).unique(dim=1, return_inverse=True)[1]
    place = torch.arange(len(kind))
    return torch.full((int(kind.max()) + 1,), len(kind)).scatter_reduce(0, kind, place, "amin").sort().values


def _gain(S: Tensor, variance: Tensor) -> Tensor:
    """Nothing where no position, or each, chose the expert."""
    return torch.where(variance > 0, -torch.special.log_ndtr(-S / variance.sqrt().clamp(min=1e-9)), 0)


def _over(a: Tensor, b: Tensor) -> float:
    """a / b, of numbers that may be 0."""
    return min(MOST, float(a / b)) if b > 0 else MOST if a > 0 else 1.0
