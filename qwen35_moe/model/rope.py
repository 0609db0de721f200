"""Interleaved multi-axis rotary positions (M-RoPE), applied to the first part of each head."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics.taps import tap
from .config import Config
from .ops import promote


def rotary_angles(config: Config, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotation angles.  position_ids [B, T] or [3, B, T] -> two tensors [B, T, R/2].

    angle_j = position * theta^(-2j/R), j = 0 .. R/2-1, where the position is that of the axis (time, height, width)
    to which frequency j belongs: height for j = 1, 4, 7, ..., width for j = 2, 5, 8, ..., as far as `mrope_section`
    reaches, time for all others. Text has the same position on all axes, and this is the ordinary rotary embedding.
    A scaled embedding (`config.rope_scaling`) has other frequencies, and may make cos and sin longer. Computed in at
    least float32; `dtype` is the model's.
    """
    angle_BTj, amplitude = angles_of(config, position_ids, torch.promote_types(dtype, torch.float32))
    return tap("rope_cos", angle_BTj.cos() * amplitude), tap("rope_sin", angle_BTj.sin() * amplitude)


def angles_of(config: Config, position_ids: Tensor, wide: torch.dtype) -> tuple[Tensor, float]:
    """The angles [B, T, R/2], and what their cos and sin are multiplied by."""
    if position_ids.dim() == 2:
        position_ids = position_ids.expand(3, -1, -1)
    j = torch.arange(config.rotary_dim // 2, device=position_ids.device)
    scaling, amplitude = config.rope_scaling, 1.0
    frequency_j = 1 / config.rope_theta ** (2 * j.to(wide) / config.rotary_dim)
    if scaling is not None:
        rotated, amplitude = int(config.head_dim * config.partial_rotary_factor), scaling.amplitude()
        frequency_j = scaling.frequencies(config.rope_theta, rotated, config.head_dim, position_ids, wide)
    _, height, width = config.mrope_section
    axis_j = torch.where((j % 3 == 1) & (j < 3 * height), 1, torch.where((j % 3 == 2) & (j < 3 * width), 2, 0))
    return position_ids[axis_j].movedim(0, -1).to(wide) * frequency_j, amplitude


def rotate(name: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x_j, x_{j+R/2}) of the first R elements of each head.  x [B, T, N, H], cos, sin [B, T, R/2].

    (a, b) -> (a cos - b sin, b cos + a sin); elements R .. H-1 pass unchanged. transformers rounds both products,
    SGLang only their sum.
    """
    half = cos.shape[-1]
    cos, sin = promote(cos)[:, :, None], promote(sin)[:, :, None]
    x = promote(x)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    x_cos = tap(f"{name}.x_cos", torch.cat((a * cos, b * cos), -1))
    x_sin = tap(f"{name}.x_sin", torch.cat((-b * sin, a * sin), -1))
    return tap(name, torch.cat((promote(x_cos) + promote(x_sin), rest), -1))
