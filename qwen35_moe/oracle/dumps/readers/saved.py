"""What people save of a model's output: a tensor, a dict, transformers' ModelOutput or what `generate` returns.

Names that are known, beside keys and engines' modules:

    logits             [B, T, V] or [T, V]: next_token_logits (log p where every row's logsumexp is 0)
    logits.N scores.N  [B, V]: after step N of `generate`
    hidden_states.N    layers.N.layer_input; the last of them is transformers' final_norm
    router_logits.N    layers.N.moe_router_logits
    step.S.NAME        NAME of step S; also step_S, in a name or in the name of a file
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....untrusted import check_regular
from .common import load_pt

LIST = re.compile(r"(?:.*[./])?(hidden_states|router_logits|scores|logits)[._](\d+)(?:[._](\d+))?")
STEP = re.compile(r"(?:^|[./_-])step[._-]?(\d+)(?=[./_-]|$)[./_-]?", re.IGNORECASE)
LOGITS_NAME = re.compile(r"(?<!router)[._-]logits?$|^logits?[._-]", re.IGNORECASE)
STEPS_OF = {"scores", "logits"}  # lists with one entry a step
WHOLE = {"logits": "next_token_logits", "last_hidden_state": "final_norm", "log_probs": "next_token_logits",
         "logprobs": "next_token_logits", "lm_logits": "next_token_logits"}  # fmt: skip


class _Inert:
    """Stands in for objects of transformers, such as caches: nothing of theirs runs, and nothing is read."""

    def __setstate__(self, state: Any) -> None: ...


def _record(*_: Any) -> OrderedDict[str, Any]:
    """Stands in for a ModelOutput, whose items follow."""
    return OrderedDict()


def load_torch_file(path: Path) -> Any:
    """What a torch file holds, with `weights_only=True`. Objects of transformers come as dicts, or as nothing."""
    check_regular(path)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # what the file is, `load_pt` says
        names = []
    allowed: list[Any] = [
        (_record if name.rpartition(".")[2].endswith(("Output", "OutputWithPast")) else _Inert, name)
        for name in names
        if name.startswith("transformers.")
    ]
    with torch.serialization.safe_globals(allowed):
        return load_pt(path)


def tensors(found: Any, name: str, depth: int = 0, seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all that an object holds, entries of lists as NAME.N. Each container counts once: one that
    holds itself, or the same one many times, would take for ever."""
    seen = set() if seen is None else seen
    if isinstance(found, Tensor):
        yield name, found
    elif isinstance(found, (Mapping, list, tuple)) and depth < 4 and id(found) not in seen:
        seen.add(id(found))
        inner = found.items() if isinstance(found, Mapping) else enumerate(found)
        for key, value in inner:
            below = f"{name}.{key}" if depth or not isinstance(found, Mapping) else str(key)
            yield from tensors(value, below, depth + 1, seen)


def step_of(name: str) -> tuple[int | None, str]:
    """The step that a name says, and the name without it.

    >>> step_of("step.2.logits"), step_of("hidden_states.3"), step_of("logits_step1")
    ((2, 'logits'), (None, 'hidden_states.3'), (1, 'logits'))
    """
    found = STEP.search(name)
    if found is None:
        return None, name
    return int(found[1]), (name[: found.start()] + ("." if found.start() > 0 else "") + name[found.end() :]).strip(".")


def meaning(name: str, last: int | None) -> tuple[int | None, str] | None:
    """(step, key) of a name that people give; None for others. last: how many layers there are, where it is known."""
    if (whole := WHOLE.get(re.split(r"[./]", name)[-1])) is not None:
        return None, whole
    found = LIST.fullmatch(name)
    if found is None:
        return (None, "next_token_logits") if LOGITS_NAME.search(name) else None
    kind, first, second = found[1], int(found[2]), found[3]
    if kind in STEPS_OF:
        return (first, "next_token_logits") if second is None else None
    step, layer = (first, int(second)) if second is not None else (None, first)
    if kind == "router_logits":
        return step, f"layers.{layer}.moe_router_logits"
    return step, "final_norm" if layer == last else f"layers.{layer}.layer_input"


def layers_in(names: list[str]) -> int | None:
    """How many layers a list of hidden states is of: it has one entry more."""
    found = [LIST.fullmatch(name) for name in names]
    numbers = {int(m[3] or m[2]) for m in found if m is not None and m[1] == "hidden_states"}
    return max(numbers) if len(numbers) > 1 and numbers == set(range(len(numbers))) else None
