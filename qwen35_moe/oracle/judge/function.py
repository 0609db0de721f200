"""Which function an engine computes: whether it quantises the inputs of FP8 products, and in which groups.

The bytes of an FP8 checkpoint do not tell: most engines run it as W8A8, some as W8A16. Both are right, and their values
are 3 % apart. So the first taps at which they differ are computed both ways, on the engine's own input. The nearest
function is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log

from torch import Tensor

from ...model.text import Model
from ...numerics import arithmetics
from ...numerics.arithmetics import Arithmetic
from ...numerics.tables import function_of
from ...numerics.tap_keys import base_name
from ...run.load import build
from ...run.source import WeightSource
from ...trace.file import Trace
from ...trace.recorder import trace
from .added import ID_TAPS, Judgement
from .envelope import Norms, legal
from .envelope_file import SLOT_ORDERED, write_envelope
from .rerun import Rerun

BY_KIND = {"fp8-block": ("+a8", ""), "fp8-channel": ("+a8-token", "+a8", ""), "fp8-tensor": ("+a8-token", "+a8", "")}
SAME = 1e-6  # a relative error: functions that are no further apart at a tap are the same there
SAYS = {"": "as they are", "+a8": "in FP8 by 128 columns", "+a8-token": "in FP8 by token"}


def functions(source: WeightSource) -> tuple[str, ...]:
    """The functions that engines may compute on this checkpoint, the most usual first: keys of SAYS."""
    for i, kind in enumerate(source.config.layer_types):
        mixer = "linear_attn.in_proj_qkv" if kind == "linear_attention" else "self_attn.q_proj"
        for module in (mixer, "mlp.experts", "mlp.shared_expert.gate_proj"):
            if (found := BY_KIND.get(source.spec(f"layers.{i}.{module}").kind)) is not None:
                return found
    return ("",)


def usual(source: WeightSource, arithmetic: str) -> str:
    """The truth's arithmetic for this checkpoint, if nothing tells which function an engine computes."""
    return arithmetic + functions(source)[0] if arithmetic == "exact" else arithmetic


def engine_function(
    table: Arithmetic, source: WeightSource, work: Judgement, rerun: Callable[[Sequence[Arithmetic]], Rerun]
) -> Arithmetic:
    """The truth's arithmetic with the function that the engine computes. Adds a note that says how it was found."""
    family, choices = table.name.partition("+")[0], functions(source)
    if family != "exact" or function_of(table.name) not in SAYS or len(choices) == 1:
        return table
    tables = [arithmetics.get(family + choice) for choice in choices]
    for _, seen in rerun(tables).parts():
        if shown := {key: errors for key in seen[0] if (errors := _errors(key, seen, work))}:
            totals = [sum(log(max(e[i], 1e-12)) for e in shown.values()) for i in range(len(tables))]
            best = min(range(len(tables)), key=lambda i: totals[i])
            key = next(iter(shown))
            each = ", ".join(f"{100 * e:.2g} % {SAYS[c]}" for c, e in zip(choices, shown[key], strict=True))
            work.result.notes.append(f"inputs of FP8 products are read {SAYS[choices[best]]}: {key} is off by {each}")
            return tables[best]
    return table


def _errors(key: str, seen: Sequence[dict[str, Tensor]], work: Judgement) -> list[float]:
    """The median relative error of the engine's rows against each function; empty where they do not differ."""
    if key not in work.alignment.keys or base_name(key) in (*ID_TAPS, *SLOT_ORDERED) or key.endswith(".gain"):
        return []
    pair = work.alignment.pair(key)
    if pair.engine is None or not len(pair.rows):
        return []
    values = [work.rows(taps[key], pair) for taps in seen]
    sizes, engine = Norms.of(values[0]).l2, pair.engine.to(values[0].device)
    apart = max(float((Norms.of(v, minus=values[0]).l2 / sizes).nan_to_num().median()) for v in values[1:])
    if apart <= SAME:
        return []
    return [min(float((Norms.of(engine, minus=v).l2 / sizes).nan_to_num(nan=1.0).median()), 1.0) for v in values]


def truth_in(table: Arithmetic, truth: Trace, source: WeightSource, fused: Sequence[bool], rerun: Rerun) -> Trace:
    """The truth of another function for the same tokens, with its envelope, in memory."""

    def model(each: Arithmetic) -> Model:
        return build(source, each, fused, rerun.device("norm"), rerun.mode)

    taps = {site.name for site in truth.sites.values()}
    known = None if bool(truth.mask.all()) else truth.mask
    found = trace(model(table), truth.ids, taps=taps, attention_mask=known, position_ids=truth.positions)
    write_envelope(found, (model(each) for each in legal(table.name)))
    return found
