"""Small configurations for the tests of the gate."""

from __future__ import annotations

from typing import Any

PREFIX = "model.language_model.layers"
FP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "is_dynamic": False, "scale_format": "e8m0"}
FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_channel", "is_dynamic": False}
W4A4 = {"weight": FP4, "input_tensors": FP4 | {"is_dynamic": True}}
W8A8 = {"weight": FP8, "input_tensors": FP8 | {"is_dynamic": True}}
TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "num_hidden_layers": 4,
    "num_experts": 8,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "mtp_num_hidden_layers": 1,
}
QWEN: dict[str, Any] = {"model_type": "qwen3_5_moe", "text_config": TEXT}
GLM: dict[str, Any] = TEXT | {
    "model_type": "glm_moe_dsa",
    "num_hidden_layers": 78,
    "num_nextn_predict_layers": 1,
    "mtp_num_hidden_layers": None,
}

NV = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}


def quark(*exclude: str, **more: Any) -> dict[str, Any]:
    layers = more.pop("layers", {})
    base = {"quant_method": "quark", "global_quant_config": W4A4, "layer_quant_config": layers}
    return base | {"exclude": list(exclude)} | more


def body(layers: range = range(4), parts: str = "down gate up") -> list[str]:
    return [f"{PREFIX}.{n}.mlp.shared_expert.{p}_proj" for n in layers for p in parts.split()]
