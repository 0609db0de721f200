"""Faults of images and of rotary angles: their order, the table of positions, merging; axes, counting, scaling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from ...model.rope import angles_of
from ...model.vision.position_table import interpolate, patch_places
from ...model.vision.positions import VIDEO
from .fault_parts import plain
from .faults import Fault, FaultSite, Seen, TapChange

PositionChange = Callable[[Tensor, Seen | None], Tensor]  # [3, B, T] -> [3, B, T]


def seeing(change: Callable[[Tensor, Seen], Tensor]) -> TapChange:
    """A change that depends on what the tower was given. Without images nothing is changed."""
    return lambda x, _, place: x if place.seen is None else change(x, place.seen)


def reversed_images(block: int) -> TapChange:
    """Images and videos in reverse order. block: 1 if a row is a merge block of m x m patches, 0 if it is a patch."""

    def change(x: Tensor, seen: Seen) -> Tensor:
        size = seen.config.spatial_merge_size**2 if block else 1
        parts, first = x.split([t * h * w // size for t, h, w in seen.grids]), len(seen.images)
        return torch.cat((*parts[:first][::-1], *parts[first:][::-1]))

    return seeing(change)


def cropped(_: Tensor, seen: Seen) -> Tensor:
    """The table's corner of the image's size; patches beyond the table have its edge."""
    row, column, _, _ = patch_places(seen.grids, seen.config.spatial_merge_size)
    side = isqrt(len(seen.table))
    return seen.table[row.clamp(max=side - 1) * side + column.clamp(max=side - 1)]


def nearest(_: Tensor, seen: Seen) -> Tensor:
    row, column, rows, columns = patch_places(seen.grids, seen.config.spatial_merge_size)
    side = isqrt(len(seen.table))
    y, x = ((i * (side - 1) / (n - 1).clamp(min=1)).round().long() for i, n in ((row, rows), (column, columns)))
    return seen.table[y * side + x]


def unaligned(_: Tensor, seen: Seen) -> Tensor:
    """Bilinear without aligned corners: patch i of n stands at (i + 1/2) s / n - 1/2 of the table's s rows."""
    m, side = seen.config.spatial_merge_size, isqrt(len(seen.table))
    table_1Dss = seen.table.T.reshape(1, -1, side, side)
    found = []
    for t, h, w in seen.grids:
        frame = torch.nn.functional.interpolate(table_1Dss, (h, w), mode="bilinear", align_corners=False)[0]
        row, column, _, _ = patch_places([(t, h, w)], m)
        found.append(frame[:, row, column].T)
    return torch.cat(found)


def row_by_row(_: Tensor, seen: Seen) -> Tensor:
    """The positions that would be right if patches came row by row, not merge block by merge block."""
    return interpolate(seen.table, *patch_places(seen.grids, 1))


def columns_first(x_LD: Tensor, seen: Seen) -> Tensor:
    """The patches of each merge block read column by column."""
    m = seen.config.spatial_merge_size
    return x_LD.unflatten(0, (-1, m, m)).transpose(1, 2).flatten(0, 2)


def gathered_again(x_LD: Tensor, seen: Seen) -> Tensor:
    """Merge blocks gathered as if patches came row by row."""
    m, found, start = seen.config.spatial_merge_size, [], 0
    for t, h, w in seen.grids:
        frames = x_LD[start : start + t * h * w].unflatten(0, (t, h // m, m, w // m, m))
        found.append(frames.transpose(2, 3).flatten(0, 4))
        start += t * h * w
    return torch.cat(found)


def slices(change: Callable[[Tensor], Tensor]) -> TapChange:
    """A change of pixels [L, channels, frames, values]; the frames are those of one patch."""

    def flat(x: Tensor, seen: Seen) -> Tensor:
        c = seen.config
        return change(x.unflatten(-1, (c.in_channels, c.temporal_patch_size, -1))).flatten(1)

    return seeing(flat)


def one_slice(which: int) -> TapChange:
    """One of the frames that a patch holds; zeros in the place of the others."""
    return slices(lambda x: torch.zeros_like(x).index_copy(2, torch.tensor([which % x.shape[2]]), x[:, :, [which]]))


def same(x_3BT: Tensor, _: Seen | None = None) -> Tensor:
    return x_3BT


def time_only(x_3BT: Tensor, _: Seen | None = None) -> Tensor:
    return x_3BT[:1].expand(3, -1, -1)


def axes_swapped(x_3BT: Tensor, _: Seen | None = None) -> Tensor:
    return x_3BT[[0, 2, 1]]


def counted(x_3BT: Tensor, _: Seen | None = None) -> Tensor:
    """Every token is one further on than the last, on all axes."""
    return torch.arange(x_3BT.shape[2]).expand_as(x_3BT)


def counted_after(x_3BT: Tensor, _: Seen | None = None) -> Tensor:
    """Images are right, but what follows goes on as if each of their tokens had taken one position. A token whose axes
    are equal is text, or the first of an image."""
    index_T = torch.arange(x_3BT.shape[2])
    text_BT = (x_3BT == x_3BT[:1]).all(0)
    last_BT = torch.where(text_BT, index_T, -1).cummax(1).values.clamp(min=0)
    ahead_BT = (index_T - x_3BT[0]).gather(1, last_BT)
    return x_3BT + ahead_BT


def off_after(by: int) -> PositionChange:
    """Text is `by` further on for each image before it."""

    def change(x_3BT: Tensor, seen: Seen | None) -> Tensor:
        if seen is None:
            return x_3BT
        inside_BT = (seen.types != 0).long().to(x_3BT.device)
        ended_BT = ((inside_BT.roll(1, 1) == 1) & (inside_BT == 0)).long()
        ended_BT[:, 0] = 0
        return x_3BT + by * ended_BT.cumsum(1)

    return change


def frames_counted(x_3BT: Tensor, seen: Seen | None) -> Tensor:
    """Each frame of a video is one further on in time, as in Qwen2.5-VL. In this model, text between frames says it."""
    if seen is None or not seen.videos:
        return x_3BT
    size, x_3BT = seen.config.spatial_merge_size**2, x_3BT.clone()
    frames = [torch.full((h * w // size,), k) for t, h, w in seen.videos for k in range(t)]
    x_3BT[0, seen.types == VIDEO] += torch.cat(frames).to(x_3BT)
    return x_3BT


def turned(positions: PositionChange, blocks: bool = False, **other: Any) -> Mapping[str, TapChange]:
    """cos and sin of the angles at other positions. blocks: the axes' frequencies side by side, not interleaved;
    other: fields of the configuration that differ."""

    def change(function: Callable[[Tensor], Tensor], _: Tensor, __: dict[str, Tensor], place: FaultSite) -> Tensor:
        config, at_BT = replace(place.config, **other), place.positions
        at_3BT = positions(at_BT if at_BT.dim() == 3 else at_BT.expand(3, -1, -1), place.seen)
        angle_BTj, amplitude = angles_of(config, at_3BT, torch.float64)
        if blocks:
            time, height, width = (angles_of(config, at_BT, torch.float64)[0] for at_BT in at_3BT)
            first, second = config.mrope_section[0], sum(config.mrope_section[:2])
            angle_BTj = torch.cat((time[..., :first], height[..., first:second], width[..., second:]), -1)
        return function(angle_BTj) * amplitude

    return {"rope_cos": partial(change, torch.cos), "rope_sin": partial(change, torch.sin)}


# Rows turn by the angles of columns, and columns by those of rows.
turned_over = plain(lambda x: x.roll(x.shape[-1] // 2, -1))
# Name, what happens, tap, change. The tower makes wrong tables of positions; whatever else it reads wrongly is right.
TOWER = (
    ("images in the wrong order", "embeddings put in the place of another image's", "image_embeds", reversed_images(1)),
    ("pixels in another order than the grids", "", "vis_pixels", reversed_images(0)),
    ("only the first temporal slice of the patch kernel", "a Conv2d for the Conv3d", "vis_pixels", one_slice(0)),
    ("only the last temporal slice of the patch kernel", "", "vis_pixels", one_slice(-1)),
    ("image embeddings one token late", "placeholders counted from 1", "image_embeds", plain(lambda x: x.roll(1, 0))),
    ("frames of a patch in reverse", "", "vis_pixels", slices(lambda x: x.flip(2))),
    ("position table not interpolated", "its corner taken as it is", "vis_pos_embed", seeing(cropped)),
    ("position table by the nearest entry", "", "vis_pos_embed", seeing(nearest)),
    ("position table without aligned corners", "align_corners=False", "vis_pos_embed", seeing(unaligned)),
    ("position table row by row", "patches come in merge blocks", "vis_pos_embed", seeing(row_by_row)),
    ("position table ignored", "", "vis_pos_embed", plain(lambda x: x * 0)),
    ("rows and columns swapped in the tower's rotary embedding", "", "vis_rope_cos vis_rope_sin", turned_over),
    ("merge blocks read column by column", "", "vis_merger_norm", seeing(columns_first)),
    ("merge blocks gathered twice", "patches taken to come row by row", "vis_merger_norm", seeing(gathered_again)),
)
VISION_FAULTS = tuple(
    Fault(name, "vision", doc, "", dict.fromkeys(taps.split(), change), needs="images",
          late=not taps.startswith(("vis_pos", "vis_rope"))) for name, doc, taps, change in TOWER
)  # fmt: skip

POSITIONS_OF_IMAGES = (
    ("M-RoPE height and width dropped", "all axes have the position in time", "sglang 34446", turned(time_only)),
    ("M-RoPE height and width swapped", "", "", turned(axes_swapped)),
    ("M-RoPE sections in blocks", "frequencies of the axes side by side, not interleaved", "",
     turned(same, blocks=True)),
    ("image positions counted by tokens", "an image has one position a token", "", turned(counted)),
    ("positions after an image counted by tokens", "text goes on after as many positions as an image has tokens", "",
     turned(counted_after)),
    ("positions after an image one too low", "text goes on at the image's last position", "", turned(off_after(-1))),
    ("positions after an image one too high", "", "", turned(off_after(1))),
    ("frames of a video counted in time", "as in Qwen2.5-VL", "", turned(frames_counted)),
)  # fmt: skip
ROTARY_FAULTS = (
    *(Fault(name, "attn", doc, seen, change, needs="images") for name, doc, seen, change in POSITIONS_OF_IMAGES),
    Fault("rotary scaling ignored", "attn", "rope_type (YaRN, ...) of config.json not read", "omlx 3347, mlx-lm 1507",
          turned(same, rope_scaling=None), needs="scaled"),
)  # fmt: skip

# Tried where the angles themselves were dumped and are wrong.
ANGLES = (
    Fault("rotary theta 10000", "attn", "rope_theta ignored", "", turned(same, rope_scaling=None, rope_theta=10000.0)),
    Fault("no rotary at all", "attn", taps={"rope_cos": plain(torch.ones_like), "rope_sin": plain(torch.zeros_like)}),
)
