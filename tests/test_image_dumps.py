"""Dumps of image prompts: right engines agree, and positions that they get wrong are named."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_like import Value, write_dumper
from fixture_models import FIXTURES
from peers.transformers_model import load_transformers, quiet
from safetensors.torch import save_file
from torch import Tensor

import qwen35_moe as q
from qwen35_moe.cli import main as cli
from qwen35_moe.errors import Qwen35Error
from qwen35_moe.model.text import Model
from qwen35_moe.model.vision.config import VisionConfig
from qwen35_moe.model.vision.position_table import patch_places
from qwen35_moe.model.vision.positions import token_types
from qwen35_moe.oracle.compare import compare
from qwen35_moe.oracle.diagnose.faults import Fault, FaultSite, Seen
from qwen35_moe.oracle.diagnose.vision_faults import VISION_FAULTS, counted, off_after, time_only
from qwen35_moe.oracle.dumps.engine_names import VISION_NAMES
from qwen35_moe.oracle.dumps.readers import read_dump
from qwen35_moe.oracle.dumps.readers.own import from_trace
from qwen35_moe.oracle.dumps.readers.transformers import TransformersCapture
from qwen35_moe.oracle.truth import open_checkpoint
from qwen35_moe.run.prompt import Images, placeholders
from qwen35_moe.trace.file import Trace
from qwen35_moe.trace.images import axes_in

CHECKPOINT = FIXTURES / "bf16-hub"
IMAGE, VIDEO = 252, 253
IDS = torch.tensor([[3, 17, 250, *[IMAGE] * 6, 251, 99, 250, *[IMAGE] * 4, 251, 7, 8, 91, 40, 12]])
GRIDS = torch.tensor([[1, 4, 6], [1, 8, 2]])
PIXELS = torch.randn(40, 96, generator=torch.Generator().manual_seed(5))
IMAGES = Images(PIXELS, GRIDS)
# As the processor writes a video of two frames: a timestamp, and the frame between vision_start and vision_end.
FILM = torch.tensor([[3, 40, 41, 250, *[VIDEO] * 6, 251, 40, 42, 250, *[VIDEO] * 6, 251, 7, 8, 91, 40, 12]])
VIDEOS = Images(pixel_values_videos=torch.cat((PIXELS, PIXELS[:8].flip(1))), video_grid_thw=torch.tensor([[2, 4, 6]]))

WHERE_IMAGES_STAND = Seen([], [], (IDS == IMAGE).long(), torch.empty(0), None)


@pytest.fixture(scope="module")
def truth() -> Trace:
    return q.trace(q.load(CHECKPOINT, shared_expert="unfused"), IDS, images=IMAGES)


@pytest.fixture(scope="module")
def source():
    return open_checkpoint(CHECKPOINT)[1].source


@cache
def loaded(dtype: torch.dtype) -> Any:
    return load_transformers(CHECKPOINT, dtype)


def captured(
    images: Images = IMAGES,
    ids: Tensor = IDS,
    dtype: torch.dtype = torch.bfloat16,
    plant: Callable[[Any], Any] = lambda model: None,
) -> TransformersCapture:
    """transformers, live, after `plant` did something to its model."""
    model = deepcopy(loaded(dtype))
    plant(model.model)
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in images.given().items()}
    with quiet(), torch.no_grad(), TransformersCapture(model) as capture:
        model(input_ids=ids, mm_token_type_ids=token_types(ids, IMAGE, VIDEO), use_cache=False, **inputs)
    return capture


def wrong_positions(positions: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """positions: what transformers makes of the right ones."""
    return lambda model: model.language_model.rotary_emb.register_forward_pre_hook(
        lambda _, args: (args[0], positions(args[1]))
    )


def test_positions_have_three_axes(truth: Trace) -> None:
    axes = axes_in(truth)
    assert axes is not None and axes.shape == (3, 1, IDS.shape[1])
    assert torch.equal(axes[0], truth.positions) and not torch.equal(axes[0], axes[2])


def test_a_right_engine_agrees(truth: Trace, source) -> None:
    found = compare(truth, captured().dump(), source)
    assert not found.diverges, found.verdict
    assert not any("takes them for text" in note for note in found.notes)
    assert any(r.key == "rope_cos" and r.cls in ("bit-equal", "within rounding") for r in found.records)


@pytest.mark.parametrize(
    ("positions", "name"),
    [
        (time_only, "M-RoPE height and width dropped"),
        (counted, "image positions counted by tokens"),
        (lambda x: off_after(-1)(x, WHERE_IMAGES_STAND), "positions after an image one too low"),
    ],
)
def test_wrong_positions_are_named(truth: Trace, source, positions: Callable[[Tensor], Tensor], name: str) -> None:
    found = compare(truth, captured(plant=wrong_positions(positions)).dump(), source, diagnoses=1)
    assert found.exit_code == 1 and found.diagnoses[0].name == name, (found.verdict, str(found.diagnoses[0]))


def test_trace_of_pixels_by_the_command(tmp_path: Path) -> None:
    """The same tensors as in Python, an envelope that the images are in, and `compare` on its own."""
    save_file({"pixel_values": PIXELS, "image_grid_thw": GRIDS}, tmp_path / "pixels.safetensors")
    short = ",".join(map(str, [3, 17, 250, IMAGE, 251, 99, 250, IMAGE, *IDS[0, 16:].tolist()]))
    out = str(tmp_path / "truth")
    arguments = ["trace", str(CHECKPOINT), "--ids", short, "--out", out, "--quiet"]
    assert cli.main([*arguments, "--pixel-values", str(tmp_path / "pixels.safetensors")]) == 0
    written = Trace.open(out)
    expected = q.trace(q.load(CHECKPOINT, shared_expert="unfused"), written.ids, images=IMAGES)
    assert written.ids.tolist() == IDS.tolist()
    assert (
        "visual.layers.0.vis_qkv" in written and [k for k in expected if not torch.equal(expected[k], written[k])] == []
    )
    alone = compare(Trace(written.sites, {**written.meta, "checkpoint": {}}, written.path), captured().dump())
    assert not alone.diverges and alone.compared > 40, alone.verdict
    assert cli.main([*arguments, "--pixel-values", str(tmp_path / "nothing.safetensors")]) == 2


def seen_by_the_tower(source) -> Seen:
    vision = VisionConfig.from_dict(source.config.raw["vision_config"], source.config.hidden_size)
    table = source.tensor("visual.pos_embed.weight").double()
    return Seen.of(IMAGES, placeholders(source.config, IDS), table, vision)


@pytest.fixture(scope="module")
def engine() -> Model:
    return q.load(CHECKPOINT, "sglang-bf16", "unfused")


# Where each fault of the tower is seen first, in a dump that has the tower's modules.
BLOCKS = {
    "pixels in another order than the grids": "vision patches",
    "only the last temporal slice of the patch kernel": "vision patches",
    "image embeddings one token late": "images",
    "frames of a patch in reverse": "vision patches",
    "merge blocks gathered twice": "vision merger",
}
TAPS = "vis_*,image_embeds,layer_input"
# These are planted in transformers itself, below.
LIVE = ("images in the wrong order", "only the first temporal slice of the patch kernel",
        "position table not interpolated", "rows and columns swapped in the tower's rotary embedding",
        "merge blocks read column by column")  # fmt: skip
INSIDE_OF_THE_TOWER = ["vis_pos_embed", "vis_embed", "vis_rope_*", "vis_q", "vis_k", "vis_v", "vis_attn_[!o]*"]


@pytest.mark.parametrize("fault", [f for f in VISION_FAULTS if f.name not in LIVE], ids=lambda f: f.name)
def test_faults_of_the_tower_are_named_at_their_block(truth: Trace, source, engine: Model, fault: Fault) -> None:
    """In an engine-like run, whose dump has what modules return."""
    place = FaultSite(source.config, axes_in(truth), seen=seen_by_the_tower(source))
    run = q.trace(engine, IDS, taps=TAPS, images=IMAGES, replay=fault.handlers(place))
    dumped = {k: e for k, e in run.sites.items() if not any(fnmatch(e.name, p) for p in INSIDE_OF_THE_TOWER)}
    found = compare(truth, from_trace(Trace(dumped, run.meta, memory=run.memory)), source, diagnoses=1)
    said = found.diagnoses[0]
    assert (said.name, said.block) == (fault.name, BLOCKS.get(fault.name, "vision positions")), str(said)


def test_the_tower_by_sglangs_names(truth: Trace, source, engine: Model, tmp_path: Path) -> None:
    """One file a call: SGLang may run the tower image by image. q, k and v are one product; ids of placeholders are
    hashes beyond the vocabulary."""
    run = q.trace(engine, IDS, images=IMAGES)
    names = {rule.split()[1].partition(":")[0]: name for name, rule in VISION_NAMES.items() if "-:" not in rule}
    names |= {"vis_qkv": "attn.qkv_proj.output", "vis_mlp_act": "mlp.act.output", "vis_hidden": "merger.inputs.0"}
    values = []
    for key, entry in run.sites.items():
        if entry.name in names and entry.part == "visual":
            layer = "" if entry.layer is None else f"blocks.{entry.layer}."
            parts = run[key].split([len(run[key]) * 24 // 40, len(run[key]) * 16 // 40])
            values += [Value(f"non_intrusive__visual.{layer}{names[entry.name]}", x[:, None], 0) for x in parts]
    ids = torch.where(IDS == IMAGE, 1_000_000 + 777 * (1 + (torch.arange(IDS.shape[1]) > 9)), IDS)[0]
    values.append(Value("input_ids", ids, 0))
    values.append(Value("positions", torch.arange(IDS.shape[1]), 0))
    values.append(Value("non_intrusive__model.layers.0.linear_attn.inputs.0", run["layers.0.input_layernorm"][0], 0))
    values.append(Value("non_intrusive__model.norm.output.0", run["final_norm"][0], 0))
    write_dumper(tmp_path / "dump", iter(values))
    dump = read_dump(tmp_path / "dump", config=source.config.raw)
    found = compare(truth, dump, source)
    assert found.exit_code == 0 and found.tokens == (IDS.shape[1],) * 2, found.verdict
    assert sum(r.key.startswith("visual.") and r.cls != "missing" for r in found.records) == len(names)
    assert q.diagnose(CHECKPOINT, dump, images=IMAGES).exit_code == 0
    with pytest.raises(Qwen35Error, match="there are no pixels"):
        q.diagnose(CHECKPOINT, dump)


def in_another_place(model: Any) -> None:
    """Embeddings of the second image first."""

    def change(_: Any, __: Any, out: Any) -> Any:
        out.pooler_output = torch.cat((out.pooler_output[6:], out.pooler_output[:6]))
        return out

    model.visual.register_forward_hook(change)


def without_slice(model: Any) -> None:
    model.visual.patch_embed.proj.weight.data[:, :, 1] = 0


def column_by_column(model: Any) -> None:
    model.visual.merger.linear_fc1.register_forward_pre_hook(
        lambda _, args: (args[0].unflatten(-1, (2, 2, -1)).transpose(1, 2).flatten(1),)
    )


def cut_from_the_table(model: Any) -> None:
    """Rows of the position table for the first row and column of the image on, and no weights between them."""
    row, column, _, _ = patch_places(GRIDS.tolist(), 2)
    table, at = model.visual.pos_embed, row.clamp(max=3) * 4 + column.clamp(max=3)
    table.register_forward_hook(lambda _, args, out: table.weight[at][:, None].expand_as(out))


def axes_turned(model: Any) -> None:
    model.visual.rotary_pos_emb.register_forward_hook(
        lambda _, __, out: tuple(x.unflatten(-1, (4, -1))[:, [1, 0, 3, 2]].flatten(1) for x in out)
    )


def in_blocks(model: Any) -> None:
    """The first 2 frequencies turn with time, the third with the height, the fourth with the width."""
    rotary = model.language_model.rotary_emb
    rotary.recomposition_frequencies = lambda f: torch.cat((f[0, ..., :2], f[1, ..., 2:3], f[2, ..., 3:]) * 2, -1)


@pytest.mark.parametrize(
    ("plant", "name", "block"),
    [
        (in_another_place, "images in the wrong order", "images"),
        (without_slice, "only the first temporal slice of the patch kernel", "vision patches"),
        (cut_from_the_table, "position table not interpolated", "vision positions"),
        (axes_turned, "rows and columns swapped in the tower's rotary embedding", "vision positions"),
        (column_by_column, "merge blocks read column by column", "vision merger"),
        (in_blocks, "M-RoPE sections in blocks", "attn"),
    ],
)
def test_faults_planted_in_transformers(truth: Trace, source, plant: Any, name: str, block: str) -> None:
    found = compare(truth, captured(plant=plant).dump(), source, diagnoses=1)
    said = found.diagnoses[0]
    assert (said.name, said.block) == (name, block), str(said)


def record_of(found: Any) -> Any:
    return next(r for r in found.records if r.key == "visual.image_embeds")


def test_float32_and_saved_files(truth: Trace, source, tmp_path: Path) -> None:
    capture = captured(dtype=torch.float32)
    found = compare(truth, capture.dump(), source, engine="float32")
    assert found.exit_code == 0 and record_of(found).cls == "within rounding", found.verdict
    tensors = {piece.raw: piece.load().contiguous() for piece in capture.pieces if ".inputs." not in piece.raw}
    save_file({**tensors, "input_ids": IDS}, tmp_path / "run.safetensors")
    saved = compare(truth, read_dump(tmp_path / "run.safetensors", config=source.config.raw), source, engine="float32")
    assert saved.exit_code == 0 and record_of(saved).cls == "within rounding", saved.verdict


def test_videos(source) -> None:
    """Positions of a right engine agree; time that moves on within the video is named."""
    truth = q.trace(q.load(CHECKPOINT, shared_expert="unfused"), FILM, images=VIDEOS)
    right = compare(truth, captured(VIDEOS, FILM).dump(), source)
    assert right.exit_code == 0, right.verdict
    later = torch.where((FILM == VIDEO) & (torch.arange(FILM.shape[1]) > 12), 1, 0)
    plant = wrong_positions(lambda x: torch.cat((x[:1] + later, x[1:])))
    found = compare(truth, captured(VIDEOS, FILM, plant=plant).dump(), source, diagnoses=1)
    assert found.diagnoses[0].name == "frames of a video counted in time", str(found.diagnoses[0])
