"""Experts all at once, and decoding in buffers of fixed size: the same functions as the plain forms, on any device."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from itertools import islice

import pytest
import torch
from peers.transformers_model import load_transformers, logits_of
from tolerances import FLOAT64_REORDERED
from torch import Tensor

import qwen35_moe as q
from qwen35_moe.model import moe
from qwen35_moe.numerics import arithmetics as arithmetic
from qwen35_moe.numerics.metrics import rel_l2
from qwen35_moe.oracle.judge.split_k import split_products, splitting
from qwen35_moe.quant import mxfp4
from qwen35_moe.quant.packed import concatenate
from qwen35_moe.run import fill
from qwen35_moe.run.generate import generate
from qwen35_moe.run.gpu import grouped, grouped_experts
from qwen35_moe.run.gpu.graphs import DecodeGraph, PrefillGraph, can_capture
from qwen35_moe.run.gpu.grouped_experts import ResidentExperts, stack_experts
from qwen35_moe.run.gpu.passing import PassingExperts

MODULE = import_module("qwen35_moe.run.generate")  # whose name in the package is the function
TABLES = ("exact", "float32", "transformers-bf16", "sglang-bf16", "sglang-aiter-mxfp4", "sglang-aiter-mxfp4/scatter")
T, A, E, D, F = 23, 4, 9, 64, 32


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def routed(tokens: int) -> tuple[Tensor, Tensor]:
    """Ids [T, A], different within a row, and weights; expert 8 is never hit."""
    draw = torch.Generator().manual_seed(tokens)
    ids = torch.stack([torch.randperm(E - 1, generator=draw)[:A] for _ in range(tokens)])
    return ids, torch.rand(tokens, A, dtype=torch.float64, generator=draw)


@pytest.mark.parametrize("order", ["expert", "slot", "slot-reversed", "torch.sum"])
@pytest.mark.parametrize("name", TABLES)
def test_grouped_is_the_loop(name: str, order: str) -> None:
    """On a CPU the same products in the same order: the same bits, whatever the table rounds."""
    table = arithmetic.get(name)
    table = replace(table, switches={**table.switches, "moe_sum_order": order})
    dtype = table.weight_dtype("experts")
    weights_of = drawn(E, 2 * F, D, dtype=dtype), drawn(E, D, F, dtype=dtype, seed=1)
    plain, experts = (kind(*weights_of, quantised=True) for kind in (moe.DecodedExperts, ResidentExperts))
    ids, weights = routed(T)
    weights = weights.to(torch.promote_types(dtype, torch.float32))  # in bf16 a product with bf16 would be exact
    x = drawn(T, D, dtype=dtype, seed=2)
    with arithmetic.using(table):
        loop = plain.combine(x, ids, weights)
        assert torch.equal(experts.combine_grouped(x, ids, weights), loop)
        assert torch.equal(experts.combine(x, ids, weights), loop)


@pytest.mark.parametrize("order", [None, 2, 3])
def test_groups_are_split_as_a_whole(order: int | None) -> None:
    """Split-K takes shares of all experts at once, to the bits of the shares of each."""
    table = split_products(arithmetic.get("sglang-bf16"), 2, order)
    weights_of = drawn(E, 2 * F, D, dtype=table.dtype), drawn(E, D, F, dtype=table.dtype, seed=1)
    plain, experts = moe.DecodedExperts(*weights_of), ResidentExperts(*weights_of)
    (ids, weights), x = routed(T), drawn(T, D, dtype=table.dtype, seed=2)
    with arithmetic.using(table):
        whole = plain.combine(x, ids, weights.float())
        with splitting(table):
            loop = plain.combine(x, ids, weights.float())
            assert torch.equal(experts.combine_grouped(x, ids, weights.float()), loop)
    assert not torch.equal(whole, loop)


def test_one_padded_product_is_the_products_of_all_experts() -> None:
    counts = [3, 0, 7, 1, 0]
    x, weight = drawn(sum(counts), D), drawn(len(counts), F, D, seed=1)
    each = [one @ w.T for one, w in zip(x.split(counts), weight, strict=True)]
    assert rel_l2(grouped.padded_linear(x, weight, counts), torch.cat(each)) <= FLOAT64_REORDERED
    ends = torch.tensor(counts).cumsum(0)
    assert rel_l2(grouped.looped_linear(x, weight, ends), torch.cat(each)) <= FLOAT64_REORDERED


@pytest.mark.parametrize("tokens", [3, T])
def test_packed_experts_pair_by_pair_and_in_batches(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_experts, "EXPERTS_PER_BATCH", 4)
    monkeypatch.setattr(grouped_experts, "FEW_PAIRS", 3 * A)
    gates, ups, downs = (
        [mxfp4.PackedMXFP4(*mxfp4.encode(drawn(*shape, seed=10 * i + e))) for e in range(E)]
        for i, shape in enumerate([(F, D), (F, D), (D, F)])
    )
    stored = [(concatenate(gate, up), down) for gate, up, down in zip(gates, ups, downs, strict=True)]
    packed = stack_experts(stored, torch.float64, torch.device("cpu"), quantised=True)
    assert packed is not None
    decoded = moe.DecodedExperts(*packed.decoded(slice(None)), quantised=True)
    assert torch.equal(decoded.gate_up_proj[5], stored[5][0].decode(torch.float64))
    monkeypatch.setattr(fill, "NUMBERS_AT_ONCE", 3 * D * F)
    for stack, parameter in ((packed.gate_up, decoded.gate_up_proj), (packed.down, decoded.down_proj)):
        fill.decode_stacked(stack, out := torch.zeros_like(parameter))
        assert torch.equal(out, parameter)
    ids, weights = routed(tokens)
    x = drawn(tokens, D, seed=2)
    loop = decoded.combine(x, ids, weights)
    assert rel_l2(packed.combine_grouped(x, ids, weights), loop) <= FLOAT64_REORDERED
    passing = PassingExperts(E, F, stored.__getitem__, torch.float64, True, torch.device("cpu"), stored=lambda e: ())
    assert torch.equal(passing.combine_grouped(x, ids, weights), loop)
    assert torch.equal(passing.combine(x, ids, weights), loop)


def test_only_mxfp4_is_stacked() -> None:
    plain = q.quant.packed.Float(drawn(4, 4))
    assert stack_experts([(plain, plain)], torch.float64, torch.device("cpu"), quantised=False) is None


@pytest.fixture(scope="module")
def model(built):
    return q.load(built("tiny"), shared_expert="unfused")


def test_decoding_in_buffers_of_fixed_size(model) -> None:
    ids = torch.arange(40).view(2, 20) * 7 % 256
    cache = q.Cache()
    model(ids[:, :15], cache=cache)
    fixed = DecodeGraph(model, cache.clone(), capacity=20)
    for t in range(15, 20):
        assert rel_l2(fixed.step(ids[:, t : t + 1]), model(ids[:, t : t + 1], cache=cache)) <= FLOAT64_REORDERED
    with pytest.raises(q.Qwen35Error, match="no room"):
        fixed.step(ids[:, :1])


def test_what_decoding_cannot_start_from(model) -> None:
    ids, cache = torch.ones(1, 4, dtype=torch.long), q.Cache()
    with pytest.raises(q.Qwen35Error, match="0 tokens"):
        DecodeGraph(model, cache, capacity=8)
    model(ids, cache=cache, attention_mask=torch.tensor([[0, 1, 1, 1]]))
    with pytest.raises(q.Qwen35Error, match="padding"):
        DecodeGraph(model, cache, capacity=8)


def test_prefill_again_and_again(model) -> None:
    ids = torch.arange(20).view(1, 20)
    again = PrefillGraph(model, ids)
    assert torch.equal(again(ids + 3), model(ids + 3))
    assert torch.equal(again(ids), model(ids)) and again.cache.length == 20


def test_a_continuation_by_graphs_is_the_same(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the steps run directly. A graph that is full hands its cache on; watched, nothing is captured."""
    plain = [step.id for step in generate(model, [1, 2, 3], 12)]
    monkeypatch.setattr(MODULE, "can_capture", lambda model: True)
    made = []
    monkeypatch.setattr(MODULE, "DecodeGraph", lambda *args: made.append(DecodeGraph(*args)) or made[-1])
    monkeypatch.setattr(MODULE, "ROOM", 5)
    assert [step.id for step in generate(model, [1, 2, 3], 12)] == plain
    assert [(graph.capacity, graph.capture) for graph in made] == [(5, True), (10, True), (15, True)]
    steps = generate(model, [1, 2, 3], 12)
    ids = [step.id for step in islice(steps, 4)]
    with q.taps.attach(lambda site, x: None):
        ids += [step.id for step in steps]
    assert ids == plain and [(graph.capacity, graph.capture) for graph in made[3:]] == [
        (5, True), (10, True), (10, False), (15, False)
    ]  # fmt: skip


def test_what_can_be_captured_needs_a_gpu(model) -> None:
    assert not can_capture(model)
    assert not grouped.has_grouped_mm(torch.bfloat16, torch.device("cpu"))
    assert grouped.has_grouped_mm(torch.bfloat16, torch.device("cuda"), 24)
    assert not grouped.has_grouped_mm(torch.bfloat16, torch.device("cuda"), 20)
    assert not grouped.has_grouped_mm(torch.float32, torch.device("cuda"), 24)


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (1, 70)])
def test_the_sum_of_grouped_mm_is_that_of_transformers(built, shape: tuple[int, int]) -> None:
    """Bit for bit, on checkpoints whose rows its product takes; in eager's arithmetic other bits come out."""
    path = built("tiny")
    ids = torch.arange(shape[0] * shape[1]).view(shape) * 7919 % 256
    theirs = logits_of(load_transformers(path, torch.bfloat16, experts="grouped_mm"), ids)
    for name, same in (("transformers-bf16/grouped_mm", True), ("transformers-bf16", False)):
        model = q.load(path, name, "unfused", text_only=True)
        assert torch.equal(model(ids), theirs) == same
        assert torch.equal(q.trace(model, ids, experts=True)["next_token_logits"], model(ids))
