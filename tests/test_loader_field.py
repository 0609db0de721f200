"""Public reports about loading, rebuilt small: each row stands for its kind."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwen35_moe as q
from qwen35_moe.checkpoint import Checkpoint
from qwen35_moe.cli.main import main
from weights.build import build

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("tiny", tmp_path_factory.mktemp("tiny") / "tiny", shards=0)


def changed(source: Path, to: Path, tensors: Any = None, config: Any = None) -> Path:
    """A copy. tensors: gives the new ones from the old; config: changes what is in config.json."""
    shutil.copytree(source, to)
    if tensors:
        save_file(tensors(load_file(to / "model.safetensors")), to / "model.safetensors")
    if config:
        values = json.loads((to / "config.json").read_text())
        config(values)
        (to / "config.json").write_text(json.dumps(values))
    return to


IDS = torch.tensor([[1, 2, 3, 4]])


def test_repeated_prefixes_are_read(tiny: Path, tmp_path: Path) -> None:
    """transformers 5.4 and 5.5 save `model.language_model.language_model.language_model.*` (transformers 45216)."""
    once = "model.language_model."
    repeated = once + "language_model." * 2
    again = changed(tiny, tmp_path / "a", lambda t: {n.replace(once, repeated): x for n, x in t.items()})
    assert torch.equal(q.load(again)(IDS), q.load(tiny)(IDS))


def test_a_foreign_prefix_is_named(tiny: Path, tmp_path: Path) -> None:
    foreign = changed(tiny, tmp_path / "a", lambda t: {f"base_model.{n}": x for n, x in t.items()})
    with pytest.raises(q.Qwen35Error, match=r"(?s)prefix that is not known.*base_model.model.language_model."):
        q.load(foreign)


def test_a_text_run_needs_no_draft_head(tiny: Path, tmp_path: Path) -> None:
    """A pruned trunk beside a draft head with all experts (omlx 3610)."""

    def pruned(tensors: Tensors) -> Tensors:
        kept = {n: x for n, x in tensors.items() if not n.startswith("mtp.")}
        count = json.loads((tiny / "config.json").read_text())["text_config"]["num_experts"]
        draft = {n: x for n, x in tensors.items() if n not in kept}
        return kept | {n: x.repeat(2, *[1] * (x.dim() - 1)) if count in x.shape[:1] else x for n, x in draft.items()}

    folder = changed(tiny, tmp_path / "a", pruned)
    assert torch.equal(q.load(folder, text_only=True)(IDS), q.load(tiny, text_only=True)(IDS))
    with pytest.raises(q.Qwen35Error, match=r"mtp\.layers\.0"):
        q.load(folder)


def test_harmless_keys_pass_with_one_line(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def notes(config: Any) -> None:
        config["text_config"] |= {"unsloth_version": "2026.1", "num_nextn_predict_layers": 1, "max_window_layers": 28}
        config["text_config"] |= {"sliding_window": None, "use_sliding_window": False}  # of Qwen2 and Qwen3: off
        config["vision_config"] |= {"_name_or_path": "x", "unsloth_fixed": True}

    with caplog.at_level(logging.WARNING):
        q.load(changed(tiny, tmp_path / "a", config=notes))
    assert [r.getMessage() for r in caplog.records] == [
        "config.json: keys that change nothing here: max_window_layers, num_nextn_predict_layers, unsloth_version"
    ]
    with pytest.raises(q.Qwen35Error, match="sliding_window"):
        q.load(changed(tiny, tmp_path / "c", config=lambda c: c["text_config"].update(sliding_window=4096)))
    with pytest.raises(q.Qwen35Error, match="(?s)unknown keys.*attention_sinks.*--ignore-config-keys"):
        q.load(changed(tiny, tmp_path / "b", config=lambda c: c["text_config"].update(attention_sinks=4)))


@pytest.mark.parametrize(("kind", "words"), [
    ("qwen4_exp", "hyper-connections"), ("qwen3_8_flash_next", "hyper-connections"), ("qwen3_next", "interleaved"),
    ("qwen3_5", "dense"), ("llama", "another family"),
])  # fmt: skip
def test_other_families_are_refused_by_name(tiny: Path, tmp_path: Path, kind: str, words: str) -> None:
    folder = changed(tiny, tmp_path / "a", config=lambda c: c.update(model_type=kind))
    with pytest.raises(q.Qwen35Error, match=words):
        q.load(folder)
    assert q.load(folder, ignore_config_keys=["model_type"])


def test_advice_fits(tiny: Path, tmp_path: Path) -> None:
    lost = "layers.0.linear_attn.A_log"
    without = changed(tiny, tmp_path / "a", lambda t: {n: x for n, x in t.items() if not n.endswith(lost)})
    with pytest.raises(q.Qwen35Error, match="A_log(?!.weight)") as missing:
        q.load(without)
    assert "A_log.weight" not in str(missing.value) and "there is" not in str(missing.value)
    headless = changed(tiny, tmp_path / "b", lambda t: {n: x for n, x in t.items() if n != "lm_head.weight"})
    with pytest.raises(q.Qwen35Error, match="tie_word_embeddings"):
        q.load(headless)


def test_packed_experts_under_modelopts_names(tmp_path: Path) -> None:
    """`gate_up_proj_weight_scale` and `_input_scale` (Model-Optimizer 2276): a scale of the weight, and none of it."""
    at, values = "model.layers.0.mlp.experts", torch.ones(2, 8, 4).to(torch.float8_e4m3fn)
    stored: Tensors = {}
    for name in ("gate_up_proj", "down_proj"):
        stored |= {f"{at}.{name}": values.clone(), f"{at}.{name}_weight_scale": torch.tensor([2.0, 3.0])}
        stored |= {f"{at}.{name}_input_scale": torch.tensor(0.5)}
    save_file(stored, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert str(checkpoint.spec("layers.0.mlp.experts")) == "fp8-tensor"
    for e, scale in enumerate((2.0, 3.0)):
        for part in checkpoint.experts("layers.0.mlp.experts").read(e):
            assert torch.equal(part.decode(torch.float64), torch.full((8, 4), scale, dtype=torch.float64))


def test_keys_that_are_known_to_be_harmless_pass(tiny: Path, tmp_path: Path) -> None:
    """A truth of a checkpoint whose config.json has a key that nobody here knows."""
    folder = changed(tiny, tmp_path / "c", config=lambda c: c["text_config"].update(attention_sinks=4))
    command = ["trace", str(folder), "--ids", "1,2,3", "--no-envelope", "--quiet", "--out", str(tmp_path / "t")]
    assert main(command) == 2
    assert main([*command, "--ignore-config-keys", "attention_sinks"]) == 0
