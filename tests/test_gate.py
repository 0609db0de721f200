"""The fusion gate against tables: rows of exclude lists, options of engines, quantisation methods.

Row sources: "#N" is an issue or pull request of sgl-project/sglang unless a repository is named.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from gate_configs import BLOCK, DRAFT_BODY, FP4, GPTQ, NV, PREFIX, QWEN, TEXT, W4A4, W8A8, Json, answers, body, quark

from qwen35_moe.errors import Qwen35Error
from qwen35_moe.gate.decide import RULES, can_fuse_shared_expert, decide_layers, hazards
from qwen35_moe.gate.declared import QuantConfig
from qwen35_moe.quant.precision import BF16, MXFP4, ModuleSpec

GATE_VECTOR = f"{PREFIX}.0.mlp.shared_expert_gate"
GLM = TEXT | {"model_type": "glm_moe_dsa", "num_hidden_layers": 78, "num_nextn_predict_layers": 1}
GLM |= {"mtp_num_hidden_layers": None}
CT = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"} | {
    "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 32}}}
}
# What it is, the quantisation, options; 1 for a rule that fuses, 0 for one that does not, - where nothing starts.
Row = tuple[str, Json | None, Json, str]
# Lists; the last column: is the body of layer 0 unquantised to SGLang's loader?
LISTS: list[tuple[str, list[str], str, int]] = [
    ("exact names of the body", body(), "0 0 0 0 0 0", 1),
    ("one exact name in one layer", [body()[0]], "0 0 - 0 0 0", 1),
    ("*shared_expert_gate* only", ["*shared_expert_gate*"], "1 1 1 1 0 1", 0),
    ("exact shared_expert_gate only (vLLM #53248)", [GATE_VECTOR], "1 1 1 1 0 1", 0),
    ("draft's body as a glob", ["mtp.layers.0.mlp.shared_expert.*"], "1 1 1 1 0 1", 0),
    ("draft's body, exact", DRAFT_BODY, "1 1 1 1 0 1", 0),
    ("re:.*shared_expert, covers the gate vector too", ["re:.*shared_expert"], "0 0 0 0 0 0", 1),
    ("*shared_expert*: gate and loader disagree", ["*shared_expert*"], "0 0 1 0 0 0", 0),
    (r"re:.*mlp\.shared slips past a substring gate", [r"re:.*mlp\.shared"], "1 1 0 0 1 0", 1),
    ("re:.*mlp.* takes routed experts too", ["re:.*mlp.*"], "1 1 0 1 1 1", 1),
    ("*.mlp.* is broad, and no pattern to SGLang", ["*.mlp.*"], "1 1 1 1 1 0", 0),
    ("empty", [], "1 1 1 1 1 1", 0),
    ("everything but experts", ["lm_head", "model.visual.*", "*mlp.gate", "*.linear_attn.*", "*.self_attn.*"],
     "1 1 1 1 1 1", 0),
]  # fmt: skip
# Options: on a checkpoint that otherwise fuses.
OPTIONS: list[tuple[str, Json, str]] = [
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
# layer_quant_config: SGLang asks layer 0 and model.decoder only.
LAYERS: list[tuple[str, Json, str]] = [
    ("attention only", {"*self_attn*": W8A8}, "1 1 1 1"),
    ("shared experts FP8", {"*shared_expert.*": W8A8}, "0 0 1 0"),
    ("shared expert's parent FP8", {"*shared_expert*": W8A8}, "0 0 0 0"),
    ("both FP8", {"*mlp.experts*": W8A8, "*shared_expert*": W8A8}, "1 1 1 1"),
    ("shared expert of layer 2 only", {f"{PREFIX}.2.mlp.shared_expert.*": W8A8}, "1 - 1 0"),
    ("gate and up only", {"*shared_expert.gate_proj": W8A8, "*shared_expert.up_proj": W8A8}, "0 0 1 0"),
    ("one expert of layer 0: a gap", {f"{PREFIX}.0.mlp.experts.3.up_proj": W4A4}, "- 1 1 1"),
    ("one expert of layer 0 FP8", {f"{PREFIX}.0.mlp.experts.3.*": W8A8}, "- 1 1 0"),
    ("experts of layer 0 one by one", {f"{PREFIX}.0.mlp.experts.{e}.up_proj": W8A8 for e in range(8)}, "0 - 0 0"),
]
METHODS: list[tuple[str, Json | None, str]] = [
    ("not quantised", None, "1 1 1 1 1"),
    ("FP8 blocks", BLOCK, "1 1 1 1 1"),
    ("FP8 blocks without the body: unchecked", BLOCK | {"modules_to_not_convert": body()}, "1 1 0 0 0"),
    ("FP8 blocks, a pattern: ATOM's only", BLOCK | {"ignored_layers": ["re:.*shared_expert"]}, "1 1 1 0 0"),
    ("FP8 a tensor", {"quant_method": "fp8"}, "1 1 0 1 1"),
    ("compressed-tensors MXFP4", CT, "1 1 0 1 1"),
    ("compressed-tensors, body ignored: unchecked", CT | {"ignore": ["re:.*shared_expert.*"]}, "1 1 0 0 0"),
    ("NVFP4: ATOM does not start", NV, "1 1 0 - 1"),
    ("NVFP4, body ignored", NV | {"ignore": ["*.mlp.shared_expert*"]}, "1 0 0 - 0"),
    ("NVFP4, the draft's body vetoes", NV | {"ignore": ["mtp.layers.0.mlp.shared_expert.up_proj"]}, "1 0 0 - 1"),
    ("NVFP4, all of the draft", NV | {"exclude_modules": ["mtp*"]}, "1 1 0 - 1"),
    ("GPTQ, body kept", GPTQ | {"dynamic": {"-:.*shared_expert.*": {}}}, "1 1 0 1 0"),
]
# ATOM's transport: topK.py; its own test names the eplb rows.
MORI = {"dp_size": 8, "a2a_backend": "mori", "dp_attention": True}
ATOM: list[tuple[str, Json, str]] = [
    ("8 ranks", {"dp_size": 8}, "1 1"),
    ("flattened", {"dp_size": 8, "moe_ep_flatten_tp_across_dp": True}, "0 0"),
    ("MoRI", MORI, "1 1"),
    ("MoRI, not asked for", MORI | {"atom_fuse_shared_expert": False}, "0 0"),
    ("MoRI, eplb", MORI | {"atom_fuse_shared_expert": False, "eplb": True}, "1 1"),
]
TABLES: dict[str, list[Row]] = {
    "sglang-22948 sglang-0.5.23 vllm atom atom-first-entry strict": [
        (name, quark(*exclude), {}, expected) for name, exclude, expected, _ in LISTS],
    "sglang-22948 sglang-0.5.23": [
        (name, quark("*shared_expert_gate*"), options, expected) for name, options, expected in OPTIONS],
    "sglang-0.5.23 vllm atom strict": [
        (name, quark("lm_head", layers=layers), {}, expected) for name, layers, expected in LAYERS],
    "sglang-22948 sglang-0.5.23 vllm atom strict": [(name, quant, {}, expected) for name, quant, expected in METHODS],
    "atom atom-first-entry": [(name, quark(), options, expected) for name, options, expected in ATOM],
}  # fmt: skip
ROWS = [(rules, *row) for rules, rows in TABLES.items() for row in rows]


@pytest.mark.parametrize(("rules", "name", "quant", "options", "expected"), ROWS, ids=[row[1] for row in ROWS])
def test_rows(rules: str, name: str, quant: Json | None, options: Json, expected: str) -> None:
    assert answers(QWEN, quant, rules, **options) == expected


@pytest.mark.parametrize(("name", "exclude", "_", "expected"), LISTS, ids=[row[0] for row in LISTS])
def test_what_sglangs_loader_takes_for_unquantised(name: str, exclude: list[str], _: str, expected: int) -> None:
    loader = QuantConfig.from_dict(quark(*exclude), 4).read_as("sglang")
    assert (loader.spec_of(f"{PREFIX}.0.mlp.shared_expert.down_proj").spec == BF16) is bool(expected)


def test_draft_layers_by_number() -> None:
    """#36124: GLM-5.2 spells its draft `model.layers.78`; PR 22948 let three such names veto 78 layers."""
    names = [f"model.layers.78.mlp.shared_experts.{p}_proj" for p in ("down", "gate", "up")]
    quant = quark(*names, *(f"model.layers.78.mlp.experts.{e}.up_proj" for e in range(8)))
    assert answers(GLM, quant, "sglang-22948 sglang-0.5.23 strict") == "0 1 1"
    decisions = decide_layers(GLM, quant)
    assert len(decisions) == 79
    assert "model.layers.78.mlp.shared_experts.gate_proj" in str(decisions[-1]), "the draft is known by its number"
    # A nested config.json has no layer count where SGLang looks for it.
    assert answers({"model_type": "x", "text_config": GLM}, quant, "sglang-0.5.23") == "0"


def test_excluded_drafts_that_miss_their_experts() -> None:
    """Quark leaves fused BF16 draft experts out of the list: by the list they are MXFP4, by the bytes BF16."""
    quant, by_bytes = quark(*DRAFT_BODY), lambda name: BF16 if name.startswith("mtp.") else MXFP4
    blind, seeing = (decide_layers(QWEN, quant, stored=lookup)[-1] for lookup in (None, by_bytes))
    assert not blind and "the shared expert is bf16, the routed experts are mxfp4" in blind.reason
    assert seeing and seeing.draft
    assert "is bf16 in the bytes, but mxfp4 by global_quant_config, no entry names it" in str(seeing.warnings)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("size", "fused"), [(32, True), (0, False), (64, False), (None, False)])
def test_sizes(rule: str, size: int | None, fused: bool) -> None:
    """The slot has the routed experts' shape. Every rule needs that."""
    config = TEXT | {"shared_expert_intermediate_size": size}
    assert can_fuse_shared_expert(config, rule=rule, vllm_opt_in=True).fused is fused


W4A8 = {"weight": FP4, "input_tensors": W8A8["weight"]}
INT4_STEPS = {"weight": [W8A8["weight"], {"dtype": "int4"}]}
# --enforce-shared-experts-fusion on an excluded body: quark.py:1121-1211. 2 = fused by conversion.
ENFORCE_ROWS: list[tuple[str, Json, Json, Json, int, str]] = [
    ("all conditions hold", QWEN, {}, {}, 2, ""),
    ("flat config", TEXT, {}, {}, 2, ""),
    ("CUDA", QWEN, {}, {"hip": False, "cuda_opt_in": True}, 0, "not ROCm"),
    ("gfx942", QWEN, {}, {"gfx95": False}, 0, "no FP4"),
    ("another model", QWEN | {"model_type": "qwen3_next"}, {}, {}, 0, "was not measured"),
    ("routed FP8", QWEN, {"global_quant_config": W8A8}, {}, 0, "of layer 0 are not MXFP4"),
    ("routed INT4 and FP8 in two steps", QWEN, {"global_quant_config": INT4_STEPS}, {}, 0, ""),
    ("one layer's experts FP8", QWEN, {"layers": {f"{PREFIX}.3.mlp.experts*": W8A8}}, {}, 0, "is not MXFP4"),
    ("attention FP8 does not matter", QWEN, {"layers": {"*self_attn*": W8A8}}, {}, 2, ""),
    ("shared experts FP8 do not matter", QWEN, {"layers": {f"{PREFIX}.3.mlp.shared_experts*": W8A8}}, {}, 2, ""),
    ("W4A8", QWEN, {"global_quant_config": W4A8}, {}, 0, "of layer 0 are not MXFP4"),
]


@pytest.mark.parametrize(
    ("name", "config", "quant", "options", "expected", "why"), ENFORCE_ROWS, ids=[r[0] for r in ENFORCE_ROWS]
)
def test_enforce_rows(name: str, config: Json, quant: Json, options: Json, expected: int, why: str) -> None:
    chosen = quark(*body(), **quant)
    decision = can_fuse_shared_expert(config, chosen, "sglang-0.5.23", enforce_shared_experts_fusion=True, **options)
    assert (decision.fused, decision.online) == (expected > 0, expected == 2)
    assert why in " ".join(decision.warnings)
    assert not decision.starts or decision.entry and decision.entry.entry == body()[0] and decision.entry.index == 0


ALGOS = {
    "FP8": "fp8-tensor, activations fp8 static", "FP8_PER_CHANNEL_PER_TOKEN": "fp8-channel, activations fp8 dynamic",
    "fp8_pb_wo": "fp8-block (block 128x128)", "FP8_BLOCK_SCALES": "fp8-block (block 128x128)",
    "NVFP4": "nvfp4 (block 16), activations fp4/16 dynamic", "W4A16_NVFP4": "nvfp4 (block 16)",
    "W4A8_NVFP4_FP8": "nvfp4 (block 16), activations fp8 static",
    "MXFP8": "mxfp8 (block 32), activations fp8/32 dynamic", "FP8_OTHER": "quantised",
}  # fmt: skip


def test_formats_of_modelopt() -> None:
    """What merely begins with FP8 is another format: rows, blocks; and NVFP4 with FP8 inputs is another function."""
    for algo, expected in ALGOS.items():
        assert str(QuantConfig.from_dict({"quant_method": "modelopt", "quant_algo": algo}).default) == expected


def test_the_narrowest_group_of_compressed_tensors_decides() -> None:
    """compressed_tensors.utils.match: exact names before patterns before classes, in whatever order they are listed."""
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
    groups = {
        "linear": {"targets": ["Linear"], "weights": fp8},
        "experts": {"targets": [r"re:.*mlp\.experts.*"], "weights": CT["config_groups"]["g"]["weights"]},
        "one": {"targets": [f"{PREFIX}.1.mlp.experts.0.up_proj"], "weights": fp8},
    }
    quant = QuantConfig.from_dict(CT | {"config_groups": groups})
    found = [quant.spec_of(f"layers.{n}.mlp.experts.0.up_proj").spec.kind for n in (0, 1)]
    assert found == ["mxfp4", "fp8-channel"]
    assert not can_fuse_shared_expert(QWEN, CT | {"config_groups": groups})
    # The entry is quoted as it is written, and a shell pattern is none of the three.
    assert quant.spec_of("lm_head").hit.entry == "Linear"
    glob = CT | {"config_groups": {"g": CT["config_groups"]["g"] | {"targets": ["*mlp*"]}}}
    assert "both bf16" in can_fuse_shared_expert(QWEN, glob).reason


# SGLang's draft is built with a configuration of its own: qwen3_5_mtp.py:50-95.
DRAFT_ROWS: list[tuple[str, Json, bool, bool]] = [
    ("draft's experts excluded (#38748)", quark(*body(), "mtp.layers.0.mlp.experts.0.up_proj"), False, True),
    ("draft's body only", quark("mtp.layers.0.mlp.shared_expert.up_proj"), True, True),
    ("target's body only", quark(*body()), False, False),
    ("NVFP4, body ignored", NV | {"ignore": ["*.mlp.shared_expert*"]}, False, True),
]


@pytest.mark.parametrize(("name", "quant", "target", "mtp"), DRAFT_ROWS, ids=[r[0] for r in DRAFT_ROWS])
def test_draft_rows(name: str, quant: Json, target: bool, mtp: bool) -> None:
    decisions = decide_layers(QWEN, quant, "sglang-0.5.23")
    found = {d.layer: bool(d) for d in decisions}
    assert found == {f"layers.{n}": target for n in range(4)} | {"mtp.layers.0": mtp}


def test_only_modelopt_drafts_beside_nvfp4_are_bf16() -> None:
    """`_mtp_quant_config` knows NVFP4 and the mix; with FP8 the draft has the target's quantisation."""
    for algo, broken in (("NVFP4", True), ("FP8", False), ("MXFP8", False)):
        quant = NV | {"quant_algo": algo}
        decisions = decide_layers(QWEN, quant, "sglang-0.5.23")
        assert all(decisions) and ("mtp.layers.0" in hazards(QWEN, quant, decisions)) is broken


def test_atom_first_entry_says_that_it_was_the_wrong_one() -> None:
    decision = can_fuse_shared_expert(QWEN, quark("lm_head", GATE_VECTOR), "atom-first-entry")
    assert not decision and decision.entry and decision.entry.index == 1
    assert "does not name the target's shared expert body" in decision.warnings[0]


@pytest.mark.parametrize(("entry", "fused"), [
    ("re:.*shared_expert.*", "0"), ("*.mlp.shared_expert*", "0"), ("model.layers.[01].mlp.shared_expert", "0"),
    (r"re:.*\.mlp\.shared_expert\..*", "1"), (r"re:.*layers\.0\.mlp\.shared_expert", "1"),
    ("*.layers.[01].mlp.shared_expert", "1"),
])  # fmt: skip
def test_atom_first_entry_asks_by_the_text_of_an_entry(entry: str, fused: str) -> None:
    """A pattern need not match its own text: `\\.` is a backslash there, `[01]` four characters. Then ATOM fuses."""
    assert answers(QWEN, quark(entry), "atom-first-entry") == fused


class EngineQuarkConfig:
    """As SGLang and vLLM hold it: the file's dictionary, and the exclude list as an attribute of its own."""

    def __init__(self, quant_config: Json):
        self.quant_config, self.exclude_layers = quant_config, quant_config["exclude"]

    def get_name(self) -> str:
        return "quark"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("exclude", [body(), [GATE_VECTOR], ["re:.*mlp.gate$"], []])
def test_objects_of_engines_decide_as_the_dictionary_does(rule: str, exclude: list[str]) -> None:
    file = quark(*exclude)
    as_file = can_fuse_shared_expert(QWEN, file, rule)
    assert bool(can_fuse_shared_expert(QWEN, EngineQuarkConfig(file), rule)) == bool(as_file)
    if rule != "atom-00afbe32":  # whose class for a text model renames no entry
        assert bool(can_fuse_shared_expert(SimpleNamespace(**TEXT), SimpleNamespace(**file), rule)) == bool(as_file)


@pytest.mark.parametrize("rule", ["strict", "sglang-22948", "sglang-0.5.23"])
def test_an_exclude_list_alone_is_about_something_quantised(rule: str) -> None:
    """Whoever asks with a list only must not hear that all is BF16 alike."""
    for exclude, expected in ((body(), "0"), ([GATE_VECTOR], "1")):
        alone = {"exclude_layers": exclude}
        for quant in ({"exclude": exclude}, alone, SimpleNamespace(**alone)):
            assert answers(QWEN, quant, rule) == expected


BLOCKS = [f"{PREFIX}.0.mlp.{block}" for block in ("shared_expert", "shared_expert.", "experts", "experts.3")]
PATTERNS = ["re:shared_expert", "*mlp.shared_expert", "re:mlp.experts", "*.mlp.experts"]


@pytest.mark.parametrize("entry", [*BLOCKS, *PATTERNS])
def test_what_some_readers_take_for_excluded_settles_nothing_without_bytes(entry: str) -> None:
    """An entry for a block names no linear module to Quark; ATOM takes all below it, and patterns anywhere."""
    for more in ([], ["*linear_attn*"], ["re:.*gate$"]):
        decision = can_fuse_shared_expert(QWEN, quark(entry, *more))
        assert not decision and entry in str(decision)
    if entry in PATTERNS:
        assert "readers of the exclude list disagree" in can_fuse_shared_expert(QWEN, quark(entry)).reason
        assert can_fuse_shared_expert(QWEN, quark(entry), stored=lambda name: MXFP4)
    assert can_fuse_shared_expert(QWEN, quark(GATE_VECTOR))


@pytest.mark.parametrize("block", ["mlp.shared_expert", "mlp.experts", "mlp.experts.", "mlp", ""])
def test_an_entry_for_the_block_settles_nothing_in_any_dialect(block: str) -> None:
    """Engines ask for `mlp.experts` as one module, whatever names the single projections have."""
    entry = f"{PREFIX}.0.{block}" if block else f"{PREFIX}.0"
    gptq = GPTQ | {"dynamic": {f"-:{entry}$": {}}}
    for quant in (CT | {"ignore": [entry]}, CT | {"ignore": [f"re:{entry}$"]}, NV | {"ignore": [entry]}, gptq):
        decision = decide_layers(QWEN, quant)[0]
        assert not decision and "readers of the exclude list disagree" in decision.reason and entry in str(decision)
        assert can_fuse_shared_expert(QWEN, quant, stored=lambda _: MXFP4)


def test_inputs_that_are_quantised_differently() -> None:
    """W4A16 and W4A4 are two functions, unless the bytes are floats: engines quantise no inputs of those."""
    config = QWEN | {"quantization_config": quark(layers={"*shared_expert*": {"weight": FP4}})}
    assert "inputs" in can_fuse_shared_expert(config).reason
    assert can_fuse_shared_expert(config, stored=lambda _: BF16)


def test_a_block_that_is_not_stated_contradicts_none() -> None:
    block, unstated, other = (ModuleSpec("fp8-block", size) for size in ((128, 128), (), (64, 64)))
    assert block.same_bytes(unstated) and unstated.same_bytes(block) and not block.same_bytes(other)


def spec(**changes: Any) -> Json:
    return quark(global_quant_config=changes)


def group(**changes: Any) -> Json:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"], **changes}}}


NO_NUMBER = "cannot be read.*a number was expected"
# keys of config.json, its quantisation, what the error says
REFUSED: list[tuple[Json, Json | None, str]] = [
    *((changes, None, "layers cannot be counted") for changes in (
        {"num_hidden_layers": 10**9}, {"mtp_num_hidden_layers": 10**30}, {"mtp_num_hidden_layers": "x"},
        {"mlp_only_layers": -1}, {"mlp_only_layers": True}, {"decoder_sparse_step": -2})),
    *(({key: "32"}, None, f"wrong type.*{key}") for key in ("shared_expert_intermediate_size", "num_experts")),
    *(({}, quant, "cannot be read.*quantization_config") for quant in (
        quark(layers="x"), quark(global_quant_config=-1), quark(global_quant_config=[None]),
        spec(weight={"group_size": "x", "dtype": "fp4"}),
        spec(**W4A4 | {"input_tensors": FP4 | {"group_size": [32]}}))),
    ({}, NV | {"group_size": [[]]}, NO_NUMBER),
    ({}, NV | {"quant_algo": "W4A16_NVFP4", "group_size": {"a": 1}}, NO_NUMBER),
    ({}, group(weights={"num_bits": 4, "type": "float", "group_size": [16]}), NO_NUMBER),
    ({}, group(weights={"num_bits": 4, "type": "int"},
               input_activations={"num_bits": 8, "type": "int", "group_size": [1]}), NO_NUMBER),
    ({}, quark() | {"exclude": "lm_head"}, "must hold strings"),
    ({}, quark("re:*.mlp.gate"), r"not a valid regular expression.*found: \*.mlp.gate"),
    ({}, quark(layer_type_quant_config={"Linear": W8A8}), "by a layer's type are not read"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "quant", "message"), REFUSED, ids=[str(row[:2])[-60:] for row in REFUSED])
def test_configurations_that_are_refused(changes: Json, quant: Json | None, message: str) -> None:
    with pytest.raises(Qwen35Error, match=f"(?s){message}") as raised:
        can_fuse_shared_expert(TEXT | changes, quant)
    assert str(raised.value).count("found:") <= 1, "an error inside another one"
