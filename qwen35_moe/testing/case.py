"""A case: the inputs of one operation, its float64 truth, what legal roundings make of it, and its known faults.

The truth and the legal results are computed on the CPU, from a copy of the inputs that no kernel sees. So a kernel that
writes into its inputs does not change its truth, and its outputs never enter its own envelope.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..model.config import Config
from ..numerics.arithmetics import Arithmetic, get, using
from ..numerics.taps import Handler, attach, scope
from ..oracle.diagnose.catalogue import FAULTS
from ..oracle.diagnose.faults import Fault, FaultSite
from ..oracle.diagnose.vision_faults import ANGLES
from ..oracle.judge.envelope import legal
from ..oracle.judge.split_k import splitting
from .drawn import config_of

Inputs = dict[str, Tensor]
Outputs = dict[str, Tensor]
Compute = Callable[[Inputs], Outputs]
Make = Callable[[], Inputs]

# Gigabytes at real sizes: widened expert by expert, when they are hit.
KEPT = ("w13", "w2")


@dataclass(frozen=True)
class Wrong:
    """How a kernel is wrong: `compute(right, inputs)` is what it does for `right(inputs)`, under the arithmetic
    `function` (that of the truth if it is ""), with a fault of the oracle's catalogue."""

    compute: Callable[[Compute, Inputs], Outputs] = lambda right, i: right(i)
    function: str = ""
    fault: Fault | None = None


def on(change: Callable[[Tensor], Tensor], *names: str) -> Wrong:
    """It takes some of its inputs, those that are there, for others."""
    return Wrong(lambda right, i: right(i | {name: change(i[name]) for name in names if name in i}))


def by(compute: Compute) -> Wrong:
    """It computes another formula."""
    return Wrong(lambda _, i: compute(i))


def out(name: str, change: Callable[[Tensor, Inputs], Tensor]) -> Wrong:
    """It returns another value for one output."""

    def compute(right: Compute, i: Inputs) -> Outputs:
        found = right(i)
        return found | {name: change(found[name], i)}

    return Wrong(compute)


def known(*names: str) -> dict[str, Wrong]:
    """Faults of the oracle's catalogue, by name. The computation of the case has the taps that they change."""
    return {fault.name: Wrong(fault=fault) for fault in (*FAULTS, *ANGLES) if fault.name in names}


@dataclass(frozen=True, eq=False, repr=False)
class Case:
    """`case["x"]` is a copy of an input, `case.to("cuda")` has all of them on a device; `outputs` are what a kernel
    returns, in this order.

    function   the arithmetic of the truth: `exact`, or `exact+a4` where activations are quantised
    wrong      the known faults by name, for `broken`
    rowwise    the inputs whose first dimension is the outputs' (tokens that do not see each other); () if they do
    """

    name: str
    outputs: tuple[str, ...]
    make: Make
    compute: Compute
    wrong: Mapping[str, Wrong] = field(default_factory=dict)
    rowwise: tuple[str, ...] = ()
    function: str = "exact"
    config: Config = field(default_factory=lambda: config_of("tiny"))

    @property
    def __name__(self) -> str:  # what pytest calls it by
        return self.name

    def __repr__(self) -> str:
        return f"<case {self.name}>"

    @property
    def top_k(self) -> int:
        return self.config.num_experts_per_tok

    @cached_property
    def _inputs(self) -> Inputs:
        return {name: x.detach().to("cpu", copy=True) for name, x in self.make().items()}

    @cached_property
    def truth(self) -> Outputs:
        """The outputs in float64, whatever dtype the inputs have."""
        return self.run(get(self.function))

    @cached_property
    def members(self) -> list[Outputs]:
        """The outputs under each arithmetic that is legal for inputs of these dtypes: those of bf16, or those of
        float32 if no input is narrower."""
        narrow = any(x.is_floating_point() and x.element_size() == 2 for x in self._inputs.values())
        packed = any(x.element_size() == 1 for x in self._inputs.values())
        return [self.run(table) for table in legal(self.function, None if narrow or packed else "float32")]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._inputs:
            raise Qwen35Error("no such input", where=self.name, expected=", ".join(self._inputs), found=name)
        return self._inputs[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._inputs)

    def to(self, device: str | torch.device) -> Inputs:
        """All inputs on a device."""
        return {name: x.to(device, copy=True) for name, x in self._inputs.items()}

    def run(self, table: Arithmetic, *handlers: Handler, compute: Compute | None = None) -> Outputs:
        """The outputs under an arithmetic, with handlers attached. The inputs are float64 for an exact arithmetic,
        at most float32 for others. Packed inputs and experts are widened when they are used."""
        exact = table.dtype == torch.float64
        inputs = dict(self._inputs)
        for name, x in inputs.items():
            if exact and x.is_floating_point() and x.element_size() > 1 and name not in KEPT:
                inputs[name] = x.to(torch.float64)
            elif not exact and x.dtype == torch.float64:
                inputs[name] = x.to(torch.float32)
        with ExitStack() as stack:
            for context in (torch.inference_mode(), using(table), splitting(table), scope(layer=0), attach(*handlers)):
                stack.enter_context(context)
            return (compute or self.compute)(inputs)

    def part(self, rows: Tensor) -> Case:
        """The case of some of its tokens only."""
        some = {name: x[rows] if name in self.rowwise else x for name, x in self._inputs.items()}
        return replace(self, make=lambda: some)

    def broken(self, name: str) -> Outputs:
        """What a kernel with a known fault returns in float64."""
        wrong, handlers = self.wrong[name], list[Handler]()
        table = get(wrong.function or self.function)
        if wrong.fault is not None:
            table = wrong.fault.arithmetic(table)
            positions = self._inputs.get("position_ids", torch.zeros(1, 1, dtype=torch.long))
            handlers = wrong.fault.handlers(FaultSite(self.config, positions))
        return self.run(table, *handlers, compute=lambda i: wrong.compute(self.compute, i))
