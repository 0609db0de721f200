"""vLLM's gate, written from what it does, not copied: quantization/utils/config_utils.py:59-370, fused_moe/utils.py.

It is asked layer by layer, behind an environment variable that is off by default. Where layers differ, or where one
part of a fused pair is left out and the other is not, vLLM raises while it builds the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from ..errors import Qwen35Error
from .common import modelopt_stops, no, quark_stops, refuse_sizes, several_steps, steps, stops, vllm_layer_config, yes
from .declared import QuantConfig
from .dialects import ALIASES
from .exclude import Hit
from .module_names import expand_fused
from .namespaces import VLLM
from .records import Decision, Evidence, GateModel, MoEBlock, Options

# modelopt.py: QUANT_ALGOS
VLLM_ALGOS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8", "MIXED_PRECISION")
SHARED_MODULES = ("gate_up_proj", "down_proj")


def vllm_0_33(model: GateModel, layer: MoEBlock, options: Options) -> Decision:
    """vLLM 0.33; 0.32 decides the same for Quark and FP8, and has no check for MXFP8."""
    quant = model.quant.read_as("vllm", VLLM, model.nested)
    word = ALIASES.get(options.quantization, options.quantization)
    if word and quant.method in ("quark", "fp8", "compressed-tensors") and word != quant.method:
        return stops(f"the checkpoint is {quant.method}, not {word}", Evidence(f"--quantization {word}"))
    decision = _decide(model, quant, layer, options)
    if quant.method == "quark" and (trouble := _cannot_start(quant, layer, decision.fused)) is not None:
        return trouble
    if quant.method == "modelopt":
        algo = str(quant.raw.get("quantization", quant.raw).get("quant_algo", "")).upper()
        if (trouble := modelopt_stops(quant, algo, VLLM_ALGOS, "vLLM")) is not None:
            return trouble
    return decision


def _decide(model: GateModel, quant: QuantConfig, layer: MoEBlock, options: Options) -> Decision:
    if not options.vllm_opt_in:
        return no("VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS is not set")
    if not (options.hip and options.aiter):
        return no("the platform does not fuse", Evidence("needs ROCm with VLLM_ROCM_USE_AITER"))
    if (refusal := refuse_sizes(model)) is not None:
        return refusal
    if quant.method == "none":
        if options.quantization:
            return no(f"vLLM has no compatibility check for --quantization {options.quantization}")
        return yes("the model is not quantised")
    if layer.draft and any(k.startswith("-:") and "mtp" in k for k in quant.raw.get("dynamic") or ()):
        return yes("an entry of `dynamic` names mtp, so the draft is built without a quantisation")
    if options.vllm_online_target:
        return _online(quant, layer, options.vllm_online_target)
    if quant.method == "quark":
        return _quark(quant, layer)
    if quant.method == "fp8" and (quant.default.kind != "fp8-block" or quant.raw.get("store_dtype") is not None):
        return no("FP8 without blocks, or stored as another dtype, is not implemented")
    if quant.method == "fp8":
        return _alike(quant, layer, _fp8_ignored, "ignored")
    if quant.method == "modelopt" and quant.default.kind == "mxfp8":
        return _alike(quant, layer, _modelopt_excluded, "excluded")
    return no(f"vLLM has no compatibility check for method {quant.method!r}")


def all_or_none(decisions: list[Decision]) -> list[Decision]:
    """vLLM raises NotImplementedError where some layers of a model fuse and others do not."""
    target = [d for d in decisions if not d.draft and d.starts]
    against = next((d for d in target if not d), None)
    if against is None or not any(target):
        return decisions
    count = sum(d.fused for d in target)
    text = f"fused shared experts must be enabled for all layers; {count} are, {len(target) - count} are not"
    stop = stops(text, Evidence(f"first {against.layer}: {against.reason}"), *against.evidence)
    return [d if d.draft or not d.starts else replace(stop, rule=d.rule, layer=d.layer) for d in decisions]


def _shared_hit(quant: QuantConfig, layer: MoEBlock, part: str) -> Hit | None:
    return quant.exclude.hit(quant.names(f"{layer.name}.mlp.shared_expert.{part}"))


def _cannot_start(quant: QuantConfig, layer: MoEBlock, fused: bool) -> Decision | None:
    """What raises while the experts are built, and the shared expert's linear layers if it is not fused."""
    if (null := quark_stops(quant, "vLLM", ("exclude", "layer_type_quant_config"))) is not None:
        return null
    names = quant.names(layer.experts)
    if quant.exclude.hit(names) is None and (text := _no_scheme(quant, vllm_layer_config(quant, *names), int4=True)):
        return stops(text, Evidence(layer.experts))
    if fused:
        return None
    try:
        if _shared_hit(quant, layer, "gate_up_proj"):
            return None
    except Qwen35Error as error:
        return stops("only one of a fused pair is excluded", Evidence(f"{error.where}: {error.found}"))
    gate, up = (vllm_layer_config(quant, *quant.names(layer.shared[part])) for part in ("gate_proj", "up_proj"))
    if gate != up:
        return stops("gate_proj and up_proj have different specs", Evidence(layer.shared["gate_proj"]))
    text = _no_scheme(quant, gate)
    return stops(text, Evidence(layer.shared["gate_proj"])) if text else None


def _no_scheme(quant: QuantConfig, spec: Any, int4: bool = False) -> str:
    """Why vLLM has no method for a spec. int4: INT4 weights in two steps with FP8 inputs, which only experts have."""
    if spec is None:
        stated = "global_quant_config" in quant.raw
        return "no spec is stated for a module that is not excluded" if stated else ""
    w4a8 = int4 and any(step.get("dtype") == "int4" for step in steps(spec.get("weight")))
    return "a weight in several steps is read as NVFP4 only" if several_steps(spec) and not w4a8 else ""


def _quark(quant: QuantConfig, layer: MoEBlock) -> Decision:
    try:
        hit = next((hit for part in SHARED_MODULES if (hit := _shared_hit(quant, layer, part))), None)
    except Qwen35Error:
        return no("only one of a fused pair is excluded")  # does not start, see `_cannot_start`
    if hit:
        return no("the exclude list names the shared expert", Evidence.of(hit))
    routed = vllm_layer_config(quant, *quant.names(layer.experts))
    for name in layer.shared.values():
        if vllm_layer_config(quant, *quant.names(name)) != routed:
            return no("routed and shared experts have different specs", Evidence(name))
    return yes("the shared expert is not excluded and has the routed experts' spec")


def _online(quant: QuantConfig, layer: MoEBlock, target: str) -> Decision:
    """The shared expert is quantised while loading, where `--quantization-config.targets` covers it.

    Only to the routed experts' own format, and of these only to MXFP4.
    """
    if quant.method != "quark":
        return no(f"vLLM converts a shared expert online for Quark only, not for {quant.method!r}")
    routed, excluded = quant.spec_of(layer.experts), quant.exclude.hit(quant.names(layer.experts))
    kind = "bf16" if excluded else routed.spec.kind
    if kind != "mxfp4" or target != "mxfp4":
        return no(f"vLLM converts a shared expert online to MXFP4 only; the routed experts are {kind}")
    if routed.spec.activation is None or routed.spec.activation.dtype != "fp4":
        return no("the routed experts' inputs are not MXFP4, and those of the converted shared expert are")
    return replace(yes("--quantization-config.targets converts the shared expert to MXFP4"), online=True)


def _alike(
    quant: QuantConfig, layer: MoEBlock, hit_of: Callable[[QuantConfig, str], Hit | None], word: str
) -> Decision:
    """Whether a list leaves out the routed experts and both modules of the shared one, or none of them."""
    routed = hit_of(quant, layer.experts)
    try:
        shared = [hit_of(quant, f"{layer.name}.mlp.shared_expert.{part}") for part in SHARED_MODULES]
    except Qwen35Error as error:
        return stops(f"only one of a fused pair is {word}", Evidence(f"{error.where}: {error.found}"))
    if any((hit is None) != (routed is None) for hit in shared):
        named = (Evidence.of(hit) for hit in (*shared, routed) if hit)
        return no(f"routed and shared experts are not {word} alike", *named)
    return yes("neither is quantised" if routed else f"routed and shared experts are {quant.default.kind} alike")


def _fp8_ignored(quant: QuantConfig, module: str) -> Hit | None:
    """Exact names; an entry with "experts" also counts if the module's name occurs in it. No patterns."""
    (name,), listed = quant.names(module), quant.exclude

    def exact(wanted: str) -> Hit | None:
        at = listed.index.plain.get(wanted)
        return None if at is None else Hit(listed.list, at, listed.written[at], "exact")

    if parts := expand_fused(name):
        hits = [exact(part) for part in parts]
        if (whole := exact(name)) is None and any(hits) and not all(hits):
            raise Qwen35Error("parts disagree", where=name, found=", ".join(str(h) for h in hits if h))
        return whole or hits[0]
    if "experts" not in name:
        return exact(name)
    found = ((i, e) for i, e in listed.index.around(name) if "experts" in e and name in e)
    return next((Hit(listed.list, i, listed.written[i], "the module's name occurs in it") for i, _ in found), None)


def _modelopt_excluded(quant: QuantConfig, module: str) -> Hit | None:
    """modelopt.py:191-287: exact names, parts of names, and wildcards; `path*` becomes `path` and `path.*`."""
    (name,) = quant.names(module)
    if (exact := _fp8_ignored(quant, module)) is not None:
        return exact
    for i, entry in enumerate(quant.exclude.entries):
        split = len(entry) >= 2 and entry.endswith("*") and not entry.endswith(".*")
        for pattern in (entry[:-1], entry[:-1] + ".*") if split else (entry,):
            if pattern in name or fnmatchcase(name, pattern):
                return Hit(quant.exclude.list, i, quant.exclude.written[i], "part or wildcard")
    return None
