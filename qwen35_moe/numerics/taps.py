"""Taps: the one mechanism for observing, rounding, replaying and breaking values.

The model code passes every value worth naming to `tap(name, x)` and continues with the result. What happens there is
data: handlers, each a callable `handler(site, x) -> x | None` (None: unchanged), and the rounding of the current
arithmetic. They run in the order of their `stage`:

    REPLAY   put a captured value there          (routing of an engine, the input of a block)
    BREAK    plant a bug                         (the fault catalogue)
    ROUND    round as an engine rounds           (the arithmetic, by `arithmetics.using`)
    OBSERVE  look at the result                  (the trace)

With no handler attached, `tap` returns its argument: nothing is copied, nothing is kept. A name that `tap_table` does
not hold is an error everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor

from .tap_keys import refuse
from .tap_table import NAMES

REPLAY, BREAK, ROUND, OBSERVE = range(4)


@dataclass(frozen=True)
class Site:
    """Where a tap stands.

    `part` is "" for the text model, "mtp" for the draft head, "visual" for the vision tower. `expert` is set inside
    one expert, `index` where a name repeats: a token of the recurrent rule, a step of a running
    sum, a block of queries.
    """

    name: str = ""
    layer: int | None = None
    expert: int | None = None
    part: str = ""
    index: int | None = None

    @property
    def key(self) -> str:
        """The name in a trace: `layers.3.moe_router_logits`, `layers.3.moe_expert_17_down`, `final_norm`."""
        name = self.name
        if self.expert is not None:  # moe_expert_down, and moe_a2, which the shared expert does not have
            name = f"moe_expert_{self.expert}_{name.removeprefix('moe_').removeprefix('expert_')}"
        layer = "" if self.layer is None else f"layers.{self.layer}."
        index = "" if self.index is None else f".{self.index}"
        return f"{self.part + '.' if self.part else ''}{layer}{name}{index}"


class Handler(Protocol):
    """Base class of handlers. A plain function can be attached as it is."""

    @property
    def stage(self) -> int:
        """When it runs: REPLAY, BREAK or OBSERVE (or later)."""
        return OBSERVE

    @property
    def sees_experts(self) -> bool:
        """Whether it observes values inside single experts; these are then computed one by one."""
        return True

    def __call__(self, site: Site, x: Tensor, /) -> Tensor | None:
        """The value to continue with; None: `x`."""
        ...


TapFunction = Callable[[Site, Tensor], Any]


class FunctionHandler(Handler):
    """A plain function as a handler."""

    stage: int = OBSERVE
    sees_experts: bool = True

    def __init__(self, function: TapFunction, stage: int = OBSERVE, sees_experts: bool = True):
        self.function, self.stage, self.sees_experts = function, stage, sees_experts

    def __call__(self, site: Site, x: Tensor, /) -> Tensor | None:
        return self.function(site, x)


class Rounder(Protocol):
    """The rounding at stage ROUND: an arithmetic. It needs the name alone, so that no `Site` has to be made."""

    def round(self, name: str, x: Tensor) -> Tensor: ...


class _Context(NamedTuple):
    """Everything that a tap depends on: handlers, rounding, place."""

    site: Site = Site()
    before: tuple[Handler, ...] = ()  # the rounding
    rounder: Rounder | None = None
    after: tuple[Handler, ...] = ()


_context: ContextVar[_Context] = ContextVar("taps", default=_Context())  # noqa: B039 - immutable


def tap(name: str, x: Tensor) -> Tensor:
    """Name a value. Returns what the attached handlers make of it (`x` itself when there are none).

    Error: a name that the tap table does not hold.
    """
    if name not in NAMES:
        refuse(name)
    context = _context.get()
    if context.before:
        x = _handled(context.before, context.site, name, x)
    if context.rounder is not None:
        x = context.rounder.round(name, x)
    return _handled(context.after, context.site, name, x) if context.after else x


def _handled(handlers: tuple[Handler, ...], site: Site, name: str, x: Tensor) -> Tensor:
    site = Site(name, site.layer, site.expert, site.part, site.index)  # many times faster than `replace`
    for handler in handlers:
        changed = handler(site, x)
        x = x if changed is None else changed
    return x


@contextmanager
def _within(**fields: Any) -> Iterator[None]:
    token = _context.set(_context.get()._replace(**fields))
    try:
        yield
    finally:
        _context.reset(token)


@contextmanager
def attach(*handlers: Handler | TapFunction, instead_of: Handler | None = None) -> Iterator[None]:
    """Attach handlers for the duration of a `with` block; within one stage, those attached first run first.
    instead_of: an attached handler that does not run inside the block."""
    context = _context.get()
    kept = [handler for handler in (*context.before, *context.after) if handler is not instead_of]
    plain = FunctionType | MethodType | BuiltinFunctionType | partial
    new = (FunctionHandler(h) if isinstance(h, plain) else cast(Handler, h) for h in handlers)
    ordered = sorted((*kept, *new), key=lambda h: h.stage)
    before, after = tuple(h for h in ordered if h.stage < ROUND), tuple(h for h in ordered if h.stage >= ROUND)
    with _within(before=before, after=after):
        yield


def attached() -> tuple[Handler, ...]:
    """The handlers that are attached here and now."""
    return _context.get().before + _context.get().after


def experts_watched() -> bool:
    """Whether a handler observes or changes values inside single experts."""
    return any(handler.sees_experts for handler in attached())


def rounder() -> Rounder | None:
    """The current rounding; None if nothing rounds."""
    return _context.get().rounder


def rounding(by: Rounder) -> AbstractContextManager[None]:
    """Inside the `with` block, round with this alone."""
    return _within(rounder=by)


def scope(**fields: Any) -> AbstractContextManager[None]:
    """Set the place of the taps inside: `with scope(layer=3): ...`, `with scope(expert=17): ...`."""
    return _within(site=replace(_context.get().site, **fields))
