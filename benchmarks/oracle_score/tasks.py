"""The checkpoints of the score, and what one process does: a part of one regime of one of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import torch

from benchmarks.oracle_score import mutants
from benchmarks.oracle_score.mutants import Found
from qwen35_moe.oracle.truth import open_checkpoint
from weights.build import build

GDN, FULL = "linear_attention", "full_attention"
HEAD_64 = {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default", "rope_theta": 500000,
           "partial_rotary_factor": 0.25}  # fmt: skip

PARTS = 3  # of one regime of one checkpoint, each a task of its own

# name -> tokens, recipe, seed, sizes
CHECKPOINTS = {
    "a": (40, "tiny", 7101, {  # bf16
        "hidden_size": 96, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "num_experts": 6,
        "num_experts_per_tok": 2, "layer_types": [GDN, FULL, GDN]}),
    "b": (56, "tiny-mxfp4", 7202, {  # a shared expert of another width
        "hidden_size": 256, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 128, "num_experts": 24,
        "num_experts_per_tok": 6, "head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 2,
        "rope_parameters": HEAD_64, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
        "layer_types": [FULL, GDN, GDN, FULL]}),
    "c": (52, "tiny-drawn-fp8", 7303, {  # scales that differ
        "hidden_size": 192, "moe_intermediate_size": 160, "shared_expert_intermediate_size": 64, "num_experts": 12,
        "num_experts_per_tok": 5, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
        "layer_types": [GDN, GDN, FULL]}),
    "d": (44, "tiny-moe-mxfp4", 7404, {  # the shared expert in MXFP4 too
        "hidden_size": 160, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 9,
        "num_experts_per_tok": 3, "layer_types": [GDN, GDN, FULL, GDN]}),
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One regime of one checkpoint."""

    name: str
    function: str
    regime: str
    seed: int
    part: int
    folder: Path


def score_of(task: Task) -> tuple[Task, Found]:
    torch.set_num_threads(1)
    tokens, recipe, seed, sizes = CHECKPOINTS[task.name]
    path = build(
        recipe, Path(mkdtemp(dir=task.folder)) / "checkpoint", jobs=1, seed=seed + task.seed, text_config=sizes
    )
    ids = (torch.arange(tokens) * 7919 % 251)[None]
    share = slice(task.part, None, PARTS)
    return task, mutants.run(open_checkpoint(path)[1].source, ids, task.regime, task.function, share)
