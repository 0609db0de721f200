"""Small configurations for the tests of the gate, what could be stored under them, and who fuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qwen35_moe.gate.decide import can_fuse_shared_expert
from qwen35_moe.quant.precision import MXFP4, ModuleSpec

Json = dict[str, Any]
Stored = Callable[[str], ModuleSpec]
PREFIX = "model.language_model.layers"
FP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "is_dynamic": False, "scale_format": "e8m0"}
FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_channel", "is_dynamic": False}
W4A4 = {"weight": FP4, "input_tensors": FP4 | {"is_dynamic": True}}
W8A8 = {"weight": FP8, "input_tensors": FP8 | {"is_dynamic": True}}
TEXT: Json = {
    "model_type": "qwen3_5_moe_text",
    "num_hidden_layers": 4,
    "num_experts": 8,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "mtp_num_hidden_layers": 1,
}
QWEN: Json = {"model_type": "qwen3_5_moe", "text_config": TEXT}
NV = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


def quark(*exclude: str, **more: Any) -> Json:
    layers = more.pop("layers", {})
    base = {"quant_method": "quark", "global_quant_config": W4A4, "layer_quant_config": layers}
    return base | {"exclude": list(exclude)} | more


def body(layers: range = range(4), parts: str = "down gate up", prefix: str = PREFIX) -> list[str]:
    return [f"{prefix}.{n}.mlp.shared_expert.{p}_proj" for n in layers for p in parts.split()]


DRAFT_BODY = body(range(1), prefix="mtp.layers")


def shared(spec: ModuleSpec, routed: ModuleSpec = MXFP4) -> Stored:
    """Stored are shared experts of one spec, and all else of another."""
    return lambda name: spec if "shared_expert" in name else routed


def draft(spec: ModuleSpec, rest: Stored) -> Stored:
    return lambda name: spec if name.startswith("mtp.") else rest(name)


def answers(config: Any, quant: Any, rules: str, **options: Any) -> str:
    """For each rule: 1 fuses, 0 does not, - does not start. vLLM is opted in."""
    asked = {"vllm_opt_in": True} | options
    decisions = [can_fuse_shared_expert(config, quant, rule, **asked) for rule in rules.split()]
    return " ".join("-" if not d.starts else str(int(d.fused)) for d in decisions)
