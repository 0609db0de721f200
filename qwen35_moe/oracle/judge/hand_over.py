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
from ...numerics.taps import attach
from ..dumps.step_rows import Foreign
from .replay import Captured, Restart

OF_SEQUENCES = ("gdn_state", "gdn_conv_state")  # taps with one row a sequence


@dataclass(frozen=True)
class DraftFault:
    """What the draft head wrongly starts from ("": it starts right).

    first    the first draft. "pre-norm": the hidden states before the final norm;  "same token": the embedding of
             token t, not t + 1
    chained  the further drafts of a chain. "in place": the position of the first draft;  "target's": the hidden
             states that the first draft started from;  "row before": the hidden states of the row before;
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
    Without a change and a shift nothing is wrong: the mixer runs in these steps.
    """

    broken: Mapping[int, tuple[int, ...]]
    earlier: Mapping[int, int]
    change: HandOverChange | None = None
    shift: Shift | None = None
    other: Mapping[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    foreign: Mapping[tuple[int, int], Foreign] = field(default_factory=dict)
    padding: Mapping[int, int] = field(default_factory=dict)
    page: int = 0


class _Steps:
    """Takes the place of a mixer's forward, and runs the sequences of a plan step by step."""

    def __init__(self, layer: Layer, mixer: nn.Module, plan: HandOver, restart: Restart, tokens: Any, config: Config):
        self.layer, self.mixer, self.plan, self.restart = layer, mixer, plan, restart
        self.tokens, self.config, self.right, self.done = tokens, config, mixer.forward, False

    def __call__(self, x_BTD: Tensor, *rest: Any) -> Tensor:
        y_BTD = self.right(x_BTD, *rest)
        if self.done:  # a further draft of a chain
            return y_BTD
        self.done = True
        seen = self.restart.seen
        for b in self.plan.broken:
            columns = self.tokens.mask[b].nonzero().flatten()
            pieces = self._sequence(b, columns, x_BTD)
            for key in seen.keys() & pieces[0].keys():
                name = base_name(key)
                if name in OF_SEQUENCES:
                    seen[key] = seen[key].clone()
                    seen[key][b] = pieces[-1][key][0].to(seen[key])
                elif name in TAPS and TAPS[name].dims.startswith("b t "):
                    seen[key] = seen[key].clone()
                    seen[key][b, columns] = torch.cat([piece[key] for piece in pieces], 1)[0]
        key = next(k for k in seen if k.endswith(".attn_output"))
        captured = self.restart.captured
        return captured.put(key, seen[key], self.tokens.count) if key in captured else seen[key]

    def _sequence(self, b: int, columns: Tensor, x_BTD: Tensor) -> list[dict[str, Tensor]]:
        """Run a sequence step by step. Returns the values at the mixer's taps in each piece."""
        plan, broken, shift, pieces = self.plan, self.plan.broken[b], 0, []
        state, snapshots = LayerState(), {0: LayerState()}
        pages = {at: at - at % plan.page if plan.page else at for at in broken}
        snapshot = [at - 1 for at in broken if at and plan.change is not None]  # of the state before the last token
        cuts = sorted({0, plan.earlier.get(b, 0), *broken, *snapshot, *pages.values(), len(columns)})
        for start, stop in zip(cuts, cuts[1:], strict=False):
            snapshots[start] = replace(state)
            if start in broken and plan.shift is not None:
                shift = plan.shift(int(self._positions(b, columns[broken[0]]).flatten()[0]), plan.padding.get(b, 0))
            if start in broken and plan.change is not None:
                before = broken[broken.index(start) - 1] if start != broken[0] else plan.earlier.get(b, 0)
                short = snapshots.get(start - 1, LayerState())
                other, ran_on = self._other(b, start, x_BTD), self._ran_on(b, start, columns, state)
                page = snapshots[pages[start]]
                handed = Handed(replace(state), snapshots[before], short, start - before, other, ran_on, page)
                state = replace(plan.change(handed))
            piece = Restart(Captured(), 0)
            with attach(piece, instead_of=self.restart):
                self._run(x_BTD[b : b + 1, columns[start:stop]], self._positions(b, columns[start:stop]) + shift, state)
            pieces.append(piece.seen)
        return pieces

    def _other(self, b: int, at: int, x_BTD: Tensor) -> LayerState | None:
        if (b, at) not in self.plan.other:
            return None
        other, count = self.plan.other[b, at]
        columns, state = self.tokens.mask[other].nonzero().flatten()[:count], LayerState()
        with attach(instead_of=self.restart):
            self._run(x_BTD[other : other + 1, columns], self._positions(other, columns), state)
        return state

    def _ran_on(self, b: int, at: int, columns: Tensor, state: LayerState) -> LayerState:
        """The state after the foreign rows before a step, too; the right state where there are none."""
        state, foreign = replace(state), self.plan.foreign.get((b, at))
        if foreign is None:
            return state
        first = int(self._positions(b, columns[at - 1]).flatten()[0]) + 1 if at else 0
        weight = next(self.mixer.parameters())
        x_TD = foreign.x.to(weight.device)
        with attach(instead_of=self.restart):
            x_TD = x_TD if foreign.normed else self.layer.input_layernorm(x_TD)
            self._run(x_TD[None].to(weight.dtype), first + torch.arange(len(x_TD), device=weight.device), state)
        return state

    def _positions(self, b: int, columns: Tensor) -> Tensor:
        """Positions [T], or [3, T], of a sequence's columns."""
        return self.tokens.positions[..., b, columns]

    def _run(self, x_1TD: Tensor, at_T: Tensor, state: LayerState) -> None:
        if isinstance(self.mixer, Attention):
            cos, sin = rotary_angles(self.config, at_T[..., None, :], x_1TD.dtype)
            self.right(x_1TD, cos, sin, None, state)
        else:
            self.right(x_1TD, None, state)


@contextmanager
def stepped(layer: Any, plan: HandOver | None, restart: Restart, tokens: Any, config: Config) -> Iterator[None]:
    """A context in which the mixer of the layer (a `Layer`) runs by a plan. The values at its taps are in
    `restart.seen`."""
    if plan is None or layer is None:
        yield
        return
    mixer = layer.get_submodule("self_attn" if layer.kind == FULL else "linear_attn")
    mixer.forward = _Steps(layer, mixer, plan, restart, tokens, config)
    try:
        yield
    finally:
        del mixer.forward
