"""Layouts: each against its definition by index, and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwen35_moe.errors import Qwen35Error
from qwen35_moe.quant.layouts import (
    deinterleave_gate_up,
    interleave_gate_up,
    shuffle_scales,
    shuffle_weight,
    unshuffle_scales,
    unshuffle_weight,
)


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(shape)))


def test_interleaved_gate_and_up() -> None:
    gate, up = torch.arange(12).view(3, 4), torch.arange(100, 112).view(3, 4)
    alternating = torch.stack([row for pair in zip(gate, up, strict=True) for row in pair])
    for dim in (0, -2):
        assert torch.equal(interleave_gate_up(torch.cat((gate, up)), dim), alternating)
        assert torch.equal(deinterleave_gate_up(alternating, dim), torch.cat((gate, up)))
    experts = random_bytes(2, 6, 5)
    assert torch.equal(deinterleave_gate_up(interleave_gate_up(experts)), experts)
    for change in (interleave_gate_up, deinterleave_gate_up):
        with pytest.raises(Qwen35Error):
            change(gate)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_aiters_weight_tiles_by_index(dtype: torch.dtype) -> None:
    rows, columns = 32, 96
    x = torch.arange(rows * columns).view(rows, columns).to(torch.int16)
    x = x.view(dtype) if dtype != torch.uint8 else random_bytes(rows, columns)
    chunk = 16 // x.element_size()
    flat = shuffle_weight(x).flatten()
    for row in range(rows):
        for column in range(columns):
            tile = (row // 16) * (columns // 32) + column // 32
            place = ((tile * (32 // chunk) + column % 32 // chunk) * 16 + row % 16) * chunk + column % chunk
            assert flat[place] == x[row, column] or flat[place].isnan()
    experts = random_bytes(3, 64, 128)
    assert torch.equal(unshuffle_weight(shuffle_weight(experts)), experts)
    assert torch.equal(shuffle_weight(experts)[1], shuffle_weight(experts[1]))
    for change in (shuffle_weight, unshuffle_weight):
        with pytest.raises(Qwen35Error):
            change(random_bytes(24, 32))
        with pytest.raises(Qwen35Error):
            change(random_bytes(32, 48))


def test_aiters_scale_tiles_by_index() -> None:
    scales = random_bytes(300, 20)
    shuffled = shuffle_scales(scales)
    assert shuffled.shape == (512, 24)
    for row in range(300):
        for block in range(20):
            tile = (row // 32) * (24 // 8) + block // 8
            within = ((block % 4 * 16 + row % 16) * 2 + block // 4 % 2) * 2 + row // 16 % 2
            assert shuffled.flatten()[tile * 256 + within] == scales[row, block]
    assert torch.equal(unshuffle_scales(shuffled, 300, 20), scales)
    padded = unshuffle_scales(shuffled)
    assert padded.shape == (512, 24)
    assert not padded[300:].any()
    with pytest.raises(Qwen35Error):
        shuffle_scales(random_bytes(2, 32, 8))
    with pytest.raises(Qwen35Error):
        unshuffle_scales(scales)
