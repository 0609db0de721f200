"""Our own rule: fuse where the shared expert is stored as the routed experts of that very layer are, and nowhere else.

What a module is comes from its bytes if they can be seen, and otherwise from the configuration, provided that all
readings of the exclude list agree about it. Where list and bytes disagree, the bytes decide and the evidence warns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from ..errors import Qwen35Error
from ..quant.precision import BF16, UNSTATED, ModuleSpec
from .common import Answers, refuse_sizes
from .declared import QuantConfig, Resolution
from .dialects import DIALECT_READERS
from .exclude import Hit, numbers_of, numbers_required
from .names import tells_experts_apart
from .records import PROJECTIONS, Evidence, GateModel, MoEBlock, Options, SpecLookup, no, yes

# Method -> who else reads such a list. vLLM reads Quark's as SGLang does.
OTHER_READINGS = {"quark": ("sglang", "atom"), "fp8": ("vllm-fp8", "atom")}

# Patterns times experts of a layer. Measured for 512 experts in 60 layers: 10 patterns take 10 s of processor time.
MOST_QUESTIONS = 5120


class TooManyPatterns(Qwen35Error):
    """A list that takes too long to read. It says nothing about the checkpoint."""


class ModuleFacts(NamedTuple):
    """One module: what it is declared to be, what it is under a reading that disagrees, what is stored."""

    name: str
    declared: Resolution
    other: Resolution | None
    stored: ModuleSpec | None

    @property
    def spec(self) -> ModuleSpec:
        return self.stored or self.declared.spec


def layer_facts(model: GateModel, layer: MoEBlock) -> tuple[list[ModuleFacts], list[ModuleFacts]]:
    """(shared, routed): the modules of one MoE block that would lie in one tensor if the shared expert is fused.

    Declared as the tool that wrote the exclude list reads it. Collected once: `hazards` judges all rules by them.
    """

    def collected() -> tuple[list[ModuleFacts], list[ModuleFacts]]:
        return [_facts(name, model.quant, model.stored) for name in layer.shared], _routed(model, layer)

    return model.quant.view((layer, model.num_experts, model.stored), collected)


def _facts(name: str, quant: QuantConfig, stored: SpecLookup | None) -> ModuleFacts:
    declared, parts = quant.spec_of(name), name.split(".")
    block = ".".join(parts[: parts.index("mlp") + 2])  # `….mlp.experts` or `….mlp.shared_expert`
    readings = []
    for other in map(quant.read_as, OTHER_READINGS.get(quant.method, ())):
        own, whole = other.spec_of(name), other.spec_of(block)  # engines ask for all experts as one
        readings.append(whole if whole.hit.entry and not own.hit.entry else own)
    if hit := quant.view(block, lambda: _block_above(block, quant)):
        readings.append(Resolution(BF16, hit))
    second = next((reading for reading in readings if reading.spec != declared.spec), None)
    return ModuleFacts(name, declared, second, stored(name) if stored else None)


def _block_above(block: str, quant: QuantConfig) -> Hit | None:
    """An entry that names a block, or what is around it.

    Engines ask for `mlp.experts`, ATOM for `mlp.shared_expert`, and people write them by hand, also with a dot behind.
    """
    parts = block.split(".")
    dotted = [n for end in range(len(parts), 1, -1) for n in quant.names(".".join(parts[:end]) + ".")]
    hit = quant.exclude.hit([*(n[:-1] for n in dotted), *dotted])
    return hit and replace(hit, how="a block around it")


def _routed(model: GateModel, layer: MoEBlock) -> list[ModuleFacts]:
    """The routed experts, each kind once. Experts of whom list and bytes say the same are asked once."""
    whole = model.stored(layer.experts) if model.stored else None
    lookup = (lambda _: whole) if whole is not None else model.stored
    said = _said(model, layer)
    asked: dict[Hashable, dict[str, ModuleFacts]] = {}
    found: dict[object, ModuleFacts] = {}
    for expert in range(max(model.num_experts, 1)):
        key: Hashable = expert if said is None else said.get(expert)
        alike = asked.get(key)
        if alike is not None and (lookup is None or whole is not None):
            continue
        for part in PROJECTIONS:
            name = f"{layer.experts}.{expert}.{part}"
            if alike is None:
                facts = asked.setdefault(key, {})[part] = _facts(name, model.quant, lookup)
            else:
                facts = alike[part]._replace(name=name, stored=lookup(name) if lookup else None)
            found.setdefault((part, facts.declared.spec, facts.other and facts.other.spec, facts.stored), facts)
    return list(found.values())


def _said(model: GateModel, layer: MoEBlock) -> Mapping[int, Hashable] | None:
    """What the configuration says of single experts of a layer; None if a pattern may tell any two of them apart.

    Error: so many such patterns that asking every expert about each would take minutes.
    """
    found, vague, quant = defaultdict[int, list[Hashable]](list), set[str](), model.quant
    spelled = {numbers_of(name): name for name in quant.names(layer.experts)}
    for index in (quant.exclude.index, quant.layer_index):
        for name in quant.names(f"{layer.experts}.0.{PROJECTIONS[0]}"):
            named = (entry for _, entry in index.near(name) if numbers_required(entry)[1] is None)
            vague |= set(filter(tells_experts_apart, named))
        for name in spelled.values():
            for expert, said in index.experts(name).items():
                found[expert].append((name, index is quant.layer_index, said))
    if len(vague) * model.num_experts > MOST_QUESTIONS:
        expected, text = f"at most {MOST_QUESTIONS // model.num_experts}", sorted(vague)[0]
        what, where = "too many patterns tell the experts of a layer apart", f"{layer.name}, {text!r:.100}"
        raise TooManyPatterns(what, where=where, expected=expected, found=len(vague))
    return None if vague else {expert: tuple(said) for expert, said in found.items()}


def strict(model: GateModel, layer: MoEBlock, options: Options) -> Answers:
    """The strict rule for one layer. It asks what is right, not what a platform or an all-to-all backend can do."""
    if options.disable_shared_experts_fusion:
        yield no("fusion is switched off")
    yield from refuse_sizes(model)
    if model.stored is None and model.quant.method not in ("none", *DIALECT_READERS):
        what = "what the quantisation does to a module is not known, and no bytes were given"
        yield no(what, model.quant.default_from)
    try:
        shared, routed = layer_facts(model, layer)
    except Qwen35Error as error:
        yield no("a module has no single spec", Evidence(f"{error.where}: {error.what}", "warning"))
        return
    evidence, everything = [*_entries(shared, routed), *_warnings(shared), *_warnings(routed)], (*shared, *routed)
    missing = [f.name for f in everything if f.stored is None]
    if model.stored and missing:
        yield no("a tensor is missing from the checkpoint", Evidence(missing[0], "warning"), *evidence)
    for f in everything:
        if f.other is not None and f.stored is None:
            text = f"{f.name}: {f.declared.spec} by {f.declared.hit}, yet {f.other.spec} to others by {f.other.hit}"
            why = "readers of the exclude list disagree, and no bytes were given to settle it"
            yield no(why, Evidence(text, "warning"), *evidence)
    source = "in the bytes" if model.stored else "by the configuration; no bytes were seen"
    one, other = shared[0].spec, routed[0].spec
    for group, what in ((routed, "the routed experts"), (shared, "the shared expert's projections")):
        for odd in (f for f in group if not f.spec.same_bytes(group[0].spec)):
            text = f"{group[0].name} is {group[0].spec}, {odd.name} is {odd.spec}"
            yield no(f"{what} are not alike", text, *evidence)
    if not one.same_bytes(other):
        yield no(f"the shared expert is {one.kind}, the routed experts are {other.kind}, {source}", *evidence)
    inputs = {f.declared.spec.activation for f in everything if not f.declared.spec.is_float}
    if len(inputs) > 1 and not one.is_float:
        why, found = "the inputs of shared and routed experts are quantised differently", sorted(map(str, inputs))
        yield no(why, " and ".join(found), *evidence)
    yield yes(f"shared and routed experts are both {one.kind}, {source}", *evidence)


def _entries(shared: list[ModuleFacts], routed: list[ModuleFacts]) -> list[Evidence]:
    """The entries behind the declared specs, each once, the shared expert's first."""
    found: dict[object, Evidence] = {}
    for who, group in (("shared", shared), ("routed", routed)):
        for fact in group:
            hit, said = fact.declared.hit, f"{who}: {fact.declared.spec.kind}"
            evidence = Evidence.of(hit, said, "entry" if hit.entry else "fact")
            found.setdefault((who, hit.list, hit.index, hit.entry), evidence)
    return sorted(found.values(), key=lambda e: e.kind != "entry")[:4]


def _warnings(group: list[ModuleFacts]) -> Iterator[Evidence]:
    """One warning if there are modules whose declared spec is not the stored one."""
    wrong = [(f, f.stored) for f in group if f.stored and not agree(f.declared.spec, f.stored)]
    for f, real in wrong[:1]:
        hit, more = f.declared.hit, f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        by = hit if hit.entry else f"{hit}, no entry names it"
        text = f"{f.name}{more} is {real.kind} in the bytes, but {f.declared.spec.kind} by {by}"
        yield Evidence(text, "warning", hit.entry, hit.index, hit.list)


def agree(declared: ModuleSpec, stored: ModuleSpec) -> bool:
    """Whether the bytes are what was declared: any float for "not quantised", and anything where nothing is stated."""
    return declared == UNSTATED or declared.is_float and stored.is_float or declared.same_bytes(stored)
