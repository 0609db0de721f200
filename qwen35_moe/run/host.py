"""Settings of the host process under which the model cannot compute: one clear error for each."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from ..errors import Qwen35Error


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
    """Error if tensors are made on the meta device by default: they would have no values."""
    if torch.get_default_device().type == "meta":
        do = "torch.set_default_device(None), and give load(device=...)"
        raise Qwen35Error("torch's default device has no values", where="torch.get_default_device()",
                          expected="cpu or a GPU", found="meta", do=do)  # fmt: skip
