"""SGLang's two gates, the seed PR's and today's, written from what they do, not copied. Neither sees a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import Qwen35Error
from .common import (
    first_entry,
    modelopt_stops,
    no,
    quark_stops,
    refuse_platform,
    refuse_sizes,
    sglang_layer_config,
    stops,
    yes,
)
from .declared import QuantConfig
from .module_names import is_draft_entry, mentions_shared_body
from .namespaces import SGLANG
from .online import requantised
from .records import PER_RANK_SLOT_BACKENDS, PROJECTIONS, Decision, Evidence, GateModel, MoEBlock, Options


def sglang_22948(model: GateModel, layer: MoEBlock, options: Options) -> Decision:
    """The seed PR, sgl-project/sglang #22948 (2026-04-16): a substring test over Quark's exclude list.

    Only Quark's configuration has a list under the name that is searched, so every other method passes.
    """
    if (refusal := _refuse_before_quantisation(model, options)) is not None:
        return refusal
    if options.a2a_backend == "deepep":
        return no("the all-to-all backend is deepep")
    if model.quant.method != "quark":
        return yes(f"the gate does not look at method {model.quant.method!r}")
    if hit := first_entry(model.quant, lambda e: mentions_shared_body(e) and not is_draft_entry(e)):
        return no("the exclude list names a shared expert", Evidence.of(hit))
    return yes("no entry of the exclude list names a shared expert's body")


def sglang_0_5_23(model: GateModel, layer: MoEBlock, options: Options) -> Decision:
    """SGLang 0.5.23: qwen2_moe.py:137-152, 283-302, quark.py:1085-1297, modelopt_quant.py:1552, qwen3_5_mtp.py:50."""
    read = requantised(model, layer, options.quantization.lower())
    if isinstance(read, Decision):
        return read
    model = read
    if (trouble := _cannot_start(model.quant)) is not None:
        return trouble
    decision = plain_draft(model) if layer.draft else None
    plain = decision is not None  # the draft is built without a quantisation
    decision = decision if decision is not None else _sglang_quant(model, options)
    if (refusal := _refuse_unseen(model, options)) is not None:
        decision = refusal
    if not plain and (trouble := _cannot_build(model, layer, decision)) is not None:
        return trouble
    if decision and options.a2a_backend in PER_RANK_SLOT_BACKENDS and options.moe_ep_size > 1:
        ranks = Evidence(f"a2a_backend = {options.a2a_backend}, moe_ep_size = {options.moe_ep_size}")
        return no("the backend keeps a shared slot per rank, and Qwen has one slot in all", ranks)
    return decision


def _refuse_unseen(model: GateModel, options: Options) -> Decision | None:
    """What SGLang 0.5.23 asks before it looks at the quantisation."""
    if options.cutedsl_ar_fusion:
        return no("the CuTe-DSL all-reduce fusion needs the shared expert apart")
    if (refusal := _refuse_before_quantisation(model, options)) is not None:
        return refusal
    if options.a2a_backend in ("deepep", "deepep_v2", "mori"):
        return no(f"the all-to-all backend is {options.a2a_backend}")
    return None


def _refuse_before_quantisation(model: GateModel, options: Options) -> Decision | None:
    """What both versions ask first: platform, flag, sizes."""
    if (refusal := refuse_platform(options)) is not None:
        return refusal
    if options.disable_shared_experts_fusion:
        return no("--disable-shared-experts-fusion")
    return refuse_sizes(model)


def _cannot_start(quant: QuantConfig) -> Decision | None:
    """What raises while SGLang reads the configuration, whether it would fuse or not.

    configs/model_config.py: _parse_modelopt_quant_config; modelopt_quant.py: from_config of each class. An unknown
    algorithm is an error in config.json only, see `online.requantised`.
    """
    if quant.method == "quark":
        return quark_stops(quant, "SGLang", ("exclude", "layer_quant_config"))
    if quant.method != "modelopt":
        return None
    inner = quant.raw.get("quantization", quant.raw)
    algo, group = str(inner.get("quant_algo", "")), inner.get("group_size", quant.raw.get("group_size"))
    trouble = modelopt_stops(quant, algo, SGLANG_ALGOS, "SGLang")
    if trouble is None and inner is not quant.raw and "FP4" in algo and not isinstance(group, int):
        return stops("hf_quant_config.json states no group_size", Evidence(f"quant_algo = {algo}"))
    return trouble


SGLANG_ALGOS = ("FP8", "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "MXFP8", "MIXED_PRECISION")


def _cannot_build(model: GateModel, layer: MoEBlock, decision: Decision) -> Decision | None:
    """Modules of Quark's without one spec: a pair of which one part is excluded, entries for single experts with gaps.

    The shared expert is a module of its own only where it is not fused.
    """
    if model.quant.method != "quark":
        return None
    quant = model.quant.read_as("sglang", SGLANG, model.nested)
    for i, at in enumerate(model.drafts if layer.draft else model.layers):
        bodies = [] if decision else [f"{at.name}.mlp.shared_expert.gate_up_proj"]
        # One module for all that are neither: the first layer of a target has a DeltaNet, a draft has attention.
        others = [] if i else [f"{at.name}.{'self_attn.o_proj' if layer.draft else 'linear_attn.out_proj'}"]
        for module in (at.experts, *bodies, *others):
            names = quant.names(module)
            try:
                spec = {} if quant.exclude.hit(names) else sglang_layer_config(quant, *names)
            except Qwen35Error as error:
                return stops(f"a module has no single spec: {error.what}", Evidence(str(error.where)))
            if spec is None and "global_quant_config" in quant.raw:
                return stops("no spec is stated for a module that is not excluded", Evidence(module))
            if any(isinstance((spec or {}).get(key), list) for key in ("weight", "input_tensors")):
                return stops("a weight in two steps has no scheme in SGLang", Evidence(f"{module}: a list of specs"))
    return None


def plain_draft(model: GateModel) -> Decision | None:
    """The draft's own quantisation: None means "as the target"; otherwise the draft is built in BF16 and may fuse."""
    quant = model.quant
    if quant.method == "quark":
        hit = first_entry(quant, lambda e: e.startswith("mtp.") and "mlp.experts" in e)
        if hit is not None:
            return yes("the draft's routed experts are excluded, so the draft is BF16 throughout", Evidence.of(hit))
    nvfp4 = quant.default.kind == "nvfp4" or any(spec.kind == "nvfp4" for _, spec in quant.layers)
    if quant.method == "modelopt" and nvfp4 and not any(name.startswith("mtp.") for name, _ in quant.layers):
        return yes("ModelOpt checkpoints keep the draft in BF16")
    return None


def _sglang_quant(model: GateModel, options: Options) -> Decision:
    quant = model.quant
    if quant.method == "modelopt" and quant.default.kind == "nvfp4":
        # The same words as for Quark, but no exemption for the draft: an `mtp.` entry vetoes the whole model.
        if hit := first_entry(quant, mentions_shared_body):
            return no("the exclude list names a shared expert", Evidence.of(hit))
        return yes("no entry of the exclude list names a shared expert's body")
    if quant.method != "quark":
        return yes(f"the gate does not look at method {quant.method!r}")
    # The top level of a nested config.json has no layer count, so there only `mtp.` marks the draft.
    count, drafts = model.top.get("num_hidden_layers"), model.top.get("num_nextn_predict_layers") or 0
    if hit := first_entry(quant, lambda e: mentions_shared_body(e) and not is_draft_entry(e, count, drafts)):
        return _sglang_online(model, options, Evidence.of(hit))
    if not quant.raw.get("layer_quant_config"):
        return yes("no entry of the exclude list names a shared expert's body, and no layer has its own spec")
    return _sglang_layer_specs(quant)


def _sglang_online(model: GateModel, options: Options, entry: Evidence) -> Decision:
    """An excluded shared expert fuses only if asked to be converted to MXFP4, and only on what that was measured on."""
    if not options.enforce_shared_experts_fusion:
        return no("the exclude list names a shared expert", entry)
    kind = model.top.get("model_type")
    conditions = (
        (model.quant.raw.get("is_prequantized", True), "the checkpoint is not prequantized"),
        (options.hip, "this is not ROCm"),
        (options.aiter, "SGLANG_USE_AITER is not set"),
        (options.gfx95, "the device has no FP4 (needs gfx95x)"),
        (kind in ("qwen3_5_moe", "qwen3_5_moe_text"), f"model_type {kind!r} was not measured"),
    )
    missing = next((text for met, text in conditions if not met), "") or _not_mxfp4(model.quant)
    if missing:
        warning = Evidence(f"--enforce-shared-experts-fusion is ignored: {missing}", "warning")
        return no("the exclude list names a shared expert", entry, warning)
    return yes("the shared expert is excluded, and --enforce-shared-experts-fusion converts it", entry, online=True)


def _not_mxfp4(quant: QuantConfig) -> str:
    """Which routed experts are not W4A4 MXFP4: those of layer 0, or of any key for experts."""
    try:
        if not all(_is_mxfp4(sglang_layer_config(quant, f"{base}.mlp.experts")) for base in LAYER0_BASES):
            return "the routed experts of layer 0 are not MXFP4"
    except Qwen35Error as error:
        return f"the spec of layer 0 is ambiguous ({error.what})"
    layers = quant.raw.get("layer_quant_config") or {}
    keys = sorted(key for key in layers if "experts" in key and "shared_expert" not in key)
    return next((f"layer_quant_config[{key!r}] is not MXFP4" for key in keys if not _is_mxfp4(layers[key])), "")


LAYER0_BASES = ("model.layers.0", "model.language_model.layers.0")


def _sglang_layer_specs(quant: QuantConfig) -> Decision:
    """With layer_quant_config, routed and shared specs must be equal; SGLang asks layer 0 and the draft only."""
    shared = "shared_expert" + "s" * any(".shared_experts." in key for key in quant.raw["layer_quant_config"])
    try:
        for base in (*LAYER0_BASES, "model.decoder"):
            routed = sglang_layer_config(quant, f"{base}.mlp.experts")
            for part in (*PROJECTIONS, "gate_up_proj"):
                name = f"{base}.mlp.{shared}.{part}"
                if sglang_layer_config(quant, name) != routed:
                    return no("layer_quant_config gives routed and shared experts different specs", Evidence(name))
    except Qwen35Error as error:
        return no("layer_quant_config gives no single spec", Evidence(f"{error.where}: {error.what}"))
    return yes("layer_quant_config gives routed and shared experts of layer 0 the same spec")


def _is_mxfp4(spec: Any) -> bool:
    """SGLang's test for W4A4 MXFP4: weights static, inputs dynamic, both fp4 in groups of 32 with E8M0 scales.

    What Quark quantises in two steps is a list, and something else.
    """
    weight, inputs = (spec or {}).get("weight") or {}, (spec or {}).get("input_tensors") or {}
    expected = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
    alike = all(isinstance(t, Mapping) and t.items() >= expected.items() for t in (weight, inputs))
    return alike and weight.get("is_dynamic") is not True and inputs.get("is_dynamic") is not False
