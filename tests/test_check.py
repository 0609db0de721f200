"""`qwen35-moe check`: every kind of fault is flagged for the right engine, and clean checkpoints are silent."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gate_configs import DRAFT_BODY, FP4, GPTQ, NV, PREFIX, QWEN, TEXT, W8A8, Json, body, draft, quark, shared
from safetensors.torch import load_file, save_file

from qwen35_moe.checkpoint import Checkpoint
from qwen35_moe.cli.main import main
from qwen35_moe.quant.precision import BF16, MXFP4, MXFP8, NVFP4, ModuleSpec
from qwen35_moe.run.lint import _gate, lint
from qwen35_moe.run.lint_files import BYTES_AT_ONCE, Finding, check_bytes
from weights import gate_recipes
from weights.build import build

ENGINES = ("sglang", "vllm", "atom")
Tensors = dict[str, torch.Tensor]
Change = Callable[[Any], None] | None


@cache
def built(recipe: str) -> Path:
    return build(recipe, Path(tempfile.mkdtemp()) / recipe)


CLEAN = ("tiny", "tiny-drawn-fp8", "tiny-flat", "tiny-fp8", "tiny-inner-prefix", "tiny-mxfp4-mtp", "tiny-per-expert")
# Recipes with a fault that is there on purpose: rule of the finding, part of its text.
FAULTY = {
    # Quark leaves a draft that it does not convert in BF16, and out of its list
    **dict.fromkeys((f"tiny-{n}" for n in ("mxfp4", "moe-mxfp4", "mxfp4-attnfp8", "drawn-mxfp4", "compressed-tensors")),
                    {("experts", "takes mtp.layers.0.mlp.experts.0.gate_proj for mxfp4, but it is bf16")}),
    # SGLang's gate does not look at FP8 lists
    "tiny-fp8-experts": {("experts", "bf16 bytes would be read as fp8-block")},
    "tiny-odd": {("special-id", "is no row of an embedding of 193")},
}  # fmt: skip


def findings(folder: Path, engines: tuple[str, ...] = ENGINES, values: bool = False) -> list[Finding]:
    """What is wrong, without the notes. values: all that are stored are looked at as well."""
    checkpoint = Checkpoint.open(folder)
    found = lint(checkpoint, engines) + (list(check_bytes(checkpoint)) if values else [])
    return [finding for finding in found if finding.level != "note"]


@pytest.mark.parametrize("recipe", [*CLEAN, *FAULTY])
def test_clean_checkpoints_are_silent(recipe: str) -> None:
    found, known = findings(built(recipe), values=True), FAULTY.get(recipe, set())
    assert {f.rule for f in found} == {rule for rule, _ in known}
    assert all(any(f.rule == rule and text in f.text for rule, text in known) for f in found), found


NEWEST_RULES = ("sglang-0.5.23", "vllm-0.33", "atom-ffdf3bb5")


def flagged(config: Json, stored: Callable[[str], ModuleSpec | None]) -> set[str]:
    """The variants of engines that are flagged, of a checkpoint that has these specs and no tensors."""
    checkpoint: Any = SimpleNamespace(config=config, spec=stored, modules={})
    found = [f for f in _gate(checkpoint, ENGINES) if f.level != "note"]
    return {label for finding in found for label in finding.engine.split("; ")}


@pytest.mark.parametrize("name", gate_recipes.names())
def test_recipes_of_real_checkpoints(name: str) -> None:
    """Who breaks by the recipe is flagged, and nobody else: where nobody does, all is silent."""
    recipe = gate_recipes.load(name)
    known = {label: words for label, words in recipe.expected.items() if label.startswith(NEWEST_RULES)}
    assert flagged(recipe.config, recipe.stored) == {label for label, words in known.items() if "!" in words}


def draft_experts(name: str) -> ModuleSpec:
    return MXFP4 if "mtp.layers.0.mlp.experts" in name else shared(BF16)(name)


HUB = r"re:model\.language_model\..*shared_expert\..*"
EXPERTS = [f"mtp.layers.0.mlp.experts.{e}.{p}_proj" for e in range(8) for p in ("gate", "up", "down")]
FP8_ROW = ModuleSpec("fp8-channel")
MIXED = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
LAYERS = dict.fromkeys([f"{PREFIX}.{n}.mlp.experts" for n in range(4)] + body(), {"quant_algo": "NVFP4"})
INT4 = ModuleSpec("int4", (128,))
ALL = "sglang-0.5.23 atom-ffdf3bb5 vllm-0.33"
# What is said of the experts, what is stored, whose loader fails. Opted in or not, vLLM counts as one.
SITUATIONS: list[tuple[str, Json, Any, str]] = [
    # the family of sglang #22948: what is said about the shared expert is not what is stored, or not read by all
    ("27936: BF16 goes into FP4 slots, for one gate sees no word", quark(r"re:.*mlp\.shared"), shared(BF16),
     "sglang-0.5.23"),
    ("38870: only the draft's routed experts are MXFP4", quark(*body(), *DRAFT_BODY), draft_experts, ""),
    ("38870: the list says that they are not", quark(*body(), *DRAFT_BODY, *EXPERTS), draft_experts, ALL),
    ("40754: a text-only checkpoint, its body BF16 and not listed", quark("lm_head"), shared(BF16), ALL),
    ("ATOM 1128: its gate asks for the block, its loader for the parts", quark(r"re:.*\.shared_expert\..*_proj$"),
     shared(BF16), "atom-ffdf3bb5"),
    ("vLLM 44434: an entry that its names do not meet", quark(r"re:model\.(language_model\.)?layers.*shared_expert.*"),
     shared(BF16), "vllm-0.33"),
    ("vLLM 53248: the gate vector alone is listed", quark(*(f"{PREFIX}.{n}.mlp.shared_expert_gate" for n in range(4))),
     shared(MXFP4), ""),
    ("a glob that only Quark reads", quark("*.shared_expert.*"), shared(BF16), ALL),
    ("a regex, hub's prefix", quark(HUB), shared(BF16), "vllm-0.33 atom-ffdf3bb5"),
    ("one of a fused pair", quark(*body(parts="gate down")), shared(MXFP4), ALL),
    ("exclude: null", quark() | {"exclude": None}, shared(MXFP4), "sglang-0.5.23 vllm-0.33"),
    ("a weight in two steps", quark(global_quant_config={"weight": [FP4, FP4], "input_tensors": FP4}), shared(MXFP4),
     ALL),
    ("listed, and MXFP4 in the bytes", quark(*body()), shared(MXFP4), ALL),
    ("listed in any order, with the draft first", quark(*DRAFT_BODY, *reversed(body())), shared(BF16), ""),
    ("listed with the prefix of older exports",
     quark(*(e.replace(PREFIX, "language_model.model.layers") for e in body())),
     shared(BF16), "sglang-0.5.23 atom-ffdf3bb5"),
    ("the draft is BF16, and nobody says so", quark(*body()), draft(BF16, shared(BF16)), ALL),
    ("the draft is BF16, and listed by single experts", quark(*body(), *DRAFT_BODY, *EXPERTS),
     draft(BF16, shared(BF16)), ""),
    ("a list about the draft only", quark(*DRAFT_BODY), shared(MXFP4), ALL),
    ("*experts* in FP8, the shared expert in MXFP4", quark(layers={"*experts*": W8A8}), shared(MXFP4, FP8_ROW), ""),
    ("NVFP4 routed, ignored by no word", NV | {"ignore": ["*.mlp.shared*"]}, draft(BF16, shared(BF16, NVFP4)),
     "sglang-0.5.23"),
    ("NVFP4 both", NV | {"ignore": ["mtp*"]}, draft(BF16, shared(NVFP4, NVFP4)), ""),
    ("MIXED_PRECISION, one entry for all experts", MIXED | {"quantized_layers": LAYERS, "exclude_modules": ["mtp*"]},
     draft(BF16, shared(NVFP4, NVFP4)), ""),
    ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["mtp*"]}},
     draft(BF16, shared(NVFP4, NVFP4)), ""),
    ("GPTQ, all in int4", GPTQ, shared(INT4, INT4), ""),
    ("awq, which we do not read", {"quant_method": "awq"}, shared(BF16, INT4), "sglang-0.5.23 atom-ffdf3bb5"),
    ("awq, both in int4", {"quant_method": "awq"}, shared(INT4, INT4), ""),
    ("MXFP8 of ModelOpt", NV | {"quant_algo": "MXFP8"}, shared(MXFP8, MXFP8), ""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "quant", "stored", "expected"), SITUATIONS, ids=[row[0] for row in SITUATIONS])
def test_situations(name: str, quant: Json, stored: Any, expected: str) -> None:
    text = TEXT | {"mtp_num_hidden_layers": int("raft" in name or "mtp" in str(quant))}
    config = text if "text-only" in name else QWEN | {"text_config": text}
    found = flagged(config | {"quantization_config": quant}, stored)
    assert {rule for rule in NEWEST_RULES if any(label.startswith(rule) for label in found)} == set(expected.split())


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint, its tensors or config.json changed by a function, or some keys of text_config."""

    def make(recipe: str, change: Change = None, config: Change = None, **keys: Any) -> Path:
        folder = build(recipe, tmp_path / "ckpt", shards=0)
        if change:
            change(tensors := load_file(folder / "model.safetensors"))
            save_file(tensors, folder / "model.safetensors")
        values = json.loads((folder / "config.json").read_text())
        for key, value in keys.items():
            values["text_config"].pop(key) if value is None else values["text_config"].update({key: value})
        if config:
            config(values)
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return make


def first(tensors: Tensors, ending: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(ending))


def drop_scale(tensors: Tensors) -> None:
    del tensors[first(tensors, "weight_scale_inv")]


def grow_draft(tensors: Tensors) -> None:
    name = first(tensors, "mtp.layers.0.mlp.gate.weight")
    tensors[name] = torch.cat([tensors[name]] * 2)


def drop_tower(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".visual." in name]:
        del tensors[name]


def repeat_prefix(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("model.language_model.")]:
        tensors["model.language_model.language_model." + name.removeprefix("model.language_model.")] = tensors.pop(name)


def stray(tensors: Tensors) -> None:
    tensors["model.language_model.layers.0.mlp.extra.weight"] = torch.ones(2)


# recipe, change of the tensors, keys of the config, rule of the finding, its level
DAMAGE: list[tuple[str, Change, Json, str, str]] = [
    ("tiny-fp8", drop_scale, {}, "format", "error"),
    ("tiny", grow_draft, {}, "draft-head", "error"),
    ("tiny", None, {"mtp_num_hidden_layers": 0}, "draft-head", "warning"),
    ("tiny", repeat_prefix, {}, "prefix", "error"),
    ("tiny", stray, {}, "tensors", "error"),
    ("tiny", None, {"eos_token_id": 10**6}, "special-id", "error"),
    ("tiny", None, {"rope_parameters": None}, "rope", "warning"),
    ("tiny", None, {"rope_parameters": {}}, "rope", "warning"),
    ("tiny", drop_tower, {}, "vision-tower", "warning"),
    ("tiny", None, {"hidden_size": None}, "config", "error"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "change", "keys", "rule", "level"), DAMAGE, ids=[f"{d[3]} {d[4]}" for d in DAMAGE])
def test_damage_is_found(damaged: Any, recipe: str, change: Change, keys: Json, rule: str, level: str) -> None:
    found = findings(damaged(recipe, change, **keys))
    assert {(f.rule, f.level) for f in found} == {(rule, level)}, [str(f) for f in found]


def fp8_module(ending: str) -> Change:
    """Stores a BF16 module in FP8, with a scale."""

    def change(tensors: Tensors) -> None:
        name = first(tensors, ending)
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = torch.ones(1, 1)

    return change


def listed(keep: Callable[[str], bool] = lambda _: True, short: bool = False) -> Change:
    """Drops entries of the list, or what stands before the layer's module."""

    def change(config: Json) -> None:
        quant, prefix = config["quantization_config"], f"{PREFIX}." if short else "no prefix"
        entries = filter(keep, quant["modules_to_not_convert"])
        quant["modules_to_not_convert"] = [e.split(".", 4)[-1] if e.startswith(prefix) else e for e in entries]

    return change


# change of tensors, of config.json, modules that are taken for something else, by whose loaders
LINEAR: list[tuple[Change, Change, set[str], str]] = [
    (fp8_module("layers.0.mlp.gate.weight"), None, {"layers.0.mlp.gate"}, ALL),
    (fp8_module("layers.1.mlp.shared_expert_gate.weight"), None, {"layers.1.mlp.shared_expert_gate"}, ALL),
    (None, listed(lambda e: "in_proj_a" not in e), {"layers.0.linear_attn.in_proj_a"}, ALL),
    (None, listed(lambda e: e != "mtp.fc"), {"mtp.fc"}, "vllm-0.33 atom-ffdf3bb5"),
    (None, listed(short=True), {f"layers.0.linear_attn.in_proj_{x}" for x in "ab"}, "vllm-0.33 atom-ffdf3bb5"),
]


@pytest.mark.parametrize(("change", "config", "modules", "engines"), LINEAR)
def test_modules_that_a_loader_takes_for_something_else(
    change: Change, config: Change, modules: set[str], engines: str, damaged: Any
) -> None:
    found = findings(damaged("tiny-fp8", change, config))
    assert {f.where for f in found} == modules and {f.rule for f in found} == {"declared"}
    assert {engine for f in found for engine in f.engine.split("; ")} == set(engines.split())


def test_values_are_read_on_demand(damaged: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def poison(tensors: Tensors) -> None:
        scale = tensors[first(tensors, "weight_scale_inv")]
        scale.view(-1)[0] = float("nan")
        tensors[first(tensors, "down_proj.weight_scale_inv")].view(-1)[-1] = 0
        tensors[first(tensors, "norm.weight")].view(-1)[0] = float("inf")

    folder = damaged("tiny-fp8", poison)
    assert main(["check", str(folder)]) == 0
    assert main(["check", str(folder), "--bytes"]) == 1
    out = capsys.readouterr().out
    assert out.count("1 values are NaN or infinite") == 2 and "1 scales are zero" in out


INF, NAN, DTYPES = float("inf"), float("nan"), (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# what is stored behind ones that fill more than one piece, and what is found
VALUES: list[tuple[str, list[float], torch.dtype, str]] = [
    *(("x.weight", [value], dtype, "1 values") for dtype in DTYPES for value in (NAN, -NAN, INF, -INF)),
    *(("x.weight", [0.0, -0.0, torch.finfo(d).max, torch.finfo(d).min, torch.finfo(d).tiny], d, "") for d in DTYPES),
    *(("x.weight_scale", [0.0, -0.0], dtype, "2 scales are zero") for dtype in DTYPES),
    ("x.weight", [NAN, -NAN], torch.float8_e4m3fn, "2 values"),
    ("x.weight", [448.0, -448.0, 0.0], torch.float8_e4m3fn, ""),
    ("x.weight_scale", [0.0, -0.0], torch.float8_e4m3fn, "2 scales are zero"),
    ("x.weight", [INF, -INF, NAN], torch.float8_e5m2, "3 values"),
    ("x.weight_scale", [255, 0], torch.uint8, "1 values"),
    ("x.weight", [255, 0], torch.uint8, ""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "values", "dtype", "expected"), VALUES)
def test_every_value_is_seen(name: str, values: list[float], dtype: torch.dtype, expected: str, tmp_path: Path) -> None:
    tensor = torch.cat([torch.ones(BYTES_AT_ONCE + 3), torch.tensor(values, dtype=torch.float64)]).to(dtype)
    save_file({name: tensor, "y.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    found = [finding.text for finding in check_bytes(Checkpoint.open(tmp_path))]
    assert len(found) == bool(expected) and all(text.startswith(expected) for text in found), found


def test_a_tensor_that_was_never_downloaded(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.zeros(2, 2), "a.bias": torch.zeros(2), "b.weight_packed": torch.zeros(2, 2).byte()}
    save_file(tensors, tmp_path / "model.safetensors")
    found = {finding.where.rpartition(" ")[2]: finding.rule for finding in check_bytes(Checkpoint.open(tmp_path))}
    assert found == {"a.weight": "zeros", "b.weight_packed": "zeros"}


def test_ids_of_generation_config(damaged: Any) -> None:
    folder = damaged("tiny")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 256], "pad_token_id": None}))
    assert [(f.rule, f.where) for f in findings(folder)] == [("special-id", "generation_config.json: eos_token_id")]


def test_static_inputs_need_a_scale() -> None:
    modules = {"layers.0.self_attn.q_proj": {".weight": None, ".weight_scale": None}}
    config = QWEN | {"quantization_config": NV | {"quant_algo": "FP8"}}
    checkpoint: Any = SimpleNamespace(config=config, spec=lambda _: None, modules=modules)
    assert "input-scale" in {f.rule for f in _gate(checkpoint, ())}
    modules["layers.0.self_attn.q_proj"][".input_scale"] = None
    assert not list(_gate(checkpoint, ()))


def test_linear_modules_under_each_engines_reading(damaged: Any) -> None:
    """BF16 attention in a checkpoint whose list names it by a glob: engines that read no globs take it for MXFP4."""

    def by_glob(config: Json) -> None:
        quant = config["quantization_config"]
        quant["exclude"] = [*(e for e in quant["exclude"] if "self_attn" not in e), "*.self_attn.*"]

    folder = damaged("tiny-mxfp4-mtp", config=by_glob)
    found = [f for f in findings(folder) if f.rule == "declared"]
    assert {f.engine for f in found} == {"sglang-0.5.23; vllm-0.33"} and all("bf16" in f.text for f in found)
    assert not [f for f in findings(folder, ("atom",)) if f.rule == "declared"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, outputs = built("tiny-mxfp4"), (tmp_path / "a.sarif", tmp_path / "a.json")
    written = ["--sarif", str(outputs[0]), "--json", str(outputs[1])]
    assert main(["check", str(folder), "--engine", "sglang", *written]) == 1
    assert "mtp.layers.0" in capsys.readouterr().out
    sarif, plain = (json.loads(file.read_text()) for file in outputs)
    run = sarif["runs"][0]
    assert sarif["version"] == "2.1.0" and "sarif-2.1.0" in sarif["$schema"] and set(run) == {"tool", "results"}
    rules = {rule["id"] for rule in run["tool"]["driver"]["rules"]}
    for result in run["results"]:
        assert result["ruleId"] in rules and result["message"]["text"]
        assert result["level"] in ("error", "warning", "note")
        assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert len(plain["findings"]) == len(run["results"]) > 0
    errors = [f for f in plain["findings"] if f["level"] == "error"]
    assert {f["engine"] for f in errors} == {"sglang-0.5.23; sglang-0.5.23 --enforce"}
    assert main(["check", str(built("tiny"))]) == 0
    odd = shutil.copytree(built("tiny"), tmp_path / "odd one")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"text_config": config["text_config"] | {"odd_note": 1}}))
    for command, more in (("check", ["--sarif", str(outputs[0])]), ("info", [])):
        assert main([command, str(odd)]) != 0
        assert main([command, str(odd), "--ignore-config-keys", "odd_note", *more]) == 0
    uri = json.loads(outputs[0].read_text())["runs"][0]["results"][0]["locations"][0]["physicalLocation"]
    assert uri["artifactLocation"]["uri"].endswith("/odd%20one"), "a URI holds no spaces"
    assert main(["check", str(tmp_path / "absent")]) == 2
