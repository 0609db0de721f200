"""Chains of elementwise operations as one pass over memory: plain functions, which a graph of a GPU holds compiled.

Compiling takes seconds for each shape, so only `graphs.PrefillGraph`, which runs many times, uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...model import deltanet, norms
from . import grouped

# With fewer elements a launch costs more than the memory that is saved.
LARGE = 2**20

# Functions of tensors that may be compiled to the bits of plain torch: each operation rounds for itself and no product
# is fused with a sum. They hold nothing but products, sums of two and moves: how a compiler adds up a row, or computes
# exp, is its own affair. And no taps, which a compiled function would not call.
ONE_PASS: tuple[tuple[ModuleType, str], ...] = (
    (norms, "squares"),
    (norms, "normalised"),
    (deltanet, "chunk_operands"),
    (deltanet, "weighted_sum"),
    (grouped, "sum_of_slots"),
)


@contextmanager
def compiling() -> Iterator[None]:
    """Inside of the block, in all threads, the functions in ONE_PASS are compiled for large tensors on a GPU."""
    # Each shape is a compilation of its own; beyond the limit, calls would run uncompiled.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    plain = [(module, name, vars(module)[name]) for module, name in ONE_PASS]
    for module, name, function in plain:
        setattr(module, name, one_pass(function))
    try:
        yield
    finally:
        for module, name, function in plain:
            setattr(module, name, function)


@cache
def one_pass(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, compiled where its first tensor is large, on a GPU and no float64."""

    @cache
    def compiled() -> Callable[..., Any]:
        # The pattern matcher takes a value that is rounded and widened again for one that need not be rounded.
        options: dict[str, Any] = {"emulate_precision_casts": True, "pattern_matcher": False}
        return torch.compile(function, dynamic=False, options=options)

    @wraps(function)
    def run(x: Tensor, *rest: Any) -> Any:
        large = x.is_cuda and x.numel() >= LARGE and x.dtype != torch.float64
        return (compiled() if large else function)(x, *rest)

    return run
