"""log p as llama.cpp's KL base file holds it: 16 bits a value, clipped 16 below the best of the row.

    log p_i = z_i - logsumexp(z)      q_i = round((log p_i - least) / scale)      scale = (best - least) / 65535

An engine's file is judged as other taps are. The log p of the truth and of legal arithmetics are clipped as those of
the file, and one rounding is half a step of the row's scale. Two rows that differ by no more than d at any column still
do so when both are clipped. So clipping can hide errors, but it makes none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .envelope import Norms

LOG_P = "next_token_logprobs"
DEPTH, STEPS = 16, 65535


def log_p(logits: Tensor) -> Tensor:
    """log p over the last dimension, in float64, clipped at DEPTH below the largest."""
    x = logits.to(torch.float64).log_softmax(-1)
    return torch.maximum(x, x.amax(-1, keepdim=True) - DEPTH)


def to_codes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p of `log_p` -> scale [..., 1], least [..., 1], q in 0 ... STEPS: x = scale * q + least, but for rounding."""
    least = x.amin(-1, keepdim=True)
    scale = (x.amax(-1, keepdim=True) - least) / STEPS
    return scale, least, ((x - least) / torch.where(scale > 0, scale, 1)).round()


def loss_in_file(x: Tensor) -> Norms:
    """The error of log p [rows, V] in the file."""
    scale, least, q = to_codes(x)
    return Norms.of(scale * q + least, minus=x)


def error_of_log_p(logits: Norms, V: int) -> Norms:
    """A bound of log p's error from that of the logits, e: each is off by e_i - c, c a mean of e, so by 2 max |e|."""
    return Norms(2 * V**0.5 * logits.max, 2 * logits.max)
