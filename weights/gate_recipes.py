"""The gate's view of real checkpoints: configurations rebuilt from what is known, and the decision of every rule.

    python -m weights.gate_recipes                        lists them
    python -m weights.gate_recipes 397b-mxfp4 > config.json

A recipe in recipes/gate/ is not a copy of a file on the hub. Each says where its facts come from. Lists of up to 2,000
module names are written as patterns: `{all}`, `{linear}`, `{full}` are layer numbers, `{expert}` expert numbers,
`{visual}` the blocks of the vision tower, and `{a,b}` alternatives.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

from qwen35_moe.quant.precision import BF16, MXFP4, NVFP4, ModuleSpec

from .layouts import QUARK_FP8, QUARK_WEIGHT

HERE = Path(__file__).parent
STORED = {
    "bf16": BF16,
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
    "fp8-block": ModuleSpec("fp8-block", (128, 128), "bf16"),
    "int4": ModuleSpec("int4", (128,)),
}


@dataclass(frozen=True)
class Recipe:
    """config: a config.json with its quantization_config. expected: variant of the gate -> what it decides.

    A value is one word for the target's layers or two, for target and draft: "no", "fused", "online"; with an
    exclamation mark if acting on it would break.
    """

    name: str
    doc: str
    source: str
    config: dict[str, Any]
    stored: Callable[[str], ModuleSpec | None]
    expected: dict[str, str]


def names() -> list[str]:
    return sorted(p.stem for p in (HERE / "recipes/gate").glob("*.toml"))


def load(name: str) -> Recipe:
    recipe = tomllib.loads((HERE / f"recipes/gate/{name}.toml").read_text(encoding="utf-8"))
    config = json.loads((HERE / f"configs/{recipe['config']}.json").read_text(encoding="utf-8"))
    quantization = dict(recipe.get("quantization") or {})
    for key in ("exclude", "ignore", "modules_to_not_convert"):
        if key in quantization:
            quantization[key] = sorted(expand(quantization[key], config))
    if quantization.get("quant_method") == "quark":
        weight = {"weight": QUARK_WEIGHT, "input_tensors": QUARK_WEIGHT | {"is_dynamic": True}}
        fp8 = {"weight": QUARK_FP8, "input_tensors": QUARK_FP8 | {"is_dynamic": True}}
        quantization |= {"global_quant_config": weight, "layer_type_quant_config": {}}
        quantization["layer_quant_config"] = dict.fromkeys(quantization.pop("fp8_layers", ()), fp8)
    config["quantization_config"] = quantization or None
    kinds = list(recipe["stored"].items())

    def stored(module: str) -> ModuleSpec | None:
        return next((STORED[kind] for pattern, kind in kinds if fnmatchcase(module, pattern)), None)

    return Recipe(name, recipe["doc"].strip(), recipe["source"], config, stored, recipe["expected"])


def expand(patterns: Iterable[str], config: dict[str, Any]) -> list[str]:
    """Module names from patterns with braces."""
    text = config.get("text_config", config)
    kinds = text["layer_types"]
    numbers = {
        "all": range(len(kinds)),
        "linear": [i for i, kind in enumerate(kinds) if kind == "linear_attention"],
        "full": [i for i, kind in enumerate(kinds) if kind == "full_attention"],
        "expert": range(text["num_experts"]),
        "visual": range((config.get("vision_config") or {}).get("depth", 0)),
    }
    found = []
    for pattern in patterns:
        pieces = re.split(r"(\{[^}]*\})", pattern)
        choices = [numbers[piece[1:-1]] if piece[1:-1] in numbers else piece.strip("{}").split(",") for piece in pieces]
        found += ["".join(map(str, choice)) for choice in product(*choices)]
    return found


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1] in names():
        print(json.dumps(load(sys.argv[1]).config, indent=1))
    else:
        print("\n".join(f"{name:24} {load(name).doc.splitlines()[0]}" for name in names()))
