"""How an error grows along the sequence. In long contexts it grows slowly."""

from __future__ import annotations

import torch

from ...numerics.tap_keys import base_name, per_token
from ..dumps.align import Alignment

SHORTEST, SEQUENCE_PARTS = 256, 6  # tokens of a sequence that it is told for; equal parts of it
GROWTH_TAPS = ("final_norm", "layer_input", "layer_output_sum", "next_token_logits", "mlp_output")


def growth(alignment: Alignment, first: str = "") -> list[str]:
    """The median relative error of tokens, part by part, in the last tap that shows the stream, and in the `first`
    wrong tap, where roundings do not yet hide a wrong angle or state. Empty for short sequences.

    It is the inherited error, against the truth. It takes the median, since tokens with other experts have other
    values.
    """
    T = alignment.truth.ids.shape[1]
    keys = [
        k
        for k in alignment.keys
        if per_token(k) and base_name(k) in GROWTH_TAPS and not k.startswith(("mtp.", "visual."))
    ]
    if T < SHORTEST or not keys:
        return []
    shown = min(keys, key=lambda k: (GROWTH_TAPS.index(base_name(k)), -alignment.keys.index(k)))
    some = [shown, first] if first != shown and first in alignment.keys and per_token(first) else [shown]
    return [said for key in some if (said := _along(alignment, key))]


def _along(alignment: Alignment, key: str) -> str:
    """One line, of one tap."""
    pair, T = alignment.pair(key), alignment.truth.ids.shape[1]
    if pair.engine is None:
        return ""
    truth, engine = pair.truth.double(), pair.engine.double()
    relative = (engine - truth).norm(dim=1) / truth.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    index = pair.rows[:, 1].long()
    bounds = [T * i // SEQUENCE_PARTS for i in range(SEQUENCE_PARTS + 1)]
    said = []
    for low, high in zip(bounds, bounds[1:], strict=False):
        some = relative[(index >= low) & (index < high)]
        if len(some):
            said.append(f"{low}-{high - 1}: {float(some.median()):.2g}")
    return f"median relative error of {key} along the sequence: {', '.join(said)}"
