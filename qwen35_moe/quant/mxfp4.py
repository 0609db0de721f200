"""MXFP4: E2M1 codes times one E8M0 scale for each 32 columns (OCP Microscaling Formats v1.0, sections 5.2 to 6.3).

A code has four bits, s ee m: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and the same with a sign (code 8 is -0). Byte b of a row holds
column 2b in its low nibble and column 2b + 1 in its high nibble. A scale byte s is worth 2^(s - 127); 255 is NaN.

    x[i] = E2M1[code[i]] * 2^(scale[i // 32] - 127)

Letters: O rows, I columns, Q = I / 32 blocks, Z = I / 2 bytes; a `...` stands for O and whatever is before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..errors import Qwen35Error

BLOCK = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

# What decoders make of the two bytes at the ends: "ocp" is the standard (also SGLang's and Aiter's Python code), "zero"
# and "inf" are kernels that shift the byte into a float's exponent (SGLang's and Aiter's HIP code; gpt-oss and
# compressed-tensors have "inf" too), nan="zero" is SGLang's dequantisation in torch.
E8M0_ZERO = {"ocp": 2.0**-127, "zero": 0.0}
E8M0_NAN = {"ocp": math.nan, "inf": math.inf, "zero": 0.0}

# amax = fraction * 2^k with fraction in [1, 2): the scale is 2^(k - 2), or 2^(k - 1) from this fraction on.
SCALE_RULES = {
    "even": lambda fraction: fraction >= 1.75,  # AMD Quark, Aiter Triton, compressed-tensors
    "round-up": lambda fraction: fraction > 1.5,  # Aiter HIP since 2026-06: ceil(log2(amax / 6)), never saturates
    "threshold-1.5": lambda fraction: fraction >= 1.5,  # Aiter HIP before, and its FlyDSL epilogue
    "floor": lambda fraction: fraction >= 2,  # OCP MX v1.0, section 6.3
    "ceil": lambda fraction: fraction > 1,
}


@cache
def scale_values(dtype: torch.dtype, device: torch.device, e8m0_zero: str, e8m0_nan: str) -> Tensor:
    """The 256 values of a scale byte."""
    values = [2.0 ** (byte - 127) for byte in range(256)]
    values[0], values[255] = E8M0_ZERO[e8m0_zero], E8M0_NAN[e8m0_nan]
    return torch.tensor(values, dtype=torch.float64).to(dtype).to(device)


def decode_plain(codes: Tensor, scales: Tensor, dtype: torch.dtype, e8m0_zero: str = "ocp", e8m0_nan: str = "ocp") -> Tensor:
    """The formula as it stands, one look-up for the codes and one for the scales: the reference of `decode`."""
    codes_I = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    scales_I = scales.repeat_interleave(BLOCK, dim=-1)
    elements = torch.tensor(E2M1, dtype=torch.float64, device=codes.device)
    return (elements[codes_I.long()] * scale_values(torch.float64, codes.device, e8m0_zero, e8m0_nan)[scales_I.long()]).to(dtype)


def decode(
    codes: Tensor,
    scales: Tensor,
    dtype: torch.dtype,
    out: Tensor | None = None,
    e8m0_zero: str = "ocp",
    e8m0_nan: str = "ocp",
) -> Tensor:
    """Codes [..., Z] and scales [..., Q] (both uint8) to values [..., I] of `dtype`."""
    check(codes, scales)
    result = decode_plain(codes, scales, dtype, e8m0_zero, e8m0_nan)
    return result if out is None else out.copy_(result)


def encode(
    x: Tensor,
    scale_rule: str = "even",
    ties: str = "even",
    absmax_floor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Values [..., I] to codes [..., Z] and scales [..., Q]: choose each block's scale, then round each element.

    Scale: with amax = fraction * 2^k the largest magnitude of a block, 2^(k - 2), doubled where `scale_rule` says so,
    and kept within 2^-127 .. 2^127. The fraction is compared exactly, so that a value gets the same scale as float16,
    bfloat16, float32 and float64.
    Element: x / scale to the nearest E2M1 value; a tie goes to the even code (`ties="half-up"`: away from zero, as the
    fake quantisation of Quark and vLLM's emulation do); beyond 6 it saturates. The sign is kept, also of a zero.

    A block of zeros has scale byte 0. `absmax_floor` (Aiter HIP: 1e-10) is the least amax that a scale is made for: a
    block of zeros then has byte 92, and what is below a quarter of 2^-35 becomes zero.
    A block that holds a NaN or an infinity has byte 255 and zero codes: all of it decodes to NaN.
    """
    if not x.is_floating_point():
        raise Qwen35Error("MXFP4 encodes floating-point tensors", expected="float16 to float64", found=x.dtype)
    if x.dim() == 0 or x.shape[-1] % BLOCK or not x.shape[-1]:
        raise Qwen35Error("MXFP4 blocks are 32 columns", expected="[..., I] with I a multiple of 32", found=list(x.shape))
    if scale_rule not in SCALE_RULES:
        raise Qwen35Error("unknown scale rule", expected=", ".join(SCALE_RULES), found=scale_rule)
    if ties not in ("even", "half-up"):
        raise Qwen35Error("unknown rule for ties", expected="even, half-up", found=ties)
    x_QB = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, BLOCK))
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
    codes_I = codes_QB.flatten(-2)
    return codes_I[..., 0::2] | codes_I[..., 1::2] << 4, byte.to(torch.uint8)


def quantise_dequantise(
    x: Tensor, scale_rule: str = "even", ties: str = "even", absmax_floor: float | None = None
) -> Tensor:
    """What is left of `x` after MXFP4, in its own dtype: `decode(*encode(x, ...), x.dtype)`."""
    return decode(*encode(x, scale_rule, ties, absmax_floor), x.dtype)


def check(codes: Tensor, scales: Tensor, where: str = "") -> None:
    """Raise unless these are MXFP4 codes [..., Z] and scales [..., Q] that belong together."""
    if codes.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise Qwen35Error(
            "MXFP4 is stored as bytes",
            where=where,
            expected="codes and scales of uint8",
            found=f"codes {codes.dtype}, scales {scales.dtype}",
            do="float8 scales are NVFP4 (block 16), which is another format" if scales.dtype.is_floating_point else "",
        )
    if codes.dim() == 0 or codes.shape[-1] % (BLOCK // 2):
        raise Qwen35Error(
            "an MXFP4 row is whole blocks of 16 bytes", where=where, expected="[..., 16 n]", found=list(codes.shape)
        )
    expected = (*codes.shape[:-1], codes.shape[-1] // (BLOCK // 2))
    if scales.shape != expected:
        raise Qwen35Error(
            "MXFP4 scales do not belong to these codes",
            where=where,
            expected=f"{list(expected)} (one byte for each 16 bytes of codes {list(codes.shape)})",
            found=list(scales.shape),
        )


@dataclass(frozen=True, eq=False)
class MXFP4:
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

    def decode(self, dtype: torch.dtype, out: Tensor | None = None, rows: slice | None = None) -> Tensor:
        """The values, or those of a slice of dimension 0."""
        rows = slice(None) if rows is None else rows
        return decode(self.codes[rows], self.scales[rows], dtype, out)
