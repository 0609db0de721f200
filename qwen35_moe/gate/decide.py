"""The fusion gate: one answer for everybody who asks whether the shared expert is fused.

Before sglang PR 22948 the model, the exclude list and the loader were not asked together: the model fused, the list
said BF16, and the loader copied BF16 bytes into an FP4 slot, which computes noise.

>>> decision = can_fuse_shared_expert(config)
>>> if decision: ...            # true if fused
>>> print(decision)             # the reason, and the very entry of the exclude list

The way to a decision, file by file:
1. records.GateModel: of config.json, the MoE layers, the experts' sizes and the quantization_config.
2. dialects: a quantization_config becomes an exclude list, specs for patterns of names, and a default.
3. names, readings: one engine's names for modules, its renaming of entries, and its ways of matching them.
4. exclude, declared: what one module is under this reading, and which entry says so.
5. strict, sglang, vllm, atom: a rule compares the shared expert with the routed ones, and gives its reason.
6. here: a rule for each layer, one answer for all, and what would break if an engine acted on its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from ..errors import Qwen35Error
from ..quant.precision import BF16, ModuleSpec
from .atom import atom, atom_first_entry, atom_multimodal
from .common import Rule
from .declared import QuantConfig
from .names import ATOM, ATOM_MULTIMODAL, SGLANG, VLLM, Names, merged_name
from .records import PROJECTIONS, Decision, Evidence, GateModel, MoEBlock, Options, Stored
from .sglang import plain_draft, sglang_0_5_23, sglang_22948
from .strict import TooManyPatterns, agree, layer_facts, strict
from .vllm import all_or_none, vllm_0_33


@dataclass(frozen=True)
class RuleInfo:
    """A rule, and how the loader of the same engine reads the exclude list.

    semantics, fp8: the reading (`readings.SEMANTICS`) of Quark's lists, and of those of the method fp8. names: the
    engine's names for modules; None where any spelling counts. by_layer: the answer may differ from layer to layer.
    together: what the engine makes of the answers for all layers. plain_draft: whether it builds a model's draft
    unquantised, whatever the target is.
    """

    decide: Rule
    semantics: str
    names: Names | None = None
    by_layer: bool = True
    together: Callable[[list[Decision]], list[Decision]] = list
    fp8: str = "fp8"
    plain_draft: Callable[[GateModel], Decision | None] = lambda _: None

    def sees(self, model: GateModel) -> GateModel:
        """The model as the engine sees it: only vLLM looks for a quantization_config in text_config."""
        unseen = model.quant_inside and self.semantics in ("sglang", "atom")
        return replace(model, quant=QuantConfig.from_dict(None)) if unseen else model

    def takes(self, quant: QuantConfig, module: str) -> ModuleSpec:
        """What the loader takes a projection for. SGLang and vLLM ask by the name of the merged module first."""
        merged = merged_name(module) if self.semantics != "atom" else ""
        return BF16 if merged and quant.exclude.direct(quant.names(merged)) else quant.spec_of(module).spec

    def reading(self, model: GateModel) -> QuantConfig:
        """The model's quantization_config as the engine's loader reads it."""
        model = self.sees(model)
        how = {"quark": self.semantics, "fp8": self.fp8}.get(model.quant.method)
        return model.quant.read_as(how, self.names and self.names[model.nested]) if how else model.quant


RULES = {
    "strict": RuleInfo(strict, "quark"),
    "sglang-22948": RuleInfo(sglang_22948, "sglang", SGLANG, by_layer=False),  # sgl-project/sglang, the PR
    "sglang-0.5.23": RuleInfo(sglang_0_5_23, "sglang", SGLANG, by_layer=False, plain_draft=plain_draft),
    "vllm-0.33": RuleInfo(vllm_0_33, "vllm", VLLM, together=all_or_none, fp8="vllm-fp8"),
    "atom-ffdf3bb5": RuleInfo(atom, "atom", ATOM, fp8="atom"),  # ROCm/ATOM at this commit, with prefixes
    "atom-00afbe32": RuleInfo(atom_multimodal, "atom", ATOM_MULTIMODAL, fp8="atom"),  # with a vision tower
    "atom-first-entry": RuleInfo(atom_first_entry, "atom", by_layer=False),  # without prefixes
}

# An engine's name alone means its newest version.
NEWEST = {"sglang": "sglang-0.5.23", "vllm": "vllm-0.33", "atom": "atom-ffdf3bb5"}

# What `--all-rules` shows: every engine as it comes, and with the switch that its users turn.
VARIANTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("strict", "strict", {}),
    ("sglang-22948", "sglang-22948", {}),
    ("sglang-0.5.23", "sglang-0.5.23", {}),
    ("sglang-0.5.23 --enforce", "sglang-0.5.23", {"enforce_shared_experts_fusion": True}),
    ("vllm-0.33", "vllm-0.33", {}),
    ("vllm-0.33, opted in", "vllm-0.33", {"vllm_opt_in": True}),
    ("vllm-0.33, converting", "vllm-0.33", {"vllm_opt_in": True, "vllm_online_target": "mxfp4"}),
    ("atom-ffdf3bb5", "atom-ffdf3bb5", {}),
    ("atom-first-entry", "atom-first-entry", {}),
)


def can_fuse_shared_expert(
    config: Any, quant_config: Any = None, rule: str = "strict", *, stored: Stored = None, **options: Any
) -> Decision:
    """Whether the shared expert may be fused, under one rule, for the whole target model.

    config: a config.json's dictionary (nested or flat) or a config object. quant_config: its quantization_config, if
    not inside. rule: one of RULES. stored: module name -> ModuleSpec of what the tensors really are
    (`Checkpoint.spec`); `strict` alone looks at it. options: fields of `Options`.

    True only if every MoE layer agrees; the draft has its own decision, in `decide_layers`.
    Error: unknown rule, option or quantisation method.
    """
    return summarise(decide_layers(config, quant_config, rule, stored=stored, **options), rule)


def summarise(decisions: Iterable[Decision], rule: str) -> Decision:
    """One answer for the target model: yes if every layer says yes. The draft does not count."""
    decisions = [d for d in decisions if not d.draft]
    against = [d for d in decisions if not d]
    if not decisions:
        return Decision(False, rule_named(rule), "the model has no MoE layer")
    if not against or len(against) == len(decisions):
        return replace(decisions[0], layer="model")
    first, fine = against[0], len(decisions) - len(against)
    reason = f"{len(against)} of {len(decisions)} layers may not fuse, first {first.layer}: {first.reason}"
    return Decision(False, first.rule, reason, (*first.evidence, Evidence(f"{fine} layers could")))


def decide_layers(
    config: Any, quant_config: Any = None, rule: str = "strict", *, stored: Stored = None, **options: Any
) -> list[Decision]:
    """One decision per MoE layer, then one per MTP draft layer. Arguments as for `can_fuse_shared_expert`."""
    model = GateModel.from_config(config, quant_config, stored)
    rule, checked = rule_named(rule), Options.from_kwargs(options)
    info, known, found = RULES[rule], dict[object, Decision](), []
    model = info.sees(model)
    for layer in (*model.layers, *model.drafts):
        key = layer.name if info.by_layer else layer.draft
        if key not in known:
            known[key] = next(info.decide(model, layer, checked))
        found.append(replace(known[key], rule=rule, layer=layer.name))
    return info.together(found)


def rule_named(rule: str) -> str:
    """The rule with its version, by its name in any case: `sglang` means the newest. Error: an unknown name."""
    rule = NEWEST.get(rule.lower(), rule.lower())
    if rule not in RULES:
        names = (*RULES, *NEWEST)
        near = get_close_matches(rule, names, n=1)
        do = f"did you mean {near[0]!r}?" if near else ""
        raise Qwen35Error("unknown rule of the gate", expected=", ".join(names), found=rule, do=do)
    return rule


def hazards(config: Any, quant_config: Any, decisions: Iterable[Decision], stored: Stored = None) -> dict[str, str]:
    """What would go wrong if an engine acted on its decisions: layer name -> what breaks.

    Judged by the stored specs; where none are given, by the exclude list under the reading of the tool that wrote it.
    Two kinds: bytes that do not fit the fused slot (the failure of PR 22948), and a loader that takes a module for
    something that it is not.
    """
    model, found = GateModel.from_config(config, quant_config, stored), dict[str, str]()
    layers = {layer.name: layer for layer in (*model.layers, *model.drafts)}
    for decision in decisions:
        try:
            text = next(_breaks(model, layers[decision.layer], decision), "")
        except TooManyPatterns:
            text = ""  # nothing is known, so nothing is said to break
        except Qwen35Error as error:
            text = f"{error.what}: {error.where} is {error.found}, expected {error.expected}"
        found |= {decision.layer: text} if text else {}
    return found


def _breaks(model: GateModel, layer: MoEBlock, decision: Decision) -> Iterator[str]:
    shared, routed = layer_facts(model, layer)
    first, absent = routed[0], [f.name for f in (*routed, *shared) if f.stored is None]
    if decision:
        if 0 < len(absent) < len(routed) + len(shared):  # nothing stored: nothing is missing
            yield f"a fused slot would stay unfilled: {absent[0]} is missing from the checkpoint"
        for odd in (f for f in routed if not f.spec.same_bytes(first.spec)):
            yield f"the routed experts are not alike: {first.name} is {first.spec}, {odd.name} is {odd.spec}"
        slot_guard(layer.experts, first.spec, {f.name: f.spec for f in shared}, convert=decision.online)
    if decision.rule == "strict" or not decision.starts:
        return
    # What the engine's loader takes for something that it is not. It asks for the routed experts as one module.
    rule = RULES[decision.rule]
    quant, plain = rule.reading(model), layer.draft and rule.plain_draft(model)
    excluded = quant.excluded(layer.experts) is not None
    inside = quant.without_exclusions() if quant.exclude.semantics.children else quant
    whole = inside.spec_of(layer.experts)
    for facts, floats, believed in ((routed, plain or excluded, inside), (shared, plain, quant)):
        for fact in facts:
            at_once = facts is routed and whole.hit.entry
            a, b = fact.spec, BF16 if floats else whole.spec if at_once else rule.takes(believed, fact.name)
            if not agree(b, a):
                yield f"the loader takes {fact.name} for {b.kind}, but it is {a.kind} ({fact.declared.hit})"


def slot_guard(slot: str, spec: ModuleSpec, tensors: Mapping[str, ModuleSpec | None], *, convert: bool = False) -> None:
    """Refuses to fill slot E with anything but what its kernel reads. The loader calls it before copying a byte.

    slot: its name, for the message. spec: the routed experts' spec. tensors: module of the body -> what is stored.
    convert: floats are quantised to the slot's format on the way (online conversion), so floats are allowed.
    Error, naming the tensor: its bytes are of another kind than the slot's; a part of the slot would stay unfilled; a
    tensor would be left over.
    """
    by_part = {name.rpartition(".")[2]: (name, found) for name, found in tensors.items()}
    for part in PROJECTIONS:
        name, found = by_part.pop(part, (part, None))
        if found is None:
            where, expected = f"{slot}, {name}", f"a {spec.kind} tensor"
            do = "check the renaming of shared_expert to the slot; a slot that is not filled computes noise"
            what = "a fused slot would stay unfilled"
            raise Qwen35Error(what, where=where, expected=expected, found="nothing", do=do)
        if not (found.same_bytes(spec) or convert and found.is_float):
            what = f"{found.kind} bytes would be read as {spec.kind}"
            do = 'load with shared_expert="unfused", or convert the tensor: "fused-online"'
            raise Qwen35Error(what, where=name, expected=spec, found=found, do=do)
    if by_part:
        left, expected = next(iter(by_part.values()))[0], f"only {', '.join(PROJECTIONS)}"
        raise Qwen35Error("a tensor has no place in the fused slot", where=left, expected=expected, found=slot)
