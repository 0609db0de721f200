"""What several engines' gates share: the answers, the shape of the slot, and how raw Quark specs are looked up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from ..errors import Qwen35Error
from .declared import QuantConfig
from .exclude import Hit
from .module_names import expand_fused
from .records import Decision, Evidence, Layer, Model, Options

Rule = Callable[[Model, Layer, Options], Decision]


def yes(reason: str, *evidence: Evidence, online: bool = False) -> Decision:
    return Decision(True, "", reason, evidence, online=online)


def no(reason: str, *evidence: Evidence) -> Decision:
    return Decision(False, "", reason, evidence)


# A refusal is a Decision, and so is false: callers compare with None.
def refuse_sizes(model: Model) -> Decision | None:
    """A slot has the routed experts' shape, so the shared expert must have it too."""
    if model.shared_size <= 0:
        return no("the model has no shared expert", Evidence(f"shared_expert_intermediate_size = {model.shared_size}"))
    if model.shared_size != model.routed_size:
        sizes = f"shared_expert_intermediate_size = {model.shared_size}, moe_intermediate_size = {model.routed_size}"
        return no("the shared expert has another size than the routed experts", Evidence(sizes))
    return None


def refuse_platform(options: Options) -> Decision | None:
    if options.hip and options.aiter or not options.hip and options.cuda_opt_in:
        return None
    return no(
        "the platform does not fuse", Evidence("needs ROCm with SGLANG_USE_AITER, or a CUDA model class that opts in")
    )


def first_entry(quant: QuantConfig, test: Callable[[str], bool], how: str = "substring") -> Hit | None:
    """The first entry of the exclude list that passes a test of the raw string."""
    found = next(((i, e) for i, e in enumerate(quant.exclude.entries) if test(e)), None)
    return Hit(quant.exclude.list, found[0], found[1], how) if found else None


def quark_layer_config(raw: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The raw Quark spec of a module, as SGLang and vLLM compare it: patterns, single experts, the default.

    Error: the parts of a fused module, or single experts, with different specs.
    """
    layers = raw.get("layer_quant_config") or {}
    if parts := expand_fused(names[0]):
        heads = [n.rpartition(".")[0] for n in names]
        specs = [quark_layer_config(raw, [f"{h}.{p.rpartition('.')[2]}" for h in heads]) for p in parts]
        if any(s != specs[0] for s in specs):
            raise Qwen35Error("the parts of a fused module have different specs", where=names[0])
        return specs[0]
    for pattern, spec in layers.items():
        if any(fnmatchcase(name, pattern) for name in names):
            return spec
    below = tuple(n + "." for n in names if n.endswith(".experts"))
    single = {key: spec for key, spec in layers.items() if key.startswith(below)} if below else {}
    return _one_spec(names[0], single) if single else raw.get("global_quant_config")


def _one_spec(experts: str, single: Mapping[str, Any]) -> Any:
    """The spec that entries for single experts give to all of them; they must begin at 0, leave no gap and be alike."""
    projections: dict[str, set[str]] = {}
    for key in single:
        number, _, projection = key.partition(".experts.")[2].partition(".")
        projections.setdefault(number, set()).add(projection)
    specs, sets = list(single.values()), list(projections.values())
    complete = set(projections) == {str(i) for i in range(len(projections))} and all(all(s) for s in sets)
    if not complete or any(s != sets[0] for s in sets) or any(s != specs[0] for s in specs):
        raise Qwen35Error("entries for single experts leave gaps or differ", where=experts)
    return specs[0]
