"""The state that one step hands to the next: a mixer runs again step by step, and a fault changes the state in between.

Only the mixer (attention or DeltaNet) lets one token see another, so only the mixer is split into steps. The rest of a
layer works token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...model.attention import Attention
from ...model.cache import LayerState
from ...model.config import FULL, Config
from ...model.rope import rotary_angles
from ...model.text import Layer
from ...numerics.tap_keys import base_name
from ...numerics.tap_table import TAPS
from ...numerics.taps import OBSERVE, Handler, Site, attach
from ..dumps.step_rows import Foreign
from .replay import Restart

OF_SEQUENCES = ("gdn_state", "gdn_conv_state")  # taps with one row a sequence


@dataclass(frozen=True)
class DraftFault:
    """What the draft head starts from, where that is wrong.

    first    "pre-norm": the hidden states before the final norm;  "same token": the embedding of token t, not t + 1
    chained  of the further drafts of a chain. "in place": the position of the first;  "target's": the hidden states
             that the first draft started from;  "row before": the hidden states of the row before;
             "pre-norm": those before the head's own norm;  "first token": the token of the first draft
    """

    first: str = ""
    chained: str = ""


RIGHT = DraftFault()


@dataclass(frozen=True)
class Handed:
    """The states that are known at the beginning of a step.

    right    the state after all tokens before
    earlier  the state that the step before began with;  short: the state before the last token
    tokens   how many tokens the step before had
    page     the state at the last multiple of `HandOver.page` tokens
    other    the state of another sequence;  ran_on: the state after tokens that are none of the sequence's
    """

    right: LayerState
    earlier: LayerState
    short: LayerState
    tokens: int
    other: LayerState | None = None
    ran_on: LayerState | None = None
    page: LayerState | None = None


HandOverChange = Callable[[Handed], LayerState]
Shift = Callable[[int, int], int]  # (position of the step's first token, padding) -> what is added to positions


@dataclass(frozen=True)
class HandOver:
    """A fault at the beginning of some steps. Indices count the real tokens of a sequence.

    broken   sequence -> where the steps begin that get a wrong state
    earlier  sequence -> where the step before the first of those begins
    other    (sequence, index) -> (another sequence, how many of its tokens had been run before that step)
    foreign  (sequence, index) -> rows that ran before that step
    padding  sequence -> how many padded tokens stand before it
    page     tokens between the states that a prefix cache keeps
    Without a change and a shift it says in which steps the mixer runs.
    """

    broken: Mapping[int, tuple[int, ...]]
    earlier: Mapping[int, int]
    change: HandOverChange | None = None
    shift: Shift | None = None
    other: Mapping[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    foreign: Mapping[tuple[int, int], Foreign] = field(default_factory=dict)
    padding: Mapping[int, int] = field(default_factory=dict)
    page: int = 0


class Collect(Handler):
    """Values of the pieces of one sequence, by key."""

    stage, sees_experts = OBSERVE + 1, False

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}

    def __call__(self, site: Site, x: Tensor) -> None:
        if site.index is None and site.expert is None:
            self.parts.setdefault(site.key, []).append(x)


class _Stepped(nn.Module):
    """In the place of a layer's mixer: the same values, but for the sequences of a plan."""

    def __init__(self, layer: Layer, mixer: nn.Module, plan: HandOver, restart: Restart, tokens: Any, config: Config):
        super().__init__()
        self.layer, self.mixer, self.plan, self.restart = [layer], [mixer], plan, restart  # in lists: no submodules
        self.tokens, self.config, self.done = tokens, config, False

    def forward(self, x_BTD: Tensor, *rest: Any) -> Tensor:
        y_BTD = self.mixer[0](x_BTD, *rest)
        if self.done:  # a further draft of a chain
            return y_BTD
        self.done = True
        seen, key = self.restart.seen, ""
        for b in self.plan.broken:
            columns = self.tokens.mask[b].nonzero().flatten()
            collect = Collect()
            self._sequence(b, columns, x_BTD, collect)
            for key, parts in collect.parts.items():
                name = base_name(key)
                if key not in seen or name not in TAPS:
                    continue
                if name in OF_SEQUENCES:
                    seen[key] = seen[key].index_copy(
                        0, torch.tensor([b], device=seen[key].device), parts[-1].to(seen[key].dtype)
                    )
                elif TAPS[name].dims.startswith("b t "):
                    seen[key] = seen[key].clone()
                    seen[key][b, columns] = torch.cat(parts, 1)[0]
        key = next(k for k in seen if k.endswith(".attn_output"))
        y_BTD = seen[key]
        return self.restart.captured.put(key, y_BTD, self.tokens.count) if key in self.restart.captured else y_BTD

    def _sequence(self, b: int, columns: Tensor, x_BTD: Tensor, collect: Collect) -> None:
        """Run a sequence step by step."""
        plan, broken = self.plan, self.plan.broken[b]
        state, short, first = LayerState(), LayerState(), broken[0]
        snapshots = {0: LayerState()}
        pages = {at: at - at % plan.page if plan.page else at for at in broken}
        snapshot = [at - 1 for at in broken if at and plan.change is not None]  # of the state before the last token
        cuts = sorted({0, plan.earlier.get(b, 0), *broken, *snapshot, *pages.values(), len(columns)})
        shift = 0
        for start, stop in zip(cuts, cuts[1:], strict=False):
            snapshots[start], short = replace(state), snapshots.get(start - 1, LayerState())
            if start in broken and plan.shift is not None:
                shift = plan.shift(self._position(b, columns[first]), plan.padding.get(b, 0))
            if start in broken and plan.change is not None:
                before = broken[broken.index(start) - 1] if start != first else plan.earlier.get(b, 0)
                ran_on = self._ran_on(b, start, columns, state)
                other = self._other(b, start, x_BTD)
                page = snapshots[pages[start]]
                handed = Handed(replace(state), snapshots[before], short, start - before, other, ran_on, page)
                state = replace(plan.change(handed))
            with attach(collect, instead_of=self.restart):
                self._run(b, columns[start:stop], x_BTD[b : b + 1, columns[start:stop]], state, shift)

    def _other(self, b: int, at: int, x_BTD: Tensor) -> LayerState | None:
        if (b, at) not in self.plan.other:
            return None
        other, count = self.plan.other[b, at]
        columns, state = self.tokens.mask[other].nonzero().flatten()[:count], LayerState()
        with attach(instead_of=self.restart):
            self._run(other, columns, x_BTD[other : other + 1, columns], state)
        return state

    def _ran_on(self, b: int, at: int, columns: Tensor, state: LayerState) -> LayerState:
        """The state after the foreign rows before a step, too; the right state where there are none."""
        foreign = self.plan.foreign.get((b, at))
        if foreign is None:
            return replace(state)
        state, first = replace(state), self._position(b, columns[at - 1]) + 1 if at else 0
        weight = next(self.mixer[0].parameters())
        x_TD = foreign.x.to(weight.device)
        positions_T = first + torch.arange(len(x_TD), device=weight.device)
        with attach(instead_of=self.restart):
            x_TD = x_TD if foreign.normed else self.layer[0].input_layernorm(x_TD)
            self._run(b, positions_T, x_TD[None].to(weight.dtype), state, positions=True)
        return state

    def _position(self, b: int, column: Tensor | int) -> int:
        return int(self.tokens.positions[..., b, column].flatten()[0])

    def _run(
        self, b: int, columns: Tensor, x_1TD: Tensor, state: LayerState, shift: int = 0, positions: bool = False
    ) -> Tensor:
        """positions: `columns` holds positions, for rows that are none of the sequence's."""
        mixer = self.mixer[0]
        if not isinstance(mixer, Attention):
            return mixer(x_1TD, None, state)
        at_T = columns if positions else self.tokens.positions[..., b, columns]  # or [3, T]
        cos, sin = rotary_angles(self.config, (at_T + shift)[..., None, :], x_1TD.dtype)
        return mixer(x_1TD, cos, sin, None, state)


@contextmanager
def stepped(layer: Any, plan: HandOver | None, restart: Restart, tokens: Any, config: Config) -> Iterator[None]:
    """A context in which the mixer of the layer (a `Layer`) runs by a plan. The values at its taps are in
    `restart.seen`."""
    if plan is None or layer is None:
        yield
        return
    name = "self_attn" if layer.kind == FULL else "linear_attn"
    mixer = layer.get_submodule(name)
    layer.register_module(name, _Stepped(layer, mixer, plan, restart, tokens, config))
    try:
        yield
    finally:
        layer.register_module(name, mixer)
