"""Bad input gets one clear error: what, where, expected, found, what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import qwen35_moe as q
from qwen35_moe.model.config import FULL, LINEAR
from qwen35_moe.numerics.taps import attach
from qwen35_moe.run.origin import origin_of


@contextmanager
def refused(words: list[str]) -> Iterator[None]:
    """One error that says all these words."""
    with pytest.raises(q.Qwen35Error) as error:
        yield
    assert [word for word in words if word not in str(error.value)] == []


@pytest.fixture
def raw(built) -> dict:
    return json.loads((built("tiny") / "config.json").read_text())


def text(raw: dict) -> dict:
    return raw["text_config"]


# What is done to the text config, and what the error must say.
CONFIGS = {
    "a key is missing": (lambda c: c.pop("num_experts"), ["keys are missing", "num_experts"]),
    "two keys are missing": (lambda c: [c.pop(k) for k in ("hidden_size", "head_dim")], ["hidden_size, head_dim"]),
    "unknown key": (lambda c: c.update(num_expertz=4), ["unknown keys", "num_expertz", "'num_experts'?"]),
    "string for a number": (lambda c: c.update(hidden_size="64"), ["wrong type", "hidden_size", "int", "'64'"]),
    "half an expert": (lambda c: c.update(num_experts=8.5), ["wrong type", "num_experts", "8.5"]),
    "infinite": (lambda c: c.update(num_experts=float("inf")), ["wrong type", "num_experts"]),
    "true for a number": (lambda c: c.update(num_experts=True), ["wrong type", "num_experts", "True"]),
    "negative": (lambda c: c.update(num_hidden_layers=-1), ["bad value", "num_hidden_layers", "positive"]),
    "layer_types too short": (lambda c: c.update(layer_types=["linear_attention"]), ["layer_types", "entries"]),
    "layer_types unknown": (
        lambda c: c.update(layer_types=["mamba"] * c["num_hidden_layers"]),
        ["layer_types", "linear_attention", "mamba"],
    ),
    "layer_types no list": (lambda c: c.update(layer_types="full_attention"), ["wrong type", "layer_types"]),
    "too many experts a token": (lambda c: c.update(num_experts_per_tok=99), ["num_experts_per_tok", "at most"]),
    "heads do not divide": (lambda c: c.update(num_key_value_heads=3), ["num_key_value_heads", "divisor"]),
    "another activation": (lambda c: c.update(hidden_act="gelu"), ["hidden_act", "'silu'", "gelu"]),
    "another rope": (lambda c: c.update(rope_parameters={"rope_type": "su"}), ["rotary", "su"]),
    "sections do not add up": (
        lambda c: c["rope_parameters"].update(mrope_section=[1, 1, 1]),
        ["mrope_section", "add up"],
    ),
    "YaRN beside the rope": (
        lambda c: c.update(rope_scaling={"type": "yarn", "factor": 4.0}),
        ["two rotary embeddings", "rope_scaling", "yarn"],
    ),
    "rope is a list": (lambda c: c.update(rope_parameters=[1]), ["wrong type", "rope_parameters"]),
    "an output gate of unknown kind": (lambda c: c.update(output_gate_type="relu"), ["output_gate_type", "relu"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config(raw, case):
    change, words = CONFIGS[case]
    change(text(raw))
    with refused(words):
        q.Config.from_dict(raw)


def test_what_a_config_leaves_out(raw):
    """Older files have no `layer_types`: the last layer of each interval is full attention."""
    del text(raw)["layer_types"]
    assert q.Config.from_dict(raw).layer_types == (LINEAR, LINEAR, LINEAR, FULL)
    text(raw)["full_attention_interval"] = 2
    assert q.Config.from_dict(raw).layer_types == (LINEAR, FULL, LINEAR, FULL)


@pytest.mark.parametrize("top, inner, tied", [(True, False, True), (False, True, False), (None, True, True)])
def test_the_top_level_says_whether_the_head_is_tied(raw, top, inner, tied):
    text(raw)["tie_word_embeddings"] = inner
    raw |= {} if top is None else {"tie_word_embeddings": top}
    if top is None:
        raw.pop("tie_word_embeddings", None)
    assert q.Config.from_dict(raw).tie_word_embeddings is tied


def test_config_may_be_told_of_harmless_keys(raw):
    text(raw)["my_note"] = 1
    assert q.Config.from_dict(raw, ignore=["my_note"]).num_experts == text(raw)["num_experts"]


@pytest.mark.parametrize("content", [None, "{", "[1]", '{"text_config": 3}', "\x00", "[" * 100_000])
def test_config_file(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(q.Qwen35Error):
        q.Config.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def model(built):
    return q.load(built("tiny"))


SOME, LONG = torch.tensor([[1, 2, 3]]), torch.long
CALLS = [
    (torch.zeros(2, 0, dtype=LONG), {}, ["nothing to compute on", "[2, 0]"]),
    (torch.zeros(0, 3, dtype=LONG), {}, ["nothing to compute on", "[0, 3]"]),
    (torch.zeros(3, dtype=LONG), {}, ["nothing to compute on", "[3]"]),
    (None, {}, ["nothing to compute on", "neither"]),
    (torch.zeros(1, 3), {}, ["integers", "float32"]),
    (torch.tensor([[1, 256]]), {}, ["vocabulary", "input_ids[0, 1]", "256"]),
    (torch.tensor([[1, -2]]), {}, ["vocabulary", "-2"]),
    (SOME, {"attention_mask": torch.ones(1, 5)}, ["attention_mask", "[1, 3]"]),
    (SOME, {"attention_mask": torch.tensor([[1, 0, 1]])}, ["padding between"]),
    (SOME, {"position_ids": torch.zeros(1, 4, dtype=LONG)}, ["position_ids", "[1, 3]"]),
    (SOME, {"logits_to_keep": -1}, ["logits_to_keep", "1 or more"]),
    (SOME, {"logits_to_keep": 0}, ["logits_to_keep", "1 or more"]),
    (SOME, {"inputs_embeds": torch.zeros(1, 3, 65)}, ["inputs_embeds", "64", "[1, 3, 65]"]),
    (SOME, {"inputs_embeds": torch.zeros(1, 3, 64, dtype=LONG)}, ["inputs_embeds", "int64"]),
    (SOME, {"cache": q.Cache(length=1, next_position=torch.ones(2, dtype=LONG))}, ["another batch", "expected: 2"]),
]


@pytest.mark.parametrize("ids, kwargs, words", CALLS)
def test_what_a_model_refuses(model, ids, kwargs, words):
    with refused(words):
        model(ids, **kwargs)


def test_a_mask_that_contradicts_the_cache(model):
    cache = q.Cache()
    model(torch.tensor([[1, 2, 3]]), cache=cache, attention_mask=torch.tensor([[0, 1, 1]]))
    with pytest.raises(q.Qwen35Error, match="contradicts the cache"):
        model(torch.tensor([[4]]), cache=cache, attention_mask=torch.ones(1, 4))
    model(torch.tensor([[4]]), cache=cache, attention_mask=torch.tensor([[0, 1, 1, 1]]))


def test_ids_that_no_expert_has(model):
    def beyond(site, x):
        return x + 10 if site.name == "moe_slot_ids" else None

    fused = q.load(origin_of(model).checkpoint.path, shared_expert="fused", text_only=True)
    with pytest.raises(q.Qwen35Error, match="no such expert"), attach(beyond):
        fused(torch.tensor([[1, 2, 3]]))


def test_a_failed_call_leaves_the_cache_as_it_was(model):
    cache = q.Cache()
    model(torch.tensor([[1, 2, 3]]), cache=cache)
    before = cache.clone()
    with pytest.raises(q.Qwen35Error):
        model(torch.tensor([[1, 2, 3]]), cache=cache, attention_mask=torch.ones(1, 9))
    with pytest.raises(q.Qwen35Error):
        model(torch.tensor([[1, 999]]), cache=cache)
    with pytest.raises(q.Qwen35Error):
        model(torch.tensor([[1, 2]]), cache=cache, position_ids=torch.zeros(1, 5, dtype=torch.long))
    assert cache.length == before.length == 3
    ids, mask = torch.tensor([[4]]), torch.ones(1, 4)
    expected = model(ids, attention_mask=mask, cache=before)
    assert torch.equal(model(ids, attention_mask=mask, cache=cache), expected)


@pytest.mark.parametrize("path, kwargs, words", [
    ("tiny", {"arithmetic": "exakt"}, ["unknown arithmetic", "'exact'"]),
    ("tiny", {"shared_expert": "yes"}, ["shared_expert", "unfused"]),
    ("tiny", {"mode": "lazy"}, ["mode", "stream"]),
    (None, {}, ["no checkpoint", "None"]),
    (3, {}, ["no checkpoint", "3"]),
    ("nowhere", {}, ["nowhere"]),
    ("nowhere", {"device": "cuda:99"}, ["no such device", "load(device=...)"]),
    ("nowhere", {"device": "gpu"}, ["no such device", "gpu"]),
])  # fmt: skip
def test_what_load_cannot_use(built, path, kwargs, words):
    with refused(words):
        q.load(built(path) if path == "tiny" else path, **kwargs)


def test_names_that_no_table_has(model):
    tries = {
        "moe_topk_ids": lambda: q.trace(model, torch.tensor([[1, 2]]), taps="moe_topk_idz"),
        "moe_topk_weights": lambda: q.Arithmetic("mine", torch.float32, rounds={"moe_topk_weight": torch.bfloat16}),
        "moe_sum_order": lambda: q.Arithmetic("mine", torch.float32, switches={"moe_sum_order": "random"}),
    }
    for near, attempt in tries.items():
        with pytest.raises(q.Qwen35Error, match=near):
            attempt()
