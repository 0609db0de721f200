"""Reading MXFP4 (the format is in `mxfp4.py`): exact values of codes and scales, in ways that agree in every bit.

`decode_plain` is the formula. `decode` is fast: on a CPU with single PyTorch operations or, where asked, compiled; on a
GPU compiled to one pass over memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from threading import local
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import Qwen35Error

MXFP4_BLOCK = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


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


def decode(
    codes: Tensor,
    scales: Tensor,
    dtype: torch.dtype,
    out: Tensor | None = None,
    compiled: bool | None = None,
) -> Tensor:
    """Codes [..., Z] and scales [..., Q] (both uint8) to values [..., I] of `dtype`; into `out` (contiguous) if given.

    Exact in bfloat16, float32 and float64, but for what is beyond their range (infinity: scale byte 253 times 4 and 6,
    254 times 2 to 6); float16 rounds to nearest even. A NaN scale makes NaN of every code.

    `compiled` uses `torch.compile`, which takes seconds at the first call and needs a C++ compiler on a CPU. None is
    yes on a GPU and no on a CPU, where it gains a factor of two for bfloat16 and changes nothing for other dtypes.
    """
    check(codes, scales)
    if not dtype.is_floating_point:
        raise Qwen35Error("MXFP4 decodes to floats", expected="bfloat16, float32, float64 or float16", found=dtype)
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=codes.device)
    elif out.shape != shape or out.dtype != dtype or not out.is_contiguous():
        raise Qwen35Error(
            "out does not fit what is decoded",
            expected=f"contiguous {dtype} {list(shape)}",
            found=f"{'' if out.is_contiguous() else 'strided '}{out.dtype} {list(out.shape)}",
        )
    if codes.is_cuda and compiled is not False:
        wide = torch.promote_types(dtype, torch.float32)
        worth = products(wide, codes.device)[:, E2M1.index(1.0)].contiguous()
        values = products(wide, codes.device)[127]
        _compiled(decode_flat)(codes.reshape(-1), scales.reshape(-1), values, worth, out.view(-1))
        return out
    return decode_in_pieces(codes, scales, dtype, out, bool(compiled))


@cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """On an H100, `decode_flat` moves 86 % of what a copy moves; with sizes left open 66 %, uncompiled 6 %."""
    import torch._dynamo  # here: nobody else waits the seconds that it takes

    # Each size and dtype of weight is a compilation of its own; beyond the limit, calls would run uncompiled.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(function, dynamic=False)


def decode_flat(codes: Tensor, scales: Tensor, values: Tensor, worth: Tensor, out: Tensor) -> None:
    """The formula for one long row, as single operations that a compiler makes one pass over memory of. Exact in the
    dtype of `values` [16] and `worth` [256], at least float32, subnormals included; rounded once into `out`."""
    codes_I = torch.stack((codes & 15, codes >> 4), dim=-1).flatten()
    worth_I = worth[scales.int()].repeat_interleave(MXFP4_BLOCK, output_size=codes_I.shape[0])
    out.copy_(values[codes_I.int()] * worth_I)


def decode_in_pieces(codes: Tensor, scales: Tensor, dtype: torch.dtype, out: Tensor, compiled: bool = False) -> Tensor:
    """`decode` with vector instructions and nothing wider than the result, in pieces that stay in a core's cache.

    The nibbles are spread to 16-bit lanes, where sign, exponent and mantissa already stand as in a float; then the
    scale goes in by a multiplication (float32, float64) or an addition to the exponent (bfloat16). Blocks whose scale
    is at an end of the range, where that would leave the normal numbers, are looked up afterwards.
    """
    table = products(dtype, codes.device)
    if dtype not in (torch.bfloat16, torch.float32, torch.float64) or out.storage_offset() % 2:  # it writes pairs
        return out.copy_(decode_plain(codes, scales, dtype))
    blocks, scale_bytes = codes.reshape(-1, MXFP4_BLOCK // 2), scales.reshape(-1, 1)
    out_blocks = out.view(-1, MXFP4_BLOCK)
    decode_piece = _decode_float
    if dtype == torch.bfloat16:
        decode_piece = _decode_bfloat16_compiled if compiled else _decode_bfloat16
    pieces: Iterable[tuple[Tensor, ...]] = [(blocks, scale_bytes, out_blocks)]
    if not codes.is_cuda and len(blocks) > CACHED_BLOCKS:
        pieces = zip(*(x.split(CACHED_BLOCKS) for x in (blocks, scale_bytes, out_blocks)), strict=True)
    for codes_piece, scales_piece, out_piece in pieces:
        decode_piece(codes_piece, scales_piece, out_piece, _scratch(len(codes_piece), codes.device))
    least, most = map(int, torch.aminmax(scales)) if len(blocks) else SAFE_SCALES
    if least < SAFE_SCALES[0] or most > SAFE_SCALES[1]:
        unsafe = ((scale_bytes < SAFE_SCALES[0]) | (scale_bytes > SAFE_SCALES[1])).squeeze(1)
        codes_QB = torch.stack((blocks[unsafe] & 15, blocks[unsafe] >> 4), dim=-1).flatten(-2)
        out_blocks[unsafe] = table[scale_bytes[unsafe].long(), codes_QB.long()]
    return out


CACHED_BLOCKS = 2**16  # 4 MiB of scratch: within the last cache, and large beside the cost of a dozen calls
SAFE_SCALES = (2, 240)  # the scale bytes for which neither of the two below meets a subnormal or an overflow


class _Scratch(NamedTuple):
    """Memory for a piece, and the same memory as other dtypes."""

    lanes: Tensor  # int32 [blocks, 16]
    int16: Tensor  # [blocks, 32]
    float16: Tensor
    values: Tensor  # float32 [blocks, 32]
    exponent: Tensor  # int32 [blocks, 1]
    scale: Tensor  # float32

    @classmethod
    @torch.inference_mode(False)  # it may be used outside of the mode that it was made in
    def of(cls, blocks: int, device: torch.device) -> _Scratch:
        lanes = torch.empty((blocks, MXFP4_BLOCK // 2), dtype=torch.int32, device=device)
        values = torch.empty((blocks, MXFP4_BLOCK), dtype=torch.float32, device=device)
        exponent = torch.empty((blocks, 1), dtype=torch.int32, device=device)
        return cls(
            lanes, lanes.view(torch.int16), lanes.view(torch.float16), values, exponent, exponent.view(torch.float32)
        )


_own = local()


def _scratch(blocks: int, device: torch.device) -> _Scratch:
    """On a CPU memory of this thread, which is used again, and views that are there already: where several threads
    decode, they wait for each other at each operation, even one that only makes a view."""
    if device.type != "cpu":
        return _Scratch.of(blocks, device)
    kept: dict[int, _Scratch] = _own.__dict__.setdefault("kept", {})
    if blocks not in kept:
        if CACHED_BLOCKS not in kept:
            kept[CACHED_BLOCKS] = _Scratch.of(CACHED_BLOCKS, device)
        kept[blocks] = _Scratch(*(x[:blocks] for x in kept[CACHED_BLOCKS]))
    return kept[blocks]


def _spread(codes: Tensor, scratch: _Scratch, position: int) -> None:
    """Each byte to two 16-bit lanes (in one int32): sign at bit 15, the other three bits from bit `position` on."""
    scratch.lanes.copy_(codes)
    scratch.lanes.mul_(1 << 12 | 1 << 24)  # a nibble at the top of each lane, and others below it
    scratch.int16.bitwise_right_shift_(12 - position)
    scratch.lanes.bitwise_and_(_both_lanes(0x8000 | 7 << position))


def _both_lanes(bits: int) -> int:
    """The int32 with the same 16 bits in both halves."""
    return (bits << 16 | bits) - (1 << 32 if bits >> 15 else 0)


def _decode_float(codes: Tensor, scales: Tensor, out: Tensor, scratch: _Scratch) -> None:
    """float32, float64: read the lanes as float16, where a code is worth 2^-14 of its value (0.5 is a subnormal, as in
    E2M1); the conversion makes it a normal number, times 2^14 and the scale. To float64 by way of float32: torch has no
    vector instructions for the direct conversion."""
    _spread(codes, scratch, position=9)
    values = out if out.dtype == torch.float32 else scratch.values
    values.copy_(scratch.float16)
    scratch.exponent.copy_(scales)
    scratch.exponent.add_(14).bitwise_left_shift_(23)
    values.mul_(scratch.scale)
    if values is not out:
        out.copy_(values)


def _decode_bfloat16(codes: Tensor, scales: Tensor, out: Tensor, scratch: _Scratch) -> None:
    """bfloat16, in integers. The magnitude c of a code becomes that of a normal number by c + min(c, 2): exponent and
    mantissa are then 0 0 | 1 0 | 2 0 | 2 1 | 3 0 | 3 1 | 4 0 | 4 1. Where c is not zero, add the scale's exponent."""
    _spread(codes, scratch, position=6)
    bits, pairs, lanes = out.view(torch.int16), out.view(torch.int32), scratch.lanes
    torch.bitwise_and(lanes, _both_lanes(7 << 6), out=pairs)  # c
    bits.clamp_max_(2 << 6)  # min(c, 2)
    lanes += pairs
    bits.clamp_max_(1)  # min(c, 1), in units of the last bit: not zero
    exponent = scales.to(torch.int16)
    exponent -= 2  # 0.5 has exponent 1 by now, and shall have scale - 1
    exponent <<= 7
    torch.addcmul(scratch.int16, bits, exponent, out=bits)


def _decode_bfloat16_compiled(codes: Tensor, scales: Tensor, out: Tensor, scratch: _Scratch) -> None:
    scratch.lanes.copy_(codes)
    _compiled(_bfloat16_pairs)(scratch.lanes.view(torch.float32), scales, out.view(torch.float32))  # vectors of floats


def _bfloat16_pairs(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """The same sum for a compiler: bytes of codes, one in each int32, to the two bfloat16 that it then holds."""
    lanes = codes.view(torch.int32) * (1 << 12 | 1)  # a nibble at the bottom of each lane, and others above it
    c = lanes & _both_lanes(7)
    not_zero = (c + _both_lanes(7)) & _both_lanes(8)  # 8 or 0
    above_half = (c + _both_lanes(6)) & _both_lanes(8)
    exponent = (scales.int() - 2) * (128 // 8) + 64 // 8  # with the 1 that min(c, 2) has of every c but zero
    sign = (lanes & _both_lanes(8)) * 4096
    out.copy_((sign + c * 64 + above_half * (64 // 8) + not_zero * exponent).view(torch.float32))


def check(codes: Tensor, scales: Tensor) -> None:
    """Raise unless these are MXFP4 codes [..., Z] and scales [..., Q] that belong together."""
    if codes.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise Qwen35Error(
            "MXFP4 is stored as bytes",
            expected="codes and scales of uint8",
            found=f"codes {codes.dtype}, scales {scales.dtype}",
            do="float8 scales are NVFP4 (block 16), which is another format" if scales.dtype.is_floating_point else "",
        )
    if codes.dim() == 0 or codes.shape[-1] % (MXFP4_BLOCK // 2):
        raise Qwen35Error("an MXFP4 row is whole blocks of 16 bytes", expected="[..., 16 n]", found=list(codes.shape))
    expected = (*codes.shape[:-1], codes.shape[-1] // (MXFP4_BLOCK // 2))
    if scales.shape != expected:
        raise Qwen35Error(
            "MXFP4 scales do not belong to these codes",
            expected=f"{list(expected)} (one byte for each 16 bytes of codes {list(codes.shape)})",
            found=list(scales.shape),
        )
