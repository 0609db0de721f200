"""The fusion gate against tables: rows of exclude lists, options of engines, quantisation methods.

Row sources: "#N" is an issue or pull request of sgl-project/sglang unless a repository is named.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from gate_configs import FP4, FP8, GLM, NV, PREFIX, QWEN, TEXT, W4A4, W8A8, body, quark

from qwen35_moe.errors import Qwen35Error
from qwen35_moe.gate.decide import RULES, can_fuse_shared_expert, decide_layers, hazards
from qwen35_moe.gate.declared import QuantConfig
from qwen35_moe.quant.precision import BF16, MXFP4, ModuleSpec

# Columns: sglang-22948, sglang-0.5.23, is the body unquantised to SGLang's loader, vllm (opted in), atom,
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
    """#36124: GLM-5.2 spells its draft `model.layers.78`; PR 22948 let three such names veto 78 layers."""
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
    (
        "routed INT4 and FP8 in two steps",
        QWEN,
        {"global_quant_config": {"weight": [FP8, {"dtype": "int4"}]}},
        {},
        0,
        "",
    ),
    ("one layer's experts FP8", QWEN, {"layers": {f"{PREFIX}.3.mlp.experts*": W8A8}}, {}, 0, "is not MXFP4"),
    ("attention FP8 does not matter", QWEN, {"layers": {"*self_attn*": W8A8}}, {}, 2, ""),
    ("shared experts FP8 do not matter", QWEN, {"layers": {f"{PREFIX}.3.mlp.shared_experts*": W8A8}}, {}, 2, ""),
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
    assert not decision.starts or decision.entry and decision.entry.entry == body()[0] and decision.entry.index == 0


# layer_quant_config: sglang-0.5.23 (layer 0 and model.decoder only), vllm, atom, strict.
LAYER_ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("attention only", {"*self_attn*": W8A8}, "1 1 1 1"),
    ("shared experts FP8", {"*shared_expert.*": W8A8}, "0 0 1 0"),
    ("shared expert's parent FP8", {"*shared_expert*": W8A8}, "0 0 0 0"),
    ("both FP8", {"*mlp.experts*": W8A8, "*shared_expert*": W8A8}, "1 1 1 1"),
    ("shared expert of layer 2 only", {f"{PREFIX}.2.mlp.shared_expert.*": W8A8}, "1 0 1 0"),
    ("gate and up only", {"*shared_expert.gate_proj": W8A8, "*shared_expert.up_proj": W8A8}, "0 0 1 0"),
    ("one expert of layer 0: a gap", {f"{PREFIX}.0.mlp.experts.3.up_proj": W4A4}, "0 1 1 1"),
    ("one expert of layer 0 FP8", {f"{PREFIX}.0.mlp.experts.3.*": W8A8}, "0 1 1 0"),
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
METHOD_ROWS: list[tuple[str, dict[str, Any] | None, str]] = [
    ("not quantised", None, "1 1 1 1 1"),
    ("FP8 blocks", BLOCK, "1 1 1 1 1"),
    ("FP8 blocks without the body: unchecked", BLOCK | {"modules_to_not_convert": body()}, "1 1 0 0 0"),
    ("FP8 blocks, a pattern: ATOM's only", BLOCK | {"ignored_layers": ["re:.*shared_expert"]}, "1 1 1 0 0"),
    ("FP8 a tensor", {"quant_method": "fp8"}, "1 1 0 1 1"),
    ("compressed-tensors MXFP4", CT, "1 1 0 1 1"),
    ("compressed-tensors, body ignored: unchecked", CT | {"ignore": ["re:.*shared_expert.*"]}, "1 1 0 0 0"),
    ("NVFP4: ATOM does not start", NV, "1 1 0 0 1"),
    ("NVFP4, body ignored", NV | {"ignore": ["*.mlp.shared_expert*"]}, "1 0 0 0 0"),
    ("NVFP4, the draft's body vetoes", NV | {"ignore": ["mtp.layers.0.mlp.shared_expert.up_proj"]}, "1 0 0 0 1"),
    ("NVFP4, all of the draft", NV | {"exclude_modules": ["mtp*"]}, "1 1 0 0 1"),
    ("GPTQ, body kept", {"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*shared_expert.*": {}}}, "1 1 0 1 0"),
]


@pytest.mark.parametrize(("name", "quant", "expected"), METHOD_ROWS, ids=[r[0] for r in METHOD_ROWS])
def test_method_rows(name: str, quant: dict[str, Any] | None, expected: str) -> None:
    rules = ("sglang-22948", "sglang-0.5.23", "vllm", "atom", "strict")
    got = [can_fuse_shared_expert(QWEN, quant, r, vllm_opt_in=True).fused for r in rules]
    assert got == [word == "1" for word in expected.split()]


ALGOS = ("FP8_BLOCK_SCALES", "MXFP8", "FP8_OTHER")


def test_formats_of_modelopt() -> None:
    """What merely begins with FP8 is another format: rows, blocks; and NVFP4 with FP8 inputs is another function."""
    names = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "fp8_pb_wo", "NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8")
    found = [str(QuantConfig.from_dict({"quant_method": "modelopt", "quant_algo": n}).default) for n in names]
    assert found[:3] == [
        "fp8-tensor, activations fp8 static",
        "fp8-channel, activations fp8 dynamic",
        "fp8-block (block 128x128)",
    ]
    ends = (", activations fp4/16 dynamic", "", ", activations fp8 static")
    assert found[3:] == ["nvfp4 (block 16)" + end for end in ends]
    more = {n: QuantConfig.from_dict({"quant_method": "modelopt", "quant_algo": n}).default for n in ALGOS}
    assert [spec.kind for spec in more.values()] == ["fp8-block", "mxfp8", "quantised"]


def test_the_narrowest_group_of_compressed_tensors_decides() -> None:
    """compressed_tensors.utils.match: exact names before patterns before classes, in whatever order they are listed."""
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
    groups = {
        "linear": {"targets": ["Linear"], "weights": fp8},
        "experts": {"targets": [r"re:.*mlp\.experts.*"], "weights": CT["config_groups"]["g"]["weights"]},
        "one": {"targets": [f"{PREFIX}.1.mlp.experts.0.up_proj"], "weights": fp8},
    }
    quant = QuantConfig.from_dict(CT | {"config_groups": groups})
    found = {
        n: quant.spec_of(n).spec.kind for n in ("layers.0.mlp.experts.0.up_proj", "layers.1.mlp.experts.0.up_proj")
    }
    assert list(found.values()) == ["mxfp4", "fp8-channel"]
    assert not can_fuse_shared_expert(QWEN, CT | {"config_groups": groups})
    # The entry is quoted as it is written, and a shell pattern is none of the three.
    assert quant.spec_of("lm_head").hit.entry == "Linear"
    glob = CT | {"config_groups": {"g": CT["config_groups"]["g"] | {"targets": ["*mlp*"]}}}
    assert "both bf16" in can_fuse_shared_expert(QWEN, glob).reason


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


def test_only_modelopt_drafts_beside_nvfp4_are_bf16() -> None:
    """`_mtp_quant_config` knows NVFP4 and the mix; with FP8 the draft has the target's quantisation."""
    for algo, broken in (("NVFP4", True), ("FP8", False), ("MXFP8", False)):
        quant = NV | {"quant_algo": algo}
        decisions = decide_layers(QWEN, quant, "sglang-0.5.23")
        assert all(decisions) and ("mtp.layers.0" in hazards(QWEN, quant, decisions)) is broken


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


class EngineQuarkConfig:
    """As SGLang and vLLM hold it: the file's dictionary, and the exclude list as an attribute of its own."""

    def __init__(self, quant_config: dict[str, Any]):
        self.quant_config, self.exclude_layers = quant_config, quant_config["exclude"]

    def get_name(self) -> str:
        return "quark"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("exclude", [body(), [f"{PREFIX}.0.mlp.shared_expert_gate"], ["re:.*mlp.gate$"], []])
def test_objects_of_engines_decide_as_the_dictionary_does(rule: str, exclude: list[str]) -> None:
    file = quark(*exclude)
    as_file = can_fuse_shared_expert(QWEN, file, rule)
    assert bool(can_fuse_shared_expert(QWEN, EngineQuarkConfig(file), rule)) == bool(as_file)
    if rule != "atom-00afbe32":  # whose class for a text model renames no entry
        assert bool(can_fuse_shared_expert(SimpleNamespace(**TEXT), SimpleNamespace(**file), rule)) == bool(as_file)


@pytest.mark.parametrize("rule", ["strict", "sglang-22948", "sglang-0.5.23"])
def test_an_exclude_list_alone_is_about_something_quantised(rule: str) -> None:
    """Whoever asks with a list only must not hear that all is BF16 alike."""
    named, other = body(), [f"{PREFIX}.0.mlp.shared_expert_gate"]
    for wrapped in (
        lambda e: {"exclude": e},
        lambda e: {"exclude_layers": e},
        lambda e: SimpleNamespace(exclude_layers=e),
    ):
        assert not can_fuse_shared_expert(QWEN, wrapped(named), rule)
        assert can_fuse_shared_expert(QWEN, wrapped(other), rule)


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
    assert can_fuse_shared_expert(QWEN, quark(f"{PREFIX}.0.mlp.shared_expert_gate"))


@pytest.mark.parametrize("block", ["mlp.shared_expert", "mlp.experts", "mlp.experts.", "mlp", ""])
def test_an_entry_for_the_block_settles_nothing_in_any_dialect(block: str) -> None:
    """Engines ask for `mlp.experts` as one module, whatever names the single projections have."""
    entry = f"{PREFIX}.0.{block}" if block else f"{PREFIX}.0"
    gptq = {"quant_method": "gptq", "dynamic": {f"-:{entry}$": {}}}
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


def spec(**changes: Any) -> dict[str, Any]:
    return quark(global_quant_config=changes)


def group(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"], **changes}}}


NO_NUMBER = "cannot be read.*a number was expected"
# keys of config.json, its quantisation, what the error says
REFUSED: list[tuple[dict[str, Any], dict[str, Any] | None, str]] = [
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
def test_configurations_that_are_refused(changes: dict[str, Any], quant: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(Qwen35Error, match=f"(?s){message}") as raised:
        can_fuse_shared_expert(TEXT | changes, quant)
    assert str(raised.value).count("found:") <= 1, "an error inside another one"
