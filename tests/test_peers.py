"""The instruments themselves: do they measure what they claim, and do they catch what they are for?"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from distances import apart
from peers.capture import capture
from peers.float64 import NoNarrowFloat, float64_clean
from peers.transformers_model import cached, load_transformers, logits_of, new_cache
from peers.transformers_parts import image_logits, load_mtp, mtp_logits, vision
from safetensors.torch import load_file
from tolerances import FLOAT32_ANOTHER_MACHINE, FLOAT64_REORDERED, VISION_FLOAT32
from torch import Tensor

from qwen35_moe.errors import Qwen35Error
from qwen35_moe.numerics.metrics import compare_traces, distance, ordinal, rel_l2, ulp_distance

FIXTURES = Path(__file__).parent / "data" / "fixtures"
HUB = FIXTURES / "bf16-hub"

load = cache(partial(load_transformers, HUB))


# transformers, loaded and made float64-clean.


def test_float64_takes_the_stored_values_exactly() -> None:
    stored = load_file(HUB / "model-00001-of-00004.safetensors")
    layer = load(torch.float64).model.language_model.layers[0].linear_attn
    for name, x in (("A_log", layer.A_log), ("conv1d.weight", layer.conv1d.weight), ("norm.weight", layer.norm.weight)):
        assert x.dtype is torch.float64
        assert torch.equal(x, stored[f"model.language_model.layers.0.linear_attn.{name}"].double())


def test_a_flat_checkpoint_is_a_causal_model(built: Callable[[str], Path]) -> None:
    model = load_transformers(built("tiny-flat"), torch.bfloat16)
    assert type(model).__name__ == "Qwen3_5MoeForCausalLM"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert capture(model, torch.tensor([[1, 2, 3]]))["next_token_logits"].shape[:2] == (1, 3)


def test_float64_clean_reproduces_the_fixture(expected: dict[str, Tensor]) -> None:
    with float64_clean(load(torch.float64)) as watched:
        logits = logits_of(load(torch.float64), expected["ids"][:1].long())
    assert watched.seen > 1000
    assert rel_l2(logits[0, :32], expected["bf16-hub/logits.transformers_f64.0"]) <= FLOAT64_REORDERED


def test_the_proof_finds_the_float32_inside_a_float64_model(expected: dict[str, Tensor]) -> None:
    with pytest.raises(AssertionError, match=r"returned torch\.float32"), NoNarrowFloat():
        logits_of(load_transformers(HUB, torch.float64), expected["ids"][:1].long())


def test_float64_clean_wants_a_float64_model() -> None:
    with pytest.raises(AssertionError, match="load the model in float64"), float64_clean(load(torch.float32)):
        pass


def test_float64_clean_leaves_nothing_behind() -> None:
    with float64_clean(load(torch.float64)):
        pass
    assert torch.get_default_dtype() is torch.float32
    assert torch.ones(1, dtype=torch.float32).float().dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_text_draft_and_image_agree_with_the_fixture(expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    model, ids = load(dtype), expected["ids"].long()
    image = [expected[f"image/{x}"] for x in ("input_ids", "pixel_values", "image_grid_thw", "mm_token_type_ids")]
    image = [x if x.is_floating_point() else x.long() for x in image]
    mtp = load_mtp(model)
    with float64_clean(model) if dtype is torch.float64 else nullcontext():
        text = torch.cat([logits_of(model, row[None]) for row in ids])
        draft = torch.cat([mtp_logits(model, mtp, row[None]) for row in ids])
        hidden, merged = vision(model, image[1], image[2])
        seen = image_logits(model, *image)
    assert {x.dtype for x in (text, draft, hidden, merged, seen)} == {dtype}
    assert apart(text, expected["bf16-hub/logits.transformers_f32"]) <= FLOAT32_ANOTHER_MACHINE
    assert apart(draft, expected["bf16-hub/mtp_logits.transformers_f32"]) <= FLOAT32_ANOTHER_MACHINE
    assert apart(seen[0], expected["image/logits.transformers_f32"]) <= FLOAT32_ANOTHER_MACHINE
    for ours, then in ((hidden, "vision_hidden"), (merged, "vision_out")):
        theirs = expected[f"image/{then}.transformers_f32"]
        assert (ours - theirs).abs().max() <= VISION_FLOAT32 * theirs.abs().max()


# What is captured.


def test_captured_steps_are_the_pieces_of_one_run() -> None:
    model, ids = load(torch.float32), torch.arange(2, 32)[None]
    whole, memory = capture(model, ids), new_cache(model)
    steps = [capture(model, part, **cached(memory)) for part in ids.split((20, 1, 9), 1)]
    for key in ("layers.0.gdn_conv", "layers.2.gdn_core_out", "layers.3.attn_q", "next_token_logits"):
        assert rel_l2(torch.cat([step[key] for step in steps], 1), whole[key]) < 1e-5
    assert steps[-1]["layers.0.gdn_state"].shape == (1, 4, 16, 16)


# The comparison.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_neighbours_are_one_ulp_apart(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    x = torch.tensor([1.0, -1.0, 0.0, tiny, -tiny, 65024.0, 1 - 2**-8], dtype=dtype)
    up = torch.nextafter(x, torch.full_like(x, torch.inf))
    assert ulp_distance(x, up).tolist() == [1] * len(x)
    assert ulp_distance(up, x).tolist() == [1] * len(x)
    assert (ordinal(up) > ordinal(x)).all()


def test_zeros_are_equal_and_signs_are_counted_through_zero() -> None:
    a, b = torch.tensor([0.0, 2**-133]).bfloat16(), torch.tensor([-0.0, -(2**-133)]).bfloat16()
    assert ulp_distance(a, b).tolist() == [0, 2]


def test_ulp_needs_one_dtype() -> None:
    with pytest.raises(Qwen35Error, match="one dtype and shape"):
        ulp_distance(torch.ones(2), torch.ones(2).double())
    with pytest.raises(Qwen35Error, match="no ulp"):
        ordinal(torch.ones(2, dtype=torch.int32))


def test_rel_l2_by_hand() -> None:
    assert rel_l2(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert rel_l2(torch.zeros(2), torch.zeros(2)) == 0.0
    assert rel_l2(torch.ones(2), torch.zeros(2)) == float("inf")


def test_the_comparison_passes_what_is_equal() -> None:
    x = torch.tensor([[1.0, torch.nan, -0.0, torch.inf]]).bfloat16()
    same = torch.tensor([1.0, torch.nan, 0.0, torch.inf]).bfloat16()
    assert distance("x", x, same).equal
    assert distance("ids", torch.tensor([1, 2], dtype=torch.int32), torch.tensor([1, 2])).equal


@pytest.mark.parametrize(
    ("theirs", "share", "max_ulp"),
    [
        (torch.tensor([1.0, 2.0, 3.015625, 4.0]), 0.75, 1),
        (torch.tensor([1.0, 2.0, torch.nan, 4.0]), 0.75, None),
        (torch.tensor([1.0, 2.0]), 0.0, None),
    ],
)
def test_the_comparison_catches(theirs: Tensor, share: float, max_ulp: int | None) -> None:
    row = distance("x", torch.tensor([1.0, 2.0, 3.0, 4.0]).bfloat16(), theirs.bfloat16())
    assert not row.equal and row.equal_share == share
    assert max_ulp is None or row.max_ulp == max_ulp


def test_what_is_missing_is_a_difference() -> None:
    x = torch.ones(2)
    rows = compare_traces({"a": x, "extra": x}, {"a": x, "b": x})
    assert [(row.key, row.equal) for row in rows] == [("a", True), ("b", False)]
