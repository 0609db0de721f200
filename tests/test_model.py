"""The text model in exact arithmetic: one function, however it is computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tolerances import FLOAT64_REORDERED

import qwen35_moe as q
from qwen35_moe.model import attention, deltanet, moe, norms, ops, router
from qwen35_moe.numerics.choices import with_choices
from qwen35_moe.numerics.metrics import rel_l2
from qwen35_moe.numerics.taps import attach
from qwen35_moe.run.gpu import grouped
from weights.build import real_config

LENGTHS = (1, 7, 64, 65, 333)


def ids_of(length: int, batch: int = 2, vocabulary: int = 256) -> torch.Tensor:
    """Ids from an integer hash, so that they are the same everywhere."""
    n = torch.arange(batch * length)
    return ((n * 2654435761 + 12345) % 2**31 // 7 % vocabulary).view(batch, length)


@pytest.fixture(scope="module")
def tiny(built) -> Path:
    return built("tiny")


@pytest.fixture(scope="module")
def model(tiny):
    return q.load(tiny, shared_expert="unfused")


def recorded(model, *args, **kwargs) -> dict[str, torch.Tensor]:
    """Every tap of a call, by key; of the recurrent rule and other loops, the last."""
    seen = {}

    def observe(site, x):
        if site.expert is None and site.index is None:
            seen[site.key] = x

    with attach(observe):
        seen["logits"] = model(*args, **kwargs)
    return seen


def assert_same(ours: dict, theirs: dict, pick=lambda key, x: x, keys=None) -> None:
    shared = [key for key in ours if key in theirs] if keys is None else keys
    assert len(shared) > 60
    for key in shared:
        a, b = pick(key, ours[key]), theirs[key]
        if a.is_floating_point():
            assert rel_l2(a, b) <= FLOAT64_REORDERED, key
        else:
            assert torch.equal(a, b), key


def test_float64_at_every_tap(model):
    for key, x in recorded(model, ids_of(7)).items():
        assert x.dtype in (torch.float64, torch.int64), key


def test_tap_without_handlers_hands_back_the_same_object():
    x = torch.ones(3)
    assert q.taps.tap("mlp_output", x) is x


@pytest.mark.parametrize("table", ["exact", "sglang-bf16", None])
def test_a_name_that_the_table_does_not_hold_is_refused(table):
    """By all that taps; without an arithmetic, too."""
    x = torch.ones(2, 2)
    calls = [
        lambda name: q.taps.tap(name, x),
        lambda name: ops.linear(name, x, x),
        lambda name: ops.matmul(name, x, x),
        lambda name: ops.add(name, x, x),
        lambda name: ops.multiply(name, x, x),
        lambda name: ops.apply(name, torch.tanh, x),
        lambda name: norms.rms_norm(name, x, x[0], 1e-6),
        lambda name: grouped.grouped_linear(name, x, x[None], torch.tensor([2])),
    ]
    for call in calls:
        with q.arithmetic.using(table or q.arithmetic.AS_GIVEN), pytest.raises(q.Qwen35Error, match="mlp_output"):
            call("mlp_outptu")
        call("mlp_output")


@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_recurrent(model, length, monkeypatch):
    chunked = recorded(model, ids_of(length))
    monkeypatch.setattr(deltanet, "chunked_delta_rule", deltanet.recurrent_delta_rule)
    assert_same(recorded(model, ids_of(length)), chunked)


def test_spans_of_the_chunked_rule_carry_the_state(model, monkeypatch):
    whole = recorded(model, ids_of(333))
    monkeypatch.setattr(deltanet, "SPAN", 128)
    assert_same(recorded(model, ids_of(333)), whole)


def test_blocks_of_queries(model, monkeypatch):
    whole = recorded(model, ids_of(65))
    monkeypatch.setattr("qwen35_moe.model.attention.QUERY_BLOCK", 16)
    in_blocks = recorded(model, ids_of(65))
    assert_same(in_blocks, whole, keys=[k for k in whole if k in in_blocks])


def test_scores_of_a_long_sequence_take_no_more_memory(monkeypatch):
    """128 queries on 1024 tokens: a block of scores is as large as on LONG tokens."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 64)
    monkeypatch.setattr(attention, "LONG", 256)
    generator = torch.Generator().manual_seed(2)
    q_BTNH, k_BSGH, v_BSGH = (torch.randn(1, n, 1, 4, generator=generator).double() for n in (128, 1024, 1024))
    sizes = []

    def watch(site, x):
        if site.name == "attn_probs":
            sizes.append(x.numel())

    with attach(watch):
        found = attention.attend(q_BTNH, k_BSGH, v_BSGH)
    assert max(sizes) == 64 * 256 and sum(sizes) == 128 * 1024
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q_BTNH, k_BSGH, v_BSGH)),
        attn_mask=torch.arange(1024) <= torch.arange(1024 - 128, 1024)[:, None],
    )
    assert rel_l2(found.transpose(1, 2), expected) <= FLOAT64_REORDERED


@pytest.mark.parametrize("length", LENGTHS)
def test_unfused_equals_fused(tiny, model, length):
    fused = q.load(tiny, shared_expert="fused")
    assert all(layer.mlp.shared_expert is None for layer in fused.layers)
    assert_same(recorded(fused, ids_of(length)), recorded(model, ids_of(length)))


def test_the_fused_slot_holds_the_bits_of_the_shared_expert(tiny, model):
    fused, shared, E = q.load(tiny, shared_expert="fused"), model.layers[0].mlp.shared_expert, model.config.num_experts
    gate_up, down = fused.layers[0].mlp.experts.at(E)
    assert torch.equal(gate_up, torch.cat((shared.gate_proj.weight, shared.up_proj.weight)))
    assert torch.equal(down, shared.down_proj.weight)


@pytest.mark.parametrize("sizes", [(1,) * 12, (5, 7), (64, 1, 1), (65, 3, 1)])
def test_cached_decode_equals_prefill(model, sizes):
    total = sum(sizes)
    ids, cache, pieces = ids_of(total), q.Cache(), []
    start = 0
    for size in sizes:
        pieces.append(recorded(model, ids[:, start : start + size], cache=cache))
        start += size
    whole = recorded(model, ids)

    def joined(key):
        B = ids.shape[0]
        parts = [piece[key] for piece in pieces]
        if ".moe_" in key or key.endswith("mlp_output") and parts[0].dim() == 2:  # tokens of the batch in one row
            return torch.cat([p.unflatten(0, (B, -1)) for p in parts], 1).flatten(0, 1)
        return torch.cat(parts, 1)

    per_token = [k for k in whole if "state" not in k and ".gain" not in k and k.split(".")[-1] not in
                 ("attn_qk", "attn_scores", "attn_probs", "gdn_conv", "gdn_conv_act")]  # fmt: skip
    assert_same({k: joined(k) for k in per_token}, whole, keys=per_token)
    states = [k for k in whole if k.endswith("gdn_state")]
    assert states
    for key in states:
        assert rel_l2(pieces[-1][key], whole[key]) <= FLOAT64_REORDERED


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_convolution_goes_on_where_it_stopped(width):
    x, weight = torch.randn(2, 9, 3, dtype=torch.float64), torch.randn(3, 1, width, dtype=torch.float64)
    state, pieces = torch.zeros(2, 3, width - 1, dtype=torch.float64), []
    whole, last = deltanet.causal_conv(x, weight, state, None)
    for piece in x.split((1, 2, 5, 1), 1):
        y, state = deltanet.causal_conv(piece, weight, state, None)
        pieces.append(y)
    assert rel_l2(torch.cat(pieces, 1), whole) <= FLOAT64_REORDERED
    assert torch.equal(state, last)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    lengths, width = (9, 70, 33), 70
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    alone = []
    for row, length in enumerate(lengths):
        sequence = ids_of(length, 1) + row
        at = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, at], mask[row, at] = sequence[0], 1
        alone.append(model(sequence)[0])
    together = model(ids, attention_mask=mask)
    for row, expected in enumerate(alone):
        assert rel_l2(together[row][mask[row].bool()], expected) <= FLOAT64_REORDERED


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_goes_on_through_its_cache(model, side):
    """Each sequence in three pieces of its own lengths, one of them empty, equals the sequence alone."""
    pieces = ((3, 5, 1), (8, 0, 2), (1, 9, 4))
    total = torch.zeros(3, dtype=torch.long)
    sequences = [ids_of(sum(p), 1)[0] + row for row, p in enumerate(pieces)]
    cache, got = q.Cache(), [[], [], []]
    for step in range(3):
        width = max(p[step] for p in pieces)
        ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
        for row, p in enumerate(pieces):
            at = slice(width - p[step], width) if side == "left" else slice(0, p[step])
            ids[row, at] = sequences[row][total[row] : total[row] + p[step]]
            mask[row, at] = 1
            total[row] += p[step]
        logits = model(ids, attention_mask=mask, cache=cache)
        for row in range(3):
            got[row].append(logits[row][mask[row].bool()])
    for row in range(3):
        assert rel_l2(torch.cat(got[row]), model(sequences[row][None])[0]) <= FLOAT64_REORDERED


def test_a_sequence_does_not_depend_on_its_neighbours(model):
    ids = ids_of(40, 3)
    changed = ids.clone()
    changed[1:] = (changed[1:] + 17) % 256
    assert rel_l2(model(changed)[0], model(ids)[0]) <= FLOAT64_REORDERED


def test_cache_is_cloned(model):
    ids, cache = ids_of(20), q.Cache()
    model(ids, cache=cache)
    branch = cache.clone()
    again = cache.clone()
    again.layer(0).state.zero_()  # in place, as a graph writes
    expected = model(ids[:, :3], cache=cache)
    assert torch.equal(model(ids[:, :3], cache=branch), expected)
    assert cache.length == 23


def test_weights_that_are_not_renormalised(model):
    x, gate = torch.randn(5, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    ids, weights = router.route(x, gate, 2, renormalise=False)
    assert torch.allclose(weights, (x @ gate.T).softmax(-1).gather(1, ids), rtol=1e-12)
    assert not moe.MoE(replace(model.config, norm_topk_prob=False)).renormalise


def test_eps_of_the_l2_norm_shows(model):
    """Keys and queries of norm about 1e-3 (recipe: short_heads): the eps inside the root is not negligible there."""
    seen = recorded(model, ids_of(64))
    norms = torch.cat([seen[k].norm(dim=-1).flatten() for k in seen if k.endswith(("gdn_q", "gdn_k"))])
    assert (norms < 0.9).double().mean() > 0.1
    assert (norms > 0.999).double().mean() > 0.3


@pytest.mark.parametrize("head_dim, factor, section", [(256, 0.25, (11, 11, 10)), (256, 0.5, (64, 0, 0)),
                                                       (64, 0.25, (8, 0, 0)), (128, 1, (64, 0, 0))])  # fmt: skip
def test_positions_of_a_text_model_need_no_sections(head_dim, factor, section):
    """transformers saves none unless it was given some."""
    text = real_config("qwen3.5-35b-a3b")["text_config"]
    config = q.Config.from_dict({**text, "head_dim": head_dim, "rope_parameters": {"partial_rotary_factor": factor}})
    assert config.mrope_section == section


def test_an_arithmetic_of_ones_own(tiny):
    mine = replace(q.tables.FLOAT32, name="mine", rounds={"moe_topk_weights": torch.bfloat16})
    theirs, ours = (q.load(tiny, arithmetic=a)(ids_of(7)) for a in ("float32", mine))
    assert 0 < rel_l2(ours, theirs) < 0.1


def test_a_name_of_its_own_goes_before_globs():
    table = q.Arithmetic("mine", torch.bfloat16, rounds={"moe_*": q.KEEP, "moe_topk_*": torch.float64,
                                                         "moe_topk_weights": torch.float32})  # fmt: skip
    found = [table.rounding(name) for name in ("moe_topk_weights", "moe_topk_probs", "final_norm")]
    assert found == [torch.float32, q.KEEP, torch.bfloat16]


def test_an_arithmetic_takes_the_place_of_the_one_around_it():
    x = torch.tensor([1 / 3], dtype=torch.float64)
    with q.arithmetic.using("transformers-bf16"):
        with q.arithmetic.using("exact"):
            assert q.taps.tap("final_norm", x) is x
        assert q.taps.tap("final_norm", x).dtype == torch.bfloat16


def test_a_sum_that_is_kept_is_wider_than_its_terms(tiny):
    run = q.trace(q.load(tiny, "sglang-bf16", "unfused", text_only=True), ids_of(7))
    h, y, total = (run[f"layers.1.{name}"] for name in ("layer_input", "attn_output", "pre_mlp_residual_sum"))
    assert h.dtype == y.dtype == torch.bfloat16
    assert torch.equal(total, h.float() + y.float())


def test_the_output_gate_that_the_config_names(model):
    x, z, w = (torch.randn(3, 8, dtype=torch.float64) for _ in range(3))
    weighted = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[0]
    gates = {"silu": z * z.sigmoid(), "swish": z * z.sigmoid(), "sigmoid": z.sigmoid()}
    for kind, gate in gates.items():
        chosen = deltanet.GatedDeltaNet(replace(model.config, output_gate_type=kind)).gate_type
        assert torch.allclose(norms.gated_rms_norm(x, z, w[0], 1e-6, chosen), weighted * gate, rtol=1e-12)
    newest = q.Config.from_dict(real_config("qwen3.8-2.4t-a95b"))
    assert (newest.output_gate_type, newest.num_hidden_layers) == ("swish", 92)


def test_every_tap_is_in_the_table(built):
    names = set()

    def observe(site, x):
        names.add(site.name)

    for recipe, table in (
        ("tiny", "sglang-bf16"),
        ("tiny-moe-mxfp4", "sglang-aiter-mxfp4"),
        ("tiny-fp8", "sglang-bf16+a8"),
        ("tiny", with_choices(q.arithmetic.get("sglang-bf16"), kv_cache="fp8_e4m3")),
    ):
        model, cache = q.load(built(recipe), table, "unfused", text_only=True), q.Cache()
        with attach(observe):
            model(ids_of(5), cache=cache)
            model(ids_of(1), cache=cache)
            q.load(built(recipe), table, "fused", text_only=True)(ids_of(5))
    text = {n for n in q.tap_names.TAPS if not n.startswith(("vis_", "mtp_", "image", "inputs"))}
    assert {n for n in names if not n.endswith(".gain")} == text
