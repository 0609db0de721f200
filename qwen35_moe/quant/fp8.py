"""FP8 weights: E4M3 values times a scale, in the three forms that checkpoints of the family have.

    block    `weight_scale_inv` [ceil(O / 128), ceil(I / 128)]   Qwen's own FP8 checkpoints; it multiplies
    channel  `weight_scale` [O] or [O, 1]                        Quark: attention and DeltaNet beside MXFP4 experts
    tensor   `weight_scale` [] or [1]

    w[o, i] = E4M3[o, i] * scale[o // 128, i // 128]   (or scale[o], or scale)

Scales are stored as bfloat16 or float32. E4M3 is the "fn" kind: no infinity, largest value 448, 0x7f and 0xff are NaN.

W8A8 engines quantise the other operand as well: `quantise_dequantise` gives the quantised input of a product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import Qwen35Error

FP8_BLOCK = 128
LARGEST_E4M3, LEAST_AMAX = 448.0, 1e-10
SCALED = {"divide": 0.0, "multiply": 1.0, "multiply-up": 1 + 2.0**-23, "multiply-down": 1 - 2.0**-23}
EXPONENT_BITS = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF << 52)}


@dataclass(frozen=True, eq=False)
class FP8:
    """A packed weight [O, I]: `values` float8_e4m3fn and `scale`, whose shape says which of the three forms it is."""

    values: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if self.values.dtype != torch.float8_e4m3fn or self.values.dim() != 2:
            found = f"{self.values.dtype} {list(self.values.shape)}"
            raise Qwen35Error("not an FP8 weight", expected="float8_e4m3fn [O, I]", found=found)
        if self.scale.dtype not in (torch.bfloat16, torch.float32):
            raise Qwen35Error("not the scale of an FP8 weight", expected="bfloat16 or float32", found=self.scale.dtype)
        rows = self.values.shape[0]
        if self.scale.shape not in (self._blocks, (rows, 1), (rows,), (1,), ()):
            expected = f"blocks {list(self._blocks)}, channels [{rows}] or [{rows}, 1], tensor [] or [1]"
            what = "the scale does not belong to this FP8 weight"
            raise Qwen35Error(what, expected=expected, found=list(self.scale.shape))

    @property
    def kind(self) -> str:
        """ "fp8-block", "fp8-channel" or "fp8-tensor"."""
        if self.scale.shape == self._blocks:
            return "fp8-block"
        return "fp8-tensor" if self.scale.numel() == 1 else "fp8-channel"

    @property
    def _blocks(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def decode(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The values. Their product with the scale is computed in float32 (in float64 if `dtype` is that) and rounded
        once, to `dtype`; with a bfloat16 scale it has 12 significant bits and is exact in float32.
        """
        out = torch.empty(self.shape, dtype=dtype, device=self.values.device) if out is None else out
        for start in range(0, self.shape[0], FP8_BLOCK):  # what is wider than the result stays small
            rows = slice(start, start + FP8_BLOCK)
            weight = widen(self.values[rows], torch.promote_types(dtype, torch.float32))
            weight *= self._scale(rows).to(weight.dtype)
            out[rows] = weight
        return out

    def _scale(self, rows: slice) -> Tensor:
        """The scales of one row of blocks, ready to be multiplied with its values."""
        if self.kind == "fp8-block":
            return self.scale[rows.start // FP8_BLOCK].repeat_interleave(FP8_BLOCK)[: self.shape[1]]
        return self.scale.reshape(-1, 1)[rows] if self.kind == "fp8-channel" else self.scale


def widen(values: Tensor, dtype: torch.dtype) -> Tensor:
    """E4M3 to float32 or float64, exactly; much faster than torch's own conversion, which is a scalar loop on a CPU.

    Shifted by 7 in 16 bits, sign and all, it is a float16 of 2^-8 the value, subnormals included. Only NaN is not.
    """
    lanes = values.view(torch.int8).to(torch.int16)
    lanes <<= 7
    lanes &= ~0x407F  # the sign was extended into the exponent, and there is nothing below the mantissa
    wide = lanes.view(torch.float16).to(dtype)
    wide *= 256
    magnitude = values.view(torch.uint8) & 0x7F
    if magnitude.numel() and int(magnitude.max()) == 0x7F:
        wide[magnitude == 0x7F] = torch.nan
    return wide


def round_to_e4m3(x: Tensor) -> Tensor:
    """The nearest E4M3 values, ties to even, in x's own dtype; beyond 448 it saturates, NaN stays NaN."""
    bits, exponent = EXPONENT_BITS[x.dtype]
    step = (x.view(bits) & exponent).view(x.dtype)  # 2^floor(log2 |x|), exactly
    step = step.clamp_(min=2.0**-6).mul_(2.0**-3)  # 3 bits after the leading one
    return (x / step).round_().mul_(step).clamp_(-LARGEST_E4M3, LARGEST_E4M3)


def quantise_dequantise(x: Tensor, columns: int | None = FP8_BLOCK, scaled: str = "divide") -> Tensor:
    """The input [..., I] of a product as an FP8 engine quantises it, in at least float32:  E4M3(x / s) * s.

    s = max(amax, 1e-10) / 448, with amax the largest magnitude of a token's `columns` neighbouring columns (None: of
    all its columns). Engines take 128 with block-scaled weights, all columns with channel-scaled ones.

    scaled: how x is divided by s, a key of SCALED. It matters for ties alone, but bf16 inputs have many of them:
    0.4 % of a real engine's codes. SGLang's kernels multiply by 448 / amax, whose last bit is the GPU's (of 63 rows, 61
    as "multiply", 2 as "multiply-up"; the products are then ours but for one rounding).
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    width = x.shape[-1]
    columns = width if columns is None else columns
    blocks = torch.nn.functional.pad(x, (0, -width % columns)).unflatten(-1, (-1, columns))
    amax = blocks.abs().amax(-1, keepdim=True).clamp_(min=LEAST_AMAX)
    scale = amax / LARGEST_E4M3
    codes = round_to_e4m3(blocks / scale if scaled == "divide" else blocks * (LARGEST_E4M3 / amax * SCALED[scaled]))
    return codes.mul_(scale).flatten(-2)[..., :width]


def mx_quantise_dequantise(x: Tensor) -> Tensor:
    """`x` quantised to MXFP8, in at least float32: E4M3 times a power of two for each 32 columns, the least that does
    not saturate, 2^ceil(log2(amax / 448)) (Aiter's "round up"). A block of zeros stays zero."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    blocks = x.unflatten(-1, (-1, 32))
    fraction, exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True))  # 448 = 0.875 * 2^9
    exponent = (exponent - 9 + (fraction > 0.875).to(exponent.dtype)).clamp(-127, 127)
    scale = torch.ldexp(torch.ones_like(fraction), exponent)
    return (round_to_e4m3(blocks / scale) * scale).flatten(-2)
