"""ATOM's gates, written from what they do, not copied."""

from __future__ import annotations

from .common import first_entry, no, refuse_sizes, yes
from .declared import BF16, ModuleSpec, QuantConfig
from .exclude import Hit
from .module_names import is_draft_entry, mentions_shared_body
from .records import Decision, Evidence, Layer, Model, Options


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
    names = tuple(n.removesuffix(".") for n in quant.names(module + "."))
    if quant.exclude.hit(names) is None and (hit := quant.exclude.below(names, "an entry below the module")):
        return BF16, hit
    return quant.spec_of(module)


def _atom_key(spec: ModuleSpec) -> tuple[object, ...]:
    """What ATOM compares. An activation that is not stated counts as dynamic, so W4A16 equals W4A4."""
    return spec.kind, spec.block, spec.activation is None or spec.activation.dynamic
