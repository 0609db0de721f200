"""Our model against transformers on the same bytes, tap by tap, and against the logits that other engines left."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from distances import apart
from peers.capture import capture
from peers.float64 import float64_clean
from peers.transformers_model import cached, load_transformers, logits_of, new_cache
from safetensors.torch import load_file, save_file
from tolerances import (
    FIXTURE_HIDDEN,
    FIXTURE_ROUTER_LOGITS,
    FIXTURE_ROUTER_WEIGHTS,
    FLOAT32_ERROR_RATIO,
    FLOAT32_LOG_P,
    FLOAT64_CLEAN,
    FLOAT64_REORDERED,
)
from torch import Tensor

import qwen35_moe as q
from qwen35_moe.numerics.metrics import compare_traces, rel_l2
from qwen35_moe.numerics.tables import TRANSFORMERS_BF16

FIXTURES = Path(__file__).parent / "data" / "fixtures"
CHECKPOINTS = ("fixture", "tiny", "tiny-odd", "tiny-flat")
BF16 = "transformers-bf16"

Open = Callable[[str], Path]


@pytest.fixture(scope="module")
def opened(built: Callable[[str], Path]) -> Open:
    return lambda name: FIXTURES / "bf16-hub" if name == "fixture" else built(name)


theirs = cache(load_transformers)


@cache
def ours(path: Path, arithmetic: str) -> q.Model:
    return q.load(path, arithmetic=arithmetic, shared_expert="unfused")


def random_ids(path: Path, *shape: int, seed: int = 0) -> Tensor:
    vocabulary = q.Config.from_pretrained(path).vocab_size
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def assert_equal_bits(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    rows = compare_traces(ours, theirs)
    different = [row for row in rows if not row.equal]
    assert not different, f"{len(different)} of {len(rows)} taps differ: {different[:20]}"


# Exact arithmetic and float32.


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (3, 65)])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_exact_is_what_transformers_computes_in_float64(opened: Open, name: str, shape: tuple[int, int]) -> None:
    """At every tap, not only at the end; transformers' every operation is seen to be float64."""
    path = opened(name)
    ids = random_ids(path, *shape)
    with float64_clean(theirs(path, torch.float64)) as watched:
        truth = capture(theirs(path, torch.float64), ids)
    assert watched.seen > 1000
    run = q.trace(ours(path, "exact"), ids, experts=True)
    far = [row for row in compare_traces(run, truth) if row.note or not row.rel_l2 <= FLOAT64_REORDERED]
    assert not far
    assert (run["next_token_logits"] - truth["next_token_logits"]).abs().max() <= FLOAT64_CLEAN


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_float32_is_no_further_from_the_truth_than_transformers(opened: Open, name: str) -> None:
    path = opened(name)
    ids = random_ids(path, 1, 333)
    truth = ours(path, "exact")(ids)
    own, other = ours(path, "float32")(ids), logits_of(theirs(path, torch.float32), ids)
    assert rel_l2(own, truth) <= FLOAT32_ERROR_RATIO * rel_l2(other, truth)
    assert (own - truth).abs().max() <= FLOAT32_ERROR_RATIO * (other - truth).abs().max()


# bfloat16: the same bits.


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (1, 64), (1, 333), (3, 65)])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bf16_has_the_same_bits_at_every_tap(opened: Open, name: str, shape: tuple[int, int]) -> None:
    path = opened(name)
    ids = random_ids(path, *shape, seed=1)
    assert_equal_bits(q.trace(ours(path, BF16), ids, experts=True), capture(theirs(path, torch.bfloat16), ids))


@pytest.mark.parametrize("steps", [(20, 1, 1), (65, 3, 1), (1, 1)])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bf16_has_the_same_bits_when_a_sequence_goes_on(opened: Open, name: str, steps: tuple[int, ...]) -> None:
    path = opened(name)
    model, peer = ours(path, BF16), theirs(path, torch.bfloat16)
    own_cache, peer_cache, batch = q.Cache(), new_cache(peer), 2
    for ids in random_ids(path, batch, sum(steps), seed=2).split(steps, dim=1):
        assert_equal_bits(q.trace(model, ids, cache=own_cache, experts=True), capture(peer, ids, **cached(peer_cache)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bf16_has_the_same_bits_in_a_padded_batch(opened: Open, name: str, side: str) -> None:
    """At real tokens. transformers is told the positions, which its `generate` also counts from the mask."""
    path = opened(name)
    ids = random_ids(path, 3, 70, seed=3)
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 13, 66)):
        mask[row, :pad] = 0
    if side == "right":
        mask = mask.flip(1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    run = q.trace(ours(path, BF16), ids, attention_mask=mask)
    peer = capture(theirs(path, torch.bfloat16), ids, attention_mask=mask, position_ids=positions)
    own_rows, peer_rows = real_tokens(run, mask.bool()), real_tokens(peer, mask.bool())
    assert len(peer_rows) > 100
    assert_equal_bits(own_rows, peer_rows)


def real_tokens(run: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """The taps with a row per token, without the rows of padding. Which rows an expert gets depends on padding, too."""
    rows = {}
    for key, x in run.items():
        if re.search(r"moe_(expert|partial)", key):
            continue
        if x.shape[:2] == mask.shape:
            rows[key] = x[mask]
        elif x.shape[0] == mask.numel():
            rows[key] = x[mask.flatten()]
    return rows


@pytest.mark.parametrize(
    "tap", ["gdn_norm_normed", "moe_expert_silu", "attn_scores", "moe_topk_weights", "attn_q.x_cos"]
)
def test_one_rounding_left_out_shows(opened: Open, tap: str) -> None:
    """What the bit comparison is worth: it sees a single missing rounding, and not before the layer that lacks it."""
    path = opened("tiny")
    table_without = replace(TRANSFORMERS_BF16, name="planted", rounds={**TRANSFORMERS_BF16.rounds, tap: q.KEEP})
    ids = random_ids(path, 1, 65, seed=1)
    run = q.trace(q.load(path, arithmetic=table_without, shared_expert="unfused"), ids, experts=True)
    rows = compare_traces(run, capture(theirs(path, torch.bfloat16), ids))
    different = [index for index, row in enumerate(rows) if not row.equal]
    assert different and not rows[-1].equal
    layer = 3 if tap.startswith("attn") else 0
    assert rows[different[0]].key.startswith(f"layers.{layer}.")


# Logits that engines left in tests/data/fixtures.


@pytest.fixture(scope="module")
def left(expected: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("bf16-hub/"): x for key, x in expected.items()}


def one_by_one(model: q.Model, ids: Tensor) -> Tensor:
    return torch.cat([model(row[None]) for row in ids])


def test_exact_lies_between_the_engines(left: dict[str, Tensor]) -> None:
    """Nearer to each engine than the engines are to each other."""
    hf, cpp = left["logits.transformers_f32"], left["logits.llamacpp_f32"]
    exact = one_by_one(ours(FIXTURES / "bf16-hub", "exact"), left["ids"].long())
    for a, b, own in zip(hf, cpp, exact, strict=True):
        assert max(apart(own, a), apart(own, b)) < apart(a, b)


def test_float32_is_within_reach_of_each_engine(left: dict[str, Tensor]) -> None:
    own = one_by_one(ours(FIXTURES / "bf16-hub", "float32"), left["ids"].long())
    for engine in ("transformers_f32", "llamacpp_f32"):
        assert apart(own, left[f"logits.{engine}"]) <= FLOAT32_LOG_P


@pytest.mark.parametrize("arithmetic", ["exact", "float32"])
def test_residual_stream_and_routing_of_every_layer(left: dict[str, Tensor], arithmetic: str) -> None:
    for sequence, ids in enumerate(left["ids"].long()):
        run = q.trace(ours(FIXTURES / "bf16-hub", arithmetic), ids[None])
        for layer in range(4):
            then = {key: left[f"{key}.transformers_f32"][layer, sequence] for key in ("hidden", "router_logits")}
            hidden, logits = (run[f"layers.{layer}.{tap}"] for tap in ("layer_output_sum", "moe_router_logits"))
            assert rel_l2(hidden[0], then["hidden"]) <= FIXTURE_HIDDEN
            assert (logits - then["router_logits"]).abs().max() <= FIXTURE_ROUTER_LOGITS
            chosen, weights = (left[f"router_topk_{x}.transformers_f32"][layer, sequence] for x in ("ids", "weights"))
            assert torch.equal(run[f"layers.{layer}.moe_topk_ids"], chosen.long())
            assert (run[f"layers.{layer}.moe_topk_weights"] - weights).abs().max() <= FIXTURE_ROUTER_WEIGHTS


def test_a_head_that_is_stored_is_used_whatever_the_configuration_says_of_ties(built, tmp_path: Path) -> None:
    path = shutil.copytree(built("tiny-flat"), tmp_path / "two")
    index = path / "model.safetensors.index.json"
    files = json.loads(index.read_text())
    name, file = next((n, f) for n, f in files["weight_map"].items() if n.endswith("embed_tokens.weight"))
    stored = load_file(path / file)
    save_file({**stored, "lm_head.weight": stored[name].flip(0).clone()}, path / file, {"format": "pt"})
    files["weight_map"]["lm_head.weight"] = file
    index.write_text(json.dumps(files))
    ids = random_ids(path, 2, 9)
    expected = logits_of(load_transformers(path, torch.bfloat16), ids)
    for mode in ("decoded", "packed", "stream"):
        assert torch.equal(q.load(path, "transformers-bf16", mode=mode)(ids), expected), mode
