"""The vision tower against transformers, timm and float64, and the properties that its formulas promise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distances import relative
from fixture_models import read
from peers.float64 import float64_clean
from tolerances import VISION_BF16_FLIPS, VISION_FLOAT32, VISION_FLOAT64, VISION_TAIL
from torch import Tensor
from transformers import Qwen3_5MoeVisionModel
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeVisionConfig

from qwen35_moe.errors import Qwen35Error
from qwen35_moe.model.vision import tower as vision
from qwen35_moe.model.vision.tower import VisionConfig, VisionTower
from qwen35_moe.numerics import arithmetics as arithmetic
from qwen35_moe.numerics import taps

# Odd in every way that could go wrong: depth 3, heads of width 12, a table of 7 x 7, frames wider and narrower
# than the table, an image of a single block, a video of three frames between images.
SHAPE: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 36,
    "num_heads": 3,
    "intermediate_size": 44,
    "patch_size": 2,
    "num_position_embeddings": 49,
    "out_hidden_size": 20,
}
GRIDS = torch.tensor([[1, 4, 6], [3, 2, 4], [1, 2, 2], [1, 10, 8], [1, 14, 2]])


@pytest.fixture(scope="module")
def fixture_tower() -> VisionTower:
    return read("bf16-hub", torch.float32)[2]


@pytest.fixture(scope="module")
def pair() -> tuple[VisionTower, Any, Tensor]:
    """Our tower and transformers' with the same weights, float64, and pixels for GRIDS."""
    generator = torch.Generator().manual_seed(7)
    theirs = Qwen3_5MoeVisionModel(Qwen3_5MoeVisionConfig(**SHAPE, attn_implementation="eager")).eval().double()
    for name, p in theirs.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.data = 1 + 0.3 * noise if ".norm" in name and name.endswith("weight") else 0.3 * noise
    ours = VisionTower(VisionConfig(**SHAPE)).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    pixels = torch.randn(int(GRIDS.prod(1).sum()), ours.config.patch_values, generator=generator, dtype=torch.float64)
    return ours, theirs, pixels


@torch.no_grad()
def observe(tower: VisionTower, pixels: Tensor, grids: Tensor, how: str) -> tuple[Tensor, dict[str, Tensor]]:
    seen: dict[str, Tensor] = {}
    with arithmetic.using(how), taps.attach(lambda site, x: seen.update({site.key: x})):
        return tower(pixels, grids), seen


@pytest.mark.parametrize(("how", "dtype"), [("float32", torch.float32), ("exact", torch.float64)])
def test_fixture(expected: dict[str, Tensor], fixture_tower: VisionTower, how: str, dtype: torch.dtype) -> None:
    tower = fixture_tower.to(dtype)
    out, seen = observe(tower, expected["image/pixel_values"], expected["image/image_grid_thw"], how)
    assert out.dtype == dtype and all(x.dtype == dtype for x in seen.values())
    assert relative(out, expected["image/vision_out.transformers_f32"]) < VISION_FLOAT32
    assert relative(out, expected["image/vision_out.timm_f32"]) < VISION_FLOAT32
    assert relative(seen["visual.vis_hidden"], expected["image/vision_hidden.transformers_f32"]) < VISION_FLOAT32


@torch.no_grad()
def test_float64_equals_float64_clean_transformers(pair: tuple[VisionTower, Any, Tensor]) -> None:
    ours, theirs, pixels = pair
    with float64_clean(theirs) as watch:
        truth = theirs(pixels, grid_thw=GRIDS)
    assert watch.seen > 100
    out, seen = observe(ours, pixels, GRIDS, "exact")
    assert relative(out, truth.pooler_output) < VISION_FLOAT64
    assert relative(seen["visual.vis_hidden"], truth.last_hidden_state) < VISION_FLOAT64
    assert all(x.dtype == torch.float64 for x in seen.values())


# Which of our taps hold what a module of transformers returns.
MODULES = {
    "vis_norm1": "norm1",
    "vis_qkv": "attn.qkv",
    "vis_attn_output": "attn.proj",
    "vis_norm2": "norm2",
    "vis_mlp_fc1": "mlp.linear_fc1",
    "vis_mlp_act": "mlp.act_fn",
    "vis_mlp_output": "mlp.linear_fc2",
    "vis_merger_norm": "norm",
    "vis_merger_fc1": "linear_fc1",
    "vis_merger_act": "act_fn",
    "vis_merger_out": "linear_fc2",
}


@torch.no_grad()
def bfloat16_flips(pair: tuple[VisionTower, Any, Tensor], table: arithmetic.Arithmetic) -> dict[str, float]:
    """How much of each operation's result differs from transformers', which put its inputs: no difference spreads."""
    ours, theirs, pixels = pair
    theirs = Qwen3_5MoeVisionModel(theirs.config).eval()
    theirs.load_state_dict({k: v.bfloat16() for k, v in ours.state_dict().items()}, assign=True)
    tower = VisionTower(ours.config)
    tower.load_state_dict(theirs.state_dict(), assign=True)
    held: dict[str, Tensor] = {}
    for name, module in theirs.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: held.update({name: out}))
    theirs(pixels.bfloat16(), grid_thw=GRIDS)

    flips: dict[str, float] = {}

    def replay(site: taps.Site, x: Tensor) -> Tensor | None:
        if site.name not in MODULES:
            return None
        there = held[
            f"merger.{MODULES[site.name]}" if site.layer is None else f"blocks.{site.layer}.{MODULES[site.name]}"
        ]
        assert x.dtype == torch.bfloat16
        flips[site.key] = ((x - there.view_as(x)).abs() > VISION_TAIL).float().mean().item()
        return there.view_as(x)

    with arithmetic.using(table), taps.attach(replay):
        tower(pixels, GRIDS)
    return flips


def test_bfloat16_rounds_where_transformers_does(pair: tuple[VisionTower, Any, Tensor]) -> None:
    flips = bfloat16_flips(pair, arithmetic.get("transformers-bf16"))
    assert len(flips) == 7 * 3 + 4
    assert max(flips.values()) < VISION_BF16_FLIPS, flips
    assert all(flips[f"visual.layers.{i}.{name}"] == 0 for i in range(3) for name in ("vis_qkv", "vis_attn_output"))


@pytest.mark.parametrize("name", ["vis_rope_*", "vis_attn_qk", "vis_attn_scores", "vis_attn_probs", "vis_pos_embed"])
def test_one_rounding_more_or_less_would_be_caught(pair: tuple[VisionTower, Any, Tensor], name: str) -> None:
    table = arithmetic.get("transformers-bf16")
    one = name.replace("*", "cos")  # a tap that the pattern means
    other = None if table.rounding(one) is torch.bfloat16 else torch.bfloat16
    flips = bfloat16_flips(pair, replace(table, rounds={**table.rounds, name: other}))
    assert max(flips.values()) > 5 * VISION_BF16_FLIPS


def test_images_do_not_see_each_other(pair: tuple[VisionTower, Any, Tensor]) -> None:
    tower, _, pixels = pair
    together, _ = observe(tower, pixels, GRIDS, "exact")
    frames = [torch.tensor([[1, h, w]]) for t, h, w in GRIDS.tolist() for _ in range(t)]
    patches = pixels.split([int(frame.prod()) for frame in frames])
    alone = [observe(tower, *case, "exact")[0] for case in zip(patches, frames, strict=True)]
    assert relative(torch.cat(alone), together) < VISION_FLOAT64


def test_attention_in_blocks_changes_nothing_but_memory(
    pair: tuple[VisionTower, Any, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    tower, _, pixels = pair
    whole, _ = observe(tower, pixels, GRIDS, "exact")
    monkeypatch.setattr(vision, "ATTENTION_ELEMENTS", 250)
    blocks, seen = observe(tower, pixels, GRIDS, "exact")
    assert relative(blocks, whole) < VISION_FLOAT64
    scores = [x for key, x in seen.items() if "vis_attn_scores" in key]
    assert len(scores) > 3 * len(GRIDS) and max(x.numel() for x in scores) <= 250


@pytest.mark.parametrize("size", [(4, 6), (7, 7), (2, 20), (1, 1)])
def test_position_table_is_torch_interpolation(size: tuple[int, int]) -> None:
    table = torch.randn(49, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    h, w = size
    expected = F.interpolate(table.view(1, 7, 7, 5).permute(0, 3, 1, 2), size, mode="bilinear", align_corners=True)
    found = vision.interpolate(table, *vision.patch_places([(1, h, w)], 1))
    assert relative(found, expected[0].permute(1, 2, 0).flatten(0, 1)) < VISION_FLOAT64
    if size == (7, 7):
        assert torch.equal(found, table)


def test_merge_blocks_are_neighbours() -> None:
    places = vision.patch_places([(2, 4, 6)], 2)[:2].T.tolist()
    assert places[:8] == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    assert places[12] == [2, 0] and places[24:] == places[:24]


BROKEN = {
    "tanh in the merger": {"gelu_exact": vision.gelu_tanh},
    "exact gelu in the blocks": {"gelu_tanh": vision.gelu_exact},
    "the text model's theta": {"ROPE_THETA": 1e7},
    "row and column of the rotary embedding swapped": {
        "patch_angles": lambda row, column, *rest, right=vision.patch_angles: right(column, row, *rest)
    },
    "row-major order instead of merge blocks": {
        "patch_places": lambda grids, m, right=vision.patch_places: right(grids, 1)
    },
    "position table not interpolated": {
        "interpolate": lambda table, row, column, rows, columns: table[(row * 4 + column) % 16]
    },
    "corners not aligned": {
        "interpolate": lambda table, row, column, rows, columns, right=vision.interpolate: right(
            table, row, column, rows + 1, columns + 1
        )
    },
    "weight of a norm counted from 1": {
        "layer_norm": lambda name, x, weight, bias, right=vision.layer_norm: right(name, x, 1 + weight, bias)
    },
}


@pytest.mark.parametrize("bug", BROKEN)
def test_the_fixture_would_catch(
    bug: str, expected: dict[str, Tensor], fixture_tower: VisionTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, wrong in BROKEN[bug].items():
        monkeypatch.setattr(vision, name, wrong)
    pixels, grids = expected["image/pixel_values"], expected["image/image_grid_thw"]
    out, _ = observe(fixture_tower.double(), pixels, grids, "exact")
    assert relative(out, expected["image/vision_out.transformers_f32"]) > 4 * VISION_FLOAT32


def test_configuration_of_real_checkpoints() -> None:
    config = VisionConfig.from_dict({"model_type": "qwen3_5_moe", "deepstack_visual_indexes": [], "depth": 27}, 2048)
    assert (config.out_hidden_size, config.side, config.patch_values) == (2048, 48, 1536)
    saved = Qwen3_5MoeVisionConfig(**SHAPE).to_diff_dict()
    assert VisionConfig.from_dict(saved, SHAPE["out_hidden_size"]) == VisionConfig(**SHAPE)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"out_hidden_size": 4096}, "the text model's 2048"),
        ({"deepstack_visual_indexes": [8, 16, 24]}, "deepstack_visual_indexes"),
        ({"hidden_act": "silu"}, "gelu_pytorch_tanh"),
        ({"num_position_embeddings": 2300}, "square"),
        ({"num_heads": 7}, "a multiple of 28"),
        ({"depth": 0}, "a positive integer"),
        ({"depth": "27"}, "a positive integer"),
        ({"patchsize": 14}, "did you mean 'patch_size'?"),
        ({"window_size": 112}, "must be understood first"),
        ({"rope_parameters": {"rope_type": "axial", "rope_theta": 1e6}}, "rope_parameters"),
    ],
)
def test_unusable_configurations_are_named(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(Qwen35Error) as error:
        VisionConfig.from_dict(raw, 2048)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("pixels", "grid", "words"),
    [
        (torch.zeros(23, 96), [[1, 4, 6]], "[24, 96]"),
        (torch.zeros(24, 48), [[1, 4, 6]], "[24, 96]"),
        (torch.zeros(24, 96), [[1, 3, 8]], "multiples of 2"),
    ],
)
def test_pixels_that_do_not_fit_are_named(fixture_tower: VisionTower, pixels: Tensor, grid: Any, words: str) -> None:
    with pytest.raises(Qwen35Error) as error:
        fixture_tower(pixels, torch.tensor(grid))
    assert words in str(error.value)
