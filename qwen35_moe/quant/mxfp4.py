"""MXFP4: E2M1 codes times one E8M0 scale for each 32 columns (OCP Microscaling Formats v1.0, sections 5.2 to 6.3).

A code has four bits, s ee m: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and the same with a sign (code 8 is -0). Byte b of a row holds
column 2b in its low nibble and column 2b + 1 in its high nibble. A scale byte s is worth 2^(s - 127); 255 is NaN.

    x[i] = E2M1[code[i]] * 2^(scale[i // 32] - 127)

Letters: O rows, I columns, Q = I / 32 blocks, Z = I / 2 bytes; a `...` stands for O and whatever is before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import Qwen35Error
from .mxfp4_decode import E2M1, MXFP4_BLOCK, check, decode, decode_in_pieces, decode_plain, products

__all__ = [
    "MXFP4_BLOCK",
    "E2M1",
    "PackedMXFP4",
    "QUANTISERS",
    "SCALE_RULES",
    "check",
    "decode",
    "decode_in_pieces",
    "decode_plain",
    "encode",
    "products",
    "quantise_dequantise",
]

# amax = fraction * 2^k with fraction in [1, 2): the scale is 2^(k - 2), or 2^(k - 1) from this fraction on.
SCALE_RULES = {
    "even": lambda fraction: fraction >= 1.75,  # AMD Quark, Aiter Triton, compressed-tensors
    "round-up": lambda fraction: fraction > 1.5,  # Aiter HIP since 2026-06: ceil(log2(amax / 6)), never saturates
    "threshold-1.5": lambda fraction: fraction >= 1.5,  # Aiter HIP before, and its FlyDSL epilogue
    "floor": lambda fraction: fraction >= 2,  # OCP MX v1.0, section 6.3
    "ceil": lambda fraction: fraction > 1,
}
# The arguments with which `encode` writes the bytes that these write.
QUANTISERS: dict[str, dict[str, Any]] = {
    "aiter-triton": {"scale_rule": "even"},
    "aiter-hip": {"scale_rule": "round-up", "absmax_floor": 1e-10},
    # Quark writes 0 for -0, and scale byte 1 for a block of zeros.
    "quark": {"scale_rule": "even", "negative_zero": False, "absmax_floor": 2.0**-124},
}


def encode(
    x: Tensor,
    scale_rule: str = "even",
    ties: str = "even",
    absmax_floor: float | None = None,
    negative_zero: bool = True,
) -> tuple[Tensor, Tensor]:
    """Values [..., I] to codes [..., Z] and scales [..., Q]: choose each block's scale, then round each element.

    Scale: with amax = fraction * 2^k the largest magnitude of a block, 2^(k - 2), doubled where `scale_rule` says so,
    and kept within 2^-127 .. 2^127. The fraction is compared exactly, so that a value gets the same scale as float16,
    bfloat16, float32 and float64.
    Element: x / scale to the nearest E2M1 value; a tie goes to the even code (`ties="half-up"`: away from zero, as the
    fake quantisation of Quark and vLLM's emulation do); beyond 6 it saturates. What rounds to zero keeps its sign
    (code 8) as in Aiter's kernels, or loses it with `negative_zero=False`.

    A block of zeros has scale byte 0. `absmax_floor` is the least amax that a scale is made for: with 1e-10 a block of
    zeros has byte 92, and what is below a quarter of 2^-35 becomes zero. QUANTISERS has what engines use.
    A block that holds a NaN or an infinity has byte 255 and zero codes: all of it decodes to NaN.
    """
    if not x.is_floating_point():
        raise Qwen35Error("MXFP4 encodes floating-point tensors", expected="float16 to float64", found=x.dtype)
    if x.dim() == 0 or x.shape[-1] % MXFP4_BLOCK or not x.shape[-1]:
        raise Qwen35Error(
            "MXFP4 blocks are 32 columns", expected="[..., I] with I a multiple of 32", found=list(x.shape)
        )
    if scale_rule not in SCALE_RULES:
        raise Qwen35Error("unknown scale rule", expected=", ".join(SCALE_RULES), found=scale_rule)
    if ties not in ("even", "half-up"):
        raise Qwen35Error("unknown rule for ties", expected="even, half-up", found=ties)
    x_QB = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, MXFP4_BLOCK))
    amax_Q = x_QB.abs().amax(-1)
    if absmax_floor is not None:
        amax_Q = amax_Q.clamp_min(absmax_floor)
    half_fraction, exponent = torch.frexp(amax_Q)  # amax = half_fraction * 2^exponent, half_fraction in [0.5, 1)
    byte = exponent - 1 - 2 + 127 + SCALE_RULES[scale_rule](2 * half_fraction)
    byte = torch.where(amax_Q == 0, 0, byte.clamp(0, 254))
    byte = torch.where(amax_Q.isfinite(), byte, 255)

    inverse = torch.tensor([2.0 ** (127 - b) for b in range(255)] + [math.nan], dtype=x_QB.dtype, device=x.device)
    magnitude_QB = (x_QB * inverse[byte].unsqueeze(-1)).abs()
    codes_QB = torch.signbit(x_QB).to(torch.uint8) << 3
    for code in range(7):  # how many midpoints between neighbours are below
        midpoint = (E2M1[code] + E2M1[code + 1]) / 2
        to_upper = code % 2 == 1 or ties == "half-up"
        codes_QB += magnitude_QB >= midpoint if to_upper else magnitude_QB > midpoint
    if not negative_zero:
        codes_QB[codes_QB == 8] = 0
    codes_I = codes_QB.flatten(-2)
    return codes_I[..., 0::2] | codes_I[..., 1::2] << 4, byte.to(torch.uint8)


def quantise_dequantise(
    x: Tensor,
    scale_rule: str = "even",
    ties: str = "even",
    absmax_floor: float | None = None,
    negative_zero: bool = True,
) -> Tensor:
    """What is left of `x` after MXFP4, in its own dtype: `decode(*encode(x, ...), x.dtype)`."""
    return decode(*encode(x, scale_rule, ties, absmax_floor, negative_zero), x.dtype)


@dataclass(frozen=True, eq=False)
class PackedMXFP4:
    """A packed weight [..., O, I]: `codes` uint8 [..., O, Z] and `scales` uint8 [..., O, Q]."""

    codes: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        check(self.codes, self.scales)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.codes.shape[:-1], 2 * self.codes.shape[-1]))

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def decode(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        return decode(self.codes, self.scales, dtype, out)
