"""The few operations that the whole model shares. Each one names its result."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..numerics import arithmetics as arithmetic
from ..numerics.taps import tap


def promote(x: Tensor) -> Tensor:
    """At least float32, never narrower: bf16 becomes fp32, float64 stays float64."""
    return cast(x, wider(x.dtype, torch.float32))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), or x itself if it has that dtype: parallel threads wait for each other at every call into torch."""
    return x if x.dtype is dtype else x.to(dtype)


def accumulation_dtype(name: str, *operands: Tensor) -> torch.dtype:
    """The dtype in which to compute a product whose result is tapped as `name`.

    Matrix products accumulate wide and round once. If the arithmetic rounds the result to the operands' own dtype, the
    library's product does that. If it keeps the result wider, or rounds it by a function, the operands are widened
    first. That changes no value.
    """
    dtype = operands[0].dtype
    for x in operands[1:]:
        dtype = wider(dtype, x.dtype)
    how = arithmetic.current().rounding(name)
    return wider(dtype, how if isinstance(how, torch.dtype) else torch.float32)


def wider(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The dtype that holds the values of both. Without a call into torch where they are one."""
    return a if a is b else torch.promote_types(a, b)


def linear(name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, tapped as `name`.  x [..., I], weight [O, I] -> [..., O]."""
    dtype = accumulation_dtype(name, x, weight)
    return tap(name, F.linear(cast(x, dtype), cast(weight, dtype), None if bias is None else cast(bias, dtype)))


def matmul(name: str, a: Tensor, b: Tensor) -> Tensor:
    """a b, tapped as `name`."""
    dtype = accumulation_dtype(name, a, b)
    return tap(name, cast(a, dtype) @ cast(b, dtype))


def add(name: str, a: Tensor, b: Tensor) -> Tensor:
    """a + b, tapped as `name`. Like a product, the sum rounds once, to the dtype of its tap."""
    return tap(name, one_wide(name, a, b) + b)


def multiply(name: str, a: Tensor, b: Tensor) -> Tensor:
    """a * b, element by element, tapped as `name`."""
    return tap(name, one_wide(name, a, b) * b)


def apply(name: str, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), element by element, tapped as `name`. The library computes bf16 in fp32 and rounds once."""
    return tap(name, function(cast(x, accumulation_dtype(name, x))))


def one_wide(name: str, a: Tensor, b: Tensor) -> Tensor:
    """`a`, widened if neither operand has the dtype to compute in. It is enough that one of them has it."""
    dtype = accumulation_dtype(name, a, b)
    return a if dtype in (a.dtype, b.dtype) else a.to(dtype)


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x), in at least float32."""
    return F.silu(promote(x))


class Linear(nn.Module):
    """Holds a weight [O, I] under its checkpoint name. No projection of the text model has a bias."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs), requires_grad=False)
        self.quantised = False  # engines quantise its input as well

    def forward(self, name: str, x: Tensor) -> Tensor:
        return linear(name, x, self.weight)


def as_read_by(name: str, x: Tensor, *linears: Linear) -> list[Tensor]:
    """The input of each projection: a quantised one reads `x` after the tap `name`, the others read `x` itself."""
    if not any(linear.quantised for linear in linears):
        return [x] * len(linears)
    quantised = tap(name, x)
    return [quantised if linear.quantised else x for linear in linears]
