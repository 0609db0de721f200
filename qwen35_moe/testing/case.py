"""A case: the inputs of one operation, its float64 truth, what legal roundings make of it, and its known faults.

The truth and the legal results are computed on the CPU, from a copy of the inputs that no kernel sees. So a kernel that
writes into its inputs does not change its truth, and its outputs never enter its own envelope.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from ..oracle.judge.envelope import legal
from ..oracle.judge.split_k import splitting
from .drawn import config_of

Inputs = dict[str, Tensor]
Outputs = dict[str, Tensor]
Compute = Callable[[Inputs], Outputs]
Make = Callable[[], Inputs]


@dataclass(frozen=True)
class WrongKernel:
    """A fault that a kernel may have: other inputs, another formula, another quantiser, or a fault of the catalogue."""

    name: str
    inputs: Callable[[Inputs], Inputs] | None = None
    compute: Compute | None = None
    outputs: Callable[[Outputs, Inputs], Outputs] | None = None
    function: str = ""
    fault: Fault | None = None


def known_faults(*names: str) -> tuple[WrongKernel, ...]:
    """Faults of the oracle's catalogue, by name."""
    found = {fault.name: fault for fault in FAULTS}
    return tuple(WrongKernel(name, fault=found[name]) for name in names)


def on(change: Callable[[Tensor], Tensor], *names: str) -> Callable[[Inputs], Inputs]:
    """A change of some of the inputs, of those that are there."""
    return lambda i: i | {name: change(i[name]) for name in names if name in i}


@dataclass(frozen=True, eq=False)
class Case:
    """`case["x"]` is a copy of an input, `case.to("cuda")` has all of them on a device; `outputs` are what a kernel
    returns, in this order.

    function   the arithmetic of the truth: `exact`, or `exact+a4` where activations are quantised
    rowwise    the inputs whose first dimension is the outputs' (tokens that do not see each other); () if they do
    matrices   outputs that are judged by matrices (a state per head), not by their last dimension
    """

    name: str
    outputs: tuple[str, ...]
    make: Make = field(repr=False)
    compute: Compute = field(repr=False)
    function: str = "exact"
    wrong: tuple[WrongKernel, ...] = field(default=(), repr=False)
    rowwise: tuple[str, ...] = ()
    matrices: tuple[str, ...] = ("gdn_state",)
    config: Config = field(default_factory=lambda: config_of("tiny"), repr=False)
    top_k: int = 0

    @property
    def __name__(self) -> str:  # what pytest calls it by
        return self.name

    @cached_property
    def _inputs(self) -> Inputs:
        return {name: x.detach().to("cpu", copy=True) for name, x in self.make().items()}

    @cached_property
    def truth(self) -> Outputs:
        """The outputs in float64, whatever dtype the inputs have."""
        return self.exact()

    def exact(self, *handlers: Handler) -> Outputs:
        """The truth again, with handlers attached."""
        return self.run(get(self.function), widened(self._inputs), handlers=handlers)

    @cached_property
    def members(self) -> list[Outputs]:
        """The outputs under each arithmetic that is legal for inputs of these dtypes."""
        return [self.run(table, narrowed(self._inputs)) for table in self.legal()]

    def legal(self) -> tuple[Arithmetic, ...]:
        """The arithmetics that an engine may have: those of bf16, or those of float32 if no input is narrower."""
        narrow = any(x.dtype in (torch.bfloat16, torch.float16) for x in self._inputs.values())
        packed = any(x.element_size() == 1 for x in self._inputs.values())
        return legal(self.function, None if narrow or packed else "float32")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._inputs:
            raise Qwen35Error("no such input", where=self.name, expected=", ".join(self._inputs), found=name)
        return self._inputs[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._inputs)

    def to(self, device: str | torch.device) -> Inputs:
        """All inputs on a device."""
        return {name: x.to(device, copy=True) for name, x in self._inputs.items()}

    def run(
        self, table: Arithmetic, inputs: Inputs, compute: Compute | None = None, handlers: Sequence[Handler] = ()
    ) -> Outputs:
        """The outputs of `compute` under an arithmetic, with handlers attached."""
        with ExitStack() as stack:
            for context in (torch.inference_mode(), using(table), splitting(table), scope(layer=0), attach(*handlers)):
                stack.enter_context(context)
            return (compute or self.compute)(inputs)

    def part(self, rows: Tensor) -> Case:
        """The case of some of its tokens only."""
        some = {name: x[rows] if name in self.rowwise else x for name, x in self._inputs.items()}
        return replace(self, make=lambda: some)

    def broken(self, wrong: WrongKernel) -> Outputs:
        """What a kernel with this fault returns in float64."""
        inputs, table, handlers = dict(self._inputs), get(wrong.function or self.function), []
        if wrong.fault is not None:
            table = wrong.fault.arithmetic(table)
            handlers = wrong.fault.handlers(FaultSite(self.config, self.positions))
        inputs = wrong.inputs(inputs) if wrong.inputs else inputs
        found = self.run(table, widened(inputs), wrong.compute, handlers)
        return wrong.outputs(found, widened(inputs)) if wrong.outputs else found

    @property
    def positions(self) -> Tensor:
        """[B, T] the positions on the time axis, for faults of the rotary embedding."""
        positions = self._inputs.get("position_ids", torch.zeros(1, 1, dtype=torch.long))
        return positions if positions.dim() == 2 else positions[0]


# Gigabytes at real sizes: decoded expert by expert, when they are hit.
KEPT = ("w13", "w2")


def widened(inputs: Mapping[str, Tensor]) -> Inputs:
    """All floating-point inputs as float64. Packed inputs and experts are widened when they are used."""
    return {n: x.to(torch.float64) if _is_plain(x) and n not in KEPT else x for n, x in inputs.items()}


def narrowed(inputs: Mapping[str, Tensor]) -> Inputs:
    """The inputs as an engine gets them: float64 becomes float32."""
    return {name: x.to(torch.float32) if x.dtype == torch.float64 else x for name, x in inputs.items()}


def _is_plain(x: Tensor) -> bool:
    return x.is_floating_point() and x.element_size() > 1
