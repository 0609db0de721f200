"""The gate on real checkpoints and real bytes, its records and errors, the guard of the fused slot, the command."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gate_configs import NV, PREFIX, QWEN, TEXT, W8A8, body, quark, shared

from qwen35_moe.checkpoint import Checkpoint
from qwen35_moe.cli.main import main
from qwen35_moe.errors import Qwen35Error
from qwen35_moe.gate.decide import VARIANTS, can_fuse_shared_expert, decide_layers, hazards, slot_guard
from qwen35_moe.gate.declared import QuantConfig
from qwen35_moe.gate.records import GateModel
from qwen35_moe.quant.precision import BF16, MXFP4, NVFP4, ModuleSpec, float_spec
from weights import gate_recipes

PARTS = ("gate", "up", "down")
BODY = [f"layers.0.mlp.shared_expert.{p}_proj" for p in PARTS]


@pytest.mark.parametrize("name", gate_recipes.names())
def test_real_checkpoints(name: str) -> None:
    """Each variant of the gate, target and draft, and where it would break."""
    recipe = gate_recipes.load(name)
    model = GateModel.from_config(recipe.config)  # once: every variant asks about the same modules
    assert set(recipe.expected) == {label for label, _, _ in VARIANTS}
    for label, rule, options in VARIANTS:
        decisions = decide_layers(model, rule=rule, stored=recipe.stored, **options)
        broken = hazards(model, None, decisions, recipe.stored)
        words = [("online" if d.online else "fused" if d else "no") + "!" * (d.layer in broken) for d in decisions]
        assert set(words[:-1]) == {words[0]}, "all layers of the target are alike in these checkpoints"
        assert f"{words[0]} {words[-1]}" == recipe.expected[label], label


def test_bytes_decide_and_disagreement_is_told() -> None:
    config = QWEN | {"quantization_config": quark(*body())}
    decision = can_fuse_shared_expert(config, stored=lambda name: MXFP4)
    assert decision and len(decision.warnings) == 1
    assert f"but bf16 by exclude[1] = '{body()[1]}'" in decision.warnings[0]
    settled = can_fuse_shared_expert(QWEN, quark("*shared_expert*"), stored=shared(BF16))
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


@pytest.mark.parametrize("found", [BF16, None])
def test_one_odd_expert_breaks_engines(found: ModuleSpec | None) -> None:
    """Also if it is not the first, and if it is not there."""
    odd = "layers.2.mlp.experts.5.down_proj"
    specs = {f"layers.{n}.mlp.experts.{e}.{p}_proj": MXFP4 for n in range(4) for e in range(8) for p in PARTS}
    specs |= {f"layers.{n}.mlp.shared_expert.{p}_proj": MXFP4 for n in range(4) for p in PARTS}
    stored = {k: v for k, v in (specs | {odd: found}).items() if v}
    for label, rule, options in VARIANTS:
        decisions = decide_layers(QWEN, quark(), rule, stored=stored, **options)
        broken = hazards(QWEN, quark(), decisions, stored)
        breaks = decisions[2] or found and rule != "strict"
        assert set(broken) == ({"layers.2"} if breaks else set()), label
        assert all(odd in text for text in broken.values())


@pytest.mark.parametrize("prefix", ["", "re:"])
def test_loaders_ask_for_the_experts_as_one_module(prefix: str) -> None:
    """`mlp.experts` leaves them all out to an engine, a pattern for what is below it none; to Quark the other way."""

    def broken(entry: str, rule: str, spec: ModuleSpec) -> set[str]:
        stored = dict.fromkeys(("layers.0.mlp.experts", *BODY), spec)
        quant = quark(entry)
        return set(hazards(QWEN, quant, decide_layers(QWEN, quant, rule, vllm_opt_in=True), stored)) & {"layers.0"}

    whole = f"{PREFIX}.0.mlp.experts"
    for rule in ("sglang-22948", "sglang-0.5.23", "vllm", "atom"):
        unseen = prefix and rule == "vllm"  # whose names begin with language_model.model.; no mapper renames `re:`
        assert bool(broken(f"re:{whole}$" if prefix else whole, rule, MXFP4)) is not bool(unseen)
    # The shared expert is BF16 to all; the routed ones, which are BF16 as well, are not to SGLang.
    assert broken(rf"re:{PREFIX}.0.mlp.experts\.\d+\..*|{PREFIX}.0.mlp.shared.*", "sglang-0.5.23", BF16)


def test_a_missing_tensor_is_no_reason_to_fuse() -> None:
    stored = {"layers.0.mlp.experts": MXFP4, "layers.0.mlp.shared_expert.gate_proj": MXFP4}
    decision = decide_layers(QWEN, quark(), stored=stored)[0]
    assert not decision and "missing" in decision.reason and "shared_expert.up_proj" in decision.warnings[0]


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


@pytest.mark.parametrize(("arguments", "message"), [
    ({"rule": "sglan"}, "unknown rule"),
    ({"disable_shared_expert_fusion": True}, "did you mean disable_shared_experts_fusion"),
    ({"moe_ep_size": "8"}, "bad value of a gate option"),
    ({"a2a_backend": "nccl"}, "unknown all-to-all backend"),
    ({"config": {"model_type": "llama"}}, "does not look like"),
    ({"config": 5}, "not a configuration"),
    ({"quant_config": 5}, "quantization_config must be an object"),
])  # fmt: skip
def test_errors_name_what_is_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(Qwen35Error, match=message) as raised:
        can_fuse_shared_expert(**{"config": QWEN} | arguments)
    assert str(raised.value).count("found:") <= 1, "an error inside another one"


def test_spec_of() -> None:
    config = QuantConfig.from_dict(quark("lm_head", *body(), layers={"*linear_attn*": W8A8}), 4)
    spec, hit = config.spec_of("layers.0.mlp.experts.3.gate_proj")
    assert spec.same_bytes(MXFP4) and str(spec.activation) == "fp4/32 dynamic" and str(hit) == "global_quant_config"
    spec, hit = config.spec_of("layers.2.mlp.shared_expert.gate_up_proj")
    assert spec == BF16 and hit.entry == f"{PREFIX}.2.mlp.shared_expert.gate_proj"
    spec, hit = config.spec_of(f"{PREFIX}.1.linear_attn.in_proj_qkv")
    assert spec.kind == "fp8-channel" and hit.entry == "*linear_attn*"
    assert QuantConfig.from_dict(NV).spec_of("layers.0.mlp.experts.0.up_proj").spec.same_bytes(NVFP4)
    layers = {f"{PREFIX}.0.mlp.experts*": {"quant_algo": "W4A16_NVFP4"}}
    mixed = QuantConfig.from_dict(NV | {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers})
    found = [mixed.spec_of(f"layers.{n}.mlp.experts.0.up_proj").spec for n in (0, 1)]
    assert found == [NVFP4, BF16]
    split = QuantConfig.from_dict(quark(layers={"*q_proj": W8A8}))
    with pytest.raises(Qwen35Error, match="different precisions"):
        split.spec_of("layers.3.self_attn.qkv_proj")
    assert float_spec("F32").kind == "f32" and not MXFP4.same_bytes(NVFP4)


def test_slot_guard() -> None:
    """The failure of #22948: BF16 bytes in an FP4 slot; of #40754 and #35719: a slot that nothing fills."""
    names, up = dict.fromkeys(BODY, MXFP4), "layers.0.mlp.shared_expert.up_proj"
    slot_guard("slot", MXFP4, names)
    slot_guard("slot", MXFP4, names | {up: BF16}, convert=True)
    refused: list[tuple[dict[str, ModuleSpec], bool, str]] = [
        (names | {up: BF16}, False, rf"bf16 bytes would be read as mxfp4\n  where: {up}"),
        (names | {up: ModuleSpec("fp8-block")}, True, "fp8-block bytes would be read as mxfp4"),
        ({k: v for k, v in names.items() if "down" not in k}, False, "would stay unfilled(.|\n)*down_proj"),
        (names | {"layers.0.mlp.shared_expert_gate": BF16}, False, "no place in the fused slot(.|\n)*_expert_gate"),
    ]
    for tensors, convert, message in refused:
        with pytest.raises(Qwen35Error, match=message):
            slot_guard("slot", MXFP4, tensors, convert=convert)


FIXTURES = Path(__file__).parent / "data/fixtures"
# Quark 0.13's own exports: what their tensors are, target and draft, and whether list and bytes agree about the draft.
EXPORTS = [("bf16-hub", True, True, False), ("quark-mxfp4", False, True, True), ("quark-moe-mxfp4", True, True, True)]


@pytest.mark.parametrize(("folder", "target", "draft", "warned"), EXPORTS)
def test_real_bytes(folder: str, target: bool, draft: bool, warned: bool, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = Checkpoint.open(FIXTURES / folder)
    decisions = decide_layers(checkpoint.config, stored=checkpoint.spec)
    assert [bool(d) for d in decisions] == [target] * 4 + [draft]
    assert not any(d.warnings for d in decisions[:-1]) and bool(decisions[-1].warnings) == warned
    assert cli(str(FIXTURES / folder)) == 0
    assert "in the bytes" in capsys.readouterr().out


def cli(*arguments: str) -> int:
    return main(["gate", *arguments])


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
    assert "cannot read the file" in capsys.readouterr().err
    assert cli(str(path), "--option", "nonsense=1") == 2
