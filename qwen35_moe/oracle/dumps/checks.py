"""Dumps that look alright and are not: files that were lost, a warm-up, a graph that was captured once and replayed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from ...errors import Qwen35Error
from ...numerics.tap_keys import base_name, per_token
from ..judge.records import layer_of
from .align import Alignment
from .dump import Dump, StepTokens

# What layers hand on: filters of a dump by layer let it through.
HANDED_ON = ("layer_input", "layer_output_sum", "mlp_output", "pre_mlp_residual")


def holes(alignment: Alignment) -> Iterator[str]:
    """Taps whose files were lost: the dump has them in other layers, and something else of this layer; or it has them
    in some of its steps only. What a layer hands on may stand under the next one's name, and the first layer reads
    the embeddings."""
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


def check_steps(dump: Dump) -> None:
    """Find dumps that look alright and are not: warm-up, and CUDA/HIP graphs that hide the decode steps."""
    known = {step: t.ids for step, t in dump.tokens.items() if t.ids is not None}
    warm = [step for step, ids in known.items() if ids.numel() > 1 and not ids.any()]
    if warm and not any(ids.any() for ids in known.values()):
        raise Qwen35Error("dump holds only warm-up", where=dump.path, found="every token id is 0",
                          do="dump a real request: skip the first passes, and turn one-shot dumping off")  # fmt: skip
    elif warm:
        dump.notes.append(f"warm-up left out: steps {', '.join(map(str, warm))}")
        for steps in dump.sources.values():
            for step in warm:
                steps.pop(step, None)
        dump.sources = {key: steps for key, steps in dump.sources.items() if steps}
    if same := _identical_steps(dump):
        dump.problems.append(Qwen35Error(
            "decode steps are identical although their tokens differ", where=dump.path,
            found=f"{same[0]} in steps {same[1]} and {same[2]}",
            do="a captured graph was replayed: dump with graphs off, as `qwen35-moe dump-config ENGINE` shows",
        ))  # fmt: skip


def _identical_steps(dump: Dump) -> tuple[str, int, int] | None:
    """(key, step, next step) of a tensor that did not change although the tokens did. Looks at a few taps."""
    keys = [k for k, steps in dump.sources.items() if len(steps) > 1 and base_name(k).endswith(("output", "norm"))]
    for key in keys[:2] + keys[-1:]:
        steps = sorted(dump.sources[key])
        for a, b in zip(steps, steps[1:], strict=False):
            one, two = (dump.tokens.get(step, StepTokens()) for step in (a, b))
            if one.ids is not None and _same(one.ids, two.ids) and (_same(one.positions, two.positions) is not False):
                continue
            try:
                x, y = (dump.sources[key][step].pieces[0].load() for step in (a, b))
            except Qwen35Error:
                continue
            if x.any() and _same(x, y):
                return key, a, b
    return None


def _same(x: Tensor | None, y: Tensor | None) -> bool | None:
    """Whether two tensors are equal; None: one is not known."""
    return None if x is None or y is None else torch.equal(x, y)
