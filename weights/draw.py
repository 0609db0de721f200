"""Values from an integer hash: the same bytes on every machine, in every version of every library.

A library's random generator may change between versions, and the last bit of `exp` or `log` differs between C
libraries. So nothing here uses either. Element i of a tensor takes 16 bits of

    splitmix64(key + (i // 4 + 1) * 0x9E3779B97F4A7C15),    key = first 8 bytes of sha256("seed:name")

(Steele, Lea, Flood 2014; arithmetic modulo 2^64), and these select one of 65,536 values from a table. The table is made
with +, -, *, / on float64 alone, which IEEE 754 fixes to the last bit, and rounded to the stored dtype by integer
arithmetic. A tensor can therefore be drawn from any row onwards, which is what keeps memory flat.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

BLOCK = 32  # columns that share an exponent, as in MXFP4
CHUNK = 1 << 18  # elements drawn at a time: hash words, values and result together stay in cache
MANTISSA = {"BF16": 7, "F32": 23}
WORD: dict[str, np.dtype] = {
    "BF16": np.dtype("<u2"),
    "F32": np.dtype("<u4"),
    "U8": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),
}


def key(seed: int, name: str) -> int:
    """The 64-bit key of the stream that the tensor of this name is drawn from."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")


def hash_words(stream: int, start: int, count: int) -> np.ndarray:
    """Words start, ..., start + count - 1 of a stream, as little-endian uint64."""
    x = np.arange(start + 1, start + count + 1, dtype="<u8")
    x *= np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(stream)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def hash_bits(stream: int, start: int, count: int, width: str) -> np.ndarray:
    """Elements start, ..., start + count - 1 of the stream read as units of `width` ("u1" or "<u2")."""
    per_word = 8 // np.dtype(width).itemsize
    first = start // per_word
    words = hash_words(stream, first, -(-(start + count) // per_word) - first)
    offset = start - first * per_word
    return words.view(width)[offset : offset + count]


def round_bits(x: np.ndarray, dtype: str) -> np.ndarray:
    """float64 to the bits of BF16 or F32, to nearest, ties to even. Only for normal values of the target, which is all
    that is ever drawn."""
    shift = np.uint64(52 - MANTISSA[dtype])
    bits = x.astype(np.float64).view(np.uint64)
    odd = (bits >> shift) & np.uint64(1)
    rounded = (bits + (np.uint64(1) << (shift - np.uint64(1))) - np.uint64(1) + odd) >> shift
    mantissa = np.uint64(MANTISSA[dtype])
    exponent = (rounded >> mantissa & np.uint64(0x7FF)).astype(np.int64) - 1023 + 127
    if not ((exponent > 0) & (exponent < 255)).all():
        raise OverflowError(f"a drawn value is not a normal {dtype}")
    sign = rounded >> (mantissa + np.uint64(11))
    fraction = rounded & ((np.uint64(1) << mantissa) - np.uint64(1))
    word = sign << (mantissa + np.uint64(8)) | exponent.astype(np.uint64) << mantissa | fraction
    return word.astype(WORD[dtype])


@cache
def bell() -> np.ndarray:
    """65,536 ascending values, symmetric, of variance 1 within 1e-3: a rational function fitted to the quantiles of the
    normal distribution (within 0.03 up to 2 sigma, and cut off at 3.13)."""
    t = (2 * np.arange(65536, dtype=np.float64) - 65535) / 65536
    t2 = t * t
    return t * ((1.25 - 0.75 * t2) - 0.3 * (t2 * t2)) / (1.0 - 0.9375 * t2) / 1.023


@cache
def flat() -> np.ndarray:
    """65,536 ascending values, evenly spread over (-1, 1)."""
    return (2 * np.arange(65536, dtype=np.float64) - 65535) / 65536


@dataclass(frozen=True)
class Values:
    """How the values of a tensor are distributed: mean + spread * (bell or flat), each row times a power of two.

    mixed: every block of 32 columns is also multiplied by one of 1/4, 1/2, 1, 2, drawn from a second stream, so that
    neighbouring blocks need different scales.
    short: (first row, last row + 1, exponent) whose values are multiplied by 2^exponent.
    """

    mean: float = 0.0
    spread: float = 1.0
    shape: str = "bell"
    mixed: bool = False
    short: tuple[tuple[int, int, int], ...] = ()


@cache
def table(mean: float, spread: float, shape: str, dtype: str) -> np.ndarray:
    return round_bits(mean + spread * (bell() if shape == "bell" else flat()), dtype)


def rows_of(size: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a tensor seen as a matrix with its first dimension as rows."""
    columns = 1
    for n in size[1:]:
        columns *= n
    return size[0], columns


def draw(seed: int, name: str, size: tuple[int, ...], values: Values, dtype: str) -> Iterator[np.ndarray]:
    """The tensor's words (uint16 for BF16, uint32 for F32), in chunks of whole rows."""
    stream, blocks = key(seed, name), key(seed, name + "#blocks")
    rows, columns = rows_of(size)
    lut = table(values.mean, values.spread, values.shape, dtype)
    step = max(1, CHUNK // columns)
    per_row = -(-columns // BLOCK)
    for first in range(0, rows, step):
        n = min(step, rows - first)
        word = lut[hash_bits(stream, first * columns, n * columns, "<u2")].reshape(n, columns)
        if values.mixed:
            exponent = (hash_bits(blocks, first * per_row, n * per_row, "u1") & 3).astype(np.int16).reshape(
                n, per_row
            ) - 2
            _scale(word, exponent, dtype)
        for start, stop, power in values.short:
            own = word[max(start - first, 0) : max(stop - first, 0)]
            own += np.array(power << MANTISSA[dtype], dtype=np.int64).astype(word.dtype)
        yield word


def _scale(word: np.ndarray, exponent: np.ndarray, dtype: str) -> None:
    """Multiply blocks of 32 columns by 2^exponent, in place: values are normal and far from the limits, so this is an
    addition to the exponent field."""
    step = (exponent.astype(np.int64) << MANTISSA[dtype]).astype(word.dtype)
    n, columns = word.shape
    if columns % BLOCK == 0:
        word.reshape(n, -1, BLOCK)[...] += step[:, :, None]
    else:
        word += np.repeat(step, BLOCK, axis=1)[:, :columns]
