"""Positions of images and videos, and the embeddings that replace their placeholders, against transformers' own."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import Qwen3_5MoeModel, Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTextRotaryEmbedding

from qwen35_moe.errors import Qwen35Error
from qwen35_moe.model.config import Config
from qwen35_moe.model.rope import rotary_angles
from qwen35_moe.model.vision.positions import embed_images, rope_positions, token_types

FIXTURES = Path(__file__).parent / "data" / "fixtures"
IMAGE, VIDEO = 252, 253


def transformers_positions(
    types: Tensor, images: Tensor | None, videos: Tensor | None, mask: Tensor | None, merge: int
) -> tuple[Tensor, Tensor]:
    """`get_rope_index` needs of its model only this much; no weights are involved."""
    model = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=merge)))
    model.get_vision_position_ids = lambda *args, **kw: Qwen3_5MoeModel.get_vision_position_ids(model, *args, **kw)
    videos = None if videos is None else videos.clone()
    return Qwen3_5MoeModel.get_rope_index(model, types, types, images, videos, mask)


def random_layout(
    rng: random.Random, times: tuple[int, ...] = (1, 1, 1, 2, 9)
) -> tuple[list[list[int]], list[list[int]], list[list[int]], int]:
    """Token types of a batch of sequences of text, images and videos, and the grids that belong to them."""
    m = rng.choice([1, 2, 2, 2, 3])
    sequences: list[list[int]] = []
    images: list[list[int]] = []
    videos: list[list[int]] = []
    for _ in range(rng.randint(1, 3)):
        types: list[int] = []
        for _ in range(rng.randint(0, 5)):
            types += [0] * rng.randint(1, 9)
            h, w, kind = m * rng.randint(1, 7), m * rng.randint(1, 7), rng.choice("tiv")
            if kind == "i":  # a grid of an image may have t > 1: two different frames stacked
                t = rng.choice(times)
                images.append([t, h, w])
                types += [1] * (t * h * w // m**2)
            if kind == "v":
                t = rng.randint(1, 4)
                videos.append([t, h, w])
                for _ in range(t):
                    types += [2] * (h * w // m**2) + [0] * rng.randint(1, 4)
        sequences.append(types + [0] * rng.randint(1, 5))
    return sequences, images, videos, m


def pad(rng: random.Random, sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """To one length, each sequence on a side of its own; padded places hold arbitrary types."""
    length = max(map(len, sequences)) + rng.randint(0, 3)
    types, mask = torch.empty(len(sequences), length, dtype=torch.long), torch.zeros(len(sequences), length).long()
    for b, sequence in enumerate(sequences):
        start = rng.choice([0, length - len(sequence)])
        types[b] = torch.tensor([rng.randint(0, 2) for _ in range(length)])
        types[b, start : start + len(sequence)] = torch.tensor(sequence)
        mask[b, start : start + len(sequence)] = 1
    return types, mask


@pytest.mark.parametrize("section", [(16, 0, 0), (8, 5, 3), (9, 2, 5), (6, 5, 5)])
def test_each_frequency_belongs_to_one_axis(section: tuple[int, int, int], built: Callable[[str], Path]) -> None:
    """Beyond its section an axis has no frequencies: in the real ones, and in the tiny model's, there is no beyond."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": list(section)}
    theirs = Qwen3_5MoeTextRotaryEmbedding(Qwen3_5MoeTextConfig(head_dim=64, rope_parameters=rope))
    tiny = Config.from_pretrained(built("tiny"))
    ours = replace(tiny, head_dim=64, rope_theta=1e4, partial_rotary_factor=0.5, mrope_section=section)
    positions = torch.tensor([[[3, 7]], [[50, 60]], [[900, 800]]])
    expected = theirs(torch.empty(0), positions)
    for a, b in zip(rotary_angles(ours, positions, torch.float32), expected, strict=True):
        assert torch.allclose(a, b[..., :16], rtol=0, atol=1e-4)


@pytest.mark.parametrize("block", range(4))
def test_two_hundred_layouts_equal_transformers(block: int) -> None:
    for seed in range(50 * block, 50 * block + 50):
        rng = random.Random(seed)
        sequences, images, videos, m = random_layout(rng)
        types, mask = pad(rng, sequences)
        grids = [torch.tensor(g) if g else None for g in (images, videos)]
        expected, _ = transformers_positions(types, *grids, mask, m)
        found = rope_positions(types, *grids, mask, m)
        assert torch.equal(found, expected), f"seed {seed}"
        for b, sequence in enumerate(sequences):  # padding changes nothing but the place
            assert (found[:, b][:, ~mask[b].bool()] == 0).all()
            if len(sequences) == 1:
                alone = rope_positions(torch.tensor([sequence]), *grids, spatial_merge_size=m)
                assert torch.equal(alone[:, 0], found[:, b, mask[b].bool()])


def test_fixture(expected: dict[str, Tensor]) -> None:
    config = json.loads((FIXTURES / "bf16-hub" / "config.json").read_text())
    types = token_types(expected["image/input_ids"], config["image_token_id"], config["video_token_id"])
    assert torch.equal(types.int(), expected["image/mm_token_type_ids"])
    positions = rope_positions(types, expected["image/image_grid_thw"])
    assert torch.equal(positions.int(), expected["image/position_ids"])


def test_by_hand() -> None:
    """Two tokens, an image of 1 x 2 x 3 blocks, one token: written out once, from the definition."""
    positions = rope_positions(torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0]]), torch.tensor([[1, 4, 6]]))
    assert positions[:, 0].tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]


def test_text_counts_up_and_padding_does_not() -> None:
    positions = rope_positions(torch.zeros(2, 4).long(), attention_mask=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    assert positions[1].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert rope_positions(torch.zeros(1, 3).long(), attention_mask=torch.zeros(1, 3)).eq(0).all()


def test_adjacent_images_equal_images_set_apart() -> None:
    """Two images without text between: transformers refuses them; ours stand as with a token between, less one."""
    grids = torch.tensor([[1, 4, 4], [1, 2, 6]])
    apart = rope_positions(torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1, 1, 0]]), grids)
    close = rope_positions(torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 0]]), grids)
    assert torch.equal(close[:, :, :5], apart[:, :, :5])
    assert torch.equal(close[:, :, 5:], apart[:, :, 6:] - 1)


@pytest.mark.parametrize(
    ("types", "images", "videos", "words"),
    [
        ([0, 1, 1, 0], [[1, 4, 4]], None, "4 placeholders for grid (1, 4, 4)"),
        ([0, 1, 1, 1, 0], [[1, 2, 4]], None, "a grid for each run"),
        ([0, 1, 0], None, None, "sequence 0, token 1"),
        ([0, 2, 0, 2, 0], None, [[3, 2, 2]], "more video grids than placeholders"),
        ([0, 0], [[1, 2, 2]], None, "more image grids than placeholders"),
        ([0, 1, 0], [[1, 3, 2]], None, "image_grid_thw[0]"),
        ([0, 1, 0], [[0, 2, 2]], None, "image_grid_thw[0]"),
        ([0, 1, 0], [[2, 2]], None, "integers [count, 3]"),
    ],
)
def test_disagreement_of_grids_and_placeholders_is_named(types, images, videos, words) -> None:
    grids = [None if g is None else torch.tensor(g) for g in (images, videos)]
    with pytest.raises(Qwen35Error) as error:
        rope_positions(torch.tensor([types]), *grids)
    assert words in str(error.value)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(Qwen35Error, match="wrong rank"):
        rope_positions(torch.zeros(3).long())
    with pytest.raises(Qwen35Error, match="attention mask of the wrong shape"):
        rope_positions(torch.zeros(1, 3).long(), attention_mask=torch.ones(1, 4))


def test_placeholders_are_replaced_in_order() -> None:
    types = token_types(torch.tensor([[7, IMAGE, VIDEO, IMAGE], [VIDEO, 5, IMAGE, 6]]), IMAGE, VIDEO)
    embeds = torch.zeros(2, 4, 2, dtype=torch.bfloat16)
    rows = torch.arange(1, 11, dtype=torch.float64).view(5, 2)
    out = embed_images(embeds, types, rows[:3], rows[3:])
    assert out.dtype == torch.float64 and embeds.eq(0).all()
    assert out[..., 0].tolist() == [[0, 1, 7, 3], [9, 0, 5, 0]]
    assert torch.equal(embed_images(embeds, torch.zeros(2, 4)), embeds)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (None, ["1 rows, one for each placeholder", "0 rows"]),
        (torch.zeros(2, 2), ["1 rows", "2 rows"]),
        (torch.zeros(1, 3), ["wrong width"]),
    ],
)
def test_a_wrong_number_of_embeddings_is_named(rows: Tensor | None, words: list[str]) -> None:
    with pytest.raises(Qwen35Error) as error:
        embed_images(torch.zeros(1, 2, 2), torch.tensor([[0, 1]]), rows)
    assert all(word in str(error.value) for word in words)
