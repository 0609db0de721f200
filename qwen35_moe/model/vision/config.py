"""The vision tower's configuration: the fields of `vision_config` by their own names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from math import isqrt
from typing import Any

from ...errors import Qwen35Error
from ..config import HARMLESS, INERT_KEYS

ROPE_THETA = 10_000.0


@dataclass(frozen=True)
class VisionConfig:
    """The `vision_config` of a checkpoint. Fields carry the names of config.json; defaults are those of Qwen3.5."""

    out_hidden_size: int
    depth: int = 27
    hidden_size: int = 1152
    num_heads: int = 16
    intermediate_size: int = 4304
    hidden_act: str = "gelu_pytorch_tanh"
    in_channels: int = 3
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], text_hidden_size: int) -> VisionConfig:
        """Reads a `vision_config`; its `out_hidden_size` must be, and is by default, the width of the text model."""
        known = {f.name for f in fields(cls)}
        only = {"rope_type": "axial", "rope_theta": ROPE_THETA}  # transformers 5 writes it
        if (rope := raw.get("rope_parameters") or only) != only:
            where, do = "config.json: vision_config.rope_parameters", "no checkpoint of the family has another value"
            raise Qwen35Error("bad value", where=where, expected=only, found=rope, do=do)
        for key in (
            k for k in raw.keys() - known - INERT_KEYS - {"rope_parameters"} if not k.startswith(("_", *HARMLESS))
        ):
            near = get_close_matches(key, known, n=1, cutoff=0.75)
            do = f"did you mean {near[0]!r}?" if near else "a field that changes the tower must be understood first"
            raise Qwen35Error("unknown key", where="config.json: vision_config", found=f"{key} = {raw[key]!r}", do=do)
        values: dict[str, Any] = {"out_hidden_size": text_hidden_size} | {key: raw[key] for key in known & raw.keys()}
        values["deepstack_visual_indexes"] = tuple(values.get("deepstack_visual_indexes") or ())
        config = cls(**values)
        config._need(
            "out_hidden_size", config.out_hidden_size == text_hidden_size, f"the text model's {text_hidden_size}"
        )
        return config

    def __post_init__(self) -> None:
        for field in fields(self):
            value = vars(self)[field.name]
            self._need(field.name, field.type != "int" or (type(value) is int and value > 0), "a positive integer")
        heads, square = 4 * self.num_heads, self.side**2 == self.num_position_embeddings
        self._need("hidden_size", self.hidden_size % heads == 0, f"a multiple of {heads}: heads of width 4, 8, ...")
        self._need("num_position_embeddings", square, "a square: the table is a square grid")
        self._need("hidden_act", self.hidden_act == "gelu_pytorch_tanh", "gelu_pytorch_tanh")
        self._need(
            "deepstack_visual_indexes", not self.deepstack_visual_indexes, "empty (Qwen3-VL has them, Qwen3.5 not)"
        )

    def _need(self, key: str, ok: bool, expected: str) -> None:
        if not ok:
            where, found = f"config.json: vision_config.{key}", repr(vars(self)[key])
            raise Qwen35Error("bad value", where=where, expected=expected, found=found)

    @property
    def side(self) -> int:
        """Rows (and columns) of the position table."""
        return isqrt(self.num_position_embeddings)

    @property
    def patch_values(self) -> int:
        """Numbers in a row of `pixel_values`: channels x frames x rows x columns of a patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2
