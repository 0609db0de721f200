"""A prompt with an image, from pixels to logits: against other engines, and token by token against all at once."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from distances import apart, relative
from fixture_models import FIXTURES
from peers.float64 import float64_clean
from peers.transformers_model import load_transformers
from peers.transformers_parts import image_logits
from tolerances import FLOAT32_LOG_P, FLOAT64_CLEAN, FLOAT64_REORDERED, IMAGE_LOGITS_FLOAT32
from torch import Tensor

import qwen35_moe as q
from qwen35_moe.model.cache import Cache
from qwen35_moe.model.mtp import draft_head, with_hidden
from qwen35_moe.model.vision.positions import token_types
from qwen35_moe.numerics import taps
from qwen35_moe.run.prompt import embed_prompt, placeholders

IMAGE, VIDEO = 252, 253


@pytest.fixture(scope="module")
def expected(expected: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("image/"): v for k, v in expected.items()}


@pytest.fixture(scope="module")
def exact() -> q.Model:
    return q.load(FIXTURES / "bf16-hub", "exact", "unfused")


def logits_of(model: q.Model, *prompt: Tensor) -> Tensor:
    return model(**embed_prompt(model, *prompt))


@pytest.mark.parametrize("table", ["float32", "exact"])
@pytest.mark.parametrize("engine", ["transformers_f32", "llamacpp_f32"])
def test_fixture(expected: dict[str, Tensor], engine: str, table: str) -> None:
    inputs = expected["input_ids"].long(), expected["pixel_values"], expected["image_grid_thw"]
    logits = logits_of(q.load(FIXTURES / "bf16-hub", table, "unfused"), *inputs)[0]
    assert relative(logits, expected[f"logits.{engine}"]) < IMAGE_LOGITS_FLOAT32
    assert apart(logits, expected[f"logits.{engine}"]) < FLOAT32_LOG_P


def several_images() -> tuple[Tensor, Tensor, Tensor]:
    """Two images of different size between text: ids [1, T], pixels, grids."""
    generator = torch.Generator().manual_seed(5)
    grids = torch.tensor([[1, 4, 6], [1, 8, 2]])
    pixels = torch.randn(40, 96, dtype=torch.float64, generator=generator)
    ids = [3, 17, 250, *[IMAGE] * 6, 251, 99, 250, *[IMAGE] * 4, 251, 7, 8]
    return torch.tensor([ids]), pixels, grids


def test_exact_equals_float64_clean_transformers(exact: q.Model) -> None:
    ids, pixels, grids = several_images()
    theirs = load_transformers(FIXTURES / "bf16-hub", torch.float64)
    with float64_clean(theirs):
        truth = image_logits(theirs, ids, pixels, grids, token_types(ids, IMAGE, VIDEO))
    assert apart(logits_of(exact, ids, pixels, grids), truth) < FLOAT64_CLEAN


def test_placeholders_of_a_configuration_that_knows_no_images(exact: q.Model) -> None:
    ids = torch.tensor([[1, exact.config.raw["image_token_id"], 2]])
    assert placeholders(exact.config, ids).tolist() == [[0, 1, 0]]
    for raw in ({}, {"image_token_id": None, "video_token_id": None}):
        assert not placeholders(replace(exact.config, raw=raw), ids).any()


def test_a_batch_with_padding(exact: q.Model) -> None:
    """What `embed_prompt` gives is all that the model needs: each prompt as if it were alone."""
    ids, pixels, grids = several_images()
    short = ids[:, 12:]  # from within its text on, with the second image
    for side in ("left", "right"):
        filler = torch.full((1, 12), 7)
        row = torch.cat((filler, short) if side == "left" else (short, filler), 1)
        mask = torch.ones(2, ids.shape[1], dtype=torch.long)
        mask[1, slice(12) if side == "left" else slice(-12, None)] = 0
        both = torch.cat((ids, row)), torch.cat((pixels, pixels[24:])), torch.cat((grids, grids[1:]))
        logits = exact(**embed_prompt(exact, *both, attention_mask=mask))
        alone = logits_of(exact, short, pixels[24:], grids[1:])
        assert apart(logits[:1], logits_of(exact, ids, pixels, grids)) < FLOAT64_REORDERED
        assert apart(logits[1:][mask[1:].bool()], alone[0]) < FLOAT64_REORDERED


def test_decoding_after_an_image_equals_prefill_at_every_tap(exact: q.Model) -> None:
    """60 tokens one by one, positions from the cache alone: as all at once."""
    model, (ids, pixels, grids) = exact, several_images()
    prompt = ids.shape[1]
    more = torch.randint(2, 250, (1, 60), generator=torch.Generator().manual_seed(6))
    embeds, positions = embed_prompt(exact, ids, pixels, grids).values()
    after = positions.max() + 1 + torch.arange(60).expand(3, 1, -1)
    all_embeds = torch.cat((embeds, model.embed_tokens(more)), 1)
    whole: dict[str, Tensor] = {}
    with taps.attach(lambda site, x: whole.update({site.key: x})):
        model(inputs_embeds=all_embeds, position_ids=torch.cat((positions, after), 2))

    cache, steps = Cache(), dict[str, list[Tensor]]()
    model(inputs_embeds=embeds, position_ids=positions, cache=cache)
    with taps.attach(lambda site, x: steps.setdefault(site.key, []).append(x)):
        for token in more.split(1, 1):
            model(token, cache=cache)

    compared = {key: difference(key, xs, whole[key], prompt) for key, xs in steps.items() if key in whole}
    assert set(compared) == set(whole)
    assert max(compared.values()) < FLOAT64_REORDERED, max(compared.items(), key=lambda item: item[1])


def difference(key: str, steps: list[Tensor], whole: Tensor, prompt: int) -> float:
    """What a tap held step by step less what it held at once for the same tokens, relative to its largest value."""
    name = re.sub(r"^layers\.\d+\.", "", key)
    if name.startswith(("attn_qk", "attn_scores", "attn_probs")):  # [B, N, T, S], S growing
        pairs = [(x, whole[:, :, i : i + 1, : i + 1]) for i, x in enumerate(steps, prompt)]
    elif name.endswith((".gain", "gdn_state", "gdn_conv_state")):  # no dimension of tokens: the last is after all
        pairs = [(steps[-1], whole)]
    elif not name.startswith(("moe_", "mlp_output")):  # [B, T, ...]
        pairs = [(torch.cat(steps, 1), whole[:, prompt:])]
    else:  # [rows, ...], of all tokens or of those that visit an expert
        rows = torch.cat(steps)
        pairs = [(rows, whole[-len(rows) :])]
    for x, truth in pairs:
        assert x.shape == truth.shape, key
    if not whole.is_floating_point():
        return 0.0 if all(torch.equal(x, truth) for x, truth in pairs) else float("inf")
    scale = whole[whole.isfinite()].abs().max()
    return max(((x - truth).abs().max() / scale).item() for x, truth in pairs)


def test_the_draft_head_sees_the_image(exact: q.Model) -> None:
    """Rows before, within and after an image, in pieces and at once; embeddings of placeholders are the image's."""
    model, mtp, (ids, pixels, grids) = exact, exact.mtp, several_images()
    embeds, positions = embed_prompt(exact, ids, pixels, grids).values()
    _, hidden = with_hidden(model, inputs_embeds=embeds, position_ids=positions)
    nexts, at = embeds[:, 1:], positions[:, :, :-1]
    whole, _ = draft_head(model, mtp, None, hidden[:, :-1], position_ids=at, next_embeds=nexts)
    cache = Cache()
    pieces = [
        draft_head(
            model, mtp, None, hidden[:, a:b], cache=cache, position_ids=at[:, :, a:b], next_embeds=nexts[:, a:b]
        )[0]
        for a, b in ((0, 5), (5, 12), (12, ids.shape[1] - 1))
    ]
    assert apart(torch.cat(pieces, 1), whole) < FLOAT64_REORDERED
    placeholders, _ = draft_head(model, mtp, ids[:, 1:], hidden[:, :-1], position_ids=at)
    assert apart(placeholders, whole) > 0.1
