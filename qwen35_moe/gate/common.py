"""What several engines' gates share: the answers, the shape of the slot, and how raw Quark specs are looked up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import Qwen35Error
from .declared import QuantConfig
from .dialects import modelopt_list
from .exclude import Hit, first_match
from .module_names import expand_fused
from .readings import exact, glob, occurs_in_key
from .records import Decision, Evidence, GateModel, MoEBlock, Options

Rule = Callable[[GateModel, MoEBlock, Options], Decision]


def yes(reason: str, *evidence: Evidence, online: bool = False) -> Decision:
    return Decision(True, "", reason, evidence, online=online)


def no(reason: str, *evidence: Evidence) -> Decision:
    return Decision(False, "", reason, evidence)


def stops(reason: str, *evidence: Evidence) -> Decision:
    """The engine raises while it starts, whatever it would have decided."""
    return Decision(False, "", reason, evidence, starts=False)


# A refusal is a Decision that is false in a condition, so callers compare it with None.
def refuse_sizes(model: GateModel) -> Decision | None:
    """A slot has the routed experts' shape, so the shared expert must have it too."""
    if model.shared_size <= 0:
        return no("the model has no shared expert", Evidence(f"shared_expert_intermediate_size = {model.shared_size}"))
    if model.shared_size != model.routed_size:
        sizes = f"shared_expert_intermediate_size = {model.shared_size}, moe_intermediate_size = {model.routed_size}"
        return no("the shared expert has another size than the routed experts", Evidence(sizes))
    return None


def refuse_platform(options: Options) -> Decision | None:
    if options.hip and options.aiter or not options.hip and options.cuda_opt_in:
        return None
    needed = Evidence("needs ROCm with SGLANG_USE_AITER, or a CUDA model class that opts in")
    return no("the platform does not fuse", needed)


def modelopt_stops(quant: QuantConfig, algo: str, known: Sequence[str], engine: str) -> Decision | None:
    """What SGLang and vLLM raise alike while they read a ModelOpt configuration."""
    inner, key = quant.raw.get("quantization", quant.raw), modelopt_list(quant.raw)
    if algo not in known:
        return stops(f"{engine} reads {', '.join(known)} of ModelOpt, not {algo}",
                     Evidence(f"quant_algo = {algo}", "format"))  # fmt: skip
    if algo == "MIXED_PRECISION" and not inner.get("quantized_layers"):
        return stops("MIXED_PRECISION without quantized_layers", Evidence(f"quant_algo = {algo}"))
    if inner.get(key, ()) is None and (engine == "vLLM" or "NVFP4" in algo):
        return stops(f"{key} is null, and {engine} wants a list", Evidence(f"{key} = null"))
    return None


def quark_stops(quant: QuantConfig, engine: str, read: Sequence[str]) -> Decision | None:
    """A Quark configuration with null where the engine reads a list or a dictionary."""
    null = next((key for key in read if quant.raw.get(key, ()) is None), None)
    return stops(f"{null} is null, and {engine} iterates over it", Evidence(f"{null} = null")) if null else None


def quark_specs(quant: QuantConfig) -> dict[str, Mapping[str, Any]]:
    """The raw specs of a Quark configuration, by the key that they stand under."""
    specs = {"global_quant_config": quant.raw.get("global_quant_config"), **(quant.raw.get("layer_quant_config") or {})}
    return {name: spec for name, spec in specs.items() if isinstance(spec, Mapping)}


def steps(spec: Any) -> list[Mapping[str, Any]]:
    """Quark quantises a tensor in one step or in several."""
    return [step for step in (spec if isinstance(spec, list) else [spec]) if isinstance(step, Mapping) and step]


def several_steps(spec: Mapping[str, Any]) -> bool:
    """Whether weights or inputs are quantised in several steps, and are not NVFP4.

    NVFP4 has two steps each: FP4 in groups of 16, then FP8 scales per tensor; weights static, inputs dynamic.
    """
    weights, inputs = steps(spec.get("weight")), steps(spec.get("input_tensors"))
    if max(len(weights), len(inputs)) < 2:
        return False
    pairs = list(zip(weights, inputs, strict=False))
    nvfp4 = len(weights) == len(inputs) == 2 and all(
        str(x.get("dtype")).startswith(dtype)
        and x.get("qscheme") == scheme
        and (dtype != "fp4" or x.get("group_size") == 16)
        for pair, dtype, scheme in zip(pairs, ("fp4", "fp8_e4m3"), ("per_group", "per_tensor"), strict=True)
        for x in pair
    )
    dynamic = [[bool(x.get("is_dynamic")) for x in pair] for pair in pairs]
    return not nvfp4 or dynamic != [[False, True], [False, False]]


def first_entry(quant: QuantConfig, test: Callable[[str], bool], how: str = "substring") -> Hit | None:
    """The first entry of the exclude list that passes a test of the raw string."""
    found = next(((i, e) for i, e in enumerate(quant.exclude.entries) if test(e)), None)
    return Hit(quant.exclude.list, found[0], found[1], how) if found else None


def sglang_layer_config(quant: QuantConfig, name: str) -> Any:
    """The raw Quark spec of a module as SGLang finds it: patterns, entries for single experts, the default.

    Error: the parts of a fused module, or single experts, with different specs.
    """
    if parts := expand_fused(name):
        specs = [sglang_layer_config(quant, part) for part in parts]
        if any(s != specs[0] for s in specs):
            raise Qwen35Error("the parts of a fused module have different specs", where=name)
        return specs[0]
    if found := first_match(quant.layer_index, name, (exact, glob)):
        return quant.key_specs[found[0]]
    single = {key: quant.key_specs[i] for i, key in quant.layer_index.below(name)} if name.endswith(".experts") else {}
    if single:
        return _one_spec(name, single)
    if quant.raw.get("layer_type_quant_config", ()) is None:
        raise Qwen35Error("layer_type_quant_config is null, and SGLang looks into it", where=name)
    return quant.raw.get("global_quant_config")


def vllm_layer_config(quant: QuantConfig, name: str) -> Any:
    """The raw Quark spec of a module as vLLM finds it: the first key in which the name occurs, else the default."""
    found = (i for i, key in quant.layer_index.around(name) if occurs_in_key(key, name))
    return next((quant.key_specs[i] for i in found if quant.key_specs[i]), None) or quant.raw.get("global_quant_config")


def _one_spec(experts: str, single: Mapping[str, Any]) -> Any:
    """The spec that entries for single experts give to all of them; they must begin at 0, leave no gap and be alike."""
    projections: dict[str, set[str]] = {}
    for key in single:
        number, _, projection = key.partition(".experts.")[2].partition(".")
        projections.setdefault(number, set()).add(projection)
    specs, sets = list(single.values()), list(projections.values())
    complete = set(projections) == {str(i) for i in range(len(projections))} and all(all(s) for s in sets)
    if not complete or any(s != sets[0] for s in sets) or any(s != specs[0] for s in specs):
        raise Qwen35Error("entries for single experts leave gaps or differ", where=experts)
    return specs[0]
