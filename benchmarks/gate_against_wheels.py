"""The gate's rules against the engines' own code, lifted from their wheels: who decides otherwise, on how many configs?

    python -m benchmarks.gate_against_wheels WHEELS --count 20000

WHEELS is a folder with `sglang-*.whl` and `vllm-*.whl` (`pip download --no-deps sglang==0.5.23`). ATOM has no wheel.
Configurations are drawn, and those of `weights/recipes/gate` are added; target and draft are asked. A disagreement is
printed with as few entries as it needs.

Not lifted, and so not compared: platform, all-to-all backends, sizes, the `export` section, online conversion.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qwen35_moe.gate.decide import decide_layers
from qwen35_moe.gate.records import Model
from weights import gate_recipes

from .lifted_engines import Answer, Json, Sglang, Vllm


def ours(engine: Sglang | Vllm, top: Json, raw: Json) -> Answer:
    decisions = decide_layers(Model.from_config(top, raw), rule=engine.rule, **engine.options)
    words = ["fused" if d else "no" if d.starts else "stops" for d in decisions]
    target = "stops" if "stops" in words[:-1] else words[0]
    return target, words[-1]


FP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "is_dynamic": False, "scale_format": "e8m0"}
FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_channel", "is_dynamic": False}
SPECS = [
    {"weight": w, "input_tensors": i and i | {"is_dynamic": True}} for w, i in ((FP4, FP4), (FP8, FP8), (FP4, None))
]
PARTS = ("gate_proj", "up_proj", "down_proj")


def names(rng: random.Random) -> str:
    """An entry as people write them: names, globs, regular expressions, parts; of target, draft and head."""
    base = rng.choice(("model.language_model.layers.{}", "model.layers.{}", "mtp.layers.0", "layers.{}")).format(
        rng.randrange(3)
    )
    shared, routed = f".mlp.shared_expert.{rng.choice(PARTS)}", f".mlp.experts.{rng.randrange(3)}.{rng.choice(PARTS)}"
    blocks = (".mlp.shared_expert_gate", ".mlp.experts", ".mlp.gate", ".mlp.shared_expert", ".mlp")
    tail = rng.choice((shared, routed, ".mlp.shared_expert.gate_up_proj", *blocks))
    form = rng.randrange(8)
    if form < 4:
        return base + tail
    if form < 6:
        return "*" + tail + rng.choice(("", "*", ".*"))
    return "re:" + rng.choice((".*", re.escape(base))) + re.escape(tail) + rng.choice(("", "$", ".*"))


def draw(rng: random.Random, engine: Sglang | Vllm) -> tuple[Json, Json]:
    text: Json = {
        "model_type": "qwen3_5_moe_text",
        "num_hidden_layers": 3,
        "num_experts": 3,
        "mtp_num_hidden_layers": 1,
    }
    text |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    top = {"model_type": "qwen3_5_moe", "text_config": text} if rng.random() < 0.7 else text
    listed = [names(rng) for _ in range(rng.choice((0, 1, 1, 2, 3, 6)))]
    if rng.random() < 0.3:  # a whole body, as lists of real checkpoints have it
        listed += [f"model.language_model.layers.{n}.mlp.shared_expert.{p}" for n in range(3) for p in PARTS]
    kind = rng.random()
    if kind < 0.7:
        layers = {names(rng).removeprefix("re:"): rng.choice(SPECS) for _ in range(rng.choice((0, 0, 1, 2, 4)))}
        raw: Json = {"quant_method": "quark", "global_quant_config": rng.choice(SPECS), "exclude": listed}
        raw |= {"layer_quant_config": layers, "layer_type_quant_config": {}}
        raw |= {"exclude": None} if rng.random() < 0.01 else {}
        return top, raw
    if isinstance(engine, Vllm) and kind < 0.85:
        plain = [name for name in listed if not name.startswith(("re:", "*"))]
        return top, {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": plain}
    algo = "MXFP8" if isinstance(engine, Vllm) else "NVFP4"
    return top, {
        "quant_method": "modelopt",
        "quant_algo": algo,
        "ignore": [n for n in listed if not n.startswith("re:")],
    }


def recipes() -> Iterator[tuple[Json, Json]]:
    for name in gate_recipes.names():
        config = gate_recipes.load(name).config
        if (raw := config.get("quantization_config")) and raw["quant_method"] == "quark":
            yield config, raw


def minimised(differs: Callable[[Json], bool], raw: Json) -> Json:
    """The same disagreement with as few entries as possible."""
    for key in ("exclude", "ignore", "ignored_layers", "layer_quant_config"):
        for entry in list(raw.get(key) or ()):
            kept = raw[key]
            less = (
                {k: v for k, v in kept.items() if k != entry}
                if isinstance(kept, dict)
                else [e for e in kept if e != entry]
            )
            if differs(raw | {key: less}):
                raw = raw | {key: less}
    return raw


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    worst = 0
    for kind, pattern in ((Sglang, "sglang-*.whl"), (Vllm, "vllm-*.whl")):
        for file in sorted(args.wheels.glob(pattern)):
            with zipfile.ZipFile(file) as wheel:
                engine = kind(wheel)
            rng, wrong, asked, answers = random.Random(args.seed), 0, 0, Counter[Answer]()
            drawn = (draw(rng, engine) for _ in range(args.count))
            for top, raw in itertools.chain(recipes() if kind is Sglang else (), drawn):
                asked += 1
                answers[ours(engine, top, raw)] += 1

                def differs(changed: Json, top: Json = top, engine: Any = engine) -> bool:
                    return ours(engine, top, changed) != engine.answer(top, copy.deepcopy(changed))

                if differs(raw):
                    wrong += 1
                    if wrong <= 12:
                        small = minimised(differs, raw)
                        print(f"  ours {ours(engine, top, small)}, theirs {engine.answer(top, small)}: {small}")
            print(f"{file.name} against {engine.rule}: {asked} configurations, {wrong} disagreements")
            print("  target, draft: " + ", ".join(f"{a} {b} {n}" for (a, b), n in answers.most_common()))
            worst += wrong
    return int(worst > 0)


if __name__ == "__main__":
    raise SystemExit(main())
