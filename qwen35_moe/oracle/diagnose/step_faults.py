"""The catalogue of faults between two steps: in what one hands to the next, and in how the next counts positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ...model.cache import LayerState
from ..judge.hand_over import Handed, HandOverChange, Shift
from .fault_parts import bf16

PAGES = (1, 2, 4, 8, 16, 32, 64, 128)  # rows of a page of a KV cache
Needs = Literal["", "earlier", "other", "rejected", "padding", "square"]
STATE_PARTS = {"state": ("state", "conv"), "recurrent state": ("state",), "conv state": ("conv",), "KV": ("k", "v")}


@dataclass(frozen=True)
class StepFault:
    """`change` makes the wrong state out of what is known; `shift` is added to the positions from there on.

    needs  "earlier": the step before is not the first; "other": another sequence; "rejected" drafts or "padding" in the
           step before; "square": a state of equal sides
    rows   how many KV rows of another sequence it takes, where these are fewer than both have
    page   tokens between the states that a prefix cache keeps
    """

    name: str
    block: str
    change: HandOverChange | None = None
    shift: Shift | None = None
    needs: Needs = ""
    seen: str = ""
    rows: int = 0
    page: int = 0


def taken(which: str, source: Callable[[Handed], LayerState | None]) -> HandOverChange:
    """`which` tensors of the state are taken from another one, `source`; where it has none they are zero, as at the
    beginning of a sequence."""
    names = STATE_PARTS[which]

    def change(handed: Handed) -> LayerState:
        found, right = dict((source(handed) or LayerState()).tensors()), dict(handed.right.tensors())
        zero = {n: torch.zeros_like(x) for n, x in {**found, **right}.items() if n in ("conv", "state")}
        return replace(handed.right, **{**zero, **right, **{n: found.get(n, zero.get(n)) for n in names}})

    return change


def altered(name: str, function: Callable[[Tensor], Tensor]) -> HandOverChange:
    return lambda handed: replace(handed.right, **{name: function(dict(handed.right.tensors())[name])})


def rows(function: Callable[[Tensor, int, Tensor], Tensor]) -> HandOverChange:
    """Keys and values changed by a function of (mine, tokens of the step before, those of another sequence)."""

    def change(handed: Handed) -> LayerState:
        right, other = (dict(state.tensors()) for state in (handed.right, handed.other or handed.right))
        return replace(handed.right, **{n: function(right[n], handed.tokens, other[n]) for n in ("k", "v")})

    return change


def rows_of_another(most: int = 1 << 30) -> HandOverChange:
    """The first rows are another sequence's: as many as both have, or `most`."""

    def first(mine: Tensor, _: int, theirs: Tensor) -> Tensor:
        n = min(mine.shape[1], theirs.shape[1], most)
        return torch.cat((theirs[:, :n], mine[:, n:]), 1)

    return rows(first)


# Each state of DeltaNet, and both together, taken from the wrong place.
TAKEN: tuple[tuple[str, Callable[[Handed], LayerState | None], Needs, str], ...] = (
    ("not handed over", lambda _: None, "", "modular 6681, sglang 33515, omlx 2119"),
    ("of an earlier step", lambda h: h.earlier, "earlier", "sparkinfer 610, vllm 55766"),
    ("one token short", lambda h: h.short, "", "sglang 39342"),
    ("of another sequence", lambda h: h.other, "other", "sglang 33515, sparkinfer 1071"),
    ("not rolled back after rejected drafts", lambda h: h.ran_on, "rejected",
     "rMLX 436, tpu-inference 3178, mlx-lm 1456, vllm-ascend 6822"),
    ("with padding in it", lambda h: h.ran_on, "padding", "maxtext 5292"),
)  # fmt: skip

STEP_FAULTS: tuple[StepFault, ...] = (
    *(StepFault(f"{which} {name}", "gdn", taken(which, source), needs=needs, seen=seen)
      for which in ("state", "recurrent state", "conv state") for name, source, needs, seen in TAKEN),
    *(StepFault(f"{which} of the last multiple of {n} tokens", "gdn", taken(which, lambda h: h.page), page=n,
                seen="sglang 39342, sparkinfer 610") for which in ("state", "recurrent state") for n in PAGES[2:]),
    StepFault("recurrent state transposed", "gdn", altered("state", lambda x: x.mT), needs="square",
              seen="sglang 39342"),
    StepFault("recurrent state in bf16", "gdn", altered("state", bf16), seen="ollama 15865"),
    StepFault("conv state reversed", "gdn", altered("conv", lambda x: x.flip(-1))),
    # [C, W-1] read from memory that holds [W-1, C].
    StepFault("conv state in the other layout", "gdn", altered("conv", lambda x: x.mT.contiguous().view_as(x))),
    StepFault("KV not handed over", "attn", lambda _: LayerState(), seen="modular 6681"),
    StepFault("last KV row missing", "attn", rows(lambda x, *_: x[:, :-1])),
    StepFault("KV rows of the step before missing", "attn", rows(lambda x, n, _: x[:, :-n]), needs="earlier"),
    StepFault("KV rows of the step before zero", "attn",
              rows(lambda x, n, _: torch.cat((x[:, :-n], torch.zeros_like(x[:, -n:])), 1))),
    StepFault("last KV row doubled", "attn", rows(lambda x, *_: torch.cat((x, x[:, -1:]), 1))),
    StepFault("KV rows of the step before doubled", "attn", rows(lambda x, n, _: torch.cat((x, x[:, -n:]), 1))),
    StepFault("KV rows of another sequence", "attn", rows_of_another(), needs="other", seen="vLLM 35744"),
    *(StepFault(f"KV rows of another sequence, the first {n}", "attn", rows_of_another(n), needs="other",
                seen="vLLM 35744", rows=n) for n in PAGES),
    StepFault("KV rows of rejected drafts kept", "attn", taken("KV", lambda h: h.ran_on), needs="rejected"),
    StepFault("KV rows of padding kept", "attn", taken("KV", lambda h: h.ran_on), needs="padding"),
    StepFault("positions one too high", "attn", shift=lambda _, __: 1, seen="mlx-vlm 1621"),
    StepFault("positions one too low", "attn", shift=lambda _, __: -1),
    StepFault("positions restarted", "attn", shift=lambda first, _: -first, seen="slime 1686, Automodel 2147"),
    StepFault("positions counted with rejected drafts", "attn", shift=lambda _, rejected: rejected, needs="rejected"),
    StepFault("positions counted with padding", "attn", shift=lambda _, padding: padding, needs="padding"),
)  # fmt: skip
