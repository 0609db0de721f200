"""ATOM's gates, written from what they do, not copied: atom/model_ops/topK.py, config.py, quant_spec.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .common import first_entry, no, quark_specs, refuse_sizes, several_steps, steps, stops, yes
from .declared import QuantConfig
from .exclude import ExcludeList, Hit, exclude_list, first_match
from .module_names import is_draft_entry, mentions_shared_body
from .namespaces import ATOM, ATOM_MULTIMODAL, Namespace
from .readings import occurs_in_key
from .records import Decision, Evidence, GateModel, MoEBlock, Options

# What ATOM compares: dtype, grouping, dynamic inputs. Inputs that are not stated count as dynamic: W4A16 equals W4A4.
Key = tuple[str, str, bool]
UNQUANTISED: Key = ("bf16", "no", True)
QSCHEMES = ("per_channel", "per_tensor", "per_group", "per_block")
AITER_DTYPES = ("fp8", "fp4", "fp16", "fp32")  # those of AITER that Quark names alike; all others are taken for BF16
# Where methods without a parser of their own have their list: the first of these that is not empty.
LISTS = ("ignore", "modules_to_not_convert", "exclude", "ignored_layers")
ONE_EXPERT = re.compile(r"(.+\.experts)\.\d+\.(?:w[123]|(?:gate|up|down)_proj)")


def atom(model: GateModel, layer: MoEBlock, options: Options) -> Decision:
    """ROCm/ATOM with prefixes, text only as its guide says: the specs of the two blocks of this very layer.

    The shared expert is asked for by its parent's name, so a pattern that only covers its children
    (`*.shared_expert.*`, Quark's own template) is not seen.
    """
    return _atom(model, layer, options, ATOM)


def atom_multimodal(model: GateModel, layer: MoEBlock, options: Options) -> Decision:
    """The same, for the class that a later model_runner.py builds of a checkpoint with a vision tower."""
    return _atom(model, layer, options, ATOM_MULTIMODAL)


def _atom(model: GateModel, layer: MoEBlock, options: Options, names: Namespace) -> Decision:
    quant = model.quant.read_as("atom", names, model.nested)
    if trouble := quant.view("atom stops", lambda: _cannot_start(quant)):
        kind = "format" if quant.method == "modelopt" else "fact"
        return stops(trouble, Evidence(f"atom/quant_spec.py: the parser of {quant.method}", kind))
    if (refusal := _refusal(model, options)) is not None:
        return refusal
    shared, shared_hit = _seen(quant, f"{layer.name}.mlp.shared_expert")
    routed, routed_hit = _seen(quant, layer.experts)
    evidence = (
        Evidence.of(shared_hit, "shared " + " ".join(map(str, shared[:2]))),
        Evidence.of(routed_hit, "routed " + " ".join(map(str, routed[:2]))),
    )
    if shared == routed:
        return yes("routed and shared experts have the same spec", *evidence)
    return no("routed and shared experts have different specs", *evidence)


def atom_first_entry(model: GateModel, layer: MoEBlock, options: Options) -> Decision:
    """ATOM without prefixes: the first entry that contains "shared_expert" speaks for all layers.

    It is often `shared_expert_gate`, or belongs to the draft, and then switches fusion off for no reason.
    """
    if (refusal := _refusal(model, options)) is not None:
        return refusal
    quant = model.quant.read_as("atom")
    hit = first_entry(quant, lambda e: "shared_expert" in e)
    if hit is None or quant.spec_of(hit.entry).spec.kind == quant.default.kind:
        return yes("no entry says that the shared expert differs")
    note: tuple[Evidence, ...] = ()
    if not mentions_shared_body(hit.entry) or is_draft_entry(hit.entry, model.num_hidden_layers, len(model.drafts)):
        note = (Evidence("this entry does not name the target's shared expert body", "warning"),)
    return no("the first entry with the word shared_expert is not quantised", Evidence.of(hit), *note)


def _refusal(model: GateModel, options: Options) -> Decision | None:
    if options.dp_size > 1 and options.moe_ep_flatten_tp_across_dp:
        return no("data parallel ranks are flattened into expert parallel ones")
    mori = options.dp_size > 1 and options.a2a_backend == "mori" and options.dp_attention
    if mori and not (options.eplb or options.atom_fuse_shared_expert):
        return no("MoRI with data parallel attention needs ATOM_FUSE_SHARED_EXPERT or EPLB")
    return refuse_sizes(model)


def _seen(quant: QuantConfig, module: str) -> tuple[Key, Hit]:
    """What ATOM takes a block for, and the entry that says so."""
    (name,), listed = quant.names(module), quant.view("atom list", lambda: _list(quant))
    below = (Hit(listed.list, i, listed.written[i], "an entry below it") for i, _ in listed.index.below(name))
    if hit := listed.hit(name) or next(below, None):
        return UNQUANTISED, hit
    keys: Mapping[str, Key] = quant.view("atom keys", lambda: _mixed(quant)) if quant.method == "modelopt" else {}
    if keys:
        key = next((key for key in keys if occurs_in_key(key, name)), "")
        return keys.get(key, UNQUANTISED), Hit("quantized_layers", None, key, "layer pattern")
    if quant.method != "quark":
        stated = UNQUANTISED if quant.method == "none" else ("as stated", "", True)
        return stated, Hit(quant.default_from, None, "", "")
    if found := first_match(quant.layer_index, name, (occurs_in_key,)):
        hit = Hit("layer_quant_config", None, quant.layer_index.entries[found[0]], "")
        return _quark_key(quant.key_specs[found[0]]), hit
    return _quark_key(quant.raw.get("global_quant_config")), Hit(quant.default_from, None, "", "default")


def _list(quant: QuantConfig) -> ExcludeList:
    """The list that ATOM reads. ATOM ignores GPTQ's `dynamic` and ModelOpt's `ignore`."""
    raw = _inner(quant.raw) if quant.method == "modelopt" else quant.raw
    places = {"quark": ("exclude",), "modelopt": ("exclude_modules",)}.get(quant.method, LISTS)
    key = next((key for key in places if raw.get(key)), "")
    written = tuple(entry for entry in raw.get(key) or () if isinstance(entry, str))
    count = quant.num_hidden_layers or 0
    names = quant.namespace or ATOM
    return exclude_list(tuple(names.entry(entry, quant.nested, count) for entry in written), "atom", key, written)


def _inner(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    return raw.get("quantization", raw)


def _mixed(quant: QuantConfig) -> dict[str, Key]:
    """ModelOpt's quantized_layers; single experts count as their block, and come last."""
    layers = _inner(quant.raw).get("quantized_layers") or {}
    algos = {name: (str(entry.get("quant_algo")).upper(), "", True) for name, entry in layers.items()}
    found = {ATOM.key(name, True): key for name, key in algos.items() if not ONE_EXPERT.fullmatch(name)}
    for name, key in algos.items():
        if match := ONE_EXPERT.fullmatch(name):
            found.setdefault(match[1], key)
    return found


def _quark_key(raw: Mapping[str, Any] | None) -> Key:
    weights, inputs = (steps((raw or {}).get(key)) for key in ("weight", "input_tensors"))
    dynamic = bool(inputs[0].get("is_dynamic", True)) if inputs else True
    if not weights:
        return "bf16", "no", dynamic
    dtype = re.sub(r"_e\d+m\d+.*", "", str(weights[0].get("dtype")))
    dtype = "nvfp4" if len(weights) > 1 else dtype if dtype in AITER_DTYPES else "bf16"
    scheme = weights[0].get("qscheme")
    return dtype, scheme if scheme in QSCHEMES else "no", dynamic


def _cannot_start(quant: QuantConfig) -> str:
    """Why ATOM raises when it reads the configuration; "" if it does not."""
    if quant.method == "quark":
        odd = any(map(several_steps, quark_specs(quant).values()))
        return "a weight in several steps is read as NVFP4 only" if odd else ""
    if quant.method != "modelopt" or quant.raw.get("quant_method") not in ("modelopt", None):
        return ""
    inner = _inner(quant.raw)
    algo, layers = str(inner.get("quant_algo", "")).upper(), inner.get("quantized_layers")
    if algo != "MIXED_PRECISION" or not layers:
        return f"ModelOpt is read as MIXED_PRECISION with quantized_layers only, not as {algo}"
    blocks: dict[str, str] = {}
    for name, entry in layers.items():
        algo = str(entry.get("quant_algo", "")).upper()
        if algo not in ("NVFP4", "MXFP8") or algo == "NVFP4" and entry.get("group_size", 16) != 16:
            return f"{algo} in quantized_layers is neither NVFP4 with groups of 16 nor MXFP8"
        if (match := ONE_EXPERT.fullmatch(name)) and blocks.setdefault(match[1], algo) != algo:
            return f"the experts of {match[1]} are quantised in two ways"
    return ""
