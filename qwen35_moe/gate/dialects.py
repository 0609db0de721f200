"""How each quant_method writes its quantization_config: one parser a method, in DIALECT_READERS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import Qwen35Error
from ..quant.precision import BF16, MXFP4, MXFP8, UNSTATED, Activation, ModuleSpec
from .exclude import ExcludeList
from .readings import layer_class


@dataclass(frozen=True)
class Declared:
    """What a configuration says: an exclude list, a default, and specs for patterns of names in their order; of the
    last two also the key that states them."""

    exclude: ExcludeList
    default: ModuleSpec
    default_from: str
    layers: tuple[tuple[str, ModuleSpec], ...] = ()
    layers_from: str = "layer_quant_config"


def steps(spec: Any) -> list[Mapping[str, Any]]:
    """The steps in which Quark quantises a tensor, mostly one: spec["weight"] or spec["input_tensors"], as a list."""
    return [step for step in (spec if isinstance(spec, list) else [spec]) if isinstance(step, Mapping) and step]


def quark_spec(entry: Mapping[str, Any] | None) -> ModuleSpec:
    """One Quark spec, `{"weight": {...}, "input_tensors": {...}}`; a null weight is an unquantised module."""
    # If there are several steps, the first says what is stored.
    weight, inputs = (next(iter(steps((entry or {}).get(key))), {}) for key in ("weight", "input_tensors"))
    if not weight:
        return BF16
    dtype, scheme, group = str(weight.get("dtype")), str(weight.get("qscheme")), int(weight.get("group_size") or 0)
    activation = None
    if inputs:
        grouped = inputs.get("qscheme") == "per_group"
        group_in = int(inputs.get("group_size") or 0) or None if grouped else None
        activation = Activation(_short(str(inputs.get("dtype"))), bool(inputs.get("is_dynamic")), group_in)
    scale = str(weight.get("scale_format") or weight.get("scale_type") or "")
    if _short(dtype) == "fp8":
        block = tuple(weight.get("block_size") or ()) if scheme == "per_block" else ()
        return ModuleSpec(f"fp8-{scheme.removeprefix('per_')}", block, scale, activation)
    if dtype == "fp4" and scheme == "per_group":
        return ModuleSpec({32: "mxfp4", 16: "nvfp4"}.get(group, f"fp4-group{group}"), (group,), scale, activation)
    return ModuleSpec(_short(dtype), (group,) if group else (), scale, activation)


def _quark(raw: Mapping[str, Any]) -> Declared:
    if types := raw.get("layer_type_quant_config"):
        where, do = "quantization_config.layer_type_quant_config", "say it by names, in layer_quant_config"
        found = ", ".join(map(str, types))
        raise Qwen35Error("specs by a layer's type are not read", where=where, expected="{}", found=found, do=do)
    layers = tuple((key, quark_spec(spec)) for key, spec in (raw.get("layer_quant_config") or {}).items())
    stated = "global_quant_config" in raw  # every file has it; a list alone is of something quantised
    default = quark_spec(raw["global_quant_config"]) if stated else UNSTATED
    source = "global_quant_config" if stated else "a quantisation that is not stated"
    return Declared(_exclude(raw, "exclude", "quark"), default, source, layers)


def _fp8(raw: Mapping[str, Any]) -> Declared:
    block = tuple(map(int, raw.get("weight_block_size") or ()))
    activation = Activation("fp8", raw.get("activation_scheme", "dynamic") == "dynamic", block[-1] if block else None)
    exclude = _exclude(raw, "ignored_layers" if raw.get("ignored_layers") else "modules_to_not_convert", "fp8")
    default = ModuleSpec("fp8-block" if block else "fp8-tensor", block, "f32", activation)
    return Declared(exclude, default, "weight_block_size" if block else "quant_method")


def _mxfp4(raw: Mapping[str, Any]) -> Declared:
    return Declared(_exclude(raw, "modules_to_not_convert", "fp8"), MXFP4, "quant_method")


def _compressed_tensors(raw: Mapping[str, Any]) -> Declared:
    layers = []
    for group in (raw.get("config_groups") or {}).values():
        spec = _group_spec(group, group.get("format") or raw.get("format") or "")
        layers += [(target, spec) for target in group.get("targets") or ()]
    # names, then patterns, then classes
    layers.sort(key=lambda layer: (layer_class(layer[0], ""), layer[0].startswith("re:")))
    exclude = _exclude(raw, "ignore", "compressed-tensors")
    return Declared(exclude, BF16, "no config group names it", tuple(layers), "config_groups")


def _group_spec(group: Mapping[str, Any], form: str) -> ModuleSpec:
    """compressed-tensors: {"weights": {num_bits, type, strategy, group_size}, "input_activations": ...}."""
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    bits, kind, size = weights.get("num_bits"), weights.get("type"), weights.get("group_size")
    block = tuple(weights.get("block_structure") or ()) or ((size,) if size else ())
    activation = None
    if inputs:
        dtype = f"{'fp' if inputs.get('type') == 'float' else 'int'}{inputs.get('num_bits')}"
        activation = Activation(dtype, bool(inputs.get("dynamic")), inputs.get("group_size"))
    if kind == "float" and bits == 4:
        if "mxfp4" in form or size == 32:
            return ModuleSpec("mxfp4", block or (32,), "e8m0", activation)
        return ModuleSpec("nvfp4", block or (16,), "e4m3", activation)
    if kind == "float" and bits == 8 and "mxfp8" in form:
        return replace(MXFP8, activation=activation)
    if kind == "float" and bits == 8:
        return ModuleSpec(f"fp8-{weights.get('strategy', 'tensor')}", block, "", activation)
    return ModuleSpec(f"int{bits}", block, "", activation) if bits else BF16


def _modelopt(raw: Mapping[str, Any]) -> Declared:
    inner = modelopt_part(raw)
    algo = str(inner.get("quant_algo") or raw.get("quant_algo") or "").upper()
    layers = inner.get("quantized_layers") or {}
    specs = {name: _algo_spec(str(entry.get("quant_algo")).upper(), entry) for name, entry in layers.items()}
    exclude = _exclude(inner, modelopt_list(raw), "modelopt")
    default = BF16 if algo == "MIXED_PRECISION" else _algo_spec(algo, inner)
    return Declared(exclude, default, f"quant_algo {algo}", tuple(specs.items()), "quantized_layers")


def modelopt_part(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The dictionary with ModelOpt's keys: in hf_quant_config.json it lies under `quantization`."""
    return raw.get("quantization", raw)


def modelopt_list(raw: Mapping[str, Any]) -> str:
    """The key of ModelOpt's exclude list: `ignore`, if config.json has it; otherwise `exclude_modules`."""
    return "ignore" if "quantization" not in raw and "ignore" in raw else "exclude_modules"


# "PB_WO" is "per block, weights only"; some exports write it in lower case.
MODELOPT_FP8 = {
    "FP8": ModuleSpec("fp8-tensor", (), "f32", Activation("fp8", False)),
    "FP8_PER_CHANNEL_PER_TOKEN": ModuleSpec("fp8-channel", (), "f32", Activation("fp8")),
    "FP8_PB_WO": ModuleSpec("fp8-block", (128, 128), "f32"),
    "FP8_BLOCK_SCALES": ModuleSpec("fp8-block", (128, 128), "f32"),
    "MXFP8": replace(MXFP8, activation=Activation("fp8", True, 32)),
}


def _algo_spec(algo: str, entry: Mapping[str, Any]) -> ModuleSpec:
    group = entry.get("group_size") or 16
    if "NVFP4" in algo:
        inputs = Activation("fp8", False) if "A8" in algo else Activation("fp4", True, group)
        return ModuleSpec("nvfp4", (group,), "e4m3", None if "A16" in algo else inputs)
    if algo in MODELOPT_FP8:
        return MODELOPT_FP8[algo]
    return UNSTATED  # INT4_AWQ, W4A8_AWQ, ...: what they are is in the bytes


def _gptq(raw: Mapping[str, Any]) -> Declared:
    bits, group = raw.get("bits", 4), raw.get("group_size") or -1
    exclude = _exclude({"dynamic": tuple(raw.get("dynamic") or ())}, "dynamic", "gptq")
    return Declared(exclude, ModuleSpec(f"int{bits}", (group,) if group > 0 else (), "f16"), "bits")


def _exclude(raw: Mapping[str, Any], key: str, semantics: str) -> ExcludeList:
    entries = raw.get(key) or ()
    listed = isinstance(entries, (list, tuple, set, frozenset))
    if not listed or not all(isinstance(e, str) for e in entries):
        where, found = f"quantization_config.{key}", repr(entries)[:200]
        raise Qwen35Error("an exclude list must hold strings", where=where, found=found)
    return ExcludeList(entries, semantics, key)


def _short(dtype: str) -> str:
    return "fp8" if dtype.startswith("fp8") else dtype


# Names of one and the same method.
ALIASES = {"compressed_tensors": "compressed-tensors", "gptq_marlin": "gptq", "gptqmodel": "gptq"}
ALIASES |= dict.fromkeys(("modelopt_fp4", "modelopt_fp8", "modelopt_mixed", "modelopt_mxfp8", "nvfp4"), "modelopt")

DIALECT_READERS = {"quark": _quark, "fp8": _fp8, "mxfp4": _mxfp4, "compressed-tensors": _compressed_tensors,
                   "modelopt": _modelopt, "gptq": _gptq}  # fmt: skip
