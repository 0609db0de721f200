"""Layouts of packed weights other than the plain one of `MXFP4`: rearrangements of bytes, each with an exact inverse.

    gpt-oss             codes [E, O, Q, 16], scales [E, O, Q], rows of gate and up alternating
    Aiter, in memory    codes in tiles of 16 rows x 32 bytes, scales in tiles of 32 rows x 8 blocks; dumps of loaded
                        weights have this layout

NVFP4 looks like MXFP4 (nibbles in bytes) and is another format: blocks of 16, E4M3 scales, and a scale of the tensor.
`checkpoint/recognise.py` refuses it by its scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import Qwen35Error


def interleave_gate_up(x: Tensor, dim: int = -2) -> Tensor:
    """[gate rows, then up rows] to [gate 0, up 0, gate 1, up 1, ...], along `dim`."""
    return _swapped(x, dim, (2, -1))


def deinterleave_gate_up(x: Tensor, dim: int = -2) -> Tensor:
    """The inverse of `interleave_gate_up`."""
    return _swapped(x, dim, (-1, 2))


def _swapped(x: Tensor, dim: int, sizes: tuple[int, int]) -> Tensor:
    """The dimension `dim` made of two, which change places."""
    if x.shape[dim] % 2:
        expected = f"an even size of dimension {dim}"
        raise Qwen35Error("gate and up have as many rows", expected=expected, found=list(x.shape))
    at = dim % x.dim()
    return x.unflatten(dim, sizes).movedim(at, at + 1).flatten(at, at + 1)


# A tile of Aiter's (16, 16) weight layout: 16 rows x 32 columns, cut into chunks of 16 bytes. In memory the chunks of
# one column position follow each other row by row, so that one load of a wave gets the same columns of 16 rows.
TILE_ROWS, TILE_COLUMNS, LAYOUT_CHUNK = 16, 32, 16


def shuffle_weight(x: Tensor) -> Tensor:
    """Plain [..., O, C] to Aiter's `shuffle_weight(x, layout=(16, 16))`, for any dtype; C counts elements, for MXFP4
    codes bytes. O is a multiple of 16, C of 32.

    [..., O / 16, 16 rows, C / 32, chunks, chunk] becomes [..., O / 16, C / 32, chunks, 16 rows, chunk].
    """
    return _tiles(x, rows_first=True).movedim(-4, -2).reshape(x.shape)


def unshuffle_weight(x: Tensor) -> Tensor:
    """The inverse of `shuffle_weight`."""
    return _tiles(x, rows_first=False).movedim(-2, -4).reshape(x.shape)


def _tiles(x: Tensor, rows_first: bool) -> Tensor:
    if x.dim() < 2 or x.shape[-2] % TILE_ROWS or x.shape[-1] % TILE_COLUMNS:
        expected = f"[..., {TILE_ROWS} n, {TILE_COLUMNS} m]"
        raise Qwen35Error("Aiter's weight layout is made of whole tiles", expected=expected, found=list(x.shape))
    chunk = LAYOUT_CHUNK // x.element_size()
    rows, columns = x.shape[-2] // TILE_ROWS, x.shape[-1] // TILE_COLUMNS
    chunks = TILE_COLUMNS // chunk
    order = (TILE_ROWS, columns, chunks, chunk) if rows_first else (columns, chunks, TILE_ROWS, chunk)
    return x.reshape(*x.shape[:-2], rows, *order)


def shuffle_scales(scales: Tensor) -> Tensor:
    """Plain scales [O, Q] to Aiter's `e8m0_shuffle`: padded to multiples of 256 rows and 8 blocks, then tiles of
    32 rows x 8 blocks, in each of which the 2 halves of the rows and the 2 halves of the blocks vary fastest.

    [O / 32, 2, 16, Q / 8, 2, 4] becomes [O / 32, Q / 8, 4, 16, 2 (of Q), 2 (of O)]. The padding is zero here (Aiter
    leaves it undefined). For experts [E, O, Q] engines flatten the first two dimensions before.
    """
    if scales.dim() != 2:
        raise Qwen35Error("Aiter shuffles scales as a matrix", expected="[O, Q]", found=list(scales.shape))
    rows, blocks = scales.shape
    padded = torch.nn.functional.pad(scales, (0, -blocks % 8, 0, -rows % 256))
    tiles = padded.reshape(padded.shape[0] // 32, 2, 16, padded.shape[1] // 8, 2, 4)
    return tiles.permute(0, 3, 5, 2, 4, 1).reshape(padded.shape)


def unshuffle_scales(shuffled: Tensor, rows: int | None = None, blocks: int | None = None) -> Tensor:
    """The inverse of `shuffle_scales`; `rows` and `blocks` cut the padding off."""
    if shuffled.dim() != 2 or shuffled.shape[0] % 256 or shuffled.shape[1] % 8:
        raise Qwen35Error("not scales in Aiter's layout", expected="[256 n, 8 m]", found=list(shuffled.shape))
    tiles = shuffled.reshape(shuffled.shape[0] // 32, shuffled.shape[1] // 8, 4, 16, 2, 2)
    return tiles.permute(0, 5, 3, 1, 4, 2).reshape(shuffled.shape)[:rows, :blocks]
