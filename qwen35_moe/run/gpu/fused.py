"""Chains of elementwise operations as one pass over memory: plain functions, which a graph of a GPU holds compiled.

Compiling takes seconds for each shape, so that it is left to what runs again and again: `graphs.PrefillGraph`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

# With fewer elements a launch costs more than the memory that is saved.
LARGE = 2**20

_compiling: ContextVar[bool] = ContextVar("compiling", default=False)


@contextmanager
def compiling() -> Iterator[None]:
    """Inside of the block, functions marked `one_pass` are compiled for large tensors on a GPU."""
    # Each shape is a compilation of its own; beyond the limit, calls would run uncompiled.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    token = _compiling.set(True)
    try:
        yield
    finally:
        _compiling.reset(token)


def one_pass(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function of tensors that may be compiled, where its first one is large and no float64.

    The same bits as plain torch: each operation rounds for itself and no product is fused with a sum. For that a
    function must hold nothing but products, sums of two and moves: how a compiler adds up a row, or computes exp, is
    its own affair. And no taps, which it would not call.
    """

    @cache
    def compiled() -> Callable[..., Any]:
        # The pattern matcher takes a value that is rounded and widened again for one that need not be rounded.
        options: dict[str, Any] = {"emulate_precision_casts": True, "pattern_matcher": False}
        return torch.compile(function, dynamic=False, options=options)

    @wraps(function)
    def run(x: Tensor, *rest: Any) -> Any:
        large = _compiling.get() and x.is_cuda and x.numel() >= LARGE and x.dtype != torch.float64
        return (compiled() if large else function)(x, *rest)

    return run
