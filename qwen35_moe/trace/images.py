"""Images of a trace: what is kept of them, so that another arithmetic can look at them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..model.config import Config
from ..model.vision.positions import rope_positions
from ..run.files import tensors_sha256
from ..run.prompt import Images, placeholders, special_id, vision_of
from ..untrusted import tensor_file
from .file import Trace

PIXELS = "vis_pixels"


def images_meta(config: Config, images: Images) -> dict[str, Any]:
    """What trace.json says of images: their grids, and the ids that they take the place of."""
    grids = {"image": images.image_grid_thw, "video": images.video_grid_thw}
    kinds = {kind: grid.tolist() for kind, grid in grids.items() if grid is not None}
    digest = tensors_sha256(images.given())
    return {"grids": kinds, "placeholders": [special_id(config, kind) for kind in kinds], "sha256": digest}


def read_images(path: str | Path) -> Images:
    """A safetensors file with pixel_values and image_grid_thw, pixel_values_videos and video_grid_thw, or all four."""
    names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    with tensor_file(path) as file:
        found = {name: file.get_tensor(name) for name in file.keys() if name in names}  # noqa: SIM118
    pairs = [(names[i] in found, names[i + 1] in found) for i in (0, 2)]
    if any(a != b for a, b in pairs) or not found:
        expected = f"{names[0]} and {names[1]}, or {names[2]} and {names[3]}"
        raise Qwen35Error("pixels and grids are not both there", where=path, expected=expected, found=sorted(found))
    return Images(*(found.get(name) for name in names))


def axes_of(config: Config, ids_BT: Tensor, mask: Tensor | None, images: Images) -> Tensor:
    """[3, B, T] the positions of a prompt with images."""
    types_BT, merged = placeholders(config, ids_BT), vision_of(config).spatial_merge_size
    return rope_positions(types_BT, images.image_grid_thw, images.video_grid_thw, mask, merged)


def axes_in(trace: Trace) -> Tensor | None:
    """[3, B, T] positions in time, height and width, where the prompt has images; else None."""
    if not trace.steps or "axes" not in trace.steps[0]:
        return None
    one = [step["axes"] if "axes" in step else [step["positions"]] * 3 for step in trace.steps]
    return torch.cat([torch.tensor(axes, dtype=torch.int64) for axes in one], dim=2)


def images_of(trace: Trace) -> Images | None:
    """The images of a trace, from its pixels (those of images first); None for text."""
    known = trace.meta.get("images")
    if known is None:
        return None
    grids = {kind: torch.tensor(grid) for kind, grid in known["grids"].items()}
    pixels, sizes = trace.get(f"visual.{PIXELS}"), [int(g.prod(1).sum()) for g in grids.values()]
    if pixels is None or len(pixels) != sum(sizes):
        raise Qwen35Error("the trace has lost its images", where=trace.path or "memory", do="write the trace again")
    parts = dict(zip(grids, pixels.split(sizes), strict=True))
    return Images(parts.get("image"), grids.get("image"), parts.get("video"), grids.get("video"))


def stands_for_images(trace: Trace) -> Tensor:
    """[B, T] which of a trace's tokens are placeholders of images."""
    ids = trace.ids
    return torch.isin(ids, ids.new_tensor((trace.meta.get("images") or {}).get("placeholders", [])))
