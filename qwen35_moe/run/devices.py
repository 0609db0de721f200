"""Devices that tensors can be made on."""

from __future__ import annotations

import torch

from ..errors import Qwen35Error


def usable(device: str | torch.device, where: str) -> torch.device:
    """The device, if tensors can be made on it."""
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("nothing is computed there")
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # what torch raises without CUDA is an assertion
        raise Qwen35Error("no such device here", where=where, found=str(error).splitlines()[0]) from error
