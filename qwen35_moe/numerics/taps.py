"""Taps: the one mechanism for observing, rounding, replaying and breaking values.

The model code hands every value worth naming to `tap(name, x)` and goes on with what comes back. What happens
there is data: a list of handlers, each a callable `handler(site, x) -> x | None` (None: left as it is). They run in
the order of their `stage`:

    REPLAY   put a captured value there          (routing of an engine, the input of a block)
    BREAK    plant a bug                         (the fault catalogue)
    ROUND    round as an engine rounds           (the arithmetics)
    OBSERVE  look at the result                  (the trace)

With no handler attached, `tap` returns its argument: nothing is copied, nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

REPLAY, BREAK, ROUND, OBSERVE = range(4)


@dataclass(frozen=True)
class Site:
    """Where a tap stands.

    `part` is "" for the text model, "mtp" for the draft head, "visual" for the vision tower. `expert` is set inside
    of one expert, `index` where one name is met again and again: a token of the recurrent rule, a step of a running
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


Handler = Callable[[Site, Any], Any]

_handlers: ContextVar[tuple[Handler, ...]] = ContextVar("handlers", default=())
_site: ContextVar[Site] = ContextVar("site", default=Site())  # noqa: B039 - frozen


def tap(name: str, x: Tensor) -> Tensor:
    """Name a value. Returns what the attached handlers make of it (`x` itself when there are none)."""
    site = None
    for handler in _handlers.get():
        if hasattr(handler, "round"):  # an arithmetic goes by the name alone, which saves making a thousand sites
            x = handler.round(name, x)
            continue
        site = replace(_site.get(), name=name) if site is None else site
        changed = handler(site, x)
        x = x if changed is None else changed
    return x


@contextmanager
def attach(*handlers: Handler, instead_of: Handler | None = None) -> Iterator[None]:
    """Attach handlers for the duration of a `with` block; within one stage, those attached first run first."""
    before = tuple(h for h in _handlers.get() if h is not instead_of)
    token = _handlers.set(tuple(sorted((*before, *handlers), key=lambda h: getattr(h, "stage", OBSERVE))))
    try:
        yield
    finally:
        _handlers.reset(token)


def attached() -> tuple[Handler, ...]:
    """The handlers that are attached here and now."""
    return _handlers.get()


@contextmanager
def scope(**fields: Any) -> Iterator[None]:
    """Say where the taps inside stand: `with scope(layer=3): ...`, `with scope(expert=17): ...`."""
    token = _site.set(replace(_site.get(), **fields))
    try:
        yield
    finally:
        _site.reset(token)
