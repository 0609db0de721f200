"""MXFP4 decoding in one pass over memory, for GPUs: what `mxfp4.decode` computes, in Triton.

Why a kernel: in plain PyTorch each of a dozen operations reads and writes the whole tensor, and a look-up needs an
index four times as large as the bytes (`benchmarks/bench_gpu.py decode` has both).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _e2m1(code):
    """A code's value as the bits of a float32: sign, and for magnitudes from 2 on exponent and mantissa as they are."""
    magnitude = code & 7
    normal = ((magnitude >> 1) + 126) << 23 | (magnitude & 1) << 22
    bits = tl.where(magnitude < 2, magnitude * 0x3F000000, normal)  # 0 and 0.5
    return (bits | (code & 8) << 28).to(tl.float32, bitcast=True)


@triton.jit
def _decode(codes, scales, worth, out, count, PIECE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * PIECE + tl.arange(0, PIECE)
    byte = tl.load(codes + at, at < count, 0).to(tl.int32)
    scale = tl.load(worth + tl.load(scales + at // 16, at < count, 0).to(tl.int32))
    low = _e2m1(byte & 15).to(scale.dtype) * scale
    high = _e2m1(byte >> 4).to(scale.dtype) * scale
    target = tl.program_id(0).to(tl.int64) * 2 * PIECE + tl.arange(0, 2 * PIECE)
    tl.store(out + target, tl.interleave(low, high).to(out.dtype.element_ty), target < 2 * count)


def decode_into(codes: Tensor, scales: Tensor, worth: Tensor, out: Tensor) -> Tensor:
    """Codes [..., Z] and scales [..., Q] to `out` [..., I], all contiguous. worth [256]: what each scale byte is worth,
    in float32 (exact for 16-bit and 32-bit results, their infinities included) or float64."""
    if codes.numel():
        _decode[(triton.cdiv(codes.numel(), 1024),)](codes, scales, worth, out, codes.numel(), PIECE=1024)
    return out

