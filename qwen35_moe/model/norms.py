"""The three normalisations of the model. They look alike: one multiplies by 1 + w, one by w, one by nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..numerics.taps import tap
from .ops import accumulation_dtype, apply, multiply, promote


def rms_norm(name: str, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zero-centred RMSNorm:  y = x / sqrt(mean(x^2) + eps) * (1 + w).  x [..., D], weight [D].

    The stored weight is the deviation from 1 and may be negative; leaving out the `1 +` is a classic bug.
    Rounds at `<name>.gain` (1 + w; SGLang's fused all-reduce keeps it in bf16) and once at the end, at `name`.
    """
    gain = promote(tap(f"{name}.gain", 1 + promote(weight)))
    root = torch.rsqrt(squares(x).mean(-1, keepdim=True) + eps)
    return tap(name, normalised(x, root, gain, accumulation_dtype(name, x)))


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, gate_type: str = "silu") -> Tensor:
    """Gated RMSNorm of a DeltaNet head:  y = (x / sqrt(mean(x^2) + eps) * w) * silu(z).  x, z [..., P], weight [P].

    Norm before gate, and a plain weight: no `1 +` here. transformers rounds the normalised x, then its product with
    the weight; SGLang's and fla's kernels round once, at the end. `gate_type` is the config's `output_gate_type`:
    silu (also called swish), or sigmoid.
    """
    root = torch.rsqrt(squares(x).mean(-1, keepdim=True) + eps)
    x = tap("gdn_norm_normed", normalised(x, root, None, accumulation_dtype("gdn_norm_normed", x)))
    x = multiply("gdn_norm_weighted", weight, x)
    gate = apply("gdn_z_gate", torch.sigmoid if gate_type == "sigmoid" else F.silu, z)
    return multiply("gdn_norm_out", x, gate)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps), not x / max(|x|, eps): with heads of norm 1e-3 the two differ by a lot."""
    root = torch.rsqrt(squares(x).sum(-1, keepdim=True) + eps)
    return normalised(x, root, None, root.dtype)


def squares(x: Tensor) -> Tensor:
    return promote(x).square()


def normalised(x: Tensor, root: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = promote(x) * root
    return (y if gain is None else y * gain).to(dtype)


class RMSNorm(nn.Module):
    """Holds the weight of `rms_norm` under its checkpoint name."""

    def __init__(self, width: int, eps: float, name: str):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.eps, self.name = eps, name

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(self.name, x, self.weight, self.eps)
