"""What the vision tower was given, for faults that need it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...model.vision.config import VisionConfig
from ...model.vision.position_table import Grid
from ...model.vision.positions import check_grids
from ...run.prompt import Images


@dataclass(frozen=True)
class Seen:
    """What the vision tower was given. table [s * s, D]: its positions; types [B, T]: which tokens are placeholders.

    images and videos: grids (t, h, w) in patches. m x m patches become one token.
    """

    images: list[Grid]
    videos: list[Grid]
    types: Tensor
    table: Tensor
    config: VisionConfig

    @classmethod
    def of(cls, images: Images, types: Tensor, table: Tensor, config: VisionConfig) -> Seen:
        some = [[] if g is None else check_grids(g, config.spatial_merge_size, "image")
                for g in (images.image_grid_thw, images.video_grid_thw)]  # fmt: skip
        return cls(some[0], some[1], types, table, config)

    @property
    def grids(self) -> list[Grid]:
        return [*self.images, *self.videos]
