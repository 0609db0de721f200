"""The oracle's score on checkpoints that nothing was chosen by: other widths, seeds, patterns of layers and layouts.

    python -m benchmarks.oracle_score [a b c d] [--regime "gate 0.05"] [--function +a8] [--folder DIR]

Each is built; then every fault of the catalogue, faults that it lacks and clean variants are planted.
One regime of one checkpoint takes about a minute of one core (31 s to 61 s measured).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.oracle_score import mutants, score
from qwen35_moe.numerics.tables import A8
from qwen35_moe.oracle.truth import open_checkpoint
from weights.build import build

GDN, FULL = "linear_attention", "full_attention"
HEAD_64 = {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default", "rope_theta": 500000,
           "partial_rotary_factor": 0.25}  # fmt: skip

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
    "c": (52, "tiny-fp8", 7303, {
        "hidden_size": 192, "moe_intermediate_size": 160, "shared_expert_intermediate_size": 64, "num_experts": 12,
        "num_experts_per_tok": 5, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
        "layer_types": [GDN, GDN, FULL]}),
    "d": (44, "tiny-moe-mxfp4", 7404, {  # the shared expert in MXFP4 too
        "hidden_size": 160, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 9,
        "num_experts_per_tok": 3, "layer_types": [GDN, GDN, FULL, GDN]}),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", choices=[*CHECKPOINTS, []], default=[])
    parser.add_argument("--regime", action="append", choices=mutants.REGIMES, help="default: all")
    parser.add_argument("--function", default="", choices=["", *A8], help="what the engine does to activations")
    parser.add_argument(
        "--save", type=Path, help="append what became of each fault and variant, one JSON object a line"
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "oracle-score")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.names or CHECKPOINTS:
        tokens, recipe, seed, sizes = CHECKPOINTS[name]
        path = build(recipe, options.folder / name, jobs=1, seed=seed, text_config=sizes)
        ids = (torch.arange(tokens) * 7919 % 251)[None]
        source = open_checkpoint(path)[1].source
        out = mutants.run(source, ids, options.regime or mutants.REGIMES, function=options.function)
        if options.save is not None:
            with options.save.open("a", encoding="utf-8") as file:
                for kind, outcomes in zip(("planted", "foreign", "clean"), out, strict=True):
                    file.writelines(
                        json.dumps({"checkpoint": name, "function": options.function, "kind": kind, **asdict(o)}) + "\n"
                        for o in outcomes
                    )
        print(f"{name}: {recipe}, width {sizes['hidden_size']}\n\n{score.table(*out)}\n")


if __name__ == "__main__":
    main()
