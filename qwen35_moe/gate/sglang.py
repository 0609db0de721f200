"""SGLang's rules, of PR 22948 and of 0.5.23, written from what they do, not copied. Neither looks at a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import Qwen35Error
from .common import Answers, first_entry, modelopt_stops, quark_stops, refuse_sizes
from .declared import QuantConfig
from .dialects import modelopt_part
from .exclude import Hit
from .names import SGLANG, is_draft_entry, mentions_shared_body, parts_of
from .online import requantised
from .records import PROJECTIONS, Decision, Evidence, GateModel, MoEBlock, Options, no, stops, yes

LISTED = "the exclude list names a shared expert"
NOT_LISTED = "no entry of the exclude list names a shared expert's body"
# Backends that give every rank its own copy of the shared slot, while Qwen has one global slot (#31793).
PER_RANK_SLOT_BACKENDS = ("deepep", "deepep_v2", "mooncake", "mori", "pplx", "megamoe")


def sglang_22948(model: GateModel, layer: MoEBlock, options: Options) -> Answers:
    """sgl-project/sglang PR 22948 (2026-04-16): a substring test over Quark's exclude list.

    Only Quark's configuration has a list under the name that is searched, so every other method passes.
    """
    yield from _refusals(model, options, ("deepep",))
    if model.quant.method != "quark":
        yield yes(f"the gate does not look at method {model.quant.method!r}")
    hit = first_entry(model.quant, lambda e: mentions_shared_body(e) and not is_draft_entry(e))
    yield no(LISTED, hit) if hit else yes(NOT_LISTED)


def sglang_0_5_23(model: GateModel, layer: MoEBlock, options: Options) -> Answers:
    """SGLang 0.5.23: qwen2_moe.py:137-152, 283-302, quark.py:1085-1297, modelopt_quant.py:1552, qwen3_5_mtp.py:50."""
    read = requantised(model, layer, options.quantization.lower())
    if isinstance(read, Decision):
        yield read
        return
    yield from _cannot_start(read.quant)
    plain = plain_draft(read) if layer.draft else None
    decision = next(_fuses(read, plain, options))
    if plain is None:
        yield from _cannot_build(read, layer, decision)
    if decision and options.a2a_backend in PER_RANK_SLOT_BACKENDS and options.moe_ep_size > 1:
        ranks = f"a2a_backend = {options.a2a_backend}, moe_ep_size = {options.moe_ep_size}"
        yield no("the backend keeps a shared slot per rank, and Qwen has one slot in all", ranks)
    yield decision


def _refusals(model: GateModel, options: Options, backends: tuple[str, ...]) -> Answers:
    """What both versions ask before they look at the quantisation."""
    if not (options.hip and options.aiter or not options.hip and options.cuda_opt_in):
        needed = "needs ROCm with SGLANG_USE_AITER, or a CUDA model class that opts in"
        yield no("the platform does not fuse", needed)
    if options.disable_shared_experts_fusion:
        yield no("--disable-shared-experts-fusion")
    yield from refuse_sizes(model)
    if options.a2a_backend in backends:
        yield no(f"the all-to-all backend is {options.a2a_backend}")


def _cannot_start(quant: QuantConfig) -> Answers:
    """What raises while SGLang reads the configuration, whether it would fuse or not.

    configs/model_config.py: _parse_modelopt_quant_config; modelopt_quant.py: from_config of each class. An unknown
    algorithm is an error in config.json only, see `online.requantised`.
    """
    if quant.method == "quark":
        yield from quark_stops(quant, "SGLang", ("exclude", "layer_quant_config"))
    if quant.method == "modelopt":
        inner = modelopt_part(quant.raw)
        algo, group = str(inner.get("quant_algo", "")), inner.get("group_size", quant.raw.get("group_size"))
        yield from modelopt_stops(quant, algo, SGLANG_ALGOS, "SGLang")
        if inner is not quant.raw and "FP4" in algo and not isinstance(group, int):
            yield stops("hf_quant_config.json states no group_size", f"quant_algo = {algo}")


SGLANG_ALGOS = ("FP8", "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "MXFP8", "MIXED_PRECISION")


def _cannot_build(model: GateModel, layer: MoEBlock, decision: Decision) -> Answers:
    """Modules of Quark's without one spec: a pair of which one part is excluded, entries for single experts with gaps.

    The shared expert is a module of its own only where it is not fused.
    """
    quant = model.quant.read_as("sglang", SGLANG[model.nested])
    for i, at in enumerate((model.drafts if layer.draft else model.layers) if quant.method == "quark" else ()):
        bodies = [] if decision else [f"{at.body}.gate_up_proj"]
        # One module for all that are neither: the first layer of a target has a DeltaNet, a draft has attention.
        others = [] if i else [f"{at.name}.{'self_attn.o_proj' if layer.draft else 'linear_attn.out_proj'}"]
        for module in (at.experts, *bodies, *others):
            try:
                spec = {} if quant.excluded(module) else _layer_config(quant, *quant.names(module))
            except Qwen35Error as error:
                yield stops(f"a module has no single spec: {error.what}", str(error.where))
                return
            if spec is None and "global_quant_config" in quant.raw:
                yield stops("no spec is stated for a module that is not excluded", module)
            if any(isinstance((spec or {}).get(key), list) for key in ("weight", "input_tensors")):
                yield stops("a weight in two steps has no scheme in SGLang", f"{module}: a list of specs")


def _fuses(model: GateModel, plain: Decision | None, options: Options) -> Answers:
    """What a model answers that starts. plain: the answer for a draft that is built without a quantisation."""
    quant = model.quant
    if options.cutedsl_ar_fusion:
        yield no("the CuTe-DSL all-reduce fusion needs the shared expert apart")
    yield from _refusals(model, options, ("deepep", "deepep_v2", "mori"))
    if plain is not None:
        yield plain
    if quant.method == "modelopt" and quant.default.kind == "nvfp4":
        # The same words as for Quark, but no exemption for the draft: an `mtp.` entry vetoes the whole model.
        hit = first_entry(quant, mentions_shared_body)
        yield no(LISTED, hit) if hit else yes(NOT_LISTED)
    if quant.method != "quark":
        yield yes(f"the gate does not look at method {quant.method!r}")
    # The top level of a nested config.json has no layer count, so there only `mtp.` marks the draft.
    count, drafts = model.top.get("num_hidden_layers"), model.top.get("num_nextn_predict_layers") or 0
    hit = first_entry(quant, lambda e: mentions_shared_body(e) and not is_draft_entry(e, count, drafts))
    if hit:
        yield _online(model, options, hit)
    if not quant.raw.get("layer_quant_config"):
        yield yes(f"{NOT_LISTED}, and no layer has its own spec")
    yield _layer_specs(quant)


def plain_draft(model: GateModel) -> Decision | None:
    """The decision for a draft that SGLang builds in BF16, whatever the target is; None if it is built like it."""
    quant = model.quant
    if quant.method == "quark":
        hit = first_entry(quant, lambda e: e.startswith("mtp.") and "mlp.experts" in e)
        if hit is not None:
            return yes("the draft's routed experts are excluded, so the draft is BF16 throughout", hit)
    nvfp4 = quant.default.kind == "nvfp4" or any(spec.kind == "nvfp4" for _, spec in quant.layers)
    if quant.method == "modelopt" and nvfp4 and not any(name.startswith("mtp.") for name, _ in quant.layers):
        return yes("ModelOpt checkpoints keep the draft in BF16")
    return None


def _online(model: GateModel, options: Options, entry: Hit) -> Decision:
    """An excluded shared expert fuses only if asked to be converted to MXFP4, and only on what that was measured on."""
    if not options.enforce_shared_experts_fusion:
        return no(LISTED, entry)
    kind = model.top.get("model_type")
    conditions = (
        (model.quant.raw.get("is_prequantized", True), "the checkpoint is not prequantized"),
        (options.hip, "this is not ROCm"),
        (options.aiter, "SGLANG_USE_AITER is not set"),
        (options.gfx95, "the device has no FP4 (needs gfx95x)"),
        (kind in ("qwen3_5_moe", "qwen3_5_moe_text"), f"model_type {kind!r} was not measured"),
    )
    if missing := next((text for met, text in conditions if not met), "") or _not_mxfp4(model.quant):
        return no(LISTED, entry, Evidence(f"--enforce-shared-experts-fusion is ignored: {missing}", "warning"))
    return yes("the shared expert is excluded, and --enforce-shared-experts-fusion converts it", entry, online=True)


def _not_mxfp4(quant: QuantConfig) -> str:
    """Which routed experts are not W4A4 MXFP4: those of layer 0, or of any key for experts."""
    try:
        if not all(_is_mxfp4(_layer_config(quant, f"{base}.mlp.experts")) for base in LAYER0_BASES):
            return "the routed experts of layer 0 are not MXFP4"
    except Qwen35Error as error:
        return f"the spec of layer 0 is ambiguous ({error.what})"
    layers = quant.raw.get("layer_quant_config") or {}
    keys = sorted(key for key in layers if "experts" in key and "shared_expert" not in key)
    return next((f"layer_quant_config[{key!r}] is not MXFP4" for key in keys if not _is_mxfp4(layers[key])), "")


LAYER0_BASES = ("model.layers.0", "model.language_model.layers.0")


def _layer_specs(quant: QuantConfig) -> Decision:
    """With layer_quant_config, routed and shared specs must be equal; SGLang asks layer 0 and the draft only."""
    shared = "shared_expert" + "s" * any(".shared_experts." in key for key in quant.raw["layer_quant_config"])
    try:
        for base in (*LAYER0_BASES, "model.decoder"):
            routed = _layer_config(quant, f"{base}.mlp.experts")
            for part in (*PROJECTIONS, "gate_up_proj"):
                name = f"{base}.mlp.{shared}.{part}"
                if _layer_config(quant, name) != routed:
                    return no("layer_quant_config gives routed and shared experts different specs", name)
    except Qwen35Error as error:
        return no("layer_quant_config gives no single spec", f"{error.where}: {error.what}")
    return yes("layer_quant_config gives routed and shared experts of layer 0 the same spec")


def _is_mxfp4(spec: Any) -> bool:
    """SGLang's test for W4A4 MXFP4: weights static, inputs dynamic, both fp4 in groups of 32 with E8M0 scales.

    What Quark quantises in two steps is a list, and something else.
    """
    weight, inputs = (spec or {}).get("weight") or {}, (spec or {}).get("input_tensors") or {}
    expected = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
    alike = all(isinstance(t, Mapping) and t.items() >= expected.items() for t in (weight, inputs))
    return alike and weight.get("is_dynamic") is not True and inputs.get("is_dynamic") is not False


def _layer_config(quant: QuantConfig, name: str) -> Any:
    """Quark's spec of a module as SGLang finds it: patterns, entries for single experts, the default.

    Error: the parts of a fused module, or single experts, with different specs.
    """
    if parts := parts_of(name):
        specs = [_layer_config(quant, part) for part in parts]
        if any(s != specs[0] for s in specs):
            raise Qwen35Error("the parts of a fused module have different specs", where=name)
        return specs[0]
    for _, spec in quant.quark_specs(name):
        return spec
    if name.endswith(".experts") and (single := [key for _, key in quant.layer_index.below(name)]):
        return _one_spec(quant, name, single)
    if quant.raw.get("layer_type_quant_config", ()) is None:
        raise Qwen35Error("layer_type_quant_config is null, and SGLang looks into it", where=name)
    return quant.raw.get("global_quant_config")


def _one_spec(quant: QuantConfig, experts: str, keys: list[str]) -> Any:
    """The spec that keys for single experts give to all of them; they must begin at 0, leave no gap and be alike."""
    projections: dict[str, set[str]] = {}
    for key in keys:
        number, _, projection = key.partition(".experts.")[2].partition(".")
        projections.setdefault(number, set()).add(projection)
    specs, sets = [quant.key_specs[key] for key in keys], list(projections.values())
    complete = projections.keys() == {str(i) for i in range(len(sets))} and all(sets[0])
    if not complete or any(s != sets[0] for s in sets) or any(s != specs[0] for s in specs):
        raise Qwen35Error("entries for single experts leave gaps or differ", where=experts)
    return specs[0]
