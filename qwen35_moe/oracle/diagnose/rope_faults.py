"""Rotary angles as engines get them wrong: axes of images, counting, scaling."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...model.vision.positions import VIDEO
from .faults import Fault, FaultSite, TapChange
from .seen import Seen

PositionChange = Callable[[Tensor, Seen | None], Tensor]  # [3, B, T] -> [3, B, T]


def same(x_3BT: Tensor, _: Seen | None = None) -> Tensor:
    return x_3BT


def time_only(x_3BT: Tensor, _: Seen | None = None) -> Tensor:
    return x_3BT[:1].expand(3, -1, -1)


def axes_swapped(x_3BT: Tensor, _: Seen | None = None) -> Tensor:
    return x_3BT[[0, 2, 1]]


def counted(x_3BT: Tensor, _: Seen | None = None) -> Tensor:
    """Every token one further on, on all axes."""
    return torch.arange(x_3BT.shape[2]).expand_as(x_3BT)


def counted_after(x_3BT: Tensor, _: Seen | None = None) -> Tensor:
    """Images stand where they should, and what follows goes on after as many positions as they have tokens. Where all
    axes are equal a token is text, or an image's first."""
    index_T = torch.arange(x_3BT.shape[2])
    text_BT = (x_3BT == x_3BT[:1]).all(0)
    last_BT = torch.where(text_BT, index_T, -1).cummax(1).values.clamp(min=0)
    ahead_BT = (index_T - x_3BT[0]).gather(1, last_BT)
    return x_3BT + ahead_BT


def off_after(by: int) -> PositionChange:
    """What follows an image, `by` further on for each image before it."""

    def change(x_3BT: Tensor, seen: Seen | None) -> Tensor:
        if seen is None:
            return x_3BT
        inside_BT = (seen.types != 0).long().to(x_3BT.device)
        ended_BT = ((inside_BT.roll(1, 1) == 1) & (inside_BT == 0)).long()
        ended_BT[:, 0] = 0
        return x_3BT + by * ended_BT.cumsum(1)

    return change


def frames_counted(x_3BT: Tensor, seen: Seen | None) -> Tensor:
    """Each frame of a video one further on in time, as in Qwen2.5-VL. Here time stands in the text between frames."""
    if seen is None or not seen.videos:
        return x_3BT
    size, x_3BT = seen.config.spatial_merge_size**2, x_3BT.clone()
    frames = [torch.full((h * w // size,), k) for t, h, w in seen.videos for k in range(t)]
    x_3BT[0, seen.types == VIDEO] += torch.cat(frames).to(x_3BT)
    return x_3BT


def turned(
    positions: PositionChange, blocks: bool = False, scaled: bool = True, theta: float | None = None
) -> Mapping[str, TapChange]:
    """cos and sin of the angles at other positions; `blocks`: the axes' frequencies side by side, not interleaved;
    not `scaled`: without `rope_scaling`; of another `theta`."""

    def angles(place: FaultSite) -> tuple[Tensor, float]:
        c, R = place.config, place.config.rotary_dim
        at_3BT = place.positions if place.positions.dim() == 3 else place.positions.expand(3, -1, -1)
        at_3BT = positions(at_3BT, place.seen)
        j = torch.arange(R // 2)
        time, height, width = c.mrope_section
        if blocks:
            axis_j = (j >= time).long() + (j >= time + height)
        else:
            axis_j = torch.where((j % 3 == 1) & (j < 3 * height), 1, torch.where((j % 3 == 2) & (j < 3 * width), 2, 0))
        frequency_j, amplitude = (theta or c.rope_theta) ** (-2 * j.double() / R), 1.0
        if scaled and c.rope_scaling is not None:
            rotated, amplitude = int(c.head_dim * c.partial_rotary_factor), c.rope_scaling.amplitude()
            frequency_j = c.rope_scaling.frequencies(c.rope_theta, rotated, c.head_dim, at_3BT, torch.float64)
        return at_3BT[axis_j].movedim(0, -1).double() * frequency_j, amplitude

    def of(function: Callable[[Tensor], Tensor]) -> TapChange:
        def change(_: Tensor, __: dict[str, Tensor], place: FaultSite) -> Tensor:
            angle_BTj, amplitude = angles(place)
            return function(angle_BTj) * amplitude

        return change

    return {"rope_cos": of(torch.cos), "rope_sin": of(torch.sin)}


ROTARY_FAULTS = (
    Fault("M-RoPE height and width dropped", "attn", "all axes have the position in time", "sglang 34446",
          turned(time_only), needs="images"),
    Fault("M-RoPE height and width swapped", "attn", "", "", turned(axes_swapped), needs="images"),
    Fault("M-RoPE sections in blocks", "attn", "frequencies of the axes side by side, not interleaved", "",
          turned(same, blocks=True), needs="images"),
    Fault("image positions counted by tokens", "attn", "an image has one position a token", "",
          turned(counted), needs="images"),
    Fault("positions after an image counted by tokens", "attn", "text goes on after as many positions as an image has "
          "tokens", "", turned(counted_after), needs="images"),
    Fault("positions after an image one too low", "attn", "text goes on at the image's last position", "",
          turned(off_after(-1)), needs="images"),
    Fault("positions after an image one too high", "attn", "", "", turned(off_after(1)), needs="images"),
    Fault("frames of a video counted in time", "attn", "as in Qwen2.5-VL", "", turned(frames_counted),
          needs="images"),
    Fault("rotary scaling ignored", "attn", "rope_type (YaRN, ...) of config.json not read", "omlx 3347, mlx-lm 1507",
          turned(same, scaled=False), needs="scaled"),
)  # fmt: skip

# Where the angles themselves were dumped, before any layer turned by them.
ANGLES = (
    Fault("rotary theta 10000", "attn", "rope_theta ignored", "", turned(same, scaled=False, theta=10000.0)),
    Fault("no rotary at all", "attn", "", "", {"rope_cos": lambda x, _, __: torch.ones_like(x),
                                               "rope_sin": lambda x, _, __: torch.zeros_like(x)}),
)  # fmt: skip
