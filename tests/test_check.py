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
from gate_configs import NV, QWEN, TEXT, body, quark
from safetensors.torch import load_file, save_file

from qwen35_moe.checkpoint import Checkpoint
from qwen35_moe.cli.main import main
from qwen35_moe.gate.declared import BF16, MXFP4, NVFP4, ModuleSpec
from qwen35_moe.run.lint import _gate, lint
from qwen35_moe.run.lint_files import check_bytes
from weights import gate_recipes
from weights.build import build

Tensors = dict[str, torch.Tensor]


@cache
def built(recipe: str) -> Path:
    return build(recipe, Path(tempfile.mkdtemp()) / recipe)


CLEAN = ("tiny", "tiny-flat", "tiny-fp8", "tiny-inner-prefix", "tiny-mxfp4-mtp", "tiny-per-expert")


@pytest.mark.parametrize("recipe", CLEAN)
def test_clean_checkpoints_are_silent(recipe: str) -> None:
    checkpoint = Checkpoint.open(built(recipe))
    assert [str(f) for f in (*lint(checkpoint), *check_bytes(checkpoint)) if f.level != "note"] == []


def engines(config: dict[str, Any], stored: Callable[[str], ModuleSpec | None]) -> set[str]:
    """The variants of engines that are flagged, of a checkpoint that has these specs and no tensors."""
    checkpoint: Any = SimpleNamespace(config=config, spec=stored, modules={})
    found = list(_gate(checkpoint, ("sglang", "vllm", "atom")))
    return {label for finding in found for label in finding.engine.replace(", opted", "; opted").split(", ")}


@pytest.mark.parametrize("name", ["35b-bf16", "35b-fp8", "35b-gptq-int4", "35b-mxfp4", "quark-template"])
def test_recipes_of_real_checkpoints(name: str) -> None:
    """Who breaks by the recipe is flagged, and nobody else."""
    recipe = gate_recipes.load(name)
    known = {label for label in recipe.expected if label.startswith(("sglang-0.5.23", "vllm", "atom-ffdf3bb5"))}
    broken = {label for label in known if "!" in recipe.expected[label]}
    checkpoint: Any = SimpleNamespace(config=recipe.config, spec=recipe.stored, modules={})
    text = "|".join(f.engine for f in _gate(checkpoint, ("sglang", "vllm", "atom")))
    assert {label for label in known if label in text.replace(label + ",", label + "|")} >= broken
    assert bool(text) == bool(broken)


def shared(spec: ModuleSpec, routed: ModuleSpec = MXFP4) -> Callable[[str], ModuleSpec]:
    return lambda name: spec if "shared_expert" in name else routed


HUB = r"re:model\.language_model\..*shared_expert\..*"
# The family of sglang #22948: what is said about the shared expert is not what is stored, or not read by all.
FAMILY: list[tuple[str, dict[str, Any], Callable[[str], ModuleSpec], str]] = [
    ("body BF16 and not listed", quark("lm_head"), shared(BF16), "sglang-0.5.23 atom-ffdf3bb5 vllm-0.33"),
    ("a regex without the word", quark(r"re:.*mlp\.shared"), shared(BF16), "sglang-0.5.23"),
    ("a glob that only Quark reads", quark("*.shared_expert.*"), shared(BF16), "sglang-0.5.23 vllm-0.33 atom-ffdf3bb5"),
    ("a regex, hub's prefix", quark(HUB), shared(BF16), "vllm-0.33 atom-ffdf3bb5"),
    ("one of a fused pair", quark(*body(parts="gate down")), shared(MXFP4), "sglang-0.5.23 vllm-0.33 atom-ffdf3bb5"),
    ("exclude: null", quark() | {"exclude": None}, shared(MXFP4), "sglang-0.5.23 vllm-0.33"),
    ("listed, and MXFP4 in the bytes", quark(*body()), shared(MXFP4), "sglang-0.5.23 vllm-0.33 atom-ffdf3bb5"),
    ("NVFP4 routed, ignored by no word", NV | {"ignore": ["*.mlp.shared*"]}, shared(BF16, NVFP4), "sglang-0.5.23"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "quant", "stored", "expected"), FAMILY, ids=[row[0] for row in FAMILY])
def test_the_family_of_22948(
    name: str, quant: dict[str, Any], stored: Callable[[str], ModuleSpec], expected: str
) -> None:
    text = TEXT | {"mtp_num_hidden_layers": 0}
    found = engines({"model_type": "qwen3_5_moe", "text_config": text, "quantization_config": quant}, stored)
    assert {rule for rule in ("sglang-0.5.23", "vllm-0.33", "atom-ffdf3bb5") if rule in found} == set(expected.split())


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint with some tensors or keys changed."""

    def make(recipe: str, change: Callable[[Tensors], None] | None = None, **config: Any) -> Path:
        folder = build(recipe, tmp_path / "ckpt", shards=0)
        tensors = load_file(folder / "model.safetensors")
        if change:
            change(tensors)
            save_file(tensors, folder / "model.safetensors")
        values = json.loads((folder / "config.json").read_text())
        text = values["text_config"]
        for key, value in config.items():
            text.pop(key) if value is None else text.update({key: value})
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


def repeat_prefix(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("model.language_model.")]:
        tensors["model.language_model.language_model." + name.removeprefix("model.language_model.")] = tensors.pop(name)


def stray(tensors: Tensors) -> None:
    tensors["model.language_model.layers.0.mlp.extra.weight"] = torch.ones(2)


# recipe, change of the tensors, keys of the config, rule of the finding, its level
DAMAGE: list[tuple[str, Callable[[Tensors], None] | None, dict[str, Any], str, str]] = [
    ("tiny-fp8", drop_scale, {}, "format", "error"),
    ("tiny", grow_draft, {}, "draft-head", "error"),
    ("tiny", None, {"mtp_num_hidden_layers": 0}, "draft-head", "warning"),
    ("tiny", repeat_prefix, {}, "prefix", "error"),
    ("tiny", stray, {}, "tensors", "error"),
    ("tiny", None, {"eos_token_id": 10**6}, "special-id", "error"),
    ("tiny", None, {"rope_parameters": None}, "rope", "warning"),
    ("tiny", None, {"hidden_size": None}, "config", "error"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "change", "config", "rule", "level"), DAMAGE, ids=[f"{d[3]}-{d[4]}" for d in DAMAGE]
)
def test_damage_is_found(damaged: Any, recipe: str, change: Any, config: Any, rule: str, level: str) -> None:
    found = [f for f in lint(Checkpoint.open(damaged(recipe, change, **config))) if f.level != "note"]
    assert {(f.rule, f.level) for f in found} == {(rule, level)}, [str(f) for f in found]


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


def test_static_inputs_need_a_scale() -> None:
    modules = {"layers.0.self_attn.q_proj": {".weight": None, ".weight_scale": None}}
    quant = NV | {"quant_algo": "FP8"}
    checkpoint: Any = SimpleNamespace(
        config=QWEN | {"quantization_config": quant}, spec=lambda _: None, modules=modules
    )
    assert "input-scale" in {f.rule for f in _gate(checkpoint, ())}
    modules["layers.0.self_attn.q_proj"][".input_scale"] = None
    assert not list(_gate(checkpoint, ()))


def test_linear_modules_under_each_engines_reading(damaged: Any) -> None:
    """BF16 attention in a checkpoint whose list names it by a glob: engines that read no globs take it for MXFP4."""
    folder = shutil.copytree(built("tiny-mxfp4-mtp"), damaged("tiny").parent / "copy")
    values = json.loads((folder / "config.json").read_text())
    kept = [e for e in values["quantization_config"]["exclude"] if "self_attn" not in e]
    values["quantization_config"]["exclude"] = [*kept, "*.self_attn.*"]
    (folder / "config.json").write_text(json.dumps(values))
    found = [f for f in lint(Checkpoint.open(folder)) if f.rule == "declared"]
    assert {f.engine for f in found} == {"sglang-0.5.23", "vllm-0.33"} and all("bf16" in f.text for f in found)
    assert {f.engine for f in lint(Checkpoint.open(folder), ("atom",)) if f.rule == "declared"} == set()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, outputs = built("tiny-mxfp4"), (tmp_path / "a.sarif", tmp_path / "a.json")
    assert (
        main(["check", str(folder), "--engine", "sglang", "--sarif", str(outputs[0]), "--json", str(outputs[1])]) == 1
    )
    assert "mtp.layers.0" in capsys.readouterr().out
    sarif, plain = (json.loads(file.read_text()) for file in outputs)
    run = sarif["runs"][0]
    assert sarif["version"] == "2.1.0" and "sarif-2.1.0" in sarif["$schema"] and set(run) == {"tool", "results"}
    rules = {rule["id"] for rule in run["tool"]["driver"]["rules"]}
    for result in run["results"]:
        assert (
            result["ruleId"] in rules and result["level"] in ("error", "warning", "note") and result["message"]["text"]
        )
        assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert len(plain["findings"]) == len(run["results"]) > 0
    assert {f["engine"] for f in plain["findings"] if f["level"] == "error"} == {
        "sglang-0.5.23, sglang-0.5.23 --enforce"
    }
    assert main(["check", str(built("tiny"))]) == 0
    assert main(["check", str(tmp_path / "absent")]) == 2
