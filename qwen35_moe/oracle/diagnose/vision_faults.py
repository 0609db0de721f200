"""Images as engines get them wrong: order, position table, patches that are merged, slices in time."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import torch
from torch import Tensor

from ...model.vision.position_table import interpolate, patch_places
from .faults import Fault, FaultSite, TapChange
from .seen import Seen


def seeing(change: Callable[[Tensor, Seen], Tensor]) -> TapChange:
    """A change that needs what the tower was given; without images nothing is changed."""
    return lambda x, _, place: x if place.seen is None else change(x, place.seen)


def reversed_images(block: int) -> TapChange:
    """Rows of images, and of videos, last one first. block: patches that a row stands for, in units of m x m."""

    def change(x: Tensor, seen: Seen) -> Tensor:
        size = seen.config.spatial_merge_size**2 if block else 1
        kinds = [[t * h * w // size for t, h, w in grids] for grids in (seen.images, seen.videos)]
        parts = list(x.split([n for counts in kinds for n in counts]))
        first = len(kinds[0])
        return torch.cat((*parts[:first][::-1], *parts[first:][::-1]))

    return seeing(change)


def cropped(_: Tensor, seen: Seen) -> Tensor:
    """The table's corner, as large as the image; patches beyond it have its edge."""
    row, column, _, _ = patch_places(seen.grids, seen.config.spatial_merge_size)
    side = isqrt(len(seen.table))
    return seen.table[row.clamp(max=side - 1) * side + column.clamp(max=side - 1)]


def nearest(_: Tensor, seen: Seen) -> Tensor:
    row, column, rows, columns = patch_places(seen.grids, seen.config.spatial_merge_size)
    side = isqrt(len(seen.table))
    y, x = ((i * (side - 1) / (n - 1).clamp(min=1)).round().long() for i, n in ((row, rows), (column, columns)))
    return seen.table[y * side + x]


def unaligned(_: Tensor, seen: Seen) -> Tensor:
    """Bilinear, with the table's pixels as areas: patch i of n stands at (i + 1/2) s / n - 1/2."""
    m, side = seen.config.spatial_merge_size, isqrt(len(seen.table))
    table_1Dss = seen.table.T.reshape(1, -1, side, side)
    found = []
    for t, h, w in seen.grids:
        frame = torch.nn.functional.interpolate(table_1Dss, (h, w), mode="bilinear", align_corners=False)[0]
        row, column, _, _ = patch_places([(t, h, w)], m)
        found.append(frame[:, row, column].T)
    return torch.cat(found)


def row_by_row(_: Tensor, seen: Seen) -> Tensor:
    """Positions of patches that come row by row, and not block by block."""
    return interpolate(seen.table, *patch_places(seen.grids, 1))


def columns_first(x_LD: Tensor, seen: Seen) -> Tensor:
    """The patches of a merge block column by column."""
    m = seen.config.spatial_merge_size
    return x_LD.unflatten(0, (-1, m, m)).transpose(1, 2).flatten(0, 2)


def gathered_again(x_LD: Tensor, seen: Seen) -> Tensor:
    """Blocks gathered from patches that were taken to come row by row."""
    m, found, start = seen.config.spatial_merge_size, [], 0
    for t, h, w in seen.grids:
        frames = x_LD[start : start + t * h * w].unflatten(0, (t, h // m, m, w // m, m))
        found.append(frames.transpose(2, 3).flatten(0, 4))
        start += t * h * w
    return torch.cat(found)


def slices(change: Callable[[Tensor], Tensor]) -> TapChange:
    """A change of the frames that one patch holds, [L, channels, frames, values]."""

    def flat(x: Tensor, seen: Seen) -> Tensor:
        c = seen.config
        return change(x.unflatten(-1, (c.in_channels, c.temporal_patch_size, -1))).flatten(1)

    return seeing(flat)


def one_slice(which: int) -> Callable[[Tensor], Tensor]:
    """One of the frames that a patch holds; zeros in the place of the others."""

    def change(x_LCfv: Tensor) -> Tensor:
        keep_f1 = (torch.arange(x_LCfv.shape[2]) == which % x_LCfv.shape[2])[:, None]
        return x_LCfv * keep_f1.to(x_LCfv)

    return change


def turned_over(x: Tensor, _: dict[str, Tensor], __: FaultSite) -> Tensor:
    """Cosines or sines of rows where those of columns should be, and the other way round."""
    return x.roll(x.shape[-1] // 2, -1)


VISION_FAULTS = (
    Fault("images in the wrong order", "vision", "embeddings put in the place of another image's", "",
          {"image_embeds": reversed_images(block=1)}, late=True, needs="images"),
    Fault("pixels in another order than the grids", "vision", "", "", {"vis_pixels": reversed_images(block=0)},
          late=True, needs="images"),
    Fault("only the first temporal slice of the patch kernel", "vision", "a Conv2d for the Conv3d", "",
          {"vis_pixels": slices(one_slice(0))}, late=True, needs="images"),
    Fault("only the last temporal slice of the patch kernel", "vision", "", "", {"vis_pixels": slices(one_slice(-1))},
          late=True, needs="images"),
    Fault("image embeddings one token late", "vision", "placeholders counted from 1", "",
          {"image_embeds": lambda x, _, __: x.roll(1, 0)}, late=True, needs="images"),
    Fault("frames of a patch in reverse", "vision", "", "", {"vis_pixels": slices(lambda x: x.flip(2))}, late=True,
          needs="images"),
    Fault("position table not interpolated", "vision", "its corner taken as it is", "",
          {"vis_pos_embed": seeing(cropped)}, needs="images"),
    Fault("position table by the nearest entry", "vision", "", "", {"vis_pos_embed": seeing(nearest)}, needs="images"),
    Fault("position table without aligned corners", "vision", "align_corners=False", "",
          {"vis_pos_embed": seeing(unaligned)}, needs="images"),
    Fault("position table row by row", "vision", "patches come in merge blocks", "",
          {"vis_pos_embed": seeing(row_by_row)}, needs="images"),
    Fault("position table ignored", "vision", "", "", {"vis_pos_embed": lambda x, _, __: x * 0}, needs="images"),
    Fault("rows and columns swapped in the tower's rotary embedding", "vision", "", "",
          {"vis_rope_cos": turned_over, "vis_rope_sin": turned_over}, needs="images"),
    Fault("merge blocks read column by column", "vision", "", "", {"vis_merger_norm": seeing(columns_first)},
          late=True, needs="images"),
    Fault("merge blocks gathered twice", "vision", "patches taken to come row by row", "",
          {"vis_merger_norm": seeing(gathered_again)}, late=True, needs="images"),
)  # fmt: skip
