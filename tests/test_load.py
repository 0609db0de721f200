"""`load` in all three modes: every recipe's layout, the same bits; what is mapped, converted and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixture_models import FIXTURES
from safetensors.torch import load_file, save_file
from torch import Tensor

import qwen35_moe as q
from qwen35_moe.numerics.tables import TRANSFORMERS_BF16
from qwen35_moe.quant.mxfp4 import decode
from qwen35_moe.run.experts import PackedExperts
from qwen35_moe.run.gpu.grouped_experts import ResidentExperts
from qwen35_moe.run.load import MODES
from qwen35_moe.run.origin import origin_of

Build = Callable[[str], Path]
RECIPES = sorted(p.stem for p in (Path(__file__).parents[1] / "weights" / "recipes").glob("tiny*.toml"))
IDS = torch.tensor([[3, 7, 11, 5, 100, 17, 29, 31, 2, 2, 90]])


def logits(path: Path, mode: str, arithmetic: str = "exact", **options: str) -> Tensor:
    return q.load(path, arithmetic, mode=mode, text_only=True, **options)(IDS)


def has_same_bits(path: Path, arithmetic: str) -> bool:
    first, *others = (logits(path, mode, arithmetic) for mode in MODES)
    return bool(first.isfinite().all()) and all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_layout_computes_the_same_bits_in_every_mode(built: Build, recipe: str) -> None:
    assert has_same_bits(built(recipe), "exact")
    if recipe in ("tiny", "tiny-mxfp4", "tiny-fp8"):
        assert has_same_bits(built(recipe), "sglang-bf16")


@pytest.mark.parametrize("shared_expert", ["fused", "unfused"])
def test_modes_agree_fused_and_unfused(built: Build, shared_expert: str) -> None:
    for recipe in ("tiny", "tiny-moe-mxfp4"):
        first, *others = (logits(built(recipe), mode, shared_expert=shared_expert) for mode in MODES)
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_has_the_dtype_of_its_row(built: Build, mode: str) -> None:
    model = q.load(built("tiny"), "sglang-bf16", mode=mode, text_only=True)
    mixer, stored = model.layers[0].linear_attn, origin_of(model).source.tensor("layers.0.linear_attn.A_log")
    assert (mixer.A_log.dtype, mixer.dt_bias.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(mixer.A_log, stored) and not torch.equal(stored.bfloat16().float(), stored)


def in_a_file(x: Tensor, files: list[str]) -> bool:
    """Whether the kernel says that this memory is one of the mapped files."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(word, 16) for word in line.split()[0].split("-"))
        if begin <= x.data_ptr() < end:
            return any(line.endswith(file) for file in files)
    return False


@pytest.mark.parametrize(("recipe", "shared_expert", "kind"), [
    ("tiny", "unfused", ResidentExperts),  # fused 3-D tensors: one parameter, as it lies
    ("tiny", "fused", PackedExperts),  # slot E lies elsewhere
    ("tiny-per-expert", "unfused", PackedExperts),
])  # fmt: skip
def test_bf16_is_used_where_it_lies(built: Build, recipe: str, shared_expert: str, kind: type) -> None:
    path = built(recipe)
    model = q.load(path, TRANSFORMERS_BF16, shared_expert)
    assert all(type(layer.mlp.experts) is kind for layer in model.layers)
    files = [str(file) for file in path.glob("*.safetensors")]
    copied = [name for name, p in model.named_parameters() if p.dtype == torch.bfloat16 and not in_a_file(p, files)]
    aside = {name for name in copied if name.endswith(("A_log", "linear_attn.norm.weight"))}  # stored as float32
    assert set(copied) == aside and len(dict(model.named_parameters())) > 40
    for gate_up, down in map(model.layers[0].mlp.experts.at, range(3)):
        assert in_a_file(down, files) and gate_up.dtype == torch.bfloat16


def test_a_changed_weight_does_not_change_the_file(built: Build) -> None:
    model = q.load(built("tiny"), TRANSFORMERS_BF16)
    before = {file: file.read_bytes() for file in built("tiny").glob("*.safetensors")}
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.layers[0].mlp.experts.gate_up_proj.zero_()
    assert {file: file.read_bytes() for file in before} == before
    assert q.load(built("tiny"), TRANSFORMERS_BF16).lm_head.weight.any()


def test_nothing_else_is_mapped(built: Build) -> None:
    """What is decoded has memory of its own; a streamed run maps nothing, or its pages would count as resident."""
    model = q.load(built("tiny"), "float32", mode="stream")
    model(IDS)
    assert not origin_of(model).checkpoint.reader.mapped
    assert isinstance(q.load(built("tiny-mxfp4"), mode="packed").layers[0].mlp.experts, PackedExperts)


def test_an_engine_that_never_fuses_is_not_fused_by_the_gate(built: Build) -> None:
    assert q.load(built("tiny"), "transformers-bf16").fused == [False] * 4
    assert q.load(built("tiny"), "sglang-bf16").fused == [True] * 4
    assert q.load(built("tiny"), "transformers-bf16", "fused").fused == [True] * 4


def test_a_bf16_shared_expert_reaches_an_mxfp4_slot_by_conversion_only(built: Build) -> None:
    path = built("tiny-mxfp4")
    with pytest.raises(q.Qwen35Error, match="fused-online"):
        q.load(path, shared_expert="fused")
    first, *others = (logits(path, mode, shared_expert="fused-online") for mode in MODES)
    assert all(torch.equal(first, other) for other in others)
    unfused = logits(path, "packed", shared_expert="unfused")
    assert not torch.equal(first, unfused)
    model = q.load(path, shared_expert="fused-online", text_only=True)
    assert model.fused == [True] * 4 and set(origin_of(model).conversion) == {f"layers.{i}.mlp" for i in range(4)}
    # Values of a normal distribution in MXFP4; scale rule even.
    assert all(0.08 < cost < 0.2 for cost in origin_of(model).conversion.values())


def test_conversion_changes_nothing_that_is_mxfp4_already(built: Build) -> None:
    path = built("tiny-moe-mxfp4")
    model = q.load(path, shared_expert="fused-online", text_only=True)
    assert set(origin_of(model).conversion.values()) == {0.0}
    assert torch.equal(model(IDS), logits(path, "packed", shared_expert="fused"))


def test_conversion_is_to_mxfp4_alone(built: Build) -> None:
    with pytest.raises(q.Qwen35Error, match="bf16 bytes would be read as fp8"):
        q.load(built("tiny-fp8-experts"), shared_expert="fused-online")
    assert origin_of(q.load(built("tiny"), shared_expert="fused-online")).conversion == {}


def test_the_model_knows_its_checkpoint(built: Build) -> None:
    a, b = (origin_of(q.load(built(recipe), mode="stream")).identity for recipe in ("tiny", "tiny-mxfp4"))
    assert a and b and a["headers_sha256"] != b["headers_sha256"] and a["tensors"] == 112


def test_an_expert_of_another_format_is_named(tmp_path: Path) -> None:
    path = shutil.copytree(FIXTURES / "quark-moe-mxfp4", tmp_path / "odd")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    name = "model.language_model.layers.1.mlp.experts.3.down_proj.weight"
    file, tensors = path / index["weight_map"][name], load_file(path / index["weight_map"][name])
    tensors[name] = decode(tensors[name], tensors.pop(f"{name}_scale"), torch.bfloat16)
    save_file(tensors, file)
    del index["weight_map"][f"{name}_scale"]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(q.Qwen35Error, match=r"(?s)differ in their format.*layers\.1\.mlp\.experts\.3\.down_proj.*bf16"):
        q.load(path)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1000, None])
def test_a_file_that_is_written_to_while_it_is_in_use(built, tmp_path, mode, size):
    """Cut off, where a mapped file would end the process, or of other weights."""
    path = shutil.copytree(built("tiny"), tmp_path / "checkpoint")
    model = q.load(path, "transformers-bf16", mode=mode, text_only=True)
    before = model(IDS)
    for file in list(path.glob("*.safetensors")):
        file.rename(file.with_suffix(".old"))
        file.write_bytes(b"another file of this name harms nobody")
    assert torch.equal(model(IDS), before)
    for file in path.glob("*.old"):
        with open(file, "r+b") as handle:
            handle.write(b"........") if size is None else handle.truncate(size)
    with pytest.raises(q.Qwen35Error, match="written to while it was in use"):
        model(IDS)


def test_a_file_that_is_written_to_before_it_is_needed(built: Build, tmp_path: Path) -> None:
    """Its header was read when the checkpoint was opened; a streamed model reads the rest later."""
    path = shutil.copytree(built("tiny"), tmp_path / "checkpoint")
    model = q.load(path, "transformers-bf16", mode="stream", text_only=True)
    last = origin_of(model).checkpoint.stored("lm_head.weight").file
    with open(last, "r+b") as handle:
        handle.seek(last.stat().st_size - 100)
        handle.write(bytes(100))
    with pytest.raises(q.Qwen35Error, match="written to while it was in use"):
        model(IDS)
