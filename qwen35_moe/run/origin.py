"""Where the weights of a loaded model come from: a record beside the model. The model itself knows nothing of files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..checkpoint import Checkpoint
from ..errors import Qwen35Error
from ..model.text import Model
from .source import WeightSource


@dataclass(frozen=True)
class Origin:
    """source: the weights by name. identity: what tells the checkpoint from another (`Checkpoint.identity`). left_out:
    part ("mtp", "visual") -> number of its tensors, where `load` was told to leave it unread.

    As a forward pre-hook it checks the files before each call of the model.
    """

    source: WeightSource
    identity: dict[str, Any]
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Checkpoint:
        return self.source.checkpoint

    @property
    def conversion(self) -> dict[str, float]:
        """MoE block -> |converted - stored| / |stored| of a shared expert that was converted to MXFP4."""
        return self.source.conversion

    def __call__(self, model: nn.Module, arguments: Any) -> None:
        """Error: a file of the checkpoint was written to since it was opened."""
        self.checkpoint.reader.check()


def set_origin(model: Model, origin: Origin) -> None:
    """Keeps the record as a forward pre-hook, so that copies of the model have it as well."""
    model.register_forward_pre_hook(origin)


def origin_of(model: Model) -> Origin:
    """The record that `load` made. Error: the model was not loaded from a checkpoint."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, Origin):
            return hook
    raise Qwen35Error("the model was not loaded from a checkpoint", expected="a model that `load` returned")


def was_left_out(model: Model, part: str) -> bool:
    """Whether the checkpoint holds this part, but `load` was told to leave it unread."""
    hooks = model._forward_pre_hooks.values()
    return any(isinstance(hook, Origin) and part in hook.left_out for hook in hooks)


def identity_of(model: Model) -> dict[str, Any] | None:
    """What tells its checkpoint from another; None for a model that was not loaded from one."""
    hooks = model._forward_pre_hooks.values()
    return next((hook.identity for hook in hooks if isinstance(hook, Origin)), None)
