"""FP8 weights in their three forms, against ml_dtypes and against the formula spelt out element by element."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from qwen35_moe.errors import Qwen35Error
from qwen35_moe.quant.fp8 import FP8, widen
from qwen35_moe.quant.packed import Float, Packed


def random_fp8(rows: int, columns: int) -> Tensor:
    """Every byte but the two NaN."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    byte = torch.randint(0, 254, (rows, columns), dtype=torch.uint8, generator=generator)
    return (byte + (byte >= 127)).view(torch.float8_e4m3fn)


def formula(values: Tensor, scale: Tensor, row: int, column: int) -> float:
    """In float64, where the product of 4 and 24 significant bits is exact."""
    if scale.dim() == 2 and scale.shape == (-(-values.shape[0] // 128), -(-values.shape[1] // 128)):
        factor = scale[row // 128, column // 128]
    else:
        factor = scale.flatten()[row if scale.numel() > 1 else 0]
    return float(np.uint8(values.view(torch.uint8)[row, column]).view(ml_dtypes.float8_e4m3fn)) * factor.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_byte_is_what_ml_dtypes_says(dtype: torch.dtype) -> None:
    byte = torch.arange(256, dtype=torch.uint8)
    theirs = torch.from_numpy(byte.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)).to(dtype)
    ours = widen(byte.view(torch.float8_e4m3fn), dtype)
    assert ours.isnan().nonzero().flatten().tolist() == [127, 255]
    assert torch.equal(ours.nan_to_num(1e9), theirs.nan_to_num(1e9))
    finite = ~ours.isnan()
    assert torch.equal(torch.signbit(ours)[finite], torch.signbit(theirs)[finite])


@pytest.mark.parametrize(
    ("shape", "scale_shape", "kind"),
    [
        ((256, 384), (2, 3), "fp8-block"),
        ((200, 300), (2, 3), "fp8-block"),  # the last block of rows and of columns is cut
        ((5, 7), (1, 1), "fp8-block"),
        ((130, 70), (130,), "fp8-channel"),
        ((130, 70), (130, 1), "fp8-channel"),
        ((130, 70), (), "fp8-tensor"),
        ((130, 70), (1,), "fp8-tensor"),
    ],
)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_the_three_forms(
    shape: tuple[int, int], scale_shape: tuple[int, ...], kind: str, scale_dtype: torch.dtype
) -> None:
    values = random_fp8(*shape)
    scale = (torch.rand(scale_shape, generator=torch.Generator().manual_seed(3)) + 0.01).to(scale_dtype)
    weight = FP8(values, scale)
    assert (weight.kind, weight.shape) == (kind, shape)
    spelt_out = torch.tensor(
        [[formula(values, scale, row, column) for column in range(0, shape[1], 3)] for row in range(shape[0])],
        dtype=torch.float64,
    )
    assert torch.equal(weight.decode(torch.float64)[:, ::3], spelt_out)
    assert torch.equal(weight.decode(torch.float32)[:, ::3], spelt_out.to(torch.float32))
    if scale_dtype == torch.bfloat16:  # the product is exact in float32, so that it is rounded once
        assert torch.equal(weight.decode(torch.bfloat16)[:, ::3], spelt_out.to(torch.bfloat16))


def test_into_a_buffer() -> None:
    weight = FP8(random_fp8(300, 200), torch.rand(3, 2, generator=torch.Generator().manual_seed(4)))
    out = torch.full((300, 200), torch.nan)
    assert weight.decode(torch.float32, out=out) is out
    assert torch.equal(out, weight.decode(torch.float32))


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        (torch.zeros(4, 4), torch.ones(1)),
        (random_fp8(4, 4)[0], torch.ones(1)),
        (random_fp8(4, 4), torch.ones(1, dtype=torch.float64)),
        (random_fp8(4, 4), torch.ones(4, 4)),
        (random_fp8(300, 300), torch.ones(2, 3)),
        (random_fp8(300, 300), torch.ones(3, 3).T[:2]),
    ],
)
def test_what_is_not_an_fp8_weight(values: Tensor, scale: Tensor) -> None:
    with pytest.raises(Qwen35Error):
        FP8(values, scale)


def test_a_plain_tensor_under_the_same_interface() -> None:
    values = torch.arange(6, dtype=torch.bfloat16).view(3, 2)
    weight: Packed = Float(values)
    assert weight.shape == (3, 2)
    assert weight.decode(torch.bfloat16) is values
    assert torch.equal(weight.decode(torch.float64), values.double())
    out = torch.empty(3, 2)
    assert weight.decode(torch.float32, out=out) is out
    assert torch.equal(out, torch.arange(6.0).view(3, 2))
