"""Dumps that look alright and are not: of the warm-up, or of a graph that was captured once and replayed."""

from __future__ import annotations

import torch

from ...errors import Qwen35Error
from ...numerics.tap_keys import base_name
from .dump import Dump, StepTokens


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
            one, two = dump.tokens.get(a), dump.tokens.get(b)
            differ = (one is None or two is None or one.ids is None or two.ids is None
                      or not torch.equal(one.ids, two.ids) or _moved(one, two))  # fmt: skip
            if differ and _equal(dump, key, a, b):
                return key, a, b
    return None


def _equal(dump: Dump, key: str, a: int, b: int) -> bool:
    try:
        x, y = (dump.sources[key][step].pieces[0].load() for step in (a, b))
    except Qwen35Error:
        return False
    return x.shape == y.shape and bool(x.any()) and torch.equal(x, y)


def _moved(one: StepTokens, two: StepTokens) -> bool:
    a, b = one.positions, two.positions
    return a is not None and b is not None and not torch.equal(a, b)
