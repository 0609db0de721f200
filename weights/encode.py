"""The stored form of one matrix: MXFP4, FP8 in blocks, FP8 by row. Either the encoding of the values that the BF16
checkpoint holds (method "encode"), or codes and scales drawn directly (method "draw"), which is as fast as writing and
good enough where only size and structure matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from math import frexp

import numpy as np
import torch

from qwen35_moe.errors import Qwen35Error

from .draw import BLOCK, CHUNK, WORD, Values, bell, draw, hash_bits, key
from .tensors import Logical

FP8_BLOCK = 128
FP8_SPREAD = 64.0  # of drawn codes: the largest, 3.13 times that, is 200 of 448
Chunks = Iterator[np.ndarray]
Part = tuple[str, str, tuple[int, ...], Callable[[], Chunks]]  # suffix, dtype, size, bytes


def encodings(kind: str, tensor: Logical, seed: int, method: str) -> list[Part]:
    """The stored tensors that stand for one `<module>.weight`: (suffix after the module's name, dtype, size, data)."""
    rows, columns = tensor.size
    if kind == "float":
        return [(".weight", "BF16", tensor.size, lambda: draw(seed, tensor.name, tensor.size, tensor.values, "BF16"))]
    if kind in ("mxfp4", "compressed-tensors"):
        if columns % BLOCK:
            raise Qwen35Error(
                "MXFP4 needs rows of whole blocks", where=tensor.name, expected=f"a multiple of {BLOCK}", found=columns,
                do="choose hidden_size and the intermediate sizes of the recipe accordingly",
            )  # fmt: skip
        codes = ".weight" if kind == "mxfp4" else ".weight_packed"
        return [
            (codes, "U8", (rows, columns // 2), lambda: _mxfp4(tensor, seed, method, 0)),
            (".weight_scale", "U8", (rows, columns // BLOCK), lambda: _mxfp4(tensor, seed, method, 1)),
        ]
    block = kind == "fp8"
    suffix, dtype = (".weight_scale_inv", "BF16") if block else (".weight_scale", "F32")
    size = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)) if block else (rows,)
    return [
        (".weight", "F8_E4M3", (rows, columns), lambda: _fp8(tensor, seed, method, block, 0)),
        (suffix, dtype, size, lambda: _fp8(tensor, seed, method, block, 1)),
    ]


def values_bf16(tensor: Logical, seed: int) -> torch.Tensor:
    """The whole matrix as the BF16 checkpoint holds it."""
    words = np.concatenate(list(draw(seed, tensor.name, tensor.size, tensor.values, "BF16")))
    return torch.from_numpy(words.view(np.int16)).view(torch.bfloat16)


def mxfp4_arrays(tensor: Logical, seed: int, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes [O, I/2] and scales [O, I/32] of one matrix, whole."""
    codes, scales = (np.concatenate(list(_mxfp4(tensor, seed, method, part))) for part in (0, 1))
    return codes, scales


def _mxfp4(tensor: Logical, seed: int, method: str, part: int) -> Chunks:
    rows, columns = tensor.size
    if method == "encode":
        from qwen35_moe.quant import mxfp4

        yield mxfp4.encode(values_bf16(tensor, seed), scale_rule="even")[part].numpy()
    elif part == 0:
        yield from _bytes(key(seed, tensor.name + "#codes"), rows, columns // 2)
    else:
        # A code drawn evenly has a root mean square of 2.93; frexp gives the nearest power of two without a logarithm.
        middle = 127 + frexp(tensor.values.spread / 2.93 * 1.41)[1] - 1
        for byte in _bytes(key(seed, tensor.name + "#scales"), rows, columns // BLOCK):
            yield (byte & 3) + np.uint8(middle - 2)


def _bytes(stream: int, rows: int, columns: int) -> Chunks:
    step = max(1, CHUNK // columns)
    for first in range(0, rows, step):
        n = min(step, rows - first)
        yield hash_bits(stream, first * columns, n * columns, "u1").reshape(n, columns)


@cache
def fp8_table() -> np.ndarray:
    return torch.from_numpy(bell() * FP8_SPREAD).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _fp8(tensor: Logical, seed: int, method: str, block: bool, part: int) -> Chunks:
    rows, columns = tensor.size
    if method == "encode":
        yield encode_fp8(values_bf16(tensor, seed), block)[part]
    elif part == 0:
        stream, step = key(seed, tensor.name + "#codes"), max(1, CHUNK // columns)
        for first in range(0, rows, step):
            n = min(step, rows - first)
            yield fp8_table()[hash_bits(stream, first * columns, n * columns, "<u2")].reshape(n, columns)
    else:
        size = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)) if block else (rows,)
        middle = tensor.values.spread / FP8_SPREAD
        values = Values(mean=middle, spread=middle / 2, shape="flat")
        yield from draw(seed, tensor.name + "#scales", size, values, "BF16" if block else "F32")


def encode_fp8(x_OI: torch.Tensor, block: bool) -> tuple[np.ndarray, np.ndarray]:
    """E4M3 codes and the multipliers that decode them: amax / 448 of each 128 x 128 block, rounded to BF16, or of each
    row, in float32. The codes are rounded, to nearest and ties to even, with the multiplier as it is stored."""
    x_OI = x_OI.to(torch.float64)
    rows, columns = x_OI.shape
    tall, wide = (FP8_BLOCK, FP8_BLOCK) if block else (1, columns)
    padded = torch.zeros(-(-rows // tall) * tall, -(-columns // wide) * wide, dtype=torch.float64)
    padded[:rows, :columns] = x_OI
    tiles = padded.unflatten(0, (-1, tall)).unflatten(2, (-1, wide))
    scale = (tiles.abs().amax(dim=(1, 3)) / 448).to(torch.bfloat16 if block else torch.float32)
    codes = (tiles / scale[:, None, :, None].to(torch.float64)).to(torch.float32).to(torch.float8_e4m3fn)
    codes = codes.view(torch.uint8).flatten(2, 3).flatten(0, 1)[:rows, :columns].contiguous()
    stored = scale.view(torch.int16).numpy().view(WORD["BF16"]) if block else scale.flatten().numpy()
    return codes.numpy(), stored
