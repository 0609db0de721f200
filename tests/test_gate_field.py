"""Public reports about checkpoints and the gate, rebuilt small: each row stands for its kind."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from gate_configs import BLOCK, DRAFT_BODY, FP4, NV, PREFIX, QWEN, TEXT, W4A4, W8A8, answers, body, draft, quark, shared
from safetensors.torch import save_file

from qwen35_moe.checkpoint import Checkpoint
from qwen35_moe.cli.gate import config_and_specs
from qwen35_moe.gate.decide import RULES, VARIANTS, can_fuse_shared_expert, decide_layers, hazards
from qwen35_moe.gate.declared import QuantConfig
from qwen35_moe.gate.records import GateModel
from qwen35_moe.gate.strict import layer_facts
from qwen35_moe.quant.precision import BF16, MXFP4, NVFP4, ModuleSpec
from weights.build import real_config

ENGINES = ("sglang", "vllm", "atom")
LIKE_THE_LIST = draft(BF16, shared(BF16))  # the routed experts of the target are MXFP4, and nothing else


@pytest.mark.parametrize("rule", ["strict", *ENGINES])
@pytest.mark.parametrize("key", ["*experts*", "*.experts.*", "*experts.*"])
def test_a_word_of_another_family_covers_nothing(rule: str, key: str) -> None:
    """`*experts*` names Qwen's routed experts, and not its `shared_expert`."""
    config = GateModel.from_config(QWEN | {"quantization_config": quark(layers={key: W8A8})})
    if key == "*experts*" or rule == "strict":
        assert not can_fuse_shared_expert(config, rule=rule, vllm_opt_in=True)
    stored = shared(MXFP4, ModuleSpec("fp8-channel"))
    decisions = decide_layers(config, rule=rule, stored=stored)
    assert key != "*experts*" or not hazards(config, None, decisions, stored)
    deepseek = TEXT | {"model_type": "deepseek_v3"}
    assert can_fuse_shared_expert(deepseek, quark(layers={"*experts*": W8A8}), "strict")


def mixed(algo: str = "W4A16_NVFP4") -> dict[str, Any]:
    routed, own = ({"quant_algo": word, "group_size": 16} for word in ("W4A16_NVFP4", algo))
    layers = {f"{PREFIX}.{n}.mlp.experts": routed for n in range(4)} | dict.fromkeys(body(), own)
    quant = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    return QWEN | {"quantization_config": quant | {"ignore": ["mtp.layers.0*", "mtp*"]}}


@pytest.mark.parametrize("rule", RULES)
def test_one_entry_for_all_experts_of_a_layer(rule: str) -> None:
    """nvidia/Qwen3.6-35B-A3B-NVFP4 (sglang 27906 37752, vllm 55496): routed experts and shared expert are NVFP4."""
    for stored in (None, draft(BF16, lambda _: NVFP4)):
        decisions = decide_layers(mixed(), rule=rule, stored=stored)
        assert not hazards(mixed(), None, decisions, stored)
        if rule == "strict":
            assert all(decisions) and "nvfp4" in decisions[0].reason
    assert not can_fuse_shared_expert(mixed("FP8"))


@pytest.mark.parametrize("method", ["awq", "bitsandbytes", "auto-round", "some_new_one"])
def test_a_method_without_a_reader(method: str) -> None:
    """Rules that do not ask what a module is answer; the others say why they cannot."""
    config = QWEN | {"quantization_config": {"quant_method": method, "bits": 4}}
    for label, rule, options in VARIANTS:
        decisions = decide_layers(config, rule=rule, **options)
        assert not hazards(config, None, decisions), label
    assert "is not known, and no bytes were given" in can_fuse_shared_expert(config).reason
    assert method in str(can_fuse_shared_expert(config))
    int4 = ModuleSpec("int4", (128,))
    assert "both int4" in can_fuse_shared_expert(config, stored=lambda _: int4).reason
    assert not can_fuse_shared_expert(config, stored=shared(BF16, int4))


@pytest.mark.parametrize("algo", ["FP8_BLOCK_SCALES", "MXFP8", "INT4_AWQ", "W4A8_AWQ"])
def test_newer_algorithms_of_modelopt(algo: str) -> None:
    """SGLang reads one FP8 of ModelOpt."""
    quant = NV | {"quant_algo": algo, "exclude_modules": ["mtp*"]}
    assert answers(QWEN, quant, "sglang vllm") == ("1 1" if algo == "MXFP8" else "- -")
    assert answers(QWEN, quant, "vllm", vllm_opt_in=False) == ("0" if algo == "MXFP8" else "-")
    left = NV | {"quant_algo": "MXFP8", "exclude_modules": ["*.mlp.shared_expert*"]}
    assert "not excluded alike" in can_fuse_shared_expert(QWEN, left, "vllm", vllm_opt_in=True).reason


def test_vllm_reads_a_star_of_modelopt_as_the_module_and_what_is_below() -> None:
    """`path*` is `path` and `path.*` before entries are renamed and compared, so it names one of a fused pair."""
    flat = QWEN["text_config"]

    def decided(*entries: str, config: dict[str, Any] = QWEN) -> Any:
        quant = NV | {"quant_algo": "MXFP8", "exclude_modules": ["lm_head*", *entries]}
        return decide_layers(config, quant, "vllm", vllm_opt_in=True)

    *target, draft = decided("mtp.layers.0.mlp.shared_expert.up_proj*")
    assert all(target) and not draft.starts and "only one of a fused pair" in draft.reason
    assert "exclude_modules[1] = 'mtp.layers.0.mlp.shared_expert.up_proj*'" in str(draft)
    halves = [f"model.language_model.layers.{n}.mlp.shared_expert.{p}_proj*" for n in range(4) for p in ("gate", "up")]
    assert "are not excluded alike" in decided(*halves)[0].reason
    assert "only one of a fused pair" in decided(*halves[1:])[0].reason
    merged = "mtp.layers.0.mlp.shared_expert.gate_up_proj*"
    assert decided(merged, "mtp.layers.0.mlp.shared_expert.up_proj")[-1].starts
    for config in (QWEN, flat):
        assert decided("model.language_model*", config=config)[0].reason == "neither is quantised"


def test_layers_that_vllm_does_not_build_alike() -> None:
    halves, some = quark(*body(parts="gate")), quark(*body(range(2, 4)))
    assert "2 are, 2 are not" in can_fuse_shared_expert(QWEN, some, "vllm", vllm_opt_in=True).reason
    for opted, expected in ((True, "-"), (False, "0")):  # not opted in: no layer fuses
        assert answers(QWEN, halves, "vllm", vllm_opt_in=opted) == "-"
        assert answers(QWEN, some, "vllm", vllm_opt_in=opted) == expected


def test_entries_that_vllms_mapper_does_not_rename() -> None:
    """A `re:` entry with the hub's prefix matches no name of vLLM's, which fuses BF16 into MXFP4 slots."""
    quant = quark(r"re:model\.language_model\.layers\.\d+\.mlp\.shared_expert\..*")
    fused = decide_layers(QWEN, quant, "vllm", vllm_opt_in=True)
    assert all(fused) and "bf16 bytes would be read as mxfp4" in hazards(QWEN, quant, fused, shared(BF16))["layers.0"]
    anywhere = quark(r"re:.*\.mlp\.shared_expert\..*")
    assert not any(decide_layers(QWEN, anywhere, "vllm", vllm_opt_in=True)[:4])
    assert can_fuse_shared_expert(QWEN, quant, "strict", stored=shared(BF16)).fused is False


CRASHES = [
    # configuration, who does not start with it
    (quark() | {"layer_quant_config": None}, "sglang"),
    (quark() | {"layer_type_quant_config": None}, "sglang vllm"),
    (quark() | {"global_quant_config": None}, "sglang vllm"),
    (quark() | {"exclude": None}, "sglang vllm"),
    (quark(global_quant_config={"weight": [FP4, FP4], "input_tensors": [FP4, FP4]}), "sglang vllm atom"),
    (quark(global_quant_config={"weight": [FP4], "input_tensors": [FP4]}), "sglang"),
    (NV | {"quant_algo": "FP8_PB_WO"}, "sglang atom"),
    (NV | {"quant_algo": "NVFP4_AWQ"}, "vllm atom"),
    (NV | {"quant_algo": "W4A8_AWQ"}, "sglang vllm atom"),
    (NV | {"ignore": None}, "sglang vllm atom"),
    (NV | {"quant_algo": "MIXED_PRECISION"}, "sglang vllm atom"),
]


@pytest.mark.parametrize(("quant", "who"), CRASHES)
def test_configurations_that_an_engine_cannot_read(quant: dict[str, Any], who: str) -> None:
    found = {rule: can_fuse_shared_expert(QWEN, quant, rule, vllm_opt_in=True) for rule in ENGINES}
    assert {rule for rule, decision in found.items() if not decision.starts} == set(who.split())
    for rule in who.split():
        assert not found[rule] and "does not start" in str(found[rule])
        assert not hazards(QWEN, quant, decide_layers(QWEN, quant, rule), lambda _: MXFP4)


def test_entries_for_all_experts_of_a_layer_as_one() -> None:
    """Engines ask for `mlp.experts`: a key with that name counts to them, not to those who ask for projections."""
    blocks = [f"{PREFIX}.{n}.mlp.experts" for n in range(4)]
    key = quark(layers=dict.fromkeys(blocks, W8A8))
    assert answers(QWEN, key, "sglang vllm atom") == "0 0 0"
    assert "readers of the exclude list disagree" in can_fuse_shared_expert(QWEN, key).reason
    assert answers(QWEN, BLOCK | {"ignored_layers": [*blocks, *body()]}, "strict sglang vllm atom") == "1 1 1 1"


def test_a_quantisation_in_text_config() -> None:
    """vLLM looks there as well; SGLang and ATOM take the model for BF16, and fuse and load MXFP4 bytes as such."""
    inside = QWEN | {"text_config": TEXT | {"quantization_config": quark(*body())}}
    assert answers(inside, None, "strict sglang vllm atom") == "0 1 0 1"
    found = {rule: decide_layers(inside, rule=rule, vllm_opt_in=True)[:4] for rule in ENGINES}
    broken = {rule for rule, decisions in found.items() if hazards(inside, None, decisions, shared(BF16))}
    assert broken == {"sglang", "atom"}


LOADERS = [
    # entries beside the draft's, which loaders take the BF16 shared expert or the draft's BF16 experts for MXFP4
    ([f"{PREFIX}.{n}.mlp.shared_expert.{m}_proj" for n in range(4) for m in ("gate_up", "down")], "atom"),
    ([r"re:.*shared_expert\.(gate_up|down)_proj"], "atom"),
    ([f"{entry}.weight" for entry in body()], "sglang vllm atom"),
    ([f"{PREFIX}.{n}.mlp.shared_expert" for n in range(4)], "sglang vllm"),
    ([*body(), "mtp.layers.0.mlp.experts.*"], ""),
    ([*body(), "mtp.layers.0.mlp.exp*"], "sglang vllm"),
]


@pytest.mark.parametrize(("entries", "who"), LOADERS)
def test_names_that_loaders_ask_for(entries: list[str], who: str) -> None:
    """SGLang and vLLM ask for gate_up_proj first, and count a glob for what is below `experts`, as ATOM does."""
    quant = quark(*entries, *DRAFT_BODY, *(() if "mtp" in entries[-1] else ("mtp.layers.0.mlp.experts",)))
    broken = {rule for rule in ENGINES if hazards(QWEN, quant, decide_layers(QWEN, quant, rule), LIKE_THE_LIST)}
    assert broken == set(who.split())


def test_lists_under_two_keys() -> None:
    """Without entries the first key does not count: FP8's `ignored_layers`; ModelOpt's `ignore` hides the other."""
    assert answers(QWEN, BLOCK | {"ignored_layers": [], "modules_to_not_convert": body()}, "vllm") == "0"
    both = NV | {"ignore": [], "exclude_modules": ["*.mlp.shared_expert*"]}
    assert answers(QWEN, both, "sglang") == "1" and answers(QWEN, {"quantization": both}, "sglang") == "0"


NV_STEPS = {"weight": [FP4 | {"group_size": 16}, {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}]}
ONLINE = [
    # --quantization, configuration, what SGLang makes of target and draft, what vLLM does; 1 fused, 0 not, - no start
    ("", None, "11", "11"),
    ("fp8", None, "11", "00"),
    ("quark_mxfp4", None, "00", "00"),  # SGLang leaves the shared expert of a qwen3_5_moe out
    ("quark_mxfp4", BLOCK, "01", "--"),  # a draft keeps the checkpoint's FP8
    ("quark_mxfp4", BLOCK | {"activation_scheme": "static"}, "--", "--"),
    ("quark_mxfp4", quark(), "--", "--"),
    ("quark_mxfp4", quark("lm_head", global_quant_config=NV_STEPS), "1-", "--"),
    ("quark_mxfp4", quark("*shared_expert.*", global_quant_config=NV_STEPS), "0-", "--"),
    ("quark_mxfp4", NV | {"ignore": ["lm_head"]}, "11", "00"),
    ("quark_mxfp4", NV | {"ignore": ["*.mlp.shared_expert*"]}, "01", "00"),
    ("quark_mxfp4", NV | {"ignore": []}, "01", "00"),  # an empty list is none, so SGLang's own counts
    ("fp8", quark(), "--", "--"),
    ("quark", quark(), "11", "11"),
    ("modelopt_fp4", BLOCK, "11", "--"),
    ("modelopt_fp4", NV | {"ignore": ["*.mlp.shared_expert*"]}, "01", "00"),
    ("quark", None, "--", "00"),
]


@pytest.mark.parametrize(("word", "quant", "sglang", "vllm"), ONLINE)
def test_quantization_on_the_command_line(word: str, quant: dict[str, Any] | None, sglang: str, vllm: str) -> None:
    config = QWEN | ({"quantization_config": quant} if quant else {})
    for rule, expected in (("sglang", sglang), ("vllm", vllm)):
        decisions = decide_layers(config, rule=rule, quantization=word, vllm_opt_in=True)
        words = ["1" if d else "0" if d.starts else "-" for d in (decisions[0], decisions[-1])]
        assert "".join(words) == expected, rule
    flat = can_fuse_shared_expert(TEXT, rule="sglang", quantization="quark_mxfp4")
    assert flat, "under the model_type of a text model SGLang converts the shared expert as well"
    forced = {"quantization": "quark_mxfp4", "enforce_shared_experts_fusion": True}
    assert "not prequantized" in can_fuse_shared_expert(QWEN, rule="sglang", **forced).warnings[0]


def test_the_draft_that_vllm_builds_without_gptq() -> None:
    """qwen3_5_mtp.py: an entry of `dynamic` that leaves mtp out switches the draft's quantisation off."""
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {r"-:^mtp\..*": {}}}
    assert [bool(d) for d in decide_layers(QWEN, gptq, "vllm", vllm_opt_in=True)] == [False] * 4 + [True]


def test_vllm_converts_a_shared_expert_while_loading() -> None:
    quant = quark(*body())
    decision = can_fuse_shared_expert(QWEN, quant, "vllm", vllm_opt_in=True, vllm_online_target="mxfp4")
    assert decision.fused and decision.online
    w4a16 = quark(*body(), global_quant_config={"weight": FP4, "input_tensors": None})
    for given, target in ((quant, "fp8"), (quant, ""), (w4a16, "mxfp4")):
        assert answers(QWEN, given, "vllm", vllm_online_target=target) == "0"


def test_atom_takes_a_missing_activation_for_a_dynamic_one() -> None:
    quant = quark(layers={"*shared_expert*": {"weight": FP4, "input_tensors": None}}, global_quant_config=W4A4)
    assert answers(QWEN, quant, "atom strict") == "1 0"


@pytest.mark.parametrize(("place", "layers"), [("exclude", 20), ("layer_quant_config", 1)])
def test_entries_for_single_experts_take_no_time(place: str, layers: int) -> None:
    """30,720 and 1,536 entries at the size of 397B (sglang 38748, 38998), all rules; 30,720 of both kinds take seconds.

    Measured, in processor time: 1.7 and 0.4 s; 30,840 keys of layer_quant_config 5.2 s.
    """
    experts = [f"{PREFIX}.{n}.mlp.experts.{e}" for n in range(layers) for e in range(512)]
    names = [f"{expert}.{p}_proj" for expert in experts for p in ("down", "gate", "up")]
    more = {"exclude": names} if place == "exclude" else {"layers": dict.fromkeys(names, W8A8)}
    model = GateModel.from_config(real_config("qwen3.5-397b-a17b"), quark(**more))
    begin = time.process_time()
    for _, rule, options in VARIANTS:
        hazards(model, None, decide_layers(model, rule=rule, **options))
    assert time.process_time() - begin < 20


HOSTILE = {
    "globs that match nothing": [f"*foo{i}*bar*" for i in range(300)],
    "regular expressions that match nothing": [f"re:.*foo{i}.*bar.*" for i in range(300)],
    "patterns that tell experts apart": [rf"re:.*experts\.\d*{i}\..*_proj" for i in range(100)],
}


@pytest.mark.parametrize("entries", HOSTILE.values(), ids=HOSTILE)
def test_hostile_lists_take_no_time(entries: list[str]) -> None:
    """All rules at the size of 397B; 0.5 s of processor time each, where it was minutes. No engine is said to break."""
    model = GateModel.from_config(real_config("qwen3.5-397b-a17b"), quark(*entries))
    begin = time.process_time()
    for _, rule, options in VARIANTS:
        decisions = decide_layers(model, rule=rule, **options)
        assert not hazards(model, None, decisions)
        vague = rule == "strict" and "experts" in entries[0]
        assert not vague or not decisions[0] and "too many patterns" in str(decisions[0])
    assert time.process_time() - begin < 10


ORDERS = [
    # keys of layer_quant_config in order, does expert 1 of layer 0 differ from the others?
    ([("L.experts.1.up_proj", W8A8), ("*.experts*", W4A4)], True),
    ([("*.experts*", W4A4), ("L.experts.1.up_proj", W8A8)], False),
    ([("L.experts.0.up_proj", W8A8), ("*.experts*", W8A8), ("L.experts.1.up_proj", W4A4)], False),
    ([(f"L.experts.{e}.up_proj", W4A4) for e in range(8)], False),
    ([(f"L.experts.{e}.up_proj", W8A8 if e == 1 else W4A4) for e in range(8)], True),
    ([("*.experts.1.*", W8A8)], True),
    ([("*.experts.[01].*", W8A8)], True),
]


@pytest.mark.parametrize(("keys", "apart"), ORDERS)
def test_experts_are_grouped_by_what_entries_say(keys: list[tuple[str, Any]], apart: bool) -> None:
    """The first key that matches decides, so their order counts; asked one by one, experts say the same."""
    quant = quark(layers={key.replace("L", f"{PREFIX}.0.mlp"): spec for key, spec in keys})
    model = GateModel.from_config(QWEN, quant)
    found = {fact.spec for fact in layer_facts(model, model.layers[0])[1] if fact.name.endswith("up_proj")}
    each = {model.quant.spec_of(f"layers.0.mlp.experts.{e}.up_proj").spec for e in range(8)}
    assert found == each and (len(each) > 1) is apart


def test_hf_quant_config_beside_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    beside = {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(beside))
    save_file({"model.language_model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    for config in (config_and_specs(tmp_path, config_only=True)[0], Checkpoint.open(tmp_path).config):
        assert QuantConfig.from_dict(config["quantization_config"]).default.same_bytes(NVFP4)


U8, F8, I32 = torch.uint8, torch.float8_e4m3fn, torch.int32
LINEAR = "model.layers.0.mlp.shared_expert.up_proj"
# tensors of one module [64, 64], what they are
W, S2 = ".weight", ".weight_scale_2"
FOREIGN: list[tuple[dict[str, tuple[tuple[int, ...], torch.dtype]], str]] = [
    ({W: ((64, 32), U8), ".weight_scale": ((64, 4), F8), S2: ((), torch.float32)}, "nvfp4 (block 16)"),
    ({".weight_packed": ((64, 32), U8), ".weight_scale": ((64, 4), F8)}, "nvfp4 (block 16)"),
    ({".weight": ((64, 64), F8), ".weight_scale": ((64, 2), U8)}, "mxfp8 (block 32)"),
    ({".qweight": ((8, 64), I32), ".qzeros": ((1, 8), I32), ".scales": ((1, 64), torch.float16)}, "int4 (block 64)"),
    ({".qweight": ((16, 64), I32), ".qzeros": ((2, 16), I32), ".scales": ((2, 64), torch.float16)}, "int8 (block 32)"),
    ({".qweight": ((6, 64), I32), ".qzeros": ((1, 6), I32), ".scales": ((1, 64), torch.float16)}, "int3 (block 64)"),
    ({".qweight": ((64, 8), I32), ".qzeros": ((2, 8), I32), ".scales": ((2, 64), torch.float16)}, "int4 (block 32)"),
    ({".weight_packed": ((64, 8), I32), ".weight_scale": ((64, 1), torch.bfloat16)}, "int"),
    ({".weight": ((64, 64), torch.int8), ".SCB": ((64,), torch.float32)}, "int8"),
    ({".weight": ((2048, 1), U8), ".weight.absmax": ((64,), U8)}, "bnb4"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "kind"), FOREIGN, ids=[kind for _, kind in FOREIGN])
def test_formats_that_are_told_by_their_headers(tensors: dict[str, Any], kind: str, tmp_path: Path) -> None:
    zeros = {LINEAR + role: torch.zeros(shape, dtype=dtype) for role, (shape, dtype) in tensors.items()}
    save_file(zeros, tmp_path / "model.safetensors")
    spec = Checkpoint.open(tmp_path).spec("layers.0.mlp.shared_expert.up_proj")
    assert spec and str(spec) == kind
    config = QWEN | {"quantization_config": {"quant_method": "awq"}}
    decisions = decide_layers(config, rule="sglang", stored=lambda _: spec)
    assert not hazards(config, None, decisions, lambda _: spec), "what only we cannot decode breaks nobody"
