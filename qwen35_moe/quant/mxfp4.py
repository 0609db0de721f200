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
from threading import local
from typing import Any

import torch
from torch import Tensor

from ..errors import Qwen35Error
from .mxfp4_compiled import MXFP4_BLOCK as MXFP4_BLOCK
from .mxfp4_compiled import decode_compiled

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
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
CACHED_BLOCKS = 2**16  # 4 MiB of scratch: within the last cache, and large beside the cost of a dozen calls
SAFE_SCALES = (2, 240)  # the scale bytes for which `_decode_piece` meets no subnormal and no overflow


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

    def decode(self, dtype: torch.dtype, out: Tensor | None = None, often: bool = False) -> Tensor:
        return decode(self.codes, self.scales, dtype, out, often)


def encode(
    x: Tensor, scale_rule: str = "even", ties: str = "even", absmax_floor: float = 0.0, negative_zero: bool = True
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
    blocks = x.dim() > 0 and x.shape[-1] and x.shape[-1] % MXFP4_BLOCK == 0
    for good, what, expected, found in (
        (x.is_floating_point(), "MXFP4 encodes floating-point tensors", "float16 to float64", x.dtype),
        (blocks, "MXFP4 blocks are 32 columns", "[..., I] with I a multiple of 32", list(x.shape)),
        (scale_rule in SCALE_RULES, "unknown scale rule", ", ".join(SCALE_RULES), scale_rule),
        (ties in ("even", "half-up"), "unknown rule for ties", "even, half-up", ties),
    ):
        if not good:
            raise Qwen35Error(what, expected=expected, found=found)
    x_QB = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, MXFP4_BLOCK))
    amax_Q = x_QB.abs().amax(-1).clamp_min(absmax_floor)
    half_fraction, exponent = torch.frexp(amax_Q)  # amax = half_fraction * 2^exponent, half_fraction in [0.5, 1)
    byte = exponent - 1 - 2 + 127 + SCALE_RULES[scale_rule](2 * half_fraction)
    byte = torch.where(amax_Q.isfinite(), torch.where(amax_Q == 0, 0, byte.clamp(0, 254)), 255)
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


def quantise_dequantise(x: Tensor, scale_rule: str = "even", **how: Any) -> Tensor:
    """What is left of `x` after MXFP4, in its own dtype: `decode(*encode(x, ...), x.dtype)`."""
    return decode(*encode(x, scale_rule, **how), x.dtype)


@cache
def products(dtype: torch.dtype, device: torch.device) -> Tensor:
    """All that a code and a scale can make: [256 scale bytes, 16 codes] of `dtype`, rounded to nearest even where
    `dtype` cannot hold the value (nothing is rounded in bfloat16 and wider).

    A subnormal is put together from its bits, so that a CPU that flushes them (`torch.set_flush_denormal`) has no say.
    """
    scales = [*(2.0 ** (byte - 127) for byte in range(255)), math.nan]
    wide = torch.tensor(scales, dtype=torch.float64)[:, None] * torch.tensor(E2M1, dtype=torch.float64)
    if dtype == torch.float64:
        return wide.to(device)
    narrow, limits = wide.to(dtype), torch.finfo(dtype)
    integer = torch.int32 if limits.bits == 32 else torch.int16
    steps = (wide.abs() / (limits.tiny * limits.eps)).round()  # how many of the smallest subnormal
    subnormal_bits = torch.where(wide.abs() < limits.tiny, steps, 0).to(integer)
    negative = torch.signbit(wide).to(integer) << (limits.bits - 1)
    bits = torch.where(wide.abs() < limits.tiny, subnormal_bits | negative, narrow.view(integer))
    return bits.view(dtype).to(device)


def decode_plain(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The formula as it stands, one look-up for each value: what `decode` is tested against."""
    codes_I = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).long()
    scales_I = scales.repeat_interleave(MXFP4_BLOCK, dim=-1).long()
    return products(dtype, codes.device)[scales_I, codes_I]


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype, out: Tensor | None = None, often: bool = False) -> Tensor:
    """Codes [..., Z] and scales [..., Q] (both uint8) to values [..., I] of `dtype`; into `out` (contiguous) if given.

    Exact in bfloat16, float32 and float64, but for what is beyond their range (infinity: scale byte 253 times 4 and 6,
    254 times 2 to 6); float16 rounds to nearest even. A NaN scale makes NaN of every code. often: a GPU shall decode
    this size so often that it pays to compile the formula to one pass over memory, which takes seconds.
    """
    check(codes, scales)
    if not dtype.is_floating_point:
        raise Qwen35Error("MXFP4 decodes to floats", expected="bfloat16, float32, float64 or float16", found=dtype)
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=codes.device)
    elif out.shape != shape or out.dtype != dtype or not out.is_contiguous():
        found = f"{'' if out.is_contiguous() else 'strided '}{out.dtype} {list(out.shape)}"
        what, expected = "out does not fit what is decoded", f"contiguous {dtype} {list(shape)}"
        raise Qwen35Error(what, expected=expected, found=found)
    if codes.is_cuda and often:
        table = products(torch.promote_types(dtype, torch.float32), codes.device)
        if decode_compiled(codes, scales, table[127], table[:, E2M1.index(1.0)].contiguous(), out):
            return out
    return decode_in_pieces(codes, scales, dtype, out)


def decode_in_pieces(codes: Tensor, scales: Tensor, dtype: torch.dtype, out: Tensor) -> Tensor:
    """`decode` with vector instructions, in pieces that stay in a core's cache. Blocks whose scale is at an end of the
    range are looked up afterwards."""
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):
        return out.copy_(decode_plain(codes, scales, dtype))
    blocks, scale_bytes = codes.reshape(-1, MXFP4_BLOCK // 2), scales.reshape(-1, 1)
    out_blocks, size = out.view(-1, MXFP4_BLOCK), len(blocks) if codes.is_cuda else CACHED_BLOCKS
    for piece in zip(*(x.split(max(size, 1)) for x in (blocks, scale_bytes, out_blocks)), strict=True):
        _decode_piece(*piece)
    least, most = map(int, torch.aminmax(scales)) if len(blocks) else SAFE_SCALES
    if least < SAFE_SCALES[0] or most > SAFE_SCALES[1]:
        unsafe = ((scale_bytes < SAFE_SCALES[0]) | (scale_bytes > SAFE_SCALES[1])).squeeze(1)
        out_blocks[unsafe] = decode_plain(blocks[unsafe], scale_bytes[unsafe], dtype)
    return out


def _decode_piece(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """Blocks [n, 16] and scales [n, 1] to values [n, 32]: each byte goes to two 16-bit lanes, which are read as
    float16. There a code is worth 2^-14 of its value (0.5 is a subnormal, as in E2M1). The conversion to float32 makes
    it a normal number, times 2^14 and the scale. To float64 by way of float32, for which torch has vectors."""
    lanes, wide, exponent, int16, float16, scale = _scratch(len(codes), codes.device)
    lanes.copy_(codes)
    lanes.mul_(1 << 12 | 1 << 24)  # a nibble at the top of each lane, and others below it
    int16.bitwise_right_shift_(3)  # sign at bit 15, the other three bits from bit 9 on
    lanes.bitwise_and_((0x8E00 << 16 | 0x8E00) - (1 << 32))
    values = out if out.dtype == torch.float32 else wide
    values.copy_(float16)
    exponent.copy_(scales)
    exponent.add_(14).bitwise_left_shift_(23)
    values.mul_(scale)
    if values is not out:
        out.copy_(values)


_own = local()


@torch.inference_mode(False)  # it may be used outside of the mode that it was made in
def _scratch(blocks: int, device: torch.device) -> tuple[Tensor, ...]:
    """int32 [blocks, 16], float32 [blocks, 32], int32 [blocks, 1], and views: the first as int16 and float16, the last
    as float32. On a CPU this thread uses the same memory and views again: where several threads decode, they wait for
    each other at each operation, even one that only makes a view."""
    kept: dict[int, tuple[Tensor, ...]] = _own.__dict__.setdefault("kept", {}) if device.type == "cpu" else {}
    if blocks not in kept:
        if CACHED_BLOCKS not in kept:
            size = CACHED_BLOCKS if device.type == "cpu" else blocks
            shapes = ((16, torch.int32), (32, torch.float32), (1, torch.int32))
            memory = [torch.empty(size, columns, dtype=dtype, device=device) for columns, dtype in shapes]
            views = memory[0].view(torch.int16), memory[0].view(torch.float16), memory[2].view(torch.float32)
            kept[CACHED_BLOCKS] = (*memory, *views)
        kept[blocks] = tuple(x[:blocks] for x in kept[CACHED_BLOCKS])
    return kept[blocks]


def check(codes: Tensor, scales: Tensor) -> None:
    """Raise unless these are MXFP4 codes [..., Z] and scales [..., Q] that belong together."""
    if codes.dtype != torch.uint8 or scales.dtype != torch.uint8:
        found = f"codes {codes.dtype}, scales {scales.dtype}"
        do = "float8 scales are NVFP4 (block 16), which is another format" if scales.dtype.is_floating_point else ""
        raise Qwen35Error("MXFP4 is stored as bytes", expected="codes and scales of uint8", found=found, do=do)
    if codes.dim() == 0 or codes.shape[-1] % (MXFP4_BLOCK // 2):
        raise Qwen35Error("an MXFP4 row is whole blocks of 16 bytes", expected="[..., 16 n]", found=list(codes.shape))
    expected = (*codes.shape[:-1], codes.shape[-1] // (MXFP4_BLOCK // 2))
    if scales.shape != expected:
        of = f"{list(expected)} (one byte for each 16 bytes of codes {list(codes.shape)})"
        raise Qwen35Error("MXFP4 scales do not belong to these codes", expected=of, found=list(scales.shape))
