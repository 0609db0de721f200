"""In which order kernels add. The last bits of a float32 sum depend on it, and nothing else does."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def triton_sum(x: Tensor, lanes: int = 32, warps: int = 8) -> Tensor:
    """x [..., I] -> [...], in the order of Triton's `tl.sum` over one block, which is I rounded up to a power of two.

    A thread holds runs of up to 8 neighbours (16 bytes of bf16, what one load gets) and adds its own from left to
    right; then halves are added to each other, lane by lane within a warp, at last warp by warp.
    """
    block = 1 << (x.shape[-1] - 1).bit_length()
    threads = min(lanes * warps, block)
    runs = F.pad(x, (0, block - x.shape[-1])).unflatten(-1, (-1, threads, min(8, block // threads)))
    mine = runs.transpose(-2, -3).flatten(-2)
    total = mine[..., 0]
    for i in range(1, mine.shape[-1]):
        total = total + mine[..., i]
    total = total.unflatten(-1, (-1, min(lanes, threads)))
    return _halved(_halved(total))


def _halved(x: Tensor) -> Tensor:
    while x.shape[-1] > 1:
        left, right = x.chunk(2, -1)
        x = left + right
    return x[..., 0]
