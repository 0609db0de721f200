"""The fusion gate against tables: rows of exclude lists, engines' options, and the real checkpoints.

Row sources: "#N" is an issue or pull request of sgl-project/sglang unless a repository is named.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen35_moe import gate_cli
from qwen35_moe.checkpoint import Checkpoint
from qwen35_moe.errors import Qwen35Error
from qwen35_moe.quant.gate import (
    RULES,
    VARIANTS,
    can_fuse_shared_expert,
    decide_layers,
    hazards,
    slot_guard,
)
from qwen35_moe.quant.spec import BF16, MXFP4, NVFP4, ModuleSpec, QuantConfig, float_spec
from weights import gate_recipes

PREFIX = "model.language_model.layers"
FP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "is_dynamic": False, "scale_format": "e8m0"}
FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_channel", "is_dynamic": False}
W4A4 = {"weight": FP4, "input_tensors": FP4 | {"is_dynamic": True}}
W8A8 = {"weight": FP8, "input_tensors": FP8 | {"is_dynamic": True}}
TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "num_hidden_layers": 4,
    "num_experts": 8,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "mtp_num_hidden_layers": 1,
}
QWEN: dict[str, Any] = {"model_type": "qwen3_5_moe", "text_config": TEXT}
GLM: dict[str, Any] = TEXT | {
    "model_type": "glm_moe_dsa",
    "num_hidden_layers": 78,
    "num_nextn_predict_layers": 1,
    "mtp_num_hidden_layers": None,
}


def quark(*exclude: str, **more: Any) -> dict[str, Any]:
    layers = more.pop("layers", {})
    base = {"quant_method": "quark", "global_quant_config": W4A4, "layer_quant_config": layers}
    return base | {"exclude": list(exclude)} | more


def body(layers: range = range(4), parts: str = "down gate up") -> list[str]:
    return [f"{PREFIX}.{n}.mlp.shared_expert.{p}_proj" for n in layers for p in parts.split()]


# Numerics 6.2. Columns: sglang-22948, sglang-0.5.23, is the body unquantised to SGLang's loader, vllm (opted in), atom,
# atom-first-entry, strict (by the configuration alone). 1 = fuses.
EXCLUDE_ROWS: list[tuple[str, list[str], str]] = [
    ("exact names of the body", body(), "0 0 1 0 0 0 0"),
    ("one exact name in one layer", [body()[0]], "0 0 1 0 0 0 0"),
    ("*shared_expert_gate* only", ["*shared_expert_gate*"], "1 1 0 1 1 0 1"),
    ("exact shared_expert_gate only (vLLM #53248)", [f"{PREFIX}.0.mlp.shared_expert_gate"], "1 1 0 1 1 0 1"),
    ("draft's body as a glob", ["mtp.layers.0.mlp.shared_expert.*"], "1 1 0 1 1 0 1"),
    (
        "draft's body, exact",
        [f"mtp.layers.0.mlp.shared_expert.{p}_proj" for p in ("down", "gate", "up")],
        "1 1 0 1 1 0 1",
    ),
    ("re:.*shared_expert, covers the gate vector too", ["re:.*shared_expert"], "0 0 1 0 0 0 0"),
    ("*shared_expert*: gate and loader disagree", ["*shared_expert*"], "0 0 0 1 0 0 0"),
    (r"re:.*mlp\.shared slips past a substring gate", [r"re:.*mlp\.shared"], "1 1 1 0 0 1 0"),
    ("re:.*mlp.* takes routed experts too", ["re:.*mlp.*"], "1 1 1 0 1 1 1"),
    ("*.mlp.* is broad, and no pattern to SGLang", ["*.mlp.*"], "1 1 0 1 1 1 0"),
    ("empty", [], "1 1 0 1 1 1 1"),
    (
        "everything but experts",
        ["lm_head", "model.visual.*", "*mlp.gate", "*.linear_attn.*", "*.self_attn.*"],
        "1 1 0 1 1 1 1",
    ),
]
COLUMNS = ("sglang-22948", "sglang-0.5.23", "loader", "vllm", "atom", "atom-first-entry", "strict")


@pytest.mark.parametrize(("name", "exclude", "expected"), EXCLUDE_ROWS, ids=[r[0] for r in EXCLUDE_ROWS])
def test_exclude_rows(name: str, exclude: list[str], expected: str) -> None:
    config = QWEN | {"quantization_config": quark(*exclude)}
    got = {}
    for rule in COLUMNS:
        if rule == "loader":
            loader = QuantConfig.from_dict(config["quantization_config"], 4).read_as("sglang")
            got[rule] = loader.spec_of(f"{PREFIX}.0.mlp.shared_expert.down_proj").spec == BF16
        else:
            got[rule] = bool(
                can_fuse_shared_expert(config, rule=rule, **({"vllm_opt_in": True} if rule == "vllm" else {}))
            )
    assert got == dict(zip(COLUMNS, (word == "1" for word in expected.split()), strict=True))


def test_draft_layers_by_number() -> None:
    """#36124: GLM-5.2 spells its draft `model.layers.78`; the seed PR let three such names veto 78 layers."""
    names = [f"model.layers.78.mlp.shared_experts.{p}_proj" for p in ("down", "gate", "up")]
    quant = quark(*names, *(f"model.layers.78.mlp.experts.{e}.up_proj" for e in range(8)))
    assert not can_fuse_shared_expert(GLM, quant, "sglang-22948")
    assert can_fuse_shared_expert(GLM, quant, "sglang-0.5.23")
    decisions = decide_layers(GLM, quant, "strict")
    assert can_fuse_shared_expert(GLM, quant, "strict") and len(decisions) == 79
    assert "model.layers.78.mlp.shared_experts.gate_proj" in str(decisions[-1]), "the draft is known by its number"
    # A nested config.json has no layer count where SGLang looks for it.
    nested = {"model_type": "x", "text_config": GLM}
    assert not can_fuse_shared_expert(nested, quant, "sglang-0.5.23")


def test_excluded_drafts_that_miss_their_experts() -> None:
    """Quark leaves fused BF16 draft experts out of the list: by the list they are MXFP4, by the bytes BF16."""
    names = [f"mtp.layers.0.mlp.shared_expert.{p}_proj" for p in ("down", "gate", "up")]
    config = QWEN | {"quantization_config": quark(*names)}
    blind = decide_layers(config)[-1]
    assert not blind and "the shared expert is bf16, the routed experts are mxfp4" in blind.reason
    seeing = decide_layers(config, stored=lambda name: BF16 if name.startswith("mtp.") else MXFP4)[-1]
    assert seeing and seeing.draft
    assert any(
        "is bf16 in the bytes, but mxfp4 by global_quant_config, no entry names it" in w for w in seeing.warnings
    )


# Options: name, options, sglang-22948, sglang-0.5.23; on a checkpoint that otherwise fuses.
OPTION_ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("default: gfx950 with aiter", {}, "1 1"),
    ("--disable-shared-experts-fusion", {"disable_shared_experts_fusion": True}, "0 0"),
    ("deepep", {"a2a_backend": "deepep"}, "0 0"),
    ("deepep_v2", {"a2a_backend": "deepep_v2"}, "1 0"),
    ("mori (#31793)", {"a2a_backend": "mori"}, "1 0"),
    ("mooncake keeps slots per rank, one rank", {"a2a_backend": "mooncake"}, "1 1"),
    ("mooncake, moe_ep_size 8", {"a2a_backend": "mooncake", "moe_ep_size": 8}, "1 0"),
    ("megamoe, moe_ep_size 2", {"a2a_backend": "megamoe", "moe_ep_size": 2}, "1 0"),
    ("no backend, moe_ep_size 8", {"moe_ep_size": 8}, "1 1"),
    ("no aiter", {"aiter": False}, "0 0"),
    ("CUDA", {"hip": False}, "0 0"),
    ("CUDA, class opts in", {"hip": False, "cuda_opt_in": True}, "1 1"),
    ("CuTe-DSL all-reduce", {"cutedsl_ar_fusion": True}, "1 0"),
    ("enforce changes nothing here", {"enforce_shared_experts_fusion": True}, "1 1"),
]


@pytest.mark.parametrize(("name", "options", "expected"), OPTION_ROWS, ids=[r[0] for r in OPTION_ROWS])
def test_option_rows(name: str, options: dict[str, Any], expected: str) -> None:
    config = QWEN | {"quantization_config": quark("*shared_expert_gate*")}
    got = [can_fuse_shared_expert(config, rule=r, **options).fused for r in ("sglang-22948", "sglang-0.5.23")]
    assert got == [word == "1" for word in expected.split()]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("size", "fused"), [(32, True), (0, False), (64, False), (None, False)])
def test_sizes(rule: str, size: int | None, fused: bool) -> None:
    """The slot has the routed experts' shape. Every rule needs that."""
    config = TEXT | {"shared_expert_intermediate_size": size}
    assert can_fuse_shared_expert(config, rule=rule, vllm_opt_in=True).fused is fused


# --enforce-shared-experts-fusion on an excluded body: quark.py:1121-1211. 2 = fused by conversion.
ENFORCE_ROWS: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], int, str]] = [
    ("all conditions hold", QWEN, {}, {}, 2, ""),
    ("flat config", TEXT, {}, {}, 2, ""),
    ("CUDA", QWEN, {}, {"hip": False, "cuda_opt_in": True}, 0, "not ROCm"),
    ("gfx942", QWEN, {}, {"gfx95": False}, 0, "no FP4"),
    ("another model", QWEN | {"model_type": "qwen3_next"}, {}, {}, 0, "was not measured"),
    ("routed FP8", QWEN, {"global_quant_config": W8A8}, {}, 0, "of layer 0 are not MXFP4"),
    ("one layer's experts FP8", QWEN, {"layers": {f"{PREFIX}.3.mlp.experts*": W8A8}}, {}, 0, "is not MXFP4"),
    ("attention FP8 does not matter", QWEN, {"layers": {"*self_attn*": W8A8}}, {}, 2, ""),
    ("W4A8", QWEN, {"global_quant_config": W4A4 | {"input_tensors": FP8}}, {}, 0, "of layer 0 are not MXFP4"),
]


@pytest.mark.parametrize(
    ("name", "config", "quant", "options", "expected", "why"), ENFORCE_ROWS, ids=[r[0] for r in ENFORCE_ROWS]
)
def test_enforce_rows(
    name: str, config: dict[str, Any], quant: dict[str, Any], options: dict[str, Any], expected: int, why: str
) -> None:
    chosen = quark(*body(), **quant)
    decision = can_fuse_shared_expert(config, chosen, "sglang-0.5.23", enforce_shared_experts_fusion=True, **options)
    assert (decision.fused, decision.online) == (expected > 0, expected == 2)
    assert why in " ".join(decision.warnings)
    assert decision.entry and decision.entry.entry == body()[0] and decision.entry.index == 0


# layer_quant_config: sglang-0.5.23 (layer 0 and model.decoder only), vllm, atom, strict.
LAYER_ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("attention only", {"*self_attn*": W8A8}, "1 1 1 1"),
    ("shared experts FP8", {"*shared_expert.*": W8A8}, "0 0 1 0"),
    ("shared expert's parent FP8", {"*shared_expert*": W8A8}, "0 0 0 0"),
    ("both FP8", {"*mlp.experts*": W8A8, "*shared_expert*": W8A8}, "1 1 1 1"),
    ("shared expert of layer 2 only", {f"{PREFIX}.2.mlp.shared_expert.*": W8A8}, "1 0 1 0"),
    ("gate and up only", {"*shared_expert.gate_proj": W8A8, "*shared_expert.up_proj": W8A8}, "0 0 1 0"),
    ("one expert of layer 0: a gap", {f"{PREFIX}.0.mlp.experts.3.up_proj": W4A4}, "0 0 1 1"),
    ("experts of layer 0 one by one", {f"{PREFIX}.0.mlp.experts.{e}.up_proj": W8A8 for e in range(8)}, "0 0 0 0"),
]


@pytest.mark.parametrize(("name", "layers", "expected"), LAYER_ROWS, ids=[r[0] for r in LAYER_ROWS])
def test_layer_rows(name: str, layers: dict[str, Any], expected: str) -> None:
    config = QWEN | {"quantization_config": quark("lm_head", layers=layers)}
    rules = ("sglang-0.5.23", "vllm", "atom", "strict")
    got = [can_fuse_shared_expert(config, rule=r, vllm_opt_in=True).fused for r in rules]
    assert got == [word == "1" for word in expected.split()]


# Other methods: sglang-22948, sglang-0.5.23, vllm, atom, strict.
BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
CT = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"} | {
    "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 32}}}
}
NV = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
METHOD_ROWS: list[tuple[str, dict[str, Any] | None, str]] = [
    ("not quantised", None, "1 1 1 1 1"),
    ("FP8 blocks", BLOCK, "1 1 1 1 1"),
    ("FP8 blocks without the body: unchecked", BLOCK | {"modules_to_not_convert": body()}, "1 1 0 0 0"),
    ("FP8 a tensor", {"quant_method": "fp8"}, "1 1 0 1 1"),
    ("compressed-tensors MXFP4", CT, "1 1 0 1 1"),
    ("compressed-tensors, body ignored: unchecked", CT | {"ignore": ["re:.*shared_expert.*"]}, "1 1 0 0 0"),
    ("NVFP4", NV, "1 1 0 1 1"),
    ("NVFP4, body ignored", NV | {"ignore": ["*.mlp.shared_expert*"]}, "1 0 0 0 0"),
    ("NVFP4, the draft's body vetoes", NV | {"ignore": ["mtp.layers.0.mlp.shared_expert.up_proj"]}, "1 0 0 1 1"),
    ("NVFP4, all of the draft", NV | {"exclude_modules": ["mtp*"]}, "1 1 0 1 1"),
    ("GPTQ, body kept", {"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*shared_expert.*": {}}}, "1 1 0 0 0"),
]


@pytest.mark.parametrize(("name", "quant", "expected"), METHOD_ROWS, ids=[r[0] for r in METHOD_ROWS])
def test_method_rows(name: str, quant: dict[str, Any] | None, expected: str) -> None:
    rules = ("sglang-22948", "sglang-0.5.23", "vllm", "atom", "strict")
    got = [can_fuse_shared_expert(QWEN, quant, r, vllm_opt_in=True).fused for r in rules]
    assert got == [word == "1" for word in expected.split()]


# SGLang's draft is built with a configuration of its own: qwen3_5_mtp.py:50-95.
DRAFT_ROWS: list[tuple[str, dict[str, Any], bool, bool]] = [
    ("draft's experts excluded (#38748)", quark(*body(), "mtp.layers.0.mlp.experts.0.up_proj"), False, True),
    ("draft's body only", quark("mtp.layers.0.mlp.shared_expert.up_proj"), True, True),
    ("target's body only", quark(*body()), False, False),
    ("NVFP4, body ignored", NV | {"ignore": ["*.mlp.shared_expert*"]}, False, True),
]


@pytest.mark.parametrize(("name", "quant", "target", "draft"), DRAFT_ROWS, ids=[r[0] for r in DRAFT_ROWS])
def test_draft_rows(name: str, quant: dict[str, Any], target: bool, draft: bool) -> None:
    decisions = decide_layers(QWEN, quant, "sglang-0.5.23")
    assert [bool(d) for d in decisions] == [target] * 4 + [draft]
    assert [d.layer for d in decisions] == ["layers.0", "layers.1", "layers.2", "layers.3", "mtp.layers.0"]


# ATOM's transport: topK.py; its own test names the eplb rows.
ATOM_ROWS: list[tuple[dict[str, Any], bool]] = [
    ({"dp_size": 8}, True),
    ({"dp_size": 8, "moe_ep_flatten_tp_across_dp": True}, False),
    ({"dp_size": 8, "a2a_backend": "mori", "dp_attention": True}, True),
    ({"dp_size": 8, "a2a_backend": "mori", "dp_attention": True, "atom_fuse_shared_expert": False}, False),
    ({"dp_size": 8, "a2a_backend": "mori", "dp_attention": True, "atom_fuse_shared_expert": False, "eplb": True}, True),
]


@pytest.mark.parametrize(("options", "expected"), ATOM_ROWS)
@pytest.mark.parametrize("rule", ["atom", "atom-first-entry"])
def test_atom_transport(rule: str, options: dict[str, Any], expected: bool) -> None:
    assert can_fuse_shared_expert(QWEN, quark(), rule, **options).fused is expected


def test_atom_first_entry_says_that_it_was_the_wrong_one() -> None:
    decision = can_fuse_shared_expert(QWEN, quark("lm_head", f"{PREFIX}.0.mlp.shared_expert_gate"), "atom-first-entry")
    assert not decision and decision.entry and decision.entry.index == 1
    assert "does not name the target's shared expert body" in decision.warnings[0]


def test_vllm_is_opt_in_and_layers_must_agree() -> None:
    assert not can_fuse_shared_expert(QWEN, None, "vllm")
    mixed = can_fuse_shared_expert(QWEN, quark(*body(range(1))), "vllm", vllm_opt_in=True)
    assert not mixed and "1 of 4 layers may not fuse" in mixed.reason
    halves = can_fuse_shared_expert(QWEN, quark(*body(parts="gate")), "vllm", vllm_opt_in=True)
    assert not halves and "refuses to load" in halves.reason


@pytest.mark.parametrize("name", gate_recipes.names())
def test_real_checkpoints(name: str) -> None:
    """Numerics 6.5, checkpoints 1.3 and 3.1: each variant of the gate, target and draft, and where it would break."""
    recipe = gate_recipes.load(name)
    assert set(recipe.expected) == {label for label, _, _ in VARIANTS}
    for label, rule, options in VARIANTS:
        decisions = decide_layers(recipe.config, rule=rule, stored=recipe.stored, **options)
        broken = hazards(recipe.config, None, decisions, recipe.stored)
        words = [("online" if d.online else "fused" if d else "no") + "!" * (d.layer in broken) for d in decisions]
        assert set(words[:-1]) == {words[0]}, "all layers of the target are alike in these checkpoints"
        assert f"{words[0]} {words[-1]}" == recipe.expected[label], label


def test_recipes_have_the_known_counts() -> None:
    """183 and 1547 of #38748 (one name unknown), 978, 148, 184, 172 (one unknown): checkpoints 1.3 and 3.1."""

    def entries(name: str) -> list[str]:
        quant = gate_recipes.load(name).config["quantization_config"]
        return quant.get("exclude") or quant.get("ignore") or quant["modules_to_not_convert"]

    mxfp4 = entries("397b-mxfp4")
    assert sum(".mlp.shared_expert." in e for e in mxfp4) == 183
    assert sum(e.startswith("mtp.") for e in mxfp4) == 1547 - 1
    counts = {n: len(entries(n)) for n in ("2.4t-fp8", "122b-nvfp4", "397b-nvfp4", "397b-mxfp4-attnfp8-v2")}
    assert counts == {"2.4t-fp8": 978, "122b-nvfp4": 148, "397b-nvfp4": 184, "397b-mxfp4-attnfp8-v2": 172 - 1}


def test_bytes_decide_and_disagreement_is_told() -> None:
    config = QWEN | {"quantization_config": quark(*body())}
    decision = can_fuse_shared_expert(config, stored=lambda name: MXFP4)
    assert decision and len(decision.warnings) == 1
    assert f"but bf16 by exclude[1] = '{body()[1]}'" in decision.warnings[0]
    settled = can_fuse_shared_expert(QWEN, quark("*shared_expert*"), stored=lambda n: BF16 if "shared" in n else MXFP4)
    assert not settled and "in the bytes" in settled.reason
    vague = can_fuse_shared_expert(QWEN, quark("*shared_expert*"))
    assert not vague and "readers of the exclude list disagree" in vague.reason and vague.entry


def test_one_odd_expert_is_seen() -> None:
    """Strict asks every expert if bytes or list could tell them apart."""
    odd = "layers.2.mlp.experts.5.down_proj"
    decisions = decide_layers(
        QWEN, quark(), stored=lambda n: None if n.endswith("experts") else BF16 if n == odd else MXFP4
    )
    assert [bool(d) for d in decisions] == [True, True, False, True, True]
    assert odd in str(decisions[2])
    listed = decide_layers(QWEN, quark(f"{PREFIX}.1.mlp.experts.7.up_proj"))
    assert [bool(d) for d in listed] == [True, False, True, True, True]


def test_a_missing_tensor_is_no_reason_to_fuse() -> None:
    stored = {"layers.0.mlp.experts": MXFP4, "layers.0.mlp.shared_expert.gate_proj": MXFP4}
    decision = decide_layers(QWEN, quark(), stored=stored)[0]
    assert not decision and "missing" in decision.reason and "shared_expert.up_proj" in decision.warnings[0]


def test_activations_count() -> None:
    """Same bytes, other function: a W4A16 expert is not a W4A4 expert."""
    layers = {"*shared_expert.*": {"weight": FP4, "input_tensors": None}}
    decision = can_fuse_shared_expert(QWEN, quark(layers=layers), stored=lambda name: MXFP4)
    assert not decision and "inputs" in decision.reason


def test_forms_of_a_configuration() -> None:
    quant = quark("lm_head")
    objects = SimpleNamespace(text_config=SimpleNamespace(**TEXT), quantization_config=quant)
    methods = SimpleNamespace(to_dict=lambda: QWEN | {"quantization_config": quant})
    inside = {"text_config": TEXT | {"quantization_config": quant}}
    for config in (objects, methods, inside, TEXT | {"quantization_config": quant}):
        decision = can_fuse_shared_expert(config)
        assert decision and "mxfp4" in decision.reason
    assert "bf16" in can_fuse_shared_expert(QWEN).reason, "no quantization_config is an unquantised model"
    sparse = TEXT | {"mlp_only_layers": [0], "decoder_sparse_step": 2}
    assert [d.layer for d in decide_layers(sparse)] == ["layers.1", "layers.3", "mtp.layers.0"]


def test_a_decision_prints_and_serialises() -> None:
    decision = can_fuse_shared_expert(QWEN, quark("lm_head", *body()), "sglang-22948")
    assert str(decision) == (
        "model: shared expert not fused (rule sglang-22948), because the exclude list names a shared expert. "
        f"[exclude[1] = '{body()[0]}' (substring)]"
    )
    record = json.loads(json.dumps(decision.to_dict()))
    assert record["fused"] is False and record["evidence"][0]["index"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "sglang"}, "unknown rule"),
        ({"disable_shared_expert_fusion": True}, "did you mean disable_shared_experts_fusion"),
        ({"moe_ep_size": "8"}, "bad value of a gate option"),
        ({"a2a_backend": "nccl"}, "unknown all-to-all backend"),
        ({"quant_config": {"quant_method": "bitsandbytes"}}, "unknown quantisation method"),
        ({"quant_config": {"quant_method": "quark", "exclude": "lm_head"}}, "must hold strings"),
        ({"quant_config": {"quant_method": "modelopt", "quant_algo": "INT2"}}, "unknown ModelOpt quant_algo"),
    ],
)
def test_errors_name_what_is_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(Qwen35Error, match=message):
        can_fuse_shared_expert(QWEN, **arguments)
    with pytest.raises(Qwen35Error, match="does not look like"):
        can_fuse_shared_expert({"model_type": "llama"})


def test_spec_of() -> None:
    config = QuantConfig.from_dict(quark("lm_head", *body(), layers={"*linear_attn*": W8A8}), 4)
    spec, hit = config.spec_of("layers.0.mlp.experts.3.gate_proj")
    assert spec.same_bytes(MXFP4) and str(spec.activation) == "fp4/32 dynamic" and str(hit) == "global_quant_config"
    spec, hit = config.spec_of("layers.2.mlp.shared_expert.gate_up_proj")
    assert spec == BF16 and hit.entry == f"{PREFIX}.2.mlp.shared_expert.gate_proj"
    spec, hit = config.spec_of(f"{PREFIX}.1.linear_attn.in_proj_qkv")
    assert spec.kind == "fp8-channel" and hit.entry == "*linear_attn*"
    assert QuantConfig.from_dict(NV).spec_of("layers.0.mlp.experts.0.up_proj").spec.same_bytes(NVFP4)
    mixed = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {}}
    mixed["quantized_layers"] = {"model.language_model.layers.0.mlp.experts*": {"quant_algo": "W4A16_NVFP4"}}
    assert QuantConfig.from_dict(mixed).spec_of("layers.0.mlp.experts.0.up_proj").spec == NVFP4
    assert QuantConfig.from_dict(mixed).spec_of("layers.1.mlp.experts.0.up_proj").spec == BF16
    split = QuantConfig.from_dict(quark(layers={"*q_proj": W8A8}))
    with pytest.raises(Qwen35Error, match="different precisions"):
        split.spec_of("layers.3.self_attn.qkv_proj")
    assert float_spec("F32").kind == "f32" and not MXFP4.same_bytes(NVFP4)


def test_slot_guard() -> None:
    """The failure of #22948: BF16 bytes in an FP4 slot; of #40754 and #35719: a slot that nothing fills."""
    names = {f"layers.3.mlp.shared_expert.{p}_proj": MXFP4 for p in ("gate", "up", "down")}
    slot_guard("layers.3.mlp.experts.8", MXFP4, names)
    wrong = names | {"layers.3.mlp.shared_expert.up_proj": BF16}
    with pytest.raises(
        Qwen35Error, match=r"bf16 bytes would be read as mxfp4\n  where: layers.3.mlp.shared_expert.up_proj"
    ):
        slot_guard("layers.3.mlp.experts.8", MXFP4, wrong)
    slot_guard("layers.3.mlp.experts.8", MXFP4, wrong, convert=True)
    with pytest.raises(Qwen35Error, match="fp8-block bytes would be read as mxfp4"):
        slot_guard("s", MXFP4, names | {"layers.3.mlp.shared_expert.up_proj": ModuleSpec("fp8-block")}, convert=True)
    with pytest.raises(Qwen35Error, match=r"would stay unfilled(.|\n)*down_proj"):
        slot_guard("layers.3.mlp.experts.8", MXFP4, {k: v for k, v in names.items() if "down" not in k})
    with pytest.raises(Qwen35Error, match=r"no place in the fused slot(.|\n)*shared_expert_gate"):
        slot_guard("layers.3.mlp.experts.8", MXFP4, names | {"layers.3.mlp.shared_expert_gate": BF16})


FIXTURES = Path(__file__).parent / "data/fixtures"


# Quark 0.13's own exports: what their tensors are, target and draft, and whether list and bytes agree about the draft.
@pytest.mark.parametrize(
    ("folder", "target", "draft", "warned"),
    [("bf16-hub", True, True, False), ("quark-mxfp4", False, True, True), ("quark-moe-mxfp4", True, True, True)],
)
def test_real_bytes(folder: str, target: bool, draft: bool, warned: bool, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = Checkpoint.open(FIXTURES / folder)
    decisions = decide_layers(checkpoint.config, stored=checkpoint.spec)
    assert [bool(d) for d in decisions] == [target] * 4 + [draft]
    assert not any(d.warnings for d in decisions[:-1]) and bool(decisions[-1].warnings) == warned
    assert cli(str(FIXTURES / folder)) == 0
    assert "in the bytes" in capsys.readouterr().out


def cli(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    gate_cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["gate", *arguments])
    return args.run(args)


def test_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN | {"quantization_config": quark("lm_head", *body())}))
    assert cli(str(path)) == 0
    out = capsys.readouterr().out
    assert "layers.0-3     unfused" in out and f"exclude[1] = '{body()[0]}'" in out
    assert cli(str(tmp_path), "--rule", "sglang-0.5.23", "--option", "enforce-shared-experts-fusion=true") == 0
    assert "online" in capsys.readouterr().out
    path.write_text(json.dumps(QWEN | {"quantization_config": quark(r"re:.*mlp\.shared")}))
    assert cli(str(path), "--all-rules") == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "BREAKS" in line]
    assert {line.split("  ")[1].strip() for line in lines} >= {"sglang-22948", "sglang-0.5.23", "atom-first-entry"}
    assert "bf16 bytes would be read as mxfp4" in out
    assert cli(str(path), "--all-rules", "--json") == 0
    records = json.loads(capsys.readouterr().out)
    assert [r["variant"] for r in records["rules"]] == [label for label, _, _ in VARIANTS]
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    assert cli(str(tmp_path)) == 2
    assert "--config-only judges by config.json alone" in capsys.readouterr().err
    assert cli(str(tmp_path), "--config-only") == 0
    capsys.readouterr()
    assert cli(str(tmp_path / "absent.json")) == 2
    assert "cannot read the configuration" in capsys.readouterr().err
    assert cli(str(path), "--option", "nonsense=1") == 2
