"""What several engines' rules share.

A rule is a generator: it yields its answers in the order in which the engine finds them, and the first one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .declared import QuantConfig
from .dialects import modelopt_list, modelopt_part, steps
from .exclude import Hit
from .records import Decision, Evidence, GateModel, MoEBlock, Options, no, stops

Answers = Iterator[Decision]
Rule = Callable[[GateModel, MoEBlock, Options], Answers]


def refuse_sizes(model: GateModel) -> Answers:
    """A slot has the routed experts' shape, so the shared expert must have it too."""
    if model.shared_size <= 0:
        yield no("the model has no shared expert", f"shared_expert_intermediate_size = {model.shared_size}")
    if model.shared_size != model.routed_size:
        sizes = f"shared_expert_intermediate_size = {model.shared_size}, moe_intermediate_size = {model.routed_size}"
        yield no("the shared expert has another size than the routed experts", sizes)


def modelopt_stops(quant: QuantConfig, algo: str, known: Sequence[str], engine: str) -> Answers:
    """What SGLang and vLLM raise alike while they read a ModelOpt configuration."""
    inner, key, stated = modelopt_part(quant.raw), modelopt_list(quant.raw), f"quant_algo = {algo}"
    if algo not in known:
        yield stops(f"{engine} reads {', '.join(known)} of ModelOpt, not {algo}", Evidence(stated, "format"))
    if algo == "MIXED_PRECISION" and not inner.get("quantized_layers"):
        yield stops("MIXED_PRECISION without quantized_layers", stated)
    if inner.get(key, ()) is None and (engine == "vLLM" or "NVFP4" in algo):
        yield stops(f"{key} is null, and {engine} wants a list", f"{key} = null")


def quark_stops(quant: QuantConfig, engine: str, read: Sequence[str]) -> Answers:
    """A Quark configuration with null where the engine reads a list or a dictionary."""
    null = (key for key in read if quant.raw.get(key, ()) is None)
    yield from (stops(f"{key} is null, and {engine} iterates over it", f"{key} = null") for key in null)


def several_steps(spec: Mapping[str, Any]) -> bool:
    """Whether weights or inputs are quantised in several steps, and are not NVFP4.

    NVFP4 has two steps each: FP4 in groups of 16, then FP8 scales per tensor; weights static, inputs dynamic.
    """
    weights, inputs = steps(spec.get("weight")), steps(spec.get("input_tensors"))
    if max(len(weights), len(inputs)) < 2:
        return False
    pairs = list(zip(weights, inputs, strict=False))
    nvfp4 = len(weights) == len(inputs) == 2 and all(
        str(x.get("dtype")).startswith(dtype)
        and x.get("qscheme") == scheme
        and (dtype != "fp4" or x.get("group_size") == 16)
        for pair, dtype, scheme in zip(pairs, ("fp4", "fp8_e4m3"), ("per_group", "per_tensor"), strict=True)
        for x in pair
    )
    dynamic = [[bool(x.get("is_dynamic")) for x in pair] for pair in pairs]
    return not nvfp4 or dynamic != [[False, True], [False, False]]


def first_entry(quant: QuantConfig, test: Callable[[str], bool]) -> Hit | None:
    """The first entry of the exclude list whose text passes a test."""
    listed = quant.exclude
    return next((listed.quoted(i, "substring") for i, entry in enumerate(listed.entries) if test(entry)), None)
