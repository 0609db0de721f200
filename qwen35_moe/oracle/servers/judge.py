"""How far an engine's log p are from the truth, in units of what legal arithmetics make at the same positions.

    d = log p(engine) - log p(truth)          of each token that the engine tells, at each position
    z = rms(d) / sigma                        of a position; sigma is the rms over the legal arithmetics of their rms(d)

A few flips of experts do not change the outcome of these tests:

quantiles   the median, upper quartile and 90 % quantile of z against the largest that a legal arithmetic has when it is
            measured by the others. It sees faults that nobody listed.
likelihood  a hypothesis h predicts d = s, since it was replayed. With noise of Student's t (3 degrees of freedom, scale
            c sigma) a position favours h by

                gain = 2 log((1 + z^2 / 3c^2) / (1 + z_h^2 / 3c^2)),   z_h = rms(d - s) / sigma

            (at most CLIP either way), and c = max(1, the median of z_h over the legal one): an engine that is noisier
            than ours is granted its noise. It sees what is far below the noise of one position, given enough of them.

one expert  (`one_expert.py`) are the positions worse than others whose tokens chose one expert?

A flip that rounding makes early in a prompt moves all positions after it, and may move them as a fault would: positions
of one prompt are not independent. So the gain without the prompt that favours h most decides. If the noise were as
modelled, a clean engine would exceed a gain of G with a chance of e^-G for each hypothesis. DECIDED is log(2,000
hypotheses / 1e-4); what the legal arithmetics reach themselves, twice over, is asked in addition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .answer import FAR
from .one_expert import OneExpert, SingleExperts
from .replay import Branch, Replay

QUANTILES = (0.5, 0.75, 0.9)
DECIDED, CLIP = 17.0, 2.0
FAINT = 0.05  # of the gain that decides: less is no ground for a forecast
UNSURE = 5e-4  # on either side: 1 in 1,000
WORST = 1e3  # z of what is not finite, and of what is further away
AFTER_TEMPERATURE = "log p after temperature"
TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.5, 2.0)


@dataclass(frozen=True)
class Positions:
    """Where log p are known. sequence, place [R]: after which token; ids, known [R, K]: of which tokens."""

    sequence: Tensor
    place: Tensor
    ids: Tensor
    known: Tensor

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        return self.sequence, self.place


@dataclass(frozen=True)
class Quantile:
    """A quantile of z over the legal one: `ratio`, and the bounds that hold 999 times in 1,000."""

    name: str
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Explanation:
    """What one hypothesis makes of the answers. `gain` in nats over "clean"; `sure`: the gain without the prompt that
    favours it most; `left`: the median of z_h over the legal one, 1 where nothing is left to explain; `visible`: this
    fault would have been found in an engine that has it."""

    name: str
    gain: float
    sure: float
    left: float
    visible: bool
    layers: tuple[int, ...] = ()  # at which it strikes; none: at all
    block: str = ""


class Judge:
    """Holds log p of all branches at some positions. `branches` as `Replay.run` gives them: truth, `members` legal
    arithmetics, hypotheses."""

    def __init__(self, replay: Replay, branches: Sequence[Branch], members: int, at: Positions):
        self.at, self.known = at, at.known
        which = at.sequence.unique(return_inverse=True)[1]
        self.prompts = torch.nn.functional.one_hot(which).double()  # [R, prompts]
        self.config = replay.config
        self.truth, self.best, self.most, warm = self._truth(replay, branches[0])
        legal = branches[1 : members + 1]
        self.legal = torch.stack([replay.gather(b, at.rows, at.ids) - self.truth for b in legal])  # [M, R, K]
        self.branches = list(branches[members + 1 :])
        signals = replay.gather_all(self.branches, at.rows, at.ids) - self.truth
        self.signals = torch.cat([signals, *(x[None] for x in warm)])  # [H, R, K]
        self.names = [*(b.name for b in self.branches), *(f"{AFTER_TEMPERATURE} {t:g}" for t in TEMPERATURES)]
        sizes = self.size(self.legal)
        self.sigma = self._sigma(sizes)
        others = [self._sigma(torch.cat((sizes[:m], sizes[m + 1 :]))) for m in range(len(sizes))]
        self.clean = torch.stack([z(s, o) for s, o in zip(sizes, others, strict=True)])  # [M, R]
        self.level = {q: max(float(x.quantile(q)) for x in self.clean) for q in QUANTILES}
        self.seen, self.need, self.reach = self._power()
        self.single = SingleExperts(replay, branches[0], at.sequence, at.place, self.clean)

    def _truth(self, replay: Replay, branch: Branch) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """log p [R, K], the likeliest token and its log p [R], and what each temperature would add [R, K]."""
        value, best, most, warm = [], [], [], []
        for some, x in replay.log_p(branch, self.at.rows):
            ids = self.at.ids[some].to(x.device)
            value.append(x.gather(1, ids))
            best.append(x.argmax(1))
            most.append(x.amax(1))
            warm.append(torch.stack([(x / t).log_softmax(1).gather(1, ids) - value[-1] for t in TEMPERATURES]))
        return torch.cat(value).cpu(), torch.cat(best).cpu(), torch.cat(most).cpu(), list(torch.cat(warm, 1).cpu())

    def size(self, d: Tensor) -> Tensor:
        """rms over the tokens that are known at a position: [..., R, K] -> [..., R]."""
        squares = torch.where(self.known, d, 0.0).square().nan_to_num(nan=torch.inf)
        return (squares.sum(-1) / self.known.sum(-1)).sqrt()

    def _sigma(self, sizes: Tensor) -> Tensor:
        """[M, R] -> [R]; at least a quarter of the typical one, which luck may undercut."""
        sigma = sizes.square().mean(0).sqrt()
        return sigma.clamp(min=float(sigma.median()) / 4 or 1e-12)

    def gains(self, z0: Tensor, zh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """gain, the sure part of it, and what is left, [H] each, of z [R] or [H, R] as it is and z_h [H, R]."""
        left = zh.quantile(0.5, dim=-1) / self.level[0.5]
        c2 = 3 * left.clamp(min=1, max=WORST).square()[:, None]
        each = 2 * (torch.log1p(z0.square() / c2) - torch.log1p(zh.square() / c2))
        prompts = each.clamp(-CLIP, CLIP) @ self.prompts
        return prompts.sum(-1), prompts.sum(-1) - prompts.amax(-1).clamp(min=0), left

    def _power(self) -> tuple[Tensor, float, Tensor]:
        """Which hypotheses [H] an engine that has them would be convicted of, in every legal arithmetic; the gain that
        decides; and how much of it each would reach [H], which grows with the number of positions."""
        noise = torch.stack([z(self.size(d), self.sigma) for d in self.legal])
        planted = torch.stack([z(self.size(self.signals + d), self.sigma) for d in self.legal])  # [M, H, R]
        gains = torch.stack([self.gains(p, n.expand_as(p))[1] for p, n in zip(planted, noise, strict=True)])
        own = torch.stack([self.gains(n, z(self.size(d - self.signals), self.sigma))[1]
                           for d, n in zip(self.legal, noise, strict=True)])  # fmt: skip
        listed = gains.amin(0) > 2 * DECIDED
        need = max(DECIDED, 2 * float(own[:, listed].max())) if listed.any() else DECIDED
        loud = torch.stack([planted.quantile(q, dim=-1).amin(0) / self.level[q] > FAR for q in QUANTILES]).any(0)
        least = gains.amin(0)
        return (least > need) | loud, need, least / need

    def look(self, log_p: Tensor) -> tuple[list[Quantile], list[Explanation]]:
        """What both tests say of an engine's log p [R, K] at these positions; the best explanation first."""
        d = log_p - self.truth
        z0, found = z(self.size(d), self.sigma), list[Explanation]()
        gains, sure, left = self.gains(z0, z(self.size(d - self.signals), self.sigma))
        for h in gains.argsort(descending=True, stable=True).tolist():
            planted = self.branches[h].hypothesis if h < len(self.branches) else None
            layers = () if planted is None or planted.layer is None else (planted.layer,)
            numbers = float(gains[h]), float(sure[h]), float(left[h]), bool(self.seen[h])
            found.append(Explanation(self.names[h], *numbers, layers, planted.fault.block if planted else ""))
        return [self._quantile(z0, q) for q in QUANTILES], found

    def experts(self, log_p: Tensor) -> tuple[list[OneExpert], OneExpert]:
        """Which single experts log p [R, K] accuse, and the one that they speak most against."""
        return self.single.look(z(self.size(log_p - self.truth), self.sigma))

    def _quantile(self, z0: Tensor, q: float) -> Quantile:
        """Bounds by order statistics: the number of positions below a quantile is binomial."""
        n, ordered = len(z0), z0.sort().values
        low, high = surely(n, q)
        name = {0.5: "median", 0.75: "upper quartile", 0.9: "90 % quantile"}[q]
        level = self.level[q]
        least = float(ordered[low]) if low >= 0 else 0.0
        most = float(ordered[high]) if high < n else float("inf")
        return Quantile(name, float(ordered.quantile(q)) / level, least / level, most / level)

    def power(self) -> tuple[list[str], list[str]]:
        """Names of the hypotheses that these positions would show, and of those that they would not."""
        named = list(zip(self.names, self.seen.tolist(), strict=True))[: len(self.branches)]
        return [n for n, seen in named if seen], [n for n, seen in named if not seen]

    def blind(self) -> str:
        """The faults of the catalogue that these positions would not show, and about how many positions would show
        them. Empty if all would be seen, except those that only round."""
        every = [(h, b.hypothesis) for h, b in enumerate(self.branches) if b.hypothesis]
        if not every:
            return "no fault was replayed, so what would be seen here is not known"
        hidden = [(h, str(x)) for h, x in every if not (x.fault.rounds or bool(self.seen[h]))]
        if not hidden:
            return ""
        reach = float(min(self.reach[h] for h, _ in hidden))
        more = f"about {ceil_2(len(self.sigma) / reach)} positions may show them" if reach > FAINT else "ask far more"
        names = [name for _, name in hidden]
        rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
        some = f"{'; '.join(names[:3])}{rest}"
        return f"{len(names)} of {len(every)} faults would not be seen in {len(self.sigma)} positions: {some}; {more}"


def surely(n: int, q: float) -> tuple[int, int]:
    """Which of n values in order are surely below and above a quantile: -1 and n where none is."""
    k = torch.arange(n + 1, dtype=torch.float64)
    ways = math.lgamma(n + 1) - (k + 1).lgamma() - (n - k + 1).lgamma()
    up_to = (ways + k * math.log(q) + (n - k) * math.log(1 - q)).exp().cumsum(0)
    return int((up_to <= UNSURE).sum()) - 1, int((1 - up_to > UNSURE).sum())


def ceil_2(x: float) -> int:
    """Rounded up to two digits."""
    step = 10 ** max(0, math.floor(math.log10(x)) - 1)
    return math.ceil(x / step) * step


def z(size: Tensor, sigma: Tensor) -> Tensor:
    return (size / sigma).nan_to_num(nan=WORST, posinf=WORST).clamp(max=WORST)
