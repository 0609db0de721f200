"""Split-K: what kernels do to a matrix product whose inner dimension several workgroups share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..arithmetic import Arithmetic

SPLIT_K = "/split-k"  # ends the name of an arithmetic whose products are split in two


class SplitK(TorchFunctionMode):
    """Linear layers as the sum of `parts` products over a share of the inner dimension each, rounded to bf16.

    No tap sees these partial sums, so that no table of roundings can say this. Products in float64 are left alone.
    """

    def __init__(self, parts: int = 2):
        super().__init__()
        self.parts = parts

    def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if f is not torch.nn.functional.linear or args[0].dtype == torch.float64:
            return f(*args, **(kwargs or {}))
        x, weight = args[0], args[1]
        shares = zip(x.chunk(self.parts, -1), weight.chunk(self.parts, -1), strict=True)
        total = torch.stack([f(a, b).to(torch.bfloat16) for a, b in shares]).sum(0, dtype=torch.float32)
        return total.to(x.dtype)


def splitting(table: Arithmetic) -> AbstractContextManager[Any]:
    """The mode in which an arithmetic's products are formed."""
    return SplitK() if table.name.endswith(SPLIT_K) else nullcontext()
