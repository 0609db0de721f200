"""Random quantization_configs as people write them, of every method, for the comparison of gates."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

Json = dict[str, Any]
FP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "is_dynamic": False, "scale_format": "e8m0"}
FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_channel", "is_dynamic": False}
SPECS = [
    {"weight": w, "input_tensors": i and i | {"is_dynamic": True}} for w, i in ((FP4, FP4), (FP8, FP8), (FP4, None))
]
NVFP4 = [FP4 | {"group_size": 16}, {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "group_size": None}]
INT4 = [FP8 | {"qscheme": "per_tensor"}, {"dtype": "int4", "qscheme": "per_channel", "symmetric": True, "ch_axis": 0}]
STEPS = [{"weight": w, "input_tensors": i} for w, i in (
    (NVFP4, [NVFP4[0] | {"is_dynamic": True}, NVFP4[1]]), (NVFP4, NVFP4), ([FP4, FP4], [FP4, FP4]),
    (NVFP4, FP4 | {"is_dynamic": True}), (INT4, FP8 | {"is_dynamic": True}),
)]  # fmt: skip
PARTS = ("gate_proj", "up_proj", "down_proj")
BASES = ("model.language_model.layers.{}",) * 3 + ("model.layers.{}", "layers.{}", "language_model.model.layers.{}")
ALGOS = (*("FP8", "NVFP4", "NVFP4", "NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "nvfp4", "W4A8_NVFP4_FP8", "MXFP8", "MXFP8"),
         *("FP8_PB_WO", "FP8_BLOCK_SCALES", "INT4_AWQ", *["MIXED_PRECISION"] * 4))  # fmt: skip


def names(rng: random.Random) -> str:
    """An entry: names, globs, regular expressions, parts; of target, draft and head."""
    base = "mtp.layers.0" if rng.random() < 0.2 else rng.choice(BASES).format(rng.randrange(3))
    shared, routed = f".mlp.shared_expert.{rng.choice(PARTS)}", f".mlp.experts.{rng.randrange(3)}.{rng.choice(PARTS)}"
    blocks = (".mlp.shared_expert_gate", ".mlp.experts", ".mlp.gate", ".mlp.shared_expert", ".mlp")
    tail = rng.choice((shared, routed, ".mlp.shared_expert.gate_up_proj", *blocks))
    form = rng.randrange(10)
    if form < 5:
        return base + tail
    if form < 7:
        return "*" + tail.removeprefix(rng.choice(("", ".mlp"))) + rng.choice(("", "*", ".*"))
    if form == 7:
        return (base if rng.random() < 0.5 else re.sub(r"\d+", "*", base, count=1)) + tail + rng.choice(("", "*", ".*"))
    return "re:" + rng.choice((".*", re.escape(base))) + re.escape(tail) + rng.choice(("", "$", ".*"))


def listed(rng: random.Random) -> list[str]:
    found = [names(rng) for _ in range(rng.choice((0, 1, 1, 2, 3, 6)))]
    if rng.random() < 0.3:  # a whole body, as lists of real checkpoints have it
        found += [f"model.language_model.layers.{n}.mlp.shared_expert.{p}" for n in range(3) for p in PARTS]
    if rng.random() < 0.1:  # single experts over several layers, one of them perhaps left out
        found += [
            f"model.language_model.layers.{n}.mlp.experts.{e}.{p}" for n in range(3) for e in range(3) for p in PARTS
        ]
    if rng.random() < 0.1:  # all of the draft
        found += [f"mtp.layers.0.mlp.experts.{e}.{p}" for e in range(3) for p in PARTS]
    rng.shuffle(found)
    return found[: -1 if rng.random() < 0.1 else None]


def _quark(rng: random.Random) -> Json:
    keys = [*(names(rng).removeprefix("re:") for _ in range(rng.choice((0, 0, 1, 2, 4)))), "*experts*", "*.mlp.*"]
    keys = keys[: rng.choice((-1, -2, -2, None))]
    layers = {key: rng.choice(SPECS) for key in keys}
    if rng.random() < 0.1:
        layers |= {name: SPECS[1] for name in listed(rng) if not name.startswith("re:")}
    raw: Json = {"quant_method": "quark", "global_quant_config": rng.choice(SPECS), "exclude": listed(rng)}
    raw |= {"layer_quant_config": layers, "layer_type_quant_config": {}}
    nulls = ("exclude", "layer_quant_config", "layer_type_quant_config", "global_quant_config")
    if rng.random() < 0.05:
        raw["global_quant_config"] = rng.choice(STEPS)
    return raw | ({rng.choice(nulls): None} if rng.random() < 0.05 else {})


def _fp8(rng: random.Random) -> Json:
    key = rng.choice(("ignored_layers", "modules_to_not_convert"))
    block = {"weight_block_size": [128, 128]} if rng.random() < 0.8 else {}
    block |= {"activation_scheme": rng.choice(("dynamic", "dynamic", "static"))}
    return {"quant_method": "fp8", **block, key: [n for n in listed(rng) if not n.startswith(("re:", "*"))]}


def _modelopt(rng: random.Random) -> Json:
    algo, plain = rng.choice(ALGOS), [n for n in listed(rng) if not n.startswith("re:")]
    inner: Json = {"quant_algo": algo, **({"group_size": 16} if rng.random() < 0.9 else {})}
    if algo == "MIXED_PRECISION":
        words = ("NVFP4", "MXFP8") if rng.random() < 0.6 else ("NVFP4", "W4A16_NVFP4", "FP8")
        chosen = [n for n in listed(rng) if not n.startswith(("re:", "*"))] or [
            "model.language_model.layers.0.mlp.experts"
        ]
        inner["quantized_layers"] = {name: {"quant_algo": rng.choice(words), "group_size": 16} for name in chosen}
    if rng.random() < 0.3:  # hf_quant_config.json
        return {"quant_method": "modelopt", "quantization": inner | {"exclude_modules": plain}}
    lists = {key: listed(rng) if rng.random() < 0.1 else plain for key in rng.choice(KEYS)}
    return {"quant_method": "modelopt", **inner, **(lists if rng.random() < 0.98 else dict.fromkeys(lists))}


KEYS = (("ignore",), ("ignore",), ("exclude_modules",), ("ignore", "exclude_modules"), ())


def _gptq(rng: random.Random) -> Json:
    dynamic: Json = {f"{rng.choice('-+')}:.*{re.escape(names(rng).strip('*'))}.*": {} for _ in range(rng.randrange(3))}
    return {
        "quant_method": "gptq",
        "bits": rng.choice((2, 3, 4, 8)),
        "group_size": 128,
        "sym": True,
        "dynamic": dynamic,
    }


def _compressed_tensors(rng: random.Random) -> Json:
    weights = {
        "num_bits": rng.choice((4, 8)),
        "type": rng.choice(("float", "int")),
        "strategy": "group",
        "group_size": 32,
    }
    group = {"targets": [rng.choice(("Linear", "re:.*experts.*"))], "weights": weights}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": listed(rng)}


def _other(rng: random.Random) -> Json:
    return rng.choice(({}, {"quant_method": "awq", "bits": 4, "group_size": 128}))


WORDS = ("quark_mxfp4", "quark_mxfp4", "fp8", "mxfp8", "quark", "modelopt_fp4", "nvfp4_online")  # --quantization
METHODS: tuple[tuple[float, Callable[[random.Random], Json]], ...] = (
    (0.55, _quark), (0.12, _fp8), (0.15, _modelopt), (0.06, _gptq), (0.09, _compressed_tensors), (0.03, _other),
)  # fmt: skip


def draw(rng: random.Random) -> tuple[Json, Json, Json]:
    """(config, its quantization_config, switches of the engine)."""
    shared = rng.choice((32,) * 20 + (64,))
    text: Json = {
        "model_type": "qwen3_5_moe_text",
        "num_hidden_layers": 3,
        "num_experts": 3,
        "mtp_num_hidden_layers": 1,
    }
    text |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": shared}
    top = {"model_type": "qwen3_5_moe", "text_config": text} if rng.random() < 0.7 else text
    make = rng.choices([method for _, method in METHODS], [weight for weight, _ in METHODS])[0]
    options: Json = {"enforce_shared_experts_fusion": rng.random() < 0.3, "vllm_opt_in": True}
    options["vllm_online_target"] = rng.choice(("", "", "mxfp4"))
    options["quantization"] = rng.choice(("",) * 30 + WORDS)
    return top, make(rng), options
