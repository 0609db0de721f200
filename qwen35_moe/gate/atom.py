"""ATOM's rules, written from what they do, not copied: atom/model_ops/topK.py, config.py, quant_spec.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from .common import Answers, first_entry, refuse_sizes, several_steps
from .declared import QuantConfig
from .dialects import modelopt_part, steps
from .exclude import ExcludeList, Hit
from .names import ATOM, ATOM_MULTIMODAL, Names, is_draft_entry, mentions_shared_body
from .readings import occurs_in_key
from .records import Evidence, GateModel, MoEBlock, Options, no, stops, yes

# What ATOM compares: dtype, grouping, dynamic inputs. Inputs that are not stated count as dynamic: W4A16 equals W4A4.
Spec = tuple[str, str, bool]
UNQUANTISED: Spec = ("bf16", "no", True)
QSCHEMES = ("per_channel", "per_tensor", "per_group", "per_block")
AITER_DTYPES = ("fp8", "fp4", "fp16", "fp32")  # those of AITER that Quark names alike; all others are taken for BF16
# Where a method has its list: the first of these that is not empty. GPTQ's `dynamic` and ModelOpt's `ignore` are not
# among them.
LISTS = {"quark": ("exclude",), "modelopt": ("exclude_modules",)}
OTHER_LISTS = ("ignore", "modules_to_not_convert", "exclude", "ignored_layers")
ONE_EXPERT = re.compile(r"(.+\.experts)\.\d+\.(?:w[123]|(?:gate|up|down)_proj)")


def _by_layer(model: GateModel, layer: MoEBlock, options: Options, names: Names) -> Answers:
    """ROCm/ATOM with prefixes: the specs of the two blocks of this very layer.

    The shared expert is asked for by its parent's name, so a pattern that only covers its children
    (`*.shared_expert.*`, Quark's own template) is not seen.
    """
    quant = model.quant.read_as("atom", names[model.nested])
    if trouble := quant.view("atom stops", lambda: _cannot_start(quant)):
        kind = "format" if quant.method == "modelopt" else "fact"
        yield stops(trouble, Evidence(f"atom/quant_spec.py: the parser of {quant.method}", kind))
    yield from _refusals(model, options)
    (shared, shared_hit), (routed, routed_hit) = (_seen(quant, module) for module in (layer.body, layer.experts))
    evidence = (
        Evidence.of(shared_hit, "shared " + " ".join(map(str, shared[:2]))),
        Evidence.of(routed_hit, "routed " + " ".join(map(str, routed[:2]))),
    )
    if shared == routed:
        yield yes("routed and shared experts have the same spec", *evidence)
    yield no("routed and shared experts have different specs", *evidence)


atom = partial(_by_layer, names=ATOM)  # text only, as its guide says
atom_multimodal = partial(_by_layer, names=ATOM_MULTIMODAL)  # a later model_runner.py's, where there is a tower


def atom_first_entry(model: GateModel, layer: MoEBlock, options: Options) -> Answers:
    """ATOM where its gate is called without the names of the modules: the first entry that contains "shared_expert"
    decides for all layers. Often that is the gate vector's, or the draft's, and fusion is off for no reason.
    """
    yield from _refusals(model, options)
    quant = model.quant.read_as("atom")
    hit = first_entry(quant, lambda e: "shared_expert" in e)
    if hit is None or quant.spec_of(hit.entry).spec.kind == quant.default.kind:
        yield yes("no entry says that the shared expert differs")
        return
    draft = is_draft_entry(hit.entry, model.num_hidden_layers, len(model.drafts))
    note = Evidence("this entry does not name the target's shared expert body", "warning")
    notes = [note] if draft or not mentions_shared_body(hit.entry) else []
    yield no("the first entry with the word shared_expert is not quantised", hit, *notes)


def _refusals(model: GateModel, options: Options) -> Answers:
    if options.dp_size > 1 and options.moe_ep_flatten_tp_across_dp:
        yield no("data parallel ranks are flattened into expert parallel ones")
    mori = options.dp_size > 1 and options.a2a_backend == "mori" and options.dp_attention
    if mori and not (options.eplb or options.atom_fuse_shared_expert):
        yield no("MoRI with data parallel attention needs ATOM_FUSE_SHARED_EXPERT or EPLB")
    yield from refuse_sizes(model)


def _seen(quant: QuantConfig, module: str) -> tuple[Spec, Hit]:
    """What ATOM takes a block for, and the entry that says so."""
    (name,), listed = quant.names(module), quant.view("atom list", lambda: _list(quant))
    if hit := listed.hit(name) or listed.below([name], "an entry below it"):
        return UNQUANTISED, hit
    mixed: Mapping[str, Spec] = quant.view("atom keys", lambda: _mixed(quant)) if quant.method == "modelopt" else {}
    if mixed:
        key = next((key for key in mixed if occurs_in_key(key, name)), "")
        return mixed.get(key, UNQUANTISED), Hit("quantized_layers", None, key, "layer pattern")
    if quant.method != "quark":
        stated = UNQUANTISED if quant.method == "none" else ("as stated", "", True)
        return stated, Hit(quant.default_from, None, "", "")
    for key, spec in quant.quark_specs(name):
        return _quark_spec(spec), Hit("layer_quant_config", None, key, "")
    return _quark_spec(quant.raw.get("global_quant_config")), Hit(quant.default_from, None, "", "default")


def _list(quant: QuantConfig) -> ExcludeList:
    """The list that ATOM reads."""
    raw = modelopt_part(quant.raw) if quant.method == "modelopt" else quant.raw
    key = next((key for key in LISTS.get(quant.method, OTHER_LISTS) if raw.get(key)), "")
    written = [entry for entry in raw.get(key) or () if isinstance(entry, str)]
    return ExcludeList(written, "atom", key, (quant.namespace or ATOM[0]).entries)


def _mixed(quant: QuantConfig) -> dict[str, Spec]:
    """ModelOpt's quantized_layers; single experts count as their block, and come last."""
    layers = modelopt_part(quant.raw).get("quantized_layers") or {}
    specs = {name: (str(entry.get("quant_algo")).upper(), "", True) for name, entry in layers.items()}
    found = {ATOM[0].key(name): spec for name, spec in specs.items() if not ONE_EXPERT.fullmatch(name)}
    for name, spec in specs.items():
        if match := ONE_EXPERT.fullmatch(name):
            found.setdefault(match[1], spec)
    return found


def _quark_spec(raw: Mapping[str, Any] | None) -> Spec:
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
    raw = quant.raw
    if quant.method == "quark":
        specs = (raw.get("global_quant_config"), *(raw.get("layer_quant_config") or {}).values())
        odd = any(several_steps(spec) for spec in specs if isinstance(spec, Mapping))
        return "a weight in several steps is read as NVFP4 only" if odd else ""
    if quant.method != "modelopt" or raw.get("quant_method") not in ("modelopt", None):
        return ""
    inner = modelopt_part(raw)
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
