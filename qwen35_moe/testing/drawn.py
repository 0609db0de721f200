"""Inputs from the integer hash: the same bytes on every machine, with the statistics of the real model."""

from __future__ import annotations

import json
from functools import cache
from math import frexp, sqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import weights
from ..errors import Qwen35Error
from ..model.config import Config
from ..weights.draw import Values, draw, hash_bits, key

CONFIGS = Path(weights.__path__[0]) / "configs"
OUTLIER = 30.0  # the loudest channel of a hidden state, in units of the others
SHORT_HEAD_EXPONENT = -10  # binary exponent of a head of norm 1e-3, beside which the eps of a norm shows


@cache
def config_of(model: str) -> Config:
    """The configuration of a model of the family by its name, in any case; `tiny` has all parts and small sizes."""
    found = {path.stem.lower(): path for path in CONFIGS.glob("*.json")}
    if model.lower() not in found:
        raise Qwen35Error("unknown model", expected=", ".join(sorted(found)), found=model)
    return Config.from_dict(json.loads(found[model.lower()].read_text(encoding="utf-8")))


def drawn(
    seed: int, name: str, *shape: int, spread: float = 1.0, mean: float = 0.0, kind: str = "bell",
    dtype: torch.dtype = torch.bfloat16, mixed: bool = False,
) -> Tensor:  # fmt: skip
    """mean + spread * z in bfloat16 or float32; z has a bell curve, or is uniform over (-1, 1). mixed: blocks of 32
    columns differ by powers of two, as those of quantised weights do."""
    size = (int(np.prod(shape[:-1], dtype=np.int64)), shape[-1])
    values = Values(mean=mean, spread=spread, shape=kind, mixed=mixed)
    words = np.concatenate(list(draw(seed, name, size, values, "BF16" if dtype == torch.bfloat16 else "F32")))
    bits = np.int16 if dtype == torch.bfloat16 else np.int32
    return torch.from_numpy(words.view(bits).reshape(shape)).view(dtype)


def hidden(seed: int, name: str, tokens: int, width: int) -> Tensor:
    """Hidden states [tokens, width] after a norm: of order 1, and one channel that is OUTLIER times as large."""
    x = drawn(seed, name, tokens, width)
    x[:, width // 3] *= OUTLIER
    return x


def matrix(seed: int, name: str, *shape: int, spread: float = 1.0, mixed: bool = False) -> Tensor:
    """A weight [..., O, I] that keeps the size of what it is multiplied with."""
    return drawn(seed, name, *shape, spread=spread / sqrt(shape[-1]), mixed=mixed)


def heads(seed: int, name: str, *shape: int) -> Tensor:
    """[..., heads, width], the second head 2^SHORT_HEAD_EXPONENT times as long as the others."""
    x = drawn(seed, name, *shape)
    if shape[-2] > 1:
        x[..., 1, :] *= 2.0**SHORT_HEAD_EXPONENT
    return x


def packed_bytes(seed: int, name: str, rows: int, columns: int, spread: float) -> tuple[Tensor, Tensor]:
    """MXFP4 codes [O, I/2] and scales [O, I/32] of a matrix as large as `matrix` makes it: all codes equally often (a
    root mean square of 2.93), scales of four neighbouring powers of two."""
    middle = 126 + frexp(spread / sqrt(columns) / 2.93 * 1.41)[1]
    codes = hash_bits(key(seed, f"{name}#codes"), 0, rows * columns // 2, "u1").copy()
    scales = (hash_bits(key(seed, f"{name}#scales"), 0, rows * columns // 32, "u1") & 3) + np.uint8(middle - 2)
    return torch.from_numpy(codes).view(rows, -1), torch.from_numpy(scales).view(rows, -1)
