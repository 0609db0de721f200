"""What `load` keeps beside a model, as forward pre-hooks: where its weights come from, and checks of the host process.
The model itself knows nothing of files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
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


def _origins(model: Model) -> Iterator[Origin]:
    return (hook for hook in model._forward_pre_hooks.values() if isinstance(hook, Origin))


def origin_of(model: Model) -> Origin:
    """The record that `load` made, which copies of the model have as well. Error: the model was not loaded."""
    for origin in _origins(model):
        return origin
    raise Qwen35Error("the model was not loaded from a checkpoint", expected="a model that `load` returned")


def was_left_out(model: Model, part: str) -> bool:
    """Whether the checkpoint holds this part, but `load` was told to leave it unread."""
    return any(part in origin.left_out for origin in _origins(model))


def identity_of(model: Model) -> dict[str, Any] | None:
    """What tells its checkpoint from another; None for a model that was not loaded from one."""
    return next((origin.identity for origin in _origins(model)), None)


class HostCheck:
    """A forward pre-hook. Error: the default device is not the model's; the process was forked from one that computes
    on several threads, whose locks a child inherits without the threads that would release them."""

    def __init__(self) -> None:
        self.process = os.getpid()

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        check_default_device()
        if os.getpid() != self.process and torch.get_num_threads() > 1:
            do = "start processes by spawn, load in the child, or call torch.set_num_threads(1) in it"
            raise Qwen35Error("the model was loaded before this process was forked", where="model(...)", do=do)


def check_default_device() -> None:
    """Error if no tensors with values can be made on torch's default device: on meta, or on a GPU that is not there."""
    where = "torch.get_default_device()"
    try:
        usable(torch.get_default_device(), where)
    except Qwen35Error as error:
        what, do = "torch's default device is of no use", "torch.set_default_device(None), and give load(device=...)"
        expected = "cpu or a GPU that is here"
        raise Qwen35Error(what, where=where, expected=expected, found=error.found, do=do) from error


def usable(device: str | torch.device, where: str) -> torch.device:
    """The device, if tensors can be made on it."""
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("nothing is computed there")
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # what torch raises without CUDA is an assertion
        raise Qwen35Error("no such device here", where=where, found=str(error).splitlines()[0]) from error
