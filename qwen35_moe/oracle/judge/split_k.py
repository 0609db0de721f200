"""Products as kernels compute them: split along the inner dimension, in any order, with rounded partial sums.

Workgroups that share an inner dimension (split-K), ranks and atomic additions store partial sums in the engine's dtype,
and add them in an unspecified order. Products of two activations, as in DeltaNet's chunks, round their operands to
that dtype. No tap shows these roundings, so the end of an arithmetic's name says them:

    sglang-bf16/split-4       each product in 4 parts, added in fp32
    sglang-bf16/split-4.7     the same, with the inner dimension in the seventh random order, and for odd numbers with
                              a running sum that is rounded after each part (an all-reduce in bf16)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...numerics.arithmetics import Arithmetic
from ...run.gpu.grouped import looped_linear

PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
_SPLIT = re.compile(r"/split-(\d+)(?:\.(\d+))?$")


class SplitK(TorchFunctionMode):
    """Linear layers, grouped ones too, become sums of `parts` products, each over a share of the inner dimension,
    and `@` rounds its operands. Products in float64 stay as they are.

    order      the inner dimension is permuted at random, by this seed (None: left as it is)
    running    the running sum is rounded too, after each part
    """

    def __init__(self, parts: int = 2, dtype: torch.dtype = torch.bfloat16, order: int | None = None,
                 running: bool = False):  # fmt: skip
        super().__init__()
        self.parts, self.dtype, self.order, self.running = parts, dtype, order, running

    def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if f in PRODUCTS and args[0].dtype == torch.float32:
            return f(*(x.to(self.dtype).to(torch.float32) for x in args))
        if f not in (F.linear, torch._grouped_mm, looped_linear) or args[0].dtype == torch.float64:
            return f(*args, **kwargs)
        x, grouped = args[0], f is torch._grouped_mm
        args, bias = (args[:2], [b for b in args[2:] if b is not None]) if f is F.linear else (args, [])

        def product(a: Tensor, b: Tensor) -> Tensor:
            if grouped:  # rows are whole 16 bytes there
                a, b = (F.pad(y, (0, -y.shape[-1] % 8)) for y in (a, b))
            return f(a, b.mT if grouped else b, *args[2:], **kwargs).to(self.dtype)

        parts = map(product, self._shares(x), self._shares(args[1].mT if grouped else args[1]))
        total = next(parts).to(torch.float32)
        for part in parts:
            total = total + part
            total = total.to(self.dtype).to(torch.float32) if self.running else total
        return sum(bias, total).to(x.dtype)  # a bias is added once

    def _shares(self, x: Tensor) -> Sequence[Tensor]:
        if self.order is not None:
            x = x.index_select(-1, _order(self.order, x.shape[-1], x.device))
        return x.chunk(self.parts, -1)


@cache
def _order(seed: int, size: int, device: torch.device) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).to(device)


def split_products(table: Arithmetic, parts: int, order: int | None = None) -> Arithmetic:
    """An arithmetic with all its products split."""
    seed = "" if order is None else f".{order}"
    return replace(table, name=f"{table.name}/split-{parts}{seed}", doc=f"{table.name}, products split in {parts}.")


def splitting(table: Arithmetic) -> AbstractContextManager[Any]:
    """A context in which products are formed as the end of an arithmetic's name says."""
    found = _SPLIT.search(table.name)
    if found is None:
        return nullcontext()
    order = None if found[2] is None else int(found[2])
    return SplitK(int(found[1]), table.dtype, order, order is not None and order % 2 == 1)


def samples(tables: Sequence[Arithmetic], count: int) -> list[Arithmetic]:
    """More legal arithmetics: the tables in turn, split in 2, 4 and 8 parts, each in another order. After 16 of these:
    8 ranks that add in bf16, whose errors are largest where partial sums cancel."""
    found = []
    for i in range(count):
        turn, table = divmod(i, len(tables))
        parts, order = ((2, 4, 8)[turn % 3], turn * (len(tables) + 1) + table) if i < 16 else (8, 2 * i + 1)
        found.append(split_products(tables[table], parts, order))
    return found
