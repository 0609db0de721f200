"""Settings of the host process under which the model cannot compute: one clear error for each."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from ..errors import Qwen35Error
from .devices import usable


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
