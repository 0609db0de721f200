"""What `--quantization` on SGLang's command line makes of a checkpoint.

SGLang 0.5.23 configs/model_config.py: _verify_quantization; model_loader/weight_utils.py: get_quant_config; quark.py:
from_config. ATOM's gate does not look at its online quantisation. vLLM's answer is one line, see `vllm.py`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .declared import QuantConfig
from .records import Decision, GateModel, MoEBlock, stops

# --quantization -> the methods of a checkpoint beside its own that it goes with.
COMPATIBLE = {
    "modelopt_fp8": ("modelopt",),
    "modelopt_fp4": ("modelopt", "fp8"),
    "modelopt_mixed": ("modelopt",),
    "nvfp4_online": ("fp8", "modelopt_fp8"),
    "w8a8_int8": ("compressed-tensors", "compressed_tensors"),
    "w8a8_fp8": ("compressed-tensors", "compressed_tensors"),
}
NEED_A_CHECKPOINT = ("quark", "awq", "gptq_marlin", "auto-round", "modelopt", "modelopt_fp8", "modelopt_mixed")
MXFP4_STEP = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "is_dynamic": False, "scale_format": "e8m0"}
FP8_STEP = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}
MXFP4_SPEC, FP8_SPEC = (
    {"weight": step, "input_tensors": step | {"is_dynamic": True}} for step in (MXFP4_STEP, FP8_STEP)
)
NEVER_CONVERTED = ["re:.*gate$", "re:.*router", "re:.*lm_head", "re:.*embed_tokens"]
# What else stays as it is where the checkpoint lists nothing; only under this model_type, not under its `_text`.
LEFT_OUT = {"qwen3_5_moe": ["re:.*n_proj_a", *(f"re:.*{name}" for name in (
    "in_proj_b", "in_proj_qkv", "in_proj_z", "o_proj", "out_proj", "qkv_proj", "shared_expert"))]}  # fmt: skip


def requantised(model: GateModel, layer: MoEBlock, word: str) -> GateModel | Decision:
    """The model as SGLang builds it under `--quantization word`, or why it does not start. word "": without it."""
    raw, method = model.quant.raw, _method(model.quant.raw)
    if word == "quark_mxfp4":
        made = _quark_mxfp4(raw, method, model.top.get("model_type"))
        if isinstance(made, str):
            return stops(f"SGLang has no conversion to MXFP4 from {made}", f"--quantization {word}")
        # A draft keeps the checkpoint's own quantisation, if there is one.
        return model if layer.draft and method else _with(model, made)
    if raw and not method:  # hf_quant_config.json with an algorithm that SGLang does not know
        if word.startswith("modelopt"):
            return stops("hf_quant_config.json states an unknown algorithm", f"--quantization {word}")
        model, raw = _with(model, {}), {}
    if not raw and word in NEED_A_CHECKPOINT:
        return stops(f"--quantization {word} needs a checkpoint that is", "no quantization_config")
    if not raw or word in ("", method):
        return model
    if method not in COMPATIBLE.get(word, ()):
        return stops(f"the checkpoint is {method}, not {word}", f"--quantization {word}")
    return model if method == "modelopt" else _with(model, {"quant_method": "nvfp4_online"})


def _with(model: GateModel, raw: Mapping[str, Any]) -> GateModel:
    quant = QuantConfig.from_dict(raw, model.quant.num_hidden_layers, model.quant.shared_word)
    return replace(model, quant=quant)


def _method(raw: Mapping[str, Any]) -> str:
    """SGLang's word for a checkpoint's method: that of ModelOpt depends on the algorithm."""
    method, inner = raw.get("quant_method") if raw else "", raw.get("quantization", raw)
    if method not in (None, "modelopt"):
        return str(method)
    algo, layers = str(inner.get("quant_algo", "")), inner.get("quantized_layers") or {}
    if algo == "MIXED_PRECISION":
        mixed = any("NVFP4" in str(entry.get("quant_algo", "")).upper() for entry in layers.values())
        return "modelopt_mixed" if mixed else "w4afp8"
    known = "modelopt_fp4" if "FP4" in algo else {"FP8": "modelopt_fp8", "MXFP8": "mxfp8"}.get(algo)
    return known or ("" if inner is not raw else "modelopt")


def _quark_mxfp4(raw: Mapping[str, Any], method: str, model_type: object) -> dict[str, Any] | str:
    """The configuration that SGLang writes for itself, or what it cannot convert."""
    if "quantization" in raw:  # hf_quant_config.json is read where it says FP4
        inner = raw["quantization"]
        fp4 = "FP4" in str(inner.get("quant_algo")).upper()
        producer = (raw.get("producer") or {}).get("name") or "modelopt"
        raw, method = ({**inner, "quant_method": producer}, str(producer)) if fp4 else ({}, "")
    algo, layers = str(raw.get("quant_algo") or "").upper(), raw.get("quantized_layers")
    weight = (raw.get("global_quant_config") or {}).get("weight")
    listed = raw.get("ignore") or raw.get("exclude_modules") or raw.get("exclude") or []
    specs: dict[str, Any] | None = None
    if algo == "MIXED_PRECISION" and layers:
        specs = _by_tail(layers)
        if specs is None:
            return "layers that are neither NVFP4 nor FP8, or of several kinds under one name"
    elif not raw or method == "fp8" and raw.get("activation_scheme") == "dynamic":
        listed = []
    elif not (
        method in ("modelopt", "modelopt_fp4", "nvfp4") and algo in ("", "NVFP4", "FP4")
        or method == "quark" and isinstance(weight, list) and _nvfp4_weight(weight)
    ):  # fmt: skip
        return f"{method} {algo}".strip()
    patterns = [p if p.startswith("re:") else "re:" + fnmatch.translate(p) for p in listed]
    patterns = patterns or (LEFT_OUT.get(str(model_type), []) if specs is None else [])
    made = {"quant_method": "quark", "exclude": NEVER_CONVERTED + patterns, "global_quant_config": MXFP4_SPEC}
    return made | {"layer_quant_config": specs or {}, "is_prequantized": False}


def _nvfp4_weight(weight: list[Mapping[str, Any]]) -> bool:
    """FP4 in groups of 16, then FP8 scales a tensor, both static."""
    wanted: tuple[dict[str, Any], ...]
    wanted = {"dtype": "fp4", "qscheme": "per_group", "group_size": 16}, {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}
    pairs = zip(weight, wanted, strict=False)
    return len(weight) == 2 and all(s.items() >= want.items() and not s.get("is_dynamic") for s, want in pairs)


def _by_tail(layers: Mapping[str, Any]) -> dict[str, Any] | None:
    """ModelOpt's quantized_layers by what follows the layer's number; None where SGLang raises."""
    algos: dict[str, set[str]] = {}
    for name, entry in layers.items():
        tail = re.split(r"\.layers\.\d+\.", name, maxsplit=1)[-1]
        algos.setdefault("*" + tail, set()).add(str(entry.get("quant_algo", "")).upper())
    known = {"NVFP4": MXFP4_SPEC, "W4A16_NVFP4": MXFP4_SPEC, "FP8": FP8_SPEC}
    if any(len(words) > 1 or not words <= known.keys() for words in algos.values()):
        return None
    specs = {key: known[word] for key, (word,) in algos.items()}
    return specs if MXFP4_SPEC in specs.values() else None
