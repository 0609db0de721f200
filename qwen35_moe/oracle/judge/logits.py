"""What an error means for the next token: KL divergence, agreement of the best tokens, and near ties."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dumps.pair import Pair


@dataclass(frozen=True)
class Logits:
    """Figures over `tokens` positions. `flips` counts positions with another best token. `legal_flips` counts those
    whose margin is within the noise. The margin is the distance of the two tokens' logits in the truth; the noise is
    twice the largest legal error of a logit there. `delta_log_p` is the engine's log p minus the truth's, of the token
    that follows in the input."""

    tokens: int
    kl_mean: float
    kl_max: float
    top1: float
    top5: float
    delta_log_p_rms: float
    delta_log_p_max: float
    flips: int
    legal_flips: int | None  # None: the noise is not known
    worst: tuple[int, int]  # sequence, token of kl_max


def compare_logits(pair: Pair, noise: Tensor | None, ids_BT: Tensor) -> Logits:
    """pair: logits (or log-probabilities) of truth and engine at the same rows; noise: the
    largest legal error of a logit in each row, from the embedding on."""
    assert pair.engine is not None
    p, q = (x.to(torch.float64).log_softmax(-1) for x in (pair.truth, pair.engine))
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    best, theirs = p.argmax(-1), q.argmax(-1)
    flip = best != theirs
    k = min(5, p.shape[1])
    top5 = (p.topk(k).indices[:, :, None] == q.topk(k).indices[:, None]).any(-1).double().mean()
    legal = None
    if noise is not None:
        truth = pair.truth.to(torch.float64)
        margin = (truth.gather(1, best[:, None]) - truth.gather(1, theirs[:, None])).flatten()
        legal = int((flip & (margin <= 2 * noise)).sum())
    b, t = pair.rows.long().unbind(1)
    follows = t + 1 < ids_BT.shape[1]
    token = ids_BT[b, (t + 1).clamp(max=ids_BT.shape[1] - 1)]
    token = torch.where(follows & (token < p.shape[1]), token, best)
    change = (q - p).gather(1, token[:, None]).flatten()
    worst = int(kl.nan_to_num(nan=torch.inf).argmax())
    return Logits(
        len(p), float(kl.mean()), float(kl[worst]), float((~flip).double().mean()), float(top5),
        float(change.square().mean().sqrt()), float(change[change.abs().argmax()]), int(flip.sum()), legal,
        (int(b[worst]), int(t[worst])),
    )  # fmt: skip
