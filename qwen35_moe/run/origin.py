"""Where the weights of a loaded model come from: one record beside the model, which itself knows nothing of files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from ..checkpoint import Checkpoint
from ..errors import Qwen35Error
from ..model.text import Model
from .source import Source


@dataclass(frozen=True)
class Origin:
    """source: the weights by name. identity: what tells the checkpoint from another (`Checkpoint.identity`). left_out:
    part ("mtp", "visual") -> number of its tensors, where `load` was told to leave it unread."""

    source: Source
    identity: dict[str, Any]
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Checkpoint:
        return self.source.checkpoint

    @property
    def conversion(self) -> dict[str, float]:
        """MoE block -> |converted - stored| / |stored| of a shared expert that was converted to MXFP4."""
        return self.source.conversion


_origins: WeakKeyDictionary[Model, Origin] = WeakKeyDictionary()


def set_origin(model: Model, origin: Origin) -> None:
    """Keeps the record as long as the model lives. Each call of the model first checks that no file was written to."""
    _origins[model] = origin
    check = origin.checkpoint.reader.check
    model.register_forward_pre_hook(lambda *_: check())


def origin_of(model: Model) -> Origin:
    """The record that `load` made. Error: the model was not loaded from a checkpoint."""
    if model not in _origins:
        raise Qwen35Error("the model was not loaded from a checkpoint", expected="a model that `load` returned")
    return _origins[model]


def was_left_out(model: Model, part: str) -> bool:
    """Whether the checkpoint holds this part, but `load` was told to leave it unread."""
    return model in _origins and part in _origins[model].left_out
