"""Arithmetics: tables that say who rounds where.

An arithmetic is a table from tap names to roundings. Model code computes on promoted values (bf16 becomes fp32,
float64 stays float64) and passes every result to `tap`; the table says how that is rounded:

    torch.bfloat16      round to this dtype, nearest even
    KEEP                do not round: the value stays as wide as it was computed
    a callable          x -> x, any other rounding (an MXFP4 quantiser, say)

Names without a row get the table's `dtype`. Matrix products accumulate wide and round once, to the row of their tap.
`weights` does the same for parameters by name, when they are loaded. `switches` holds orders and choices that are no
roundings; `SWITCHES` lists the alternatives.

A table of one's own:

    mine = replace(TRANSFORMERS_BF16, name="mine", rounds={**TRANSFORMERS_BF16.rounds, "moe_topk_weights": KEEP})
    q.load(path, arithmetic=mine)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from ..errors import Qwen35Error
from . import taps
from .tap_keys import check_patterns, refuse
from .tap_table import NAMES

KEEP = None
Rounding = torch.dtype | Callable[[Tensor], Tensor] | None

SWITCHES: Mapping[str, tuple[str, ...]] = {
    # In which order the experts' weighted outputs of a token are added: by slot (the order of `moe_topk_ids`, the
    # fused shared expert last), or by expert id, the running sum being the tap `moe_partial_sum`; or all at once, as
    # torch.sum happens to add them on the device.
    "moe_sum_order": ("slot", "expert", "slot-reversed", "torch.sum"),
    # How a weighted output enters the running sum: as a product that may be rounded before (`moe_expert_weighted`),
    # or in one fused multiply-add of weight and output.
    "moe_weight": ("product", "fma"),
    # Which expert wins an exact tie between router logits: the lowest id, or the one that torch.topk happens to return.
    "moe_ties": ("lowest-id", "torch.topk"),
    # How the router's softmax and the shared gate's dot product are summed: in the library's order, in the dtype of the
    # table; or exactly, to be rounded once, which is the fair model of an fp32 kernel whose order is not known.
    "moe_router_sums": ("library", "exact"),
    # Which rule DeltaNet uses. A single token that continues a sequence always takes the recurrent rule.
    "gdn_rule": ("chunked", "recurrent"),
    # How the recurrent rule scales q: times K^-0.5, as the chunked rule does, or divided by K^0.5.
    "gdn_step_scale": ("times", "divided"),
    # Whether beta is rounded in a decode step as elsewhere, or not at all.
    "gdn_step_beta": ("as table", "fp32"),
    # Whether DeltaNet's memory fades over padding. In transformers it does: harmless left of a new sequence, where the
    # memory is empty (only the running sum of decays rounds differently), wrong before a continued one.
    "gdn_padding": ("still", "fades"),
    # How the place of a patch in the vision tower's position table is rounded, before its whole part is taken away: not
    # at all; to fp32, once; to fp32 as evenly spaced places; or so, with weights and products stored in the dtype.
    "vis_places": ("exact", "fp32", "spaced", "stored"),
    # How the tower's norms take the mean away: from x; from x, after both are scaled; or from x, where the variance is
    # mean(x^2) - mean^2.
    "vis_norm": ("centred", "scaled", "moments"),
}


@dataclass(frozen=True)
class Arithmetic:
    """Who rounds where. See the module's docstring for the meaning of the fields."""

    name: str
    dtype: torch.dtype
    doc: str = ""
    rounds: Mapping[str, Rounding] = field(default_factory=dict)
    weights: Mapping[str, torch.dtype] = field(default_factory=dict)
    switches: Mapping[str, str] = field(default_factory=dict)
    # Whether the engine ever fuses the shared expert: what `load(shared_expert="auto")` goes by, besides the gate.
    fuses: bool = True
    # Formats of weights whose products take quantised inputs: there the taps attn_a1, gdn_a2, moe_a2, ... stand.
    quantised: tuple[str, ...] = ("mxfp4",)
    _found: dict[str, Rounding] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_patterns(tuple(self.rounds))
        for key, value in self.switches.items():
            if value not in SWITCHES.get(key, ()):
                where, found = f"arithmetic {self.name!r}", (key, value)
                raise Qwen35Error("unknown switch or value", where=where, expected=dict(SWITCHES), found=found)

    def rounding(self, name: str) -> Rounding:
        """The row that decides for a tap name: the exact name, else the first matching glob, else `dtype`."""
        if name not in self._found:
            if name not in NAMES:
                refuse(name)
            self._found[name] = _first_match(name, self.rounds, self.dtype)
        return self._found[name]

    def weight_dtype(self, name: str) -> torch.dtype:
        """The dtype in which the parameter `name` is held."""
        return _first_match(name, self.weights, self.dtype)

    def quantises(self, kind: str) -> bool:
        """Whether the inputs of weights of this kind ("mxfp4", "fp8-block", ...) are quantised, too."""
        return kind.partition("-")[0] in self.quantised

    def switch(self, name: str) -> str:
        return self.switches.get(name, SWITCHES[name][0])

    def round(self, name: str, x: Tensor) -> Tensor:
        """`x` as it is rounded at the tap `name`."""
        how = self.rounding(name)
        if how is KEEP or how is x.dtype or not x.is_floating_point():
            return x
        return x.to(how) if isinstance(how, torch.dtype) else how(x)


def _first_match(name: str, table: Mapping[str, Any], default: Any) -> Any:
    if name in table:
        return table[name]
    return next((value for pattern, value in table.items() if fnmatchcase(name, pattern)), default)


# Arithmetics by name; `tables.py` fills it.
ARITHMETICS: dict[str, Arithmetic] = {}


def register(*arithmetics: Arithmetic) -> None:
    """Make arithmetics known by their names."""
    ARITHMETICS.update({a.name: a for a in arithmetics})


# What functions of the model do when they are called on their own, outside of a model: nothing is rounded.
AS_GIVEN = Arithmetic(name="as-given", dtype=torch.float64, rounds={"*": KEEP})


def get(arithmetic: str | Arithmetic) -> Arithmetic:
    """An arithmetic by name (`exact`, `float32`, ...), or the given one."""
    if isinstance(arithmetic, Arithmetic):
        return arithmetic
    arithmetic = str(arithmetic).lower() if str(arithmetic).lower() in ARITHMETICS else arithmetic
    if arithmetic not in ARITHMETICS:
        near = get_close_matches(str(arithmetic), ARITHMETICS, n=1)
        expected = "an Arithmetic, or a name that `qwen35-moe trace --list` prints"
        do = f"did you mean {near[0]!r}?" if near else "see qwen35_moe.numerics.arithmetics"
        raise Qwen35Error("unknown arithmetic", expected=expected, found=repr(arithmetic), do=do)
    return ARITHMETICS[arithmetic]


def current() -> Arithmetic:
    """The arithmetic in use here and now."""
    found = taps.rounder()
    return found if isinstance(found, Arithmetic) else AS_GIVEN


@contextmanager
def using(arithmetic: str | Arithmetic) -> Iterator[None]:
    """Compute in this arithmetic inside the `with` block. An enclosing autocast, which would round as well, is off."""
    with ExitStack() as off:
        for device in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            off.enter_context(torch.autocast(device, enabled=False))
        off.enter_context(taps.rounding(get(arithmetic)))
        yield


@contextmanager
def keeping(name: str) -> Iterator[None]:
    """Compute without the rounding at the tap `name` inside the `with` block."""
    table = current()
    with using(replace(table, rounds={name: KEEP, **{k: v for k, v in table.rounds.items() if k != name}})):
        yield


def stored(name: str, x: Tensor) -> Tensor:
    """`x` as a cache keeps it: tapped as `name` if the arithmetic has a row for that name, otherwise unchanged."""
    return taps.tap(name, x) if name in current().rounds else x
