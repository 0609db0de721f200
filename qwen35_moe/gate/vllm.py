"""vLLM's rule, written from what it does, not copied: quantization/utils/config_utils.py:59-370, fused_moe/utils.py.

vLLM asks it layer by layer, and only if an environment variable says so, which is not set by default. Where layers
differ, or one of gate_proj and up_proj is excluded and the other is not, vLLM raises while it builds the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from ..errors import Qwen35Error
from .common import Answers, modelopt_stops, quark_stops, refuse_sizes, several_steps
from .declared import QuantConfig
from .dialects import ALIASES, modelopt_part, steps
from .exclude import Hit
from .names import VLLM
from .records import Decision, GateModel, MoEBlock, Options, no, stops, yes

# modelopt.py: QUANT_ALGOS
VLLM_ALGOS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8", "MIXED_PRECISION")
SHARED_MODULES = ("gate_up_proj", "down_proj")


def vllm_0_33(model: GateModel, layer: MoEBlock, options: Options) -> Answers:
    """vLLM 0.33; 0.32 decides the same for Quark and FP8, and has no check for MXFP8."""
    method = model.quant.method
    names = replace(VLLM[model.nested], stars=method == "modelopt")
    quant = model.quant.read_as("vllm-fp8" if method in ("fp8", "modelopt") else "vllm", names)
    word = ALIASES.get(options.quantization, options.quantization)
    if word and method in ("quark", "fp8", "compressed-tensors") and word != method:
        yield stops(f"the checkpoint is {method}, not {word}", f"--quantization {word}")
    decision = next(_fuses(model, quant, layer, options))
    if method == "quark":
        yield from _cannot_start(quant, layer, decision.fused)
    if method == "modelopt":
        algo = str(modelopt_part(quant.raw).get("quant_algo", "")).upper()
        yield from modelopt_stops(quant, algo, VLLM_ALGOS, "vLLM")
    yield decision


def _fuses(model: GateModel, quant: QuantConfig, layer: MoEBlock, options: Options) -> Answers:
    if not options.vllm_opt_in:
        yield no("VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS is not set")
    if not (options.hip and options.aiter):
        yield no("the platform does not fuse", "needs ROCm with VLLM_ROCM_USE_AITER")
    yield from refuse_sizes(model)
    if quant.method == "none" and options.quantization:
        yield no(f"vLLM has no compatibility check for --quantization {options.quantization}")
    if quant.method == "none":
        yield yes("the model is not quantised")
    if layer.draft and any(k.startswith("-:") and "mtp" in k for k in quant.raw.get("dynamic") or ()):
        yield yes("an entry of `dynamic` names mtp, so the draft is built without a quantisation")
    if options.vllm_online_target:
        yield from _online(quant, layer, options.vllm_online_target)
    if quant.method == "quark":
        yield from _quark(quant, layer)
    if quant.method == "fp8" and (quant.default.kind != "fp8-block" or quant.raw.get("store_dtype") is not None):
        yield no("FP8 without blocks, or stored as another dtype, is not implemented")
    if quant.method == "fp8":
        yield from _alike(quant, layer, _fp8_ignored, "ignored")
    if quant.method == "modelopt" and quant.default.kind == "mxfp8":
        yield from _alike(quant, layer, _modelopt_excluded, "excluded")
    yield no(f"vLLM has no compatibility check for method {quant.method!r}")


def all_or_none(decisions: list[Decision]) -> list[Decision]:
    """vLLM raises NotImplementedError where some layers of a model fuse and others do not."""
    target = [d for d in decisions if not d.draft and d.starts]
    against = next((d for d in target if not d), None)
    if against is None or not any(target):
        return decisions
    count = sum(d.fused for d in target)
    text = f"fused shared experts must be enabled for all layers; {count} are, {len(target) - count} are not"
    stop = stops(text, f"first {against.layer}: {against.reason}", *against.evidence)
    return [d if d.draft or not d.starts else replace(stop, rule=d.rule, layer=d.layer) for d in decisions]


def _cannot_start(quant: QuantConfig, layer: MoEBlock, fused: bool) -> Answers:
    """What raises while the experts are built, and the shared expert's linear layers if it is not fused."""
    yield from quark_stops(quant, "vLLM", ("exclude", "layer_type_quant_config"))
    if quant.excluded(layer.experts) is None and (text := _no_scheme(quant, _spec(quant, layer.experts), int4=True)):
        yield stops(text, layer.experts)
    try:
        if fused or quant.excluded(f"{layer.body}.gate_up_proj"):
            return
    except Qwen35Error as error:
        yield stops("only one of a fused pair is excluded", f"{error.where}: {error.found}")
    gate, up = (_spec(quant, module) for module in layer.shared[:2])
    if gate != up:
        yield stops("gate_proj and up_proj have different specs", layer.shared[0])
    if text := _no_scheme(quant, gate):
        yield stops(text, layer.shared[0])


def _spec(quant: QuantConfig, module: str) -> Any:
    """Quark's spec of a module as vLLM finds it: of the first key that has one, else the default."""
    (name,) = quant.names(module)
    return next((spec for _, spec in quant.quark_specs(name) if spec), None) or quant.raw.get("global_quant_config")


def _no_scheme(quant: QuantConfig, spec: Any, int4: bool = False) -> str:
    """Why vLLM has no method for a spec. int4: INT4 weights in two steps with FP8 inputs, which only experts have."""
    if spec is None:
        stated = "global_quant_config" in quant.raw
        return "no spec is stated for a module that is not excluded" if stated else ""
    w4a8 = int4 and any(step.get("dtype") == "int4" for step in steps(spec.get("weight")))
    return "a weight in several steps is read as NVFP4 only" if several_steps(spec) and not w4a8 else ""


def _quark(quant: QuantConfig, layer: MoEBlock) -> Answers:
    try:
        for part in SHARED_MODULES:
            if hit := quant.excluded(f"{layer.body}.{part}"):
                yield no("the exclude list names the shared expert", hit)
    except Qwen35Error:
        yield no("only one of a fused pair is excluded")  # does not start, see `_cannot_start`
    routed = _spec(quant, layer.experts)
    if odd := next((name for name in layer.shared if _spec(quant, name) != routed), None):
        yield no("routed and shared experts have different specs", odd)
    yield yes("the shared expert is not excluded and has the routed experts' spec")


def _online(quant: QuantConfig, layer: MoEBlock, target: str) -> Answers:
    """The shared expert is quantised while loading, where `--quantization-config.targets` covers it.

    Only to the routed experts' own format, and of these only to MXFP4.
    """
    if quant.method != "quark":
        yield no(f"vLLM converts a shared expert online for Quark only, not for {quant.method!r}")
    routed = quant.spec_of(layer.experts).spec
    kind = "bf16" if quant.excluded(layer.experts) else routed.kind
    if kind != "mxfp4" or target != "mxfp4":
        yield no(f"vLLM converts a shared expert online to MXFP4 only; the routed experts are {kind}")
    if routed.activation is None or routed.activation.dtype != "fp4":
        yield no("the routed experts' inputs are not MXFP4, and those of the converted shared expert are")
    yield yes("--quantization-config.targets converts the shared expert to MXFP4", online=True)


def _alike(quant: QuantConfig, layer: MoEBlock, hit_of: Callable[[QuantConfig, str], Hit | None], word: str) -> Answers:
    """Whether a list leaves out the routed experts and both modules of the shared one, or none of them."""
    routed = hit_of(quant, layer.experts)
    try:
        hits = [*(hit_of(quant, f"{layer.body}.{part}") for part in SHARED_MODULES), routed]
    except Qwen35Error as error:
        yield stops(f"only one of a fused pair is {word}", f"{error.where}: {error.found}")
        return
    if any(hits) and not all(hits):
        yield no(f"routed and shared experts are not {word} alike", *filter(None, hits))
    yield yes("neither is quantised" if routed else f"routed and shared experts are {quant.default.kind} alike")


def _fp8_ignored(quant: QuantConfig, module: str) -> Hit | None:
    """Exact names, or for `experts` an entry in which the name occurs. No patterns."""
    if not module.endswith(".experts"):
        return quant.excluded(module)
    (name,), listed = quant.names(module), quant.exclude
    found = (i for i, entry in listed.index.near(name) if "experts" in entry and name in entry)
    return next((listed.quoted(i, "the module's name occurs in it") for i in found), None)


def _modelopt_excluded(quant: QuantConfig, module: str) -> Hit | None:
    """modelopt.py:191-287: exact names, parts of names, and wildcards."""
    if (exact := _fp8_ignored(quant, module)) is not None:
        return exact
    (name,) = quant.names(module)
    for i, entry in enumerate(quant.exclude.entries):
        if entry in name or fnmatchcase(name, entry):
            return quant.exclude.quoted(i, "part or wildcard")
    return None
