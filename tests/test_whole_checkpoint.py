"""`load` reads all of a checkpoint: draft head and vision tower too, in every mode, and nothing is left unread."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixture_models import FIXTURES
from torch import Tensor

import qwen35_moe as q
from qwen35_moe.checkpoint import Checkpoint
from qwen35_moe.model.mtp import draft_head, with_hidden
from qwen35_moe.numerics import arithmetics as arithmetic
from qwen35_moe.run.load import MODES
from qwen35_moe.run.origin import origin_of
from qwen35_moe.run.streamed import StreamedPart

Build = Callable[[str], Path]
LAYOUTS = ["tiny", "tiny-mxfp4", "tiny-mxfp4-mtp", "tiny-fp8", "tiny-mixed", "tiny-odd"]
QUARK = {name: FIXTURES / name for name in ("quark-mxfp4", "quark-moe-mxfp4")}


def outputs(model: q.Model) -> tuple[Tensor, Tensor]:
    """Draft logits for some ids, and the embeddings of an image of 2 x 3 merge blocks."""
    ids = torch.tensor([[3, 7, 11, 5, 100, 17, 29, 31]])
    _, hidden = with_hidden(model, ids)
    drafted, _ = draft_head(model, model.mtp, ids[:, 1:], hidden[:, :-1])
    grids = torch.tensor([[1, 4, 6]])
    width = model.visual.config.patch_values
    pixels = torch.randn(24, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with arithmetic.using(model.arithmetic), torch.inference_mode():
        return drafted, model.visual(pixels, grids)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Checkpoint]:
    """The checkpoints that the test opens."""
    seen: list[Checkpoint] = []
    original = Checkpoint.open.__func__
    monkeypatch.setattr(Checkpoint, "open", classmethod(lambda cls, p: seen.append(original(cls, p)) or seen[-1]))
    return seen


@pytest.mark.parametrize("recipe", [*LAYOUTS, *QUARK])
def test_every_mode_computes_the_same_bits_and_leaves_nothing_unread(
    built: Build, opened: list[Checkpoint], recipe: str
) -> None:
    path = QUARK[recipe] if recipe in QUARK else built(recipe)
    found = {mode: outputs(q.load(path, mode=mode)) for mode in MODES}
    for checkpoint in opened:
        report = checkpoint.report(aside=())
        assert report.complete and not report.aside, str(report)
    for mode in MODES[1:]:
        assert all(map(torch.equal, found[mode], found["decoded"]))


@pytest.mark.parametrize(
    ("recipe", "target", "drafting"),
    [
        *(("tiny", True, True), ("tiny-mxfp4", False, True), ("tiny-mxfp4-mtp", False, False)),
        *(("tiny-odd", False, False), ("quark-mxfp4", False, True), ("quark-moe-mxfp4", True, True)),
    ],
)
def test_the_draft_is_fused_by_its_own_decision(built: Build, recipe: str, target: bool, drafting: bool) -> None:
    """PR 22948's two cases are Quark's: a BF16 shared expert stays out of the slot, an MXFP4 one goes in."""
    model = q.load(QUARK[recipe] if recipe in QUARK else built(recipe))
    assert {layer.mlp.fused for layer in model.layers} == {target} and model.mtp.layers[0].mlp.fused == drafting


def test_a_streamed_part_holds_nothing(built: Build) -> None:
    model = q.load(built("tiny"), mode="stream")
    assert isinstance(model.mtp, StreamedPart) and isinstance(model.visual, StreamedPart)
    outputs(model)
    assert not [*model.mtp.parameters(), *model.visual.parameters()]


def test_text_only_says_what_it_leaves_out(built: Build) -> None:
    model = q.load(built("tiny"), text_only=True)
    assert model.mtp is None and model.visual is None
    assert origin_of(model).left_out == {"mtp": 19, "visual": 21}
    assert origin_of(q.load(built("tiny"))).left_out == {}


def test_a_checkpoint_without_them(built: Build) -> None:
    model = q.load(built("tiny-flat"))
    assert (model.mtp, model.visual, origin_of(model).left_out) == (None, None, {})


def test_a_tower_without_its_configuration_is_an_error(built: Build, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(built("tiny"), folder)
    config = json.loads((folder / "config.json").read_text())
    del config["vision_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(q.Qwen35Error, match="vision tower without its configuration"):
        q.load(folder)
    assert origin_of(q.load(folder, text_only=True)).left_out["visual"] == 21
