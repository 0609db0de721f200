"""The draft head against transformers' own and llama.cpp, its cache and chains, and the reference for acceptance."""

from __future__ import annotations

import json

import pytest
import torch
from distances import apart
from fixture_models import FIXTURES, read
from peers.float64 import float64_clean
from peers.transformers_model import load_transformers
from peers.transformers_parts import load_mtp, mtp_logits
from tolerances import FLOAT32_LOG_P, FLOAT64_CLEAN, FLOAT64_REORDERED
from torch import Tensor

from qwen35_moe.errors import Qwen35Error
from qwen35_moe.model.cache import Cache
from qwen35_moe.model.config import Config
from qwen35_moe.model.mtp import MTP, draft, draft_chains, draft_head, greedy, with_hidden
from qwen35_moe.model.text import Model
from qwen35_moe.numerics import taps
from qwen35_moe.trace.recorder import record

Pair = tuple[Model, MTP]


@pytest.fixture(scope="module")
def exact() -> Pair:
    return read("bf16-hub", torch.float64)[:2]


@pytest.fixture(scope="module")
def ids(expected: dict[str, Tensor]) -> Tensor:
    return expected["ids"].long()


def head(pair: Pair, ids_BT: Tensor) -> Tensor:
    """Draft logits for all rows: [B, T-1, V]."""
    model, mtp = pair
    _, hidden = with_hidden(model, ids_BT)
    return draft_head(model, mtp, ids_BT[:, 1:], hidden[:, :-1])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("checkpoint", "key", "rows"),
    [
        ("bf16-hub", "mtp_logits.transformers_f32", slice(None)),
        ("bf16-hub", "mtp_logits.llamacpp_f32", slice(None)),
        ("quark-mxfp4", "mtp_logits.llamacpp_f32_dequant.0", slice(0, 1)),
    ],
)
def test_fixtures(
    expected: dict[str, Tensor], ids: Tensor, checkpoint: str, key: str, rows: slice, dtype: torch.dtype
) -> None:
    logits = head(read(checkpoint, dtype)[:2], ids[rows])
    assert logits.dtype == dtype
    assert apart(logits, expected[f"{checkpoint}/{key}"].view_as(logits)) < FLOAT32_LOG_P


def test_float32_equals_transformers(ids: Tensor) -> None:
    theirs = load_transformers(FIXTURES / "bf16-hub", torch.float32)
    assert (
        apart(head(read("bf16-hub", torch.float32)[:2], ids), mtp_logits(theirs, load_mtp(theirs), ids)) < FLOAT32_LOG_P
    )


def test_exact_equals_float64_clean_transformers(exact: Pair, ids: Tensor) -> None:
    theirs = load_transformers(FIXTURES / "bf16-hub", torch.float64)
    draft_model = load_mtp(theirs)
    with float64_clean(theirs):
        truth = mtp_logits(theirs, draft_model.double(), ids)
    assert truth.dtype == torch.float64
    assert apart(head(exact, ids), truth) < FLOAT64_CLEAN


BROKEN = {
    "halves of fc exchanged": lambda mtp: mtp.fc.weight.data.copy_(mtp.fc.weight.roll(mtp.fc.weight.shape[1] // 2, 1)),
    "norms of fc exchanged": lambda mtp: (
        setattr(mtp, "pre_fc_norm_hidden", mtp.pre_fc_norm_embedding),
        setattr(mtp, "pre_fc_norm_embedding", mtp.pre_fc_norm_hidden),
    ),
    "last norm left out": lambda mtp: setattr(mtp, "norm", torch.nn.Identity()),
    "draft weights dropped": lambda mtp: [p.data.zero_() for p in mtp.layers.parameters()],
}


@pytest.mark.parametrize("bug", BROKEN)
def test_the_fixture_would_catch(expected: dict[str, Tensor], ids: Tensor, bug: str) -> None:
    model, mtp, _ = read("bf16-hub", torch.float64)
    BROKEN[bug](mtp)
    assert apart(head((model, mtp), ids), expected["bf16-hub/mtp_logits.transformers_f32"]) > 10 * FLOAT32_LOG_P


def test_hidden_before_the_final_norm_would_be_caught(exact: Pair, expected: dict[str, Tensor], ids: Tensor) -> None:
    kept: dict[str, Tensor] = {}
    with taps.attach(lambda site, x: kept.update({site.key: x})):
        exact[0](ids)
    hidden = kept["layers.3.layer_output_sum"][:, :-1]
    logits, _ = draft_head(*exact, ids[:, 1:], hidden)
    assert apart(logits, expected["bf16-hub/mtp_logits.transformers_f32"]) > 10 * FLOAT32_LOG_P


def test_the_cache_carries_the_head_on(exact: Pair, ids: Tensor) -> None:
    """In pieces of any size, the head's cache beside the model's: as in one pass."""
    model, mtp = exact
    whole, main, own = head(exact, ids), Cache(), Cache()
    pieces, start = [], 0
    for size in (5, 1, 1, 30, 32):
        _, hidden = with_hidden(model, ids[:, start : start + size], cache=main)
        pieces.append(draft_head(model, mtp, ids[:, start + 1 : start + size + 1], hidden, cache=own)[0])
        start += size
    assert start == 69 and own.length == 69
    assert apart(torch.cat(pieces, 1), whole) < FLOAT64_REORDERED


def test_only_differences_of_positions_matter(exact: Pair, ids: Tensor) -> None:
    """Row t at the position of token t or of t+1, as engines differ in it: the same logits, RoPE being relative."""
    model, mtp = exact
    _, hidden = with_hidden(model, ids)
    shifted = draft_head(model, mtp, ids[:, 1:], hidden[:, :-1], position_ids=torch.arange(1, 70).expand(2, -1))[0]
    assert apart(shifted, head(exact, ids)) < FLOAT64_REORDERED


def test_padding_changes_nothing(exact: Pair, ids: Tensor) -> None:
    model, mtp = exact
    short, long = ids[:1, :9], ids[1:, :12]
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    padded = torch.cat((torch.cat((torch.full((1, 3), 7), short), 1), long))
    _, hidden = with_hidden(model, padded, attention_mask=mask)
    together, _ = draft(model, mtp, padded[:, 1:], hidden[:, :-1], 4, attention_mask=mask[:, :-1])
    for row, sequence in enumerate((short, long)):
        _, alone = with_hidden(model, sequence)
        assert torch.equal(together[row : row + 1], draft(model, mtp, sequence[:, 1:], alone[:, :-1], 4)[0])
    right = torch.cat((torch.cat((short, torch.full((1, 3), 7)), 1), long))
    _, hidden = with_hidden(model, right, attention_mask=mask.flip(1))
    mask_rows = mask.flip(1)[:, 1:]
    assert torch.equal(draft(model, mtp, right[:, 1:], hidden[:, :-1], 4, attention_mask=mask_rows)[0], together)


def test_fused_equals_unfused(exact: Pair, ids: Tensor) -> None:
    model, mtp = exact
    fused = MTP(model.config, fused=True)
    state = dict(mtp.state_dict())
    stem = "layers.0.mlp."
    shared = [state.pop(f"{stem}shared_expert.{part}_proj.weight") for part in ("gate", "up", "down")]
    for name, slot in (("gate_up_proj", torch.cat(shared[:2])), ("down_proj", shared[2])):
        state[f"{stem}experts.{name}"] = torch.cat((state[f"{stem}experts.{name}"], slot[None]))
    fused.load_state_dict(state, strict=True, assign=True)
    assert apart(head((model, fused), ids), head(exact, ids)) < FLOAT64_REORDERED


def test_a_chain_is_the_head_fed_with_itself(exact: Pair, ids: Tensor) -> None:
    """Each draft again in one pass over all rows, without any cache; and the chain leaves no trace in the cache."""
    model, mtp = exact
    _, hidden = with_hidden(model, ids[:, :20])
    cache = Cache()
    drafts, logits = draft(model, mtp, ids[:, 1:21], hidden, 4, cache=cache)
    assert cache.length == 20 and cache.layer(0).k.shape[1] == 20
    rows, tokens = hidden, ids[:, 1:21]
    for step in range(4):
        again, own = draft_head(model, mtp, tokens, rows)
        assert apart(logits[:, step], again[:, -1]) < FLOAT64_REORDERED
        assert torch.equal(drafts[:, step], greedy(again[:, -1]))
        rows, tokens = torch.cat((rows, own[:, -1:]), 1), torch.cat((tokens, drafts[:, step : step + 1]), 1)


def test_chains_at_every_token_are_the_chain_from_there(exact: Pair, ids: Tensor) -> None:
    """Sequences of different lengths, padded on the right; ids that are given are drafted on."""
    model, mtp = exact
    mask = torch.tensor([[1] * 20, [1] * 13 + [0] * 7])
    _, hidden = with_hidden(model, ids[:, :20], attention_mask=mask)
    unknown = torch.full_like(mask, -1)
    given = torch.where(torch.arange(20) == 5, 7, unknown)
    with record("next_token_logits") as recorder:
        used = draft_chains(model, mtp, [ids[:, 1:21], unknown, given], hidden, mask)
    for b, t in ((0, 0), (0, 19), (1, 12), (1, 3)):
        chain, logits = draft(model, mtp, ids[b : b + 1, 1 : t + 2], hidden[b : b + 1, : t + 1], 3)
        assert [int(x[b, t]) for x in used[1:]] == chain[0, :2].tolist()
        for k, part in enumerate(("mtp", "mtp.2", "mtp.3")):
            assert apart(recorder.trace[f"{part}.next_token_logits"][b, t], logits[0, k]) < FLOAT64_REORDERED
    assert used[2][0, 5] == 7 != used[1][0, 5]


def test_taps_stand_under_mtp(exact: Pair, ids: Tensor) -> None:
    seen: dict[str, Tensor] = {}
    _, hidden = with_hidden(exact[0], ids[:, :5])
    with taps.attach(lambda site, x: seen.update({site.key: x})):
        draft_head(*exact, ids[:, 1:6], hidden)
    assert all(key.startswith("mtp.") for key in seen)
    names = ("embed_tokens", "mtp_embedding", "mtp_hidden", "mtp_fc", "layers.0.layer_input", "layers.0.moe_topk_ids")
    assert {f"mtp.{n}" for n in (*names, "final_norm", "next_token_logits")} <= seen.keys()
    assert all(x.dtype in (torch.float64, torch.int64) for x in seen.values())


def test_wrong_input_to_the_head_is_named(exact: Pair, ids: Tensor) -> None:
    _, hidden = with_hidden(exact[0], ids[:, :5])
    with pytest.raises(Qwen35Error, match="for each token t the token t"):
        draft_head(*exact, ids[:, 1:5], hidden)
    raw = json.loads((FIXTURES / "bf16-hub" / "config.json").read_text())
    raw["text_config"]["mtp_num_hidden_layers"] = 2
    with pytest.raises(Qwen35Error, match="mtp_num_hidden_layers"):
        MTP(Config.from_dict(raw))
