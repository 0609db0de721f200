"""Dumps of image prompts: right engines agree, and positions that they get wrong are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixture_models import FIXTURES
from peers.transformers_model import load_transformers, quiet
from safetensors.torch import save_file
from torch import Tensor

import qwen35_moe as q
from qwen35_moe.cli import main as cli
from qwen35_moe.model.vision.positions import token_types
from qwen35_moe.oracle.compare import compare
from qwen35_moe.oracle.diagnose.rope_faults import counted, counted_after, swapped, time_only
from qwen35_moe.oracle.dumps.dump import Dump
from qwen35_moe.oracle.dumps.readers.transformers import TransformersCapture
from qwen35_moe.oracle.truth import open_checkpoint
from qwen35_moe.run.prompt import Images
from qwen35_moe.trace.file import Trace
from qwen35_moe.trace.images import axes_in

CHECKPOINT = FIXTURES / "bf16-hub"
IMAGE = 252
IDS = torch.tensor([[3, 17, 250, *[IMAGE] * 6, 251, 99, 250, *[IMAGE] * 4, 251, 7, 8, 91, 40, 12]])
GRIDS = torch.tensor([[1, 4, 6], [1, 8, 2]])
PIXELS = torch.randn(40, 96, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def truth() -> Trace:
    return q.trace(q.load(CHECKPOINT, shared_expert="unfused"), IDS, images=Images(PIXELS, GRIDS))


@pytest.fixture(scope="module")
def source():
    return open_checkpoint(CHECKPOINT)[1].source


def transformers_dump(positions: Callable[[Tensor], Tensor] | None = None, images: bool = True) -> Dump:
    """transformers in bf16, live; `positions` is what it makes of the right ones."""
    model = load_transformers(CHECKPOINT, torch.bfloat16)
    rotary = model.model.language_model.rotary_emb
    if positions is not None:
        rotary.register_forward_pre_hook(lambda _, args: (args[0], positions(args[1])))
    with quiet(), torch.no_grad(), TransformersCapture(model) as capture:
        model(
            input_ids=IDS, pixel_values=PIXELS.bfloat16(), image_grid_thw=GRIDS,
            mm_token_type_ids=token_types(IDS, IMAGE, 253), use_cache=False,
        )  # fmt: skip
    return capture.dump()


def test_positions_have_three_axes(truth: Trace) -> None:
    axes = axes_in(truth)
    assert axes is not None and axes.shape == (3, 1, IDS.shape[1])
    assert torch.equal(axes[0], truth.positions) and not torch.equal(axes[0], axes[2])


def test_a_right_engine_agrees(truth: Trace, source) -> None:
    found = compare(truth, transformers_dump(), source)
    assert not found.diverges, found.verdict
    assert not any("takes them for text" in note for note in found.notes)
    assert any(r.key == "rope_cos" and r.cls in ("bit-equal", "within rounding") for r in found.records)


@pytest.mark.parametrize(
    ("positions", "name"),
    [
        (time_only, "M-RoPE height and width dropped"),
        (swapped, "M-RoPE height and width swapped"),
        (counted, "image positions counted by tokens"),
        (counted_after, "positions after an image counted by tokens"),
    ],
)
def test_wrong_positions_are_named(truth: Trace, source, positions: Callable[[Tensor], Tensor], name: str) -> None:
    found = compare(truth, transformers_dump(positions), source, diagnoses=1)
    assert found.exit_code == 1 and found.diagnoses[0].name == name, (found.verdict, str(found.diagnoses[0]))


def test_trace_of_pixels_by_the_command(tmp_path: Path) -> None:
    """The same tensors as in Python, an envelope that the images are in, and `compare` on its own."""
    save_file({"pixel_values": PIXELS, "image_grid_thw": GRIDS}, tmp_path / "pixels.safetensors")
    short = ",".join(map(str, [3, 17, 250, IMAGE, 251, 99, 250, IMAGE, *IDS[0, 16:].tolist()]))
    out = str(tmp_path / "truth")
    arguments = ["trace", str(CHECKPOINT), "--ids", short, "--out", out, "--quiet"]
    assert cli.main([*arguments, "--pixel-values", str(tmp_path / "pixels.safetensors")]) == 0
    written = Trace.open(out)
    expected = q.trace(q.load(CHECKPOINT, shared_expert="unfused"), written.ids, images=Images(PIXELS, GRIDS))
    assert written.ids.tolist() == IDS.tolist()
    assert (
        "visual.layers.0.vis_qkv" in written and [k for k in expected if not torch.equal(expected[k], written[k])] == []
    )
    alone = compare(Trace(written.sites, {**written.meta, "checkpoint": {}}, written.path), transformers_dump())
    assert not alone.diverges and alone.compared > 40, alone.verdict
    assert cli.main([*arguments, "--pixel-values", str(tmp_path / "nothing.safetensors")]) == 2
