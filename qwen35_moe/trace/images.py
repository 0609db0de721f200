"""Images of a trace: what is kept of them, so that another arithmetic can look at them again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..model.config import Config
from ..run.prompt import Images, special_id
from .file import Trace

PIXELS = "vis_pixels"


def images_meta(config: Config, images: Images) -> dict[str, Any]:
    """What trace.json says of images: their grids, and the ids that they take the place of."""
    grids = {"image": images.image_grid_thw, "video": images.video_grid_thw}
    kinds = {kind: grid.tolist() for kind, grid in grids.items() if grid is not None}
    return {"grids": kinds, "placeholders": [special_id(config, kind) for kind in kinds]}


def images_of(trace: Trace) -> Images | None:
    """The images of a trace, from its pixels (those of images first); None for text."""
    known = trace.meta.get("images")
    if known is None:
        return None
    grids = {kind: torch.tensor(grid) for kind, grid in known["grids"].items()}
    parts = dict(
        zip(grids, trace[f"visual.{PIXELS}"].split([int(g.prod(1).sum()) for g in grids.values()]), strict=True)
    )
    return Images(parts.get("image"), grids.get("image"), parts.get("video"), grids.get("video"))


def stands_for_images(trace: Trace) -> Tensor:
    """[B, T] which of a trace's tokens are placeholders of images."""
    ids = trace.ids
    return torch.isin(ids, ids.new_tensor((trace.meta.get("images") or {}).get("placeholders", [])))
