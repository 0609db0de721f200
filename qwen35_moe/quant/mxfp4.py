"""MXFP4: E2M1 codes times one E8M0 scale for each 32 columns (OCP Microscaling Formats v1.0, sections 5.2 to 6.3).

A code has four bits, s ee m: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and the same with a sign (code 8 is -0). Byte b of a row holds
column 2b in its low nibble and column 2b + 1 in its high nibble. A scale byte s is worth 2^(s - 127); 255 is NaN.

    x[i] = E2M1[code[i]] * 2^(scale[i // 32] - 127)

Letters: O rows, I columns, Q = I / 32 blocks, Z = I / 2 bytes; a `...` stands for O and whatever is before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

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
# The arguments with which `encode` writes the bytes that these write.
QUANTISERS: dict[str, dict[str, Any]] = {
    "aiter-triton": {"scale_rule": "even"},
    "aiter-hip": {"scale_rule": "round-up", "absmax_floor": 1e-10},
    # Quark writes 0 for -0, and scale byte 1 for a block of zeros.
    "quark": {"scale_rule": "even", "negative_zero": False, "absmax_floor": 2.0**-124},
}


@cache
def products(dtype: torch.dtype, device: torch.device, e8m0_zero: str = "ocp", e8m0_nan: str = "ocp") -> Tensor:
    """All that a code and a scale can make: [256 scale bytes, 16 codes] of `dtype`, rounded to nearest even where
    `dtype` cannot hold the value (nothing is rounded in bfloat16 and wider).

    A subnormal is put together from its bits, so that a CPU that flushes them (`torch.set_flush_denormal`) has no say.
    """
    if e8m0_zero not in E8M0_ZERO or e8m0_nan not in E8M0_NAN:
        raise Qwen35Error(
            "unknown convention for a scale byte",
            expected=f"e8m0_zero: {', '.join(E8M0_ZERO)}; e8m0_nan: {', '.join(E8M0_NAN)}",
            found=f"{e8m0_zero}, {e8m0_nan}",
        )
    scales = [E8M0_ZERO[e8m0_zero], *(2.0 ** (byte - 127) for byte in range(1, 255)), E8M0_NAN[e8m0_nan]]
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


def decode_plain(
    codes: Tensor, scales: Tensor, dtype: torch.dtype, e8m0_zero: str = "ocp", e8m0_nan: str = "ocp"
) -> Tensor:
    """The formula as it stands, one look-up for each value: what `decode` is tested against."""
    codes_I = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).long()
    scales_I = scales.repeat_interleave(BLOCK, dim=-1).long()
    return products(dtype, codes.device, e8m0_zero, e8m0_nan)[scales_I, codes_I]


def decode(
    codes: Tensor,
    scales: Tensor,
    dtype: torch.dtype,
    out: Tensor | None = None,
    e8m0_zero: str = "ocp",
    e8m0_nan: str = "ocp",
) -> Tensor:
    """Codes [..., Z] and scales [..., Q] (both uint8) to values [..., I] of `dtype`; into `out` (contiguous) if given.

    Exact in bfloat16, float32 and float64, but for what is beyond their range (infinity: scale byte 253 times 4 and 6,
    254 times 2 to 6); float16 rounds to nearest even. `e8m0_zero` ("ocp", "zero") and `e8m0_nan` ("ocp", "inf", "zero")
    say what the scale bytes 0 and 255 are worth; a NaN scale makes NaN of every code.

    How: vector instructions and nothing wider than the result, in pieces that stay in a core's cache. The nibbles are
    spread to 16-bit lanes, where sign, exponent and mantissa already stand as in a float; then the scale goes in by a
    multiplication (float32, float64) or an addition to the exponent (bfloat16). Blocks whose scale is at an end of the
    range, where that would leave the normal numbers, are looked up instead.
    """
    check(codes, scales)
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=codes.device)
    elif out.shape != shape or out.dtype != dtype or not out.is_contiguous():
        raise Qwen35Error(
            "out does not fit what is decoded",
            expected=f"contiguous {dtype} {list(shape)}",
            found=f"{'' if out.is_contiguous() else 'strided '}{out.dtype} {list(out.shape)}",
        )
    if codes.is_cuda:
        wide = torch.promote_types(dtype, torch.float32)
        worth = products(wide, codes.device, e8m0_zero, e8m0_nan)[:, E2M1.index(1.0)].contiguous()
        _one_pass()(codes.reshape(-1), scales.reshape(-1), products(wide, codes.device)[127], worth, out.view(-1))
        return out
    return decode_in_pieces(codes, scales, dtype, out, e8m0_zero, e8m0_nan)


def decode_flat(codes: Tensor, scales: Tensor, values: Tensor, worth: Tensor, out: Tensor) -> None:
    """The formula for one long row, as single operations that a compiler makes one pass over memory of. Exact in the
    dtype of `values` [16] and `worth` [256], at least float32, subnormals included; rounded once into `out`."""
    codes_I = torch.stack((codes & 15, codes >> 4), dim=-1).flatten()
    worth_I = worth[scales.int()].repeat_interleave(BLOCK, output_size=codes_I.shape[0])
    out.copy_(values[codes_I.int()] * worth_I)


@cache
def _one_pass() -> Callable[..., None]:
    """`decode_flat` compiled. An H100 moves 86 % of what a copy moves; with sizes left open 66 %, uncompiled 6 %."""
    import torch._dynamo  # here: nobody else waits the seconds that it takes

    # Each size and dtype of weight is a compilation of its own; beyond the limit, calls would run uncompiled.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(decode_flat, dynamic=False)


def decode_in_pieces(
    codes: Tensor, scales: Tensor, dtype: torch.dtype, out: Tensor, e8m0_zero: str = "ocp", e8m0_nan: str = "ocp"
) -> Tensor:
    """`decode` in plain PyTorch."""
    table = products(dtype, codes.device, e8m0_zero, e8m0_nan)
    if dtype not in (torch.bfloat16, torch.float32, torch.float64) or out.storage_offset() % 2:  # it writes pairs
        return out.copy_(decode_plain(codes, scales, dtype, e8m0_zero, e8m0_nan))
    blocks, scale_bytes, out_blocks = codes.reshape(-1, BLOCK // 2), scales.reshape(-1, 1), out.view(-1, BLOCK)
    step = max(1, len(blocks) if codes.is_cuda else min(len(blocks), CACHED_BLOCKS))
    lanes = torch.empty((step, BLOCK // 2), dtype=torch.int32, device=codes.device)
    decode_piece = _decode_bfloat16 if dtype == torch.bfloat16 else _decode_float
    for codes_piece, scales_piece, out_piece in zip(
        blocks.split(step), scale_bytes.split(step), out_blocks.split(step), strict=True
    ):
        decode_piece(codes_piece, scales_piece, lanes[: len(codes_piece)], out_piece)
    least, most = map(int, torch.aminmax(scales)) if len(blocks) else SAFE_SCALES
    if least < SAFE_SCALES[0] or most > SAFE_SCALES[1]:
        unsafe = ((scale_bytes < SAFE_SCALES[0]) | (scale_bytes > SAFE_SCALES[1])).squeeze(1)
        codes_QB = torch.stack((blocks[unsafe] & 15, blocks[unsafe] >> 4), dim=-1).flatten(-2)
        out_blocks[unsafe] = table[scale_bytes[unsafe].long(), codes_QB.long()]
    return out


CACHED_BLOCKS = 2**16  # 4 MiB of scratch: within the last cache, and large beside the cost of a dozen calls
SAFE_SCALES = (2, 240)  # the scale bytes for which neither of the two below meets a subnormal or an overflow


def _spread(codes: Tensor, lanes: Tensor, position: int) -> None:
    """Each byte to two 16-bit lanes (in one int32): sign at bit 15, the other three bits from bit `position` on."""
    lanes.copy_(codes)
    lanes.mul_(1 << 12 | 1 << 24)  # a nibble at the top of each lane, and others below it
    lanes.view(torch.int16).bitwise_right_shift_(12 - position)
    lanes.bitwise_and_(_both_lanes(0x8000 | 7 << position))


def _both_lanes(bits: int) -> int:
    """The int32 with the same 16 bits in both halves."""
    return (bits << 16 | bits) - (1 << 32 if bits >> 15 else 0)


def _decode_float(codes: Tensor, scales: Tensor, lanes: Tensor, out: Tensor) -> None:
    """float32, float64: read the lanes as float16, where a code is worth 2^-14 of its value (0.5 is a subnormal, as in
    E2M1); the conversion makes it a normal number, times 2^14 and the scale."""
    _spread(codes, lanes, position=9)
    out.copy_(lanes.view(torch.float16))
    exponent = scales.to(torch.int32)
    exponent += 14
    exponent <<= 23
    out *= exponent.view(torch.float32)


def _decode_bfloat16(codes: Tensor, scales: Tensor, lanes: Tensor, out: Tensor) -> None:
    """bfloat16, in integers. The magnitude c of a code becomes that of a normal number by c + min(c, 2): exponent and
    mantissa are then 0 0 | 1 0 | 2 0 | 2 1 | 3 0 | 3 1 | 4 0 | 4 1. Where c is not zero, add the scale's exponent."""
    _spread(codes, lanes, position=6)
    bits, pairs = out.view(torch.int16), out.view(torch.int32)
    torch.bitwise_and(lanes, _both_lanes(7 << 6), out=pairs)  # c
    bits.clamp_max_(2 << 6)  # min(c, 2)
    lanes += pairs
    bits.clamp_max_(1)  # min(c, 1), in units of the last bit: not zero
    exponent = scales.to(torch.int16)
    exponent -= 2  # 0.5 has exponent 1 by now, and shall have scale - 1
    exponent <<= 7
    torch.addcmul(lanes.view(torch.int16), bits, exponent, out=bits)


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
    if x.dim() == 0 or x.shape[-1] % BLOCK or not x.shape[-1]:
        raise Qwen35Error(
            "MXFP4 blocks are 32 columns", expected="[..., I] with I a multiple of 32", found=list(x.shape)
        )
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
