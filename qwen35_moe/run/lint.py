"""Defects of a checkpoint, found before anyone serves it: in its headers, its config.json and the files beside them.

Nothing is computed. Each finding names a module, what is wrong, and which engines it concerns: the newest version of
each, as it comes and with the switches that its users turn (`gate.decide.VARIANTS`). Every stored value is read by
`lint_files.check_bytes`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any

from ..checkpoint import Checkpoint
from ..checkpoint.checkpoint import TensorLayout
from ..checkpoint.recognise import foreign_spec
from ..errors import Qwen35Error
from ..gate.decide import NEWEST, RULES, VARIANTS, decide_layers, hazards
from ..gate.declared import QuantConfig
from ..gate.records import GateModel
from ..gate.strict import agree
from ..model.config import Config
from ..quant.precision import BF16
from .lint_files import Finding, check_files, check_ids
from .validate import model_config, validate

# Linear modules that engines build quantised where the configuration says so, and routers, which they never do. The
# draft's shared expert is judged by the gate.
LINEAR_NAMES = re.compile(
    r"layers\.\d+\.(linear_attn\.(in_proj_(qkv|z|a|b)|out_proj)|mlp\.shared_expert\.(gate|up|down)_proj)"
    r"|(mtp\.)?layers\.\d+\.self_attn\.[qkvo]_proj|mtp\.fc"
)
NEVER_QUANTISED = re.compile(r"(mtp\.)?layers\.\d+\.mlp\.(gate|shared_expert_gate)")


def lint(
    checkpoint: Checkpoint, engines: tuple[str, ...] = tuple(NEWEST), ignore_config_keys: tuple[str, ...] = ()
) -> list[Finding]:
    """All findings that headers, configuration and the files beside them give, the worst first."""
    broken = list(_formats(checkpoint))
    found = [*broken]
    layouts = {checkpoint.layout(module): roles for module, roles in checkpoint.modules.items()}
    foreign = any(foreign_spec(roles) for roles in layouts.values())
    try:
        config = model_config(checkpoint, ignore_config_keys)
    except Qwen35Error as error:
        found.append(_as_finding("config", error))
    else:
        found += [] if foreign or found else _complete(checkpoint, config)
        found += check_ids(checkpoint, config)
    found += _names(checkpoint)
    try:
        found += [] if broken else _gate(checkpoint, engines)
    except Qwen35Error as error:
        found.append(_as_finding("quantization", error))
    found += check_files(checkpoint.path)
    return sorted(dict.fromkeys(found), key=lambda f: ("error", "warning", "note").index(f.level))


def _as_finding(rule: str, error: Qwen35Error) -> Finding:
    text = error.what + (f" (expected {error.expected}, found {error.found})" if str(error.found) else "")
    return Finding("error", rule, str(error.where), text + (f"; {error.do}" if error.do else ""))


def _formats(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Modules whose tensors do not fit together: a scale that is missing, of another shape, or beside a float."""
    alike: dict[TensorLayout, list[str]] = {}
    for module in checkpoint.modules:
        alike.setdefault(checkpoint.layout(module), []).append(module)
    for modules in alike.values():
        try:
            checkpoint.spec(modules[0])
        except Qwen35Error as error:
            found = _as_finding("format", error)
            yield found if len(modules) == 1 else replace(found, text=f"{found.text} ({len(modules)} such modules)")


def _complete(checkpoint: Checkpoint, config: Config) -> Iterator[Finding]:
    try:
        validate(checkpoint, config)
    except Qwen35Error as error:
        try:
            validate(checkpoint, config, text_only=True)
        except Qwen35Error as trunk:
            yield _as_finding("tensors", trunk)
            return
        yield _as_finding("draft-head" if "mtp." in str(error) else "tensors", error)
    tower = any(name.startswith("visual.") for name in checkpoint.tensors)
    if isinstance(config.raw.get("vision_config"), dict) and not tower:
        text = "a vision tower is announced, and none is stored: engines leave its weights as they were allocated"
        yield Finding("warning", "vision-tower", "config.json: vision_config", text)
    stored = any(name.startswith("mtp.") for name in checkpoint.tensors)
    if stored != (config.mtp_num_hidden_layers > 0):
        text = "a draft head is stored, and config.json announces none" if stored else "no draft head is stored"
        yield Finding("warning", "draft-head", "config.json: mtp_num_hidden_layers", text)


def _names(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Prefixes that are read here and by no engine (transformers 45216)."""
    repeated = re.compile(r"(model\.)?language_model\.(language_model|model\.language_model)\.")
    text = "the prefix is repeated; loaders of engines drop such tensors"
    odd = (stored for stored in checkpoint.tensors.values() if repeated.match(stored.raw_name))
    yield from (Finding("error", "prefix", stored.where, text, "all") for stored in islice(odd, 1))


def _gate(checkpoint: Checkpoint, engines: tuple[str, ...]) -> Iterator[Finding]:
    model = GateModel.from_config(checkpoint.config, stored=cache(checkpoint.spec))
    labels: dict[tuple[str, str, str], list[str]] = {}  # (rule, layer, text) -> the variants of engines that do so
    for label, rule, options in VARIANTS:
        if rule in {NEWEST[engine] for engine in engines}:
            for found in _variant(model, rule, options):
                labels.setdefault(found, []).append(label)
    for (what, layer, text), names in labels.items():
        level = "error" if any(name in RULES for name in names) else "warning"  # with a switch only
        yield Finding("note" if what == "unread" else level, what, layer, text, "; ".join(names))
    yield from _linear(checkpoint, model, engines)
    yield from _input_scales(checkpoint, model.quant)


def _variant(model: GateModel, rule: str, options: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(rule of the lint, layer, text): why an engine would not start, or what its loader would spoil."""
    decisions = decide_layers(model, rule=rule, **options)
    if (stop := next((d for d in decisions if not d.starts), None)) is not None:
        unread = any(e.kind == "format" for e in stop.evidence)  # the engine's lack, not the checkpoint's fault
        why = "; ".join(map(str, stop.evidence[:1]))
        yield "unread" if unread else "start", stop.layer, f"does not start: {stop.reason} ({why})"
        return
    broken = hazards(model, None, decisions)
    for part in ("layers.", "mtp."):
        if hit := [name for name in broken if name.startswith(part)]:
            more = f" (and {len(hit) - 1} layers like it)" if len(hit) > 1 else ""
            yield "experts", hit[0], broken[hit[0]] + more


def _linear(checkpoint: Checkpoint, model: GateModel, engines: tuple[str, ...]) -> Iterator[Finding]:
    """Linear modules that an engine's loader takes for something else, once for each kind of module and of mistake."""
    rules = {NEWEST[engine]: RULES[NEWEST[engine]] for engine in engines}
    readings = {name: (rule.reading(model), rule.plain_draft(model)) for name, rule in rules.items()}
    seen: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for module in (module for module in checkpoint.modules if ".experts." not in module):
        never = NEVER_QUANTISED.fullmatch(module)
        if not (never or LINEAR_NAMES.fullmatch(module)) or (spec := checkpoint.spec(module)) is None:
            continue
        for name, (quant, plain_draft) in readings.items():
            plain = never or module.startswith("mtp.") and (plain_draft or module == "mtp.fc" and "sglang" in name)
            believed = BF16 if plain else rules[name].takes(quant, module)
            if not agree(believed, spec):
                key = re.sub(r"\d+", "*", module), spec.kind, believed.kind
                seen.setdefault(key, {}).setdefault(name, []).append(module)
    for (_, real, taken), found in seen.items():
        modules = max(found.values(), key=len)
        loads = "crashes" if "mxfp4" in (real, taken) else "loads garbage, or crashes"
        text = f"is {real}, and its loader takes it for {taken} ({len(modules)} such modules): {loads}"
        yield Finding("error", "declared", modules[0], text, "; ".join(found))


def _input_scales(checkpoint: Checkpoint, quant: QuantConfig) -> Iterator[Finding]:
    """Modules declared to have static inputs without the scale that such inputs need."""
    missing: dict[str, str] = {}
    activations = [spec.activation for spec in (quant.default, *(spec for _, spec in quant.layers))]
    if all(activation is None or activation.dynamic for activation in activations):
        return
    for module, roles in checkpoint.modules.items():
        quantised = roles.keys() & {".weight_scale", ".weight_scale_inv"}
        if quantised and not roles.keys() & {".input_scale", ".input_global_scale"}:
            activation = quant.spec_of(module).spec.activation
            if activation is not None and not activation.dynamic:
                missing.setdefault(re.sub(r"\d+", "*", module), module)
    for module in missing.values():
        yield Finding("error", "input-scale", module, "inputs are declared static, and no input_scale is stored")
