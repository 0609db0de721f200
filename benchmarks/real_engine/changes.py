"""What is done to the weights of all experts [E, out, in], a copy of which comes in."""

from __future__ import annotations

from torch import Tensor


def swapped(weight: Tensor) -> Tensor:
    weight[[0, 1]] = weight[[1, 0]]
    return weight


def zero_first(weight: Tensor) -> Tensor:
    weight[0] = 0
    return weight


def half_lost(weight: Tensor) -> Tensor:
    weight[..., weight.shape[-1] // 2 :] = 0
    return weight
