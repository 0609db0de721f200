"""Which models these are: the Qwen3.5 MoE family, and who looks like it and is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import Qwen35Error

# Qwen3.6 and Qwen3.8 carry the same names.
FAMILY = ("qwen3_5_moe", "qwen3_5_moe_text")
OTHER_MODELS = {
    "qwen4_exp": "Qwen4-Exp has hyper-connections, n-gram embeddings and an indexer",
    "qwen3_8_flash_next": "Qwen3.8-Flash-Next (125B) is Qwen4-Exp: hyper-connections, n-gram embeddings and an indexer",
    "qwen3_next": "Qwen3-Next stores the DeltaNet projections interleaved by head group (in_proj_qkvz)",
    "qwen3_5": "the dense Qwen3.5 has no experts",
    "qwen3_vl_moe": "Qwen3-VL MoE has no DeltaNet layers, and stores its experts transposed",
    "qwen3_moe": "Qwen3 MoE has no DeltaNet layers and no shared expert",
    "qwen2_moe": "Qwen2 MoE has no DeltaNet layers",
}


def check_family(top: Mapping[str, Any], text: Mapping[str, Any], ignore: Iterable[str]) -> None:
    """Error: `model_type` names another family, or the model is dense. ignore: with "model_type", all pass."""
    if "model_type" in ignore:
        return
    for kind in (top.get("model_type"), text.get("model_type")):
        if kind in (None, "", *FAMILY):
            continue
        why = next((text for name, text in OTHER_MODELS.items() if kind in (name, f"{name}_text")), "")
        what, expected = "a model of another family", " or ".join(FAMILY) + " (Qwen3.5, Qwen3.6 and Qwen3.8 MoE)"
        do = 'if it is the same model under another name, load(..., ignore_config_keys=["model_type"])'
        what, do = (f"{what}: {why}", "") if why else (what, do)
        raise Qwen35Error(what, where="config.json: model_type", expected=expected, found=repr(kind), do=do)
    if "num_experts" not in text and "intermediate_size" in text:
        expected, found = "num_experts and moe_intermediate_size", "intermediate_size and no experts"
        raise Qwen35Error("a dense model", where="config.json", expected=expected, found=found)
