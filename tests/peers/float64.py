"""transformers in float64 without any float32 inside, and the proof that there is none.

Its code says `.float()`, `.to(torch.float32)`, `softmax(..., dtype=torch.float32)`: in a bfloat16 model these promote,
in a float64 model they narrow. `Widen` reads float32 as float64 wherever it is asked for by name; `NoNarrowFloat`
then looks at every tensor that any operation returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NARROW = (torch.float32, torch.bfloat16, torch.float16)


class Widen(TorchFunctionMode):
    """Every request for float32, as a method (`x.float()`) or as an argument (`dtype=`), becomes one for float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args, kwargs = tree_map(lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {}))
        return func(*args, **kwargs)


class NoNarrowFloat(TorchDispatchMode):
    """Raises as soon as an operation returns a non-empty floating tensor narrower than float64. Counts what it saw."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.numel():
                self.seen += x.dtype is torch.float64
                if x.dtype in NARROW:
                    raise AssertionError(f"{func} returned {x.dtype} {list(x.shape)}")
        return out


def recompute_frequencies(model: nn.Module) -> None:
    """Build each rotary module anew, so that inv_freq is computed in float64 and not in float32 and cast."""
    for module in model.modules():
        if hasattr(module, "original_inv_freq"):
            fresh = type(module)(module.config)
            module.inv_freq, module.original_inv_freq = fresh.inv_freq, fresh.original_inv_freq


@contextmanager
def float64_clean(model: nn.Module, *, prove: bool = True) -> Iterator[NoNarrowFloat]:
    """Inside, `model` (loaded in float64) computes in float64 alone. `prove=False`: without looking at each result."""
    narrow = [name for name, p in model.named_parameters() if p.dtype is not torch.float64]
    if narrow:
        raise AssertionError(f"load the model in float64 first; these parameters are not: {narrow[:5]}")
    default, watch = torch.get_default_dtype(), NoNarrowFloat()
    torch.set_default_dtype(torch.float64)
    try:
        with Widen():
            recompute_frequencies(model)
            if prove:
                with watch:
                    yield watch
            else:
                yield watch
    finally:
        torch.set_default_dtype(default)
