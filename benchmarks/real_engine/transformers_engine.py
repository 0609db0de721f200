"""transformers on the CPU: prefill and three decode steps of a batch, padded on the left, every module's values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen35_moe.oracle.dumps.dump import Dump
from qwen35_moe.oracle.dumps.readers.transformers import TransformersCapture

from .bugs import CLEAN
from .prompts import UNEQUAL, prompts
from .transformers_bugs import PLANT

STEPS = 3


@dataclass(frozen=True)
class Setup:
    lengths: Sequence[int] = (30, 17)
    broken: Sequence[int] = (16, 9)
    layout: str | None = None
    recipe: str = "engine-size"
    dtype: torch.dtype = torch.bfloat16
    declared: dict[str, str] = field(default_factory=dict)


SETUPS = {
    "bf16": Setup(),
    "float32": Setup(dtype=torch.float32, declared={"engine": "float32"}),
    "batch-8": Setup(lengths=UNEQUAL),
}


def run(setup: str, checkpoint: Path, out: Path, bugs: Sequence[str], port: int) -> Iterator[tuple[str, Dump]]:
    """Yields the name of each run and its dump, which is never written; the tokens go to out/dumps-SETUP/NAME.json."""
    dumps = out / f"dumps-{setup}"
    dumps.mkdir(parents=True, exist_ok=True)
    chosen = SETUPS[setup]
    for bug in bugs:
        model = _load(checkpoint, chosen.dtype)
        if bug != CLEAN:
            PLANT[bug](model.model.language_model)
        ids = prompts(chosen.lengths if bug == CLEAN else chosen.broken)
        dump, new = _generate(model, ids)
        (dumps / f"{setup}.{bug}.json").write_text(json.dumps({"ids": ids, "new": new}))
        yield f"{setup}.{bug}", dump


def _load(checkpoint: Path, dtype: torch.dtype) -> Any:
    from transformers import Qwen3_5MoeForConditionalGeneration

    return Qwen3_5MoeForConditionalGeneration.from_pretrained(
        checkpoint, dtype=dtype, attn_implementation="eager", experts_implementation="eager", local_files_only=True
    ).eval()


def cache_of(out: Any) -> dict[str, Any]:
    """The argument with which a model goes on after a pass. transformers 5.24 has renamed `past_key_values`."""
    name = "cache" if "cache" in out else "past_key_values"
    return {name: out[name]}


@torch.no_grad()
def _generate(model: Any, ids: list[list[int]]) -> tuple[Dump, list[list[int]]]:
    longest = max(map(len, ids))
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    now = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
    cache, new = dict[str, Any](), list[Tensor]()
    with TransformersCapture(model) as capture:
        for _ in range(STEPS + 1):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -now.shape[1] :]
            out = model(input_ids=now, attention_mask=mask, position_ids=positions, use_cache=True, **cache)
            cache = cache_of(out)
            now = out.logits[:, -1:].argmax(-1)
            new.append(now)
            mask = torch.cat((mask, torch.ones_like(now)), -1)
    return capture.dump(), torch.cat(new, -1).tolist()
