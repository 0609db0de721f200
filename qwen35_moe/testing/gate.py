"""Compares a predicate of yours with a rule of the fusion gate, on every real exclude list and on thousands of
others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from ..gate.decide import can_fuse_shared_expert
from ..weights.gate_recipes import load, names
from .checks import Check, announce, assertion, wrong_check
from .drawn import CONFIGS

Gate = Callable[[dict[str, Any]], object]

# What entries of exclude lists are made of: {p} a projection, {l} a layer.
ENTRIES = (
    "lm_head", "model.visual.*", "*mlp.gate", "*shared_expert_gate*", "*.linear_attn.*", "*.self_attn.*", "mtp.*",
    "model.language_model.layers.{l}.mlp.shared_expert.{p}_proj", "model.layers.{l}.mlp.shared_expert.{p}_proj",
    "language_model.model.layers.{l}.mlp.shared_expert.{p}_proj", "model.language_model.layers.{l}.mlp.shared_expert",
    "model.language_model.layers.{l}.mlp.shared_expert_gate", "mtp.layers.0.mlp.shared_expert.{p}_proj",
    "*shared_expert*", "*.shared_expert.*", "*.mlp.shared_expert.{p}_proj", "re:.*shared_expert", "re:.*mlp.*",
    r"re:.*mlp\.shared", r"re:.*shared_expert\.", r"re:.*\.shared_expert_gate$", "*.mlp.*",
    "model.language_model.layers.{l}.mlp.experts.3.{p}_proj", "model.language_model.layers.{l}.mlp.gate",
    "re:model.language_model.layers.{l}.mlp.shared.*", "*mlp.shared_expert.{p}_proj*", "mtp.layers.0.mlp.experts.*",
    "model.language_model.layers.{l}.mlp.experts", "re:.*gate$", "*layers.{l}.mlp*",
)  # fmt: skip
CONFIG_COUNT = 2000


def real_configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """The configurations of real checkpoints, rebuilt from what is known of them."""
    for name in names():
        yield name, load(name).config


def random_configs(count: int = CONFIG_COUNT, seed: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """A model of two layers under exclude lists of up to four entries, drawn from an integer hash."""
    config = json.loads((CONFIGS / "tiny.json").read_text(encoding="utf-8"))
    config["text_config"] |= {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    weight = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0", "is_dynamic": False}
    quark = {"quant_method": "quark", "layer_quant_config": {}, "layer_type_quant_config": {}}
    quark["global_quant_config"] = {"weight": weight, "input_tensors": weight | {"is_dynamic": True}}
    for i in range(count):
        bits = int.from_bytes(hashlib.sha256(f"{seed}:{i}".encode()).digest(), "little")
        entries = []
        for _ in range(bits % 5):
            bits //= 5
            text, bits = ENTRIES[bits % len(ENTRIES)], bits // len(ENTRIES)
            entries.append(text.replace("{l}", str(bits % 2)).replace("{p}", ("gate", "up", "down")[bits // 2 % 3]))
            bits //= 6
        yield f"list {i}", config | {"quantization_config": quark | {"exclude": entries}}


def check_gate(
    mine: Gate, rule: str = "strict", lists: int = CONFIG_COUNT, seed: int = 0, **options: Any
) -> list[Check]:
    """`mine(config) -> whether the shared expert is fused` against a rule of the gate, under its options.

    config is a config.json's dictionary with `quantization_config`. The record of a difference names the list, and the
    entry that decides. A predicate that raises counts as one that says no.
    """
    differences, tried = [], 0
    for name, config in (*real_configs(), *random_configs(lists, seed)):
        tried += 1
        decision = can_fuse_shared_expert(config, rule=rule, **options)
        try:
            answer, said = bool(mine(config)), ""
        except Exception as error:  # whatever a stranger's predicate raises
            answer, said = False, f" (it raised {type(error).__name__}: {error})"
        if answer != bool(decision):
            exclude = (config.get("quantization_config") or {}).get("exclude", ())
            text = f"{name}: your answer: {'fused' if answer else 'not fused'}{said}; the rule's: {decision}"
            text += f" exclude: {exclude}" if 0 < len(exclude) < 6 else ""
            differences.append((not decision.evidence, text))
    name = f"gate-{rule}"
    if not differences:
        return announce(Check(name, "can_fuse", "bit-equal", note=f"{tried} configurations, as rule {rule}"))
    note = f"{len(differences)} of {tried} configurations differ; first {min(differences)[1]}"
    return announce(wrong_check(name, "can_fuse", note, bad_rows=len(differences)))


assert_gate = assertion(check_gate)
