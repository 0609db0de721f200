"""Files of a dump that were lost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from ...numerics.tap_keys import base_name, per_token
from ..judge.records import layer_of
from .align import Alignment

# What layers hand on: filters of a dump by layer let it through.
HANDED_ON = ("layer_input", "layer_output_sum", "mlp_output", "pre_mlp_residual")


def holes(alignment: Alignment) -> Iterator[str]:
    """Taps that the dump has in some layers, and not in another of which it has something, or there not in all steps:
    files that were lost. What a layer hands on may stand under the next one's name, and the first layer reads the
    embeddings."""
    have = {(layer_of(k), base_name(k)) for k in alignment.keys}
    names = {n for _, n in have}
    layers = {i for i, n in have if n not in HANDED_ON} or {i for i, _ in have}
    have |= {(layer - 1, "layer_output_sum") for layer, name in have if layer and name == "layer_input"}
    have |= {(0, "layer_input")}
    for key in alignment.missing:
        tap = layer_of(key), base_name(key)
        if tap[0] is not None and tap[1] in names and tap[0] in layers and tap not in have:
            yield key
    used = set(alignment.tokens_of.where)
    found: dict[str, set[int]] = defaultdict(set)
    steps = {k: used & set(alignment.dump.sources.get(k, {})) for k in alignment.keys if layer_of(k) is not None}
    for key, some in steps.items():
        found[base_name(key)] |= some
    for key, some in steps.items():
        if lost := sorted(found[base_name(key)] - some) if some and per_token(key) else []:
            yield f"{key} in step {lost[0]}"
