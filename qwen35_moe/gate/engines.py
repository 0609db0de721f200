"""The gates of vLLM and ATOM, written from what they do, not copied; and the table of all engines' rules.

They are here to be compared and warned about; `gate_strict` is the rule to use.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import Qwen35Error
from .common import Rule, first_entry, no, quark_layer_config, refuse_sizes, yes
from .declared import ModuleSpec, QuantConfig
from .exclude import Hit
from .module_names import is_draft_entry, mentions_shared_body, spellings
from .records import Decision, Evidence, Layer, Model, Options
from .sglang import sglang_0_5_23, sglang_22948


def vllm(model: Model, layer: Layer, options: Options) -> Decision:
    """vLLM 0.32: quantization/utils/config_utils.py:59-350, behind an environment variable that is off by default."""
    if not options.vllm_opt_in:
        return no("VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS is not set")
    if not (options.hip and options.aiter):
        return no("the platform does not fuse", Evidence("needs ROCm with VLLM_ROCM_USE_AITER"))
    if (refusal := refuse_sizes(model)) is not None:
        return refusal
    quant = model.quant.read_as("vllm")
    if quant.method == "none":
        return yes("the model is not quantised")
    if quant.method not in ("quark", "fp8"):
        return no(f"vLLM has no compatibility check for method {quant.method!r}")
    if quant.method == "fp8" and quant.default.kind != "fp8-block":
        return no("FP8 without blocks is not implemented")

    def hit_of(name: str) -> Hit | None:
        return quant.exclude.hit(spellings(name, model.num_hidden_layers))

    try:
        hits = [hit_of(f"{layer.name}.mlp.shared_expert.{part}") for part in ("gate_up_proj", "down_proj")]
    except Qwen35Error as error:
        return no("vLLM refuses to load this", Evidence(f"{error.what}: {error.found}", "warning"))
    if quant.method == "fp8":
        routed = hit_of(layer.experts)
        if any((hit is None) != (routed is None) for hit in hits):
            return no(
                "routed and shared experts are not ignored alike", *map(Evidence.of, filter(None, [*hits, routed]))
            )
        return yes("routed and shared experts are block FP8 alike" if routed is None else "neither is quantised")
    if hit := next(filter(None, hits), None):
        return no("the exclude list names the shared expert", Evidence.of(hit))
    return _vllm_specs(model, layer)


def _vllm_specs(model: Model, layer: Layer) -> Decision:
    raw, count = model.quant.raw, model.num_hidden_layers
    try:
        routed = quark_layer_config(raw, spellings(layer.experts, count))
        for name in layer.shared.values():
            if quark_layer_config(raw, spellings(name, count)) != routed:
                return no("routed and shared experts have different specs", Evidence(name))
    except Qwen35Error as error:
        return no("layer_quant_config gives no single spec", Evidence(f"{error.where}: {error.what}", "warning"))
    return yes("the shared expert is not excluded and has the routed experts' spec")


# -- ATOM --------------------------------------------------------------------------------------------------------------


def atom(model: Model, layer: Layer, options: Options) -> Decision:
    """ROCm/ATOM atom/model_ops/topK.py:16-80, with prefixes: compares kind, grouping and dynamic in this very layer.

    The shared expert is asked for by its parent's name, so a pattern that only covers its children
    (`*.shared_expert.*`, Quark's own template) is not seen.
    """
    if (refusal := _atom_transport(model, options)) is not None:
        return refusal
    quant = model.quant.read_as("atom")
    shared, shared_hit = _atom_spec(quant, f"{layer.name}.mlp.shared_expert")
    routed, routed_hit = _atom_spec(quant, layer.experts)
    evidence = Evidence.of(shared_hit, f"shared {shared}"), Evidence.of(routed_hit, f"routed {routed}")
    if _atom_key(shared) == _atom_key(routed):
        return yes("routed and shared experts have the same spec", *evidence)
    return no("routed and shared experts have different specs", *evidence)


def atom_first_entry(model: Model, layer: Layer, options: Options) -> Decision:
    """ATOM without prefixes: the first entry that contains "shared_expert" speaks for all layers.

    It is often `shared_expert_gate`, or belongs to the draft, and then switches fusion off for no reason.
    """
    if (refusal := _atom_transport(model, options)) is not None:
        return refusal
    quant = model.quant.read_as("atom")
    hit = first_entry(quant, lambda e: "shared_expert" in e)
    if hit is None or quant.spec_of(hit.entry).spec.kind == quant.default.kind:
        return yes("no entry says that the shared expert differs")
    note: tuple[Evidence, ...] = ()
    if not mentions_shared_body(hit.entry) or is_draft_entry(hit.entry, model.num_hidden_layers, len(model.drafts)):
        note = (Evidence("this entry does not name the target's shared expert body", "warning"),)
    return no("the first entry with the word shared_expert is not quantised", Evidence.of(hit), *note)


def _atom_transport(model: Model, options: Options) -> Decision | None:
    if options.dp_size > 1 and options.moe_ep_flatten_tp_across_dp:
        return no("data parallel ranks are flattened into expert parallel ones")
    mori = options.dp_size > 1 and options.a2a_backend == "mori" and options.dp_attention
    if mori and not (options.eplb or options.atom_fuse_shared_expert):
        return no("MoRI with data parallel attention needs ATOM_FUSE_SHARED_EXPERT or EPLB")
    if model.quant.method in ("gptq", "mxfp4"):
        return no(f"how ATOM reads the list of method {model.quant.method!r} is not known")
    return refuse_sizes(model)


def _atom_spec(quant: QuantConfig, module: str) -> tuple[ModuleSpec, Hit]:
    names = spellings(module + ".", quant.num_hidden_layers)
    names = tuple(n.removesuffix(".") for n in names)
    if quant.exclude.hit(names) is None:
        below = tuple(n + "." for n in names)
        if hit := first_entry(quant, lambda e: e.startswith(below), "an entry below the module"):
            return ModuleSpec("bf16"), hit
    return quant.spec_of(module)


def _atom_key(spec: ModuleSpec) -> tuple[object, ...]:
    return spec.kind, spec.block, spec.activation and spec.activation.dynamic


@dataclass(frozen=True)
class RuleInfo:
    """A rule, and how the loader that goes with it reads the exclude list."""

    decide: Rule
    semantics: str
    source: str


ENGINE_RULES = {
    "sglang-22948": RuleInfo(sglang_22948, "sglang", "sgl-project/sglang #22948, the seed PR"),
    "sglang-0.5.23": RuleInfo(sglang_0_5_23, "sglang", "SGLang 0.5.23"),
    "vllm": RuleInfo(vllm, "vllm", "vLLM 0.32"),
    "atom": RuleInfo(atom, "atom", "ROCm/ATOM, with prefixes"),
    "atom-first-entry": RuleInfo(atom_first_entry, "atom", "ROCm/ATOM, without prefixes"),
}
