"""Continuations: equal to transformers' and llama.cpp's, however they are computed; and what is said of each token."""

from __future__ import annotations

import json
from collections import Counter
from importlib import import_module
from itertools import islice
from typing import Any

import pytest
import torch
from fixture_models import FIXTURES, read
from peers.transformers_model import load_transformers, quiet
from tolerances import FLOAT32_LOG_P, FLOAT64_REORDERED
from torch import Tensor

import qwen35_moe as q
from qwen35_moe.model.mtp import draft_head, with_hidden
from qwen35_moe.numerics import arithmetics as arithmetic
from qwen35_moe.numerics import taps
from qwen35_moe.numerics.tap_keys import base_name, dims_of
from qwen35_moe.numerics.tap_table import TAPS
from qwen35_moe.run.generate import Sampling, Step, generate, score, uniform
from qwen35_moe.run.prompt import embed_prompt

MODULE = import_module("qwen35_moe.run.generate")  # whose name in the package is the function
RIGHT = torch.tensor([[1, 1, 0]])
LLAMA_CPP = json.loads((FIXTURES.parent / "greedy" / "llamacpp.json").read_text())


def whole(dtype: torch.dtype) -> q.Model:
    model, model.mtp, model.visual = read("bf16-hub", dtype)
    return model


@pytest.fixture(scope="module")
def exact() -> q.Model:
    return whole(torch.float64)


@pytest.fixture(scope="module")
def image(exact: q.Model, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """A prompt with an image, embedded."""
    inputs = {name: expected[f"image/{name}"] for name in ("input_ids", "pixel_values", "image_grid_thw")}
    return embed_prompt(exact, inputs.pop("input_ids").long(), **inputs)


def ids_of(steps: Any) -> list[int]:
    return [step.id for step in steps]


FLOAT64, FLOAT32 = torch.float64, torch.float32


@pytest.mark.parametrize(("case", "dtype"), [*((case, FLOAT64) for case in LLAMA_CPP), (LLAMA_CPP[0], FLOAT32)])
def test_greedy_equals_llama_cpp(expected: dict[str, Tensor], case: dict[str, Any], dtype: torch.dtype) -> None:
    """100 tokens, and their log p."""
    model = whole(dtype)
    steps = list(generate(model, expected["ids"][case["row"], : case["prompt_tokens"]].long(), 100))
    assert ids_of(steps) == case["continuation"]
    assert max(abs(s.log_p - theirs) for s, theirs in zip(steps, case["log_p"], strict=True)) < FLOAT32_LOG_P


def theirs(**inputs: Any) -> list[int]:
    """100 tokens of transformers' own greedy `generate`, in float32."""
    model = load_transformers(FIXTURES / "bf16-hub", torch.float32)
    settings = {"max_new_tokens": 100, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with quiet():
        found = model.generate(**inputs, **settings)
    return found[0, inputs["input_ids"].shape[1] :].tolist()


def test_greedy_equals_transformers(exact: q.Model, expected: dict[str, Tensor]) -> None:
    prompt = expected["ids"][:1, :10].long()
    assert ids_of(generate(exact, prompt, 100)) == theirs(input_ids=prompt)


def test_greedy_after_an_image_equals_transformers(exact, expected, image):
    names = ("input_ids", "pixel_values", "image_grid_thw", "mm_token_type_ids")
    inputs = {name: expected[f"image/{name}"] for name in names}
    inputs |= {"input_ids": inputs["input_ids"].long(), "mm_token_type_ids": inputs["mm_token_type_ids"].long()}
    assert ids_of(generate(exact, image, 100)) == theirs(**inputs)


@pytest.mark.parametrize(("settings", "drafts"), [
    (Sampling(), 4), (Sampling(temperature=1.3, seed=5), 1), (Sampling(temperature=1.3, top_k=9, top_p=0.8, seed=5), 3),
], ids=["greedy", "sampled", "cut"])  # fmt: skip
def test_speculation_changes_no_token(exact, expected, image, settings, drafts):
    for prompt in (expected["ids"][:1, :10].long(), image):
        plain = list(generate(exact, prompt, 12, settings, top=2))
        ahead = list(generate(exact, prompt, 12, settings, top=2, drafts=drafts))
        assert ids_of(plain) == ids_of(ahead)
        for a, b in zip(plain, ahead, strict=True):
            assert abs(a.log_p - b.log_p) < FLOAT64_REORDERED and a.rank == b.rank
            assert [i for i, _ in a.top] == [i for i, _ in b.top]


def test_right_drafts_are_counted_and_save_passes(exact: q.Model, expected: dict[str, Tensor]) -> None:
    """With the model's own continuation as drafts, each pass yields drafts + 1 tokens; with wrong ones, a single."""
    prompt = expected["ids"][:1, :10].long()
    plain = ids_of(generate(exact, prompt, 21))
    passes = Counter[str]()

    def right(place: int, steps: int) -> list[int]:
        return plain[place : place + steps]

    for name, guess in (("right", right), ("wrong", lambda place, steps: [(i + 1) % 256 for i in right(place, steps)])):
        done = [1]

        def drafted(*_: Any, steps: int, guess: Any = guess, done: list[int] = done, **__: Any) -> tuple[Tensor, None]:
            return torch.tensor([guess(done[0], steps)]), None

        def count(site: taps.Site, x: Tensor, name: str = name) -> None:
            passes[name] += site.name == "next_token_logits"

        with pytest.MonkeyPatch.context() as patch, taps.attach(count):
            patch.setattr(MODULE, "draft", drafted)
            steps = []
            for step in generate(exact, prompt, 21, drafts=4):
                steps.append(step)
                done[0] = len(steps)
        assert ids_of(steps) == plain
        assert [s.drafted for s in steps] == [name == "right" and i % 5 != 0 for i in range(21)]
    assert passes == {"right": 5, "wrong": 1 + 20 + 19}  # after a wrong draft, what was right is fed again


def test_forced_tokens_get_the_log_p_of_prefill(exact: q.Model, expected: dict[str, Tensor]) -> None:
    """In pieces, with a cache: as one pass over prompt and tokens. The likeliest token has rank 0."""
    ids = expected["ids"][0].long()
    log_p = exact(ids[None])[0].log_softmax(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "SCORED_AT_ONCE", 7)
        steps = list(score(exact, ids[:10], ids[10:].tolist(), top=3))
    assert ids_of(steps) == ids[10:].tolist()
    for step, row in zip(steps, log_p[9:-1], strict=True):
        assert abs(step.log_p - row[step.id].item()) < FLOAT64_REORDERED
        assert step.rank == int((row > row[step.id]).sum())
        assert [i for i, _ in step.top] == row.topk(3).indices.tolist()
        assert step.rank > 2 or step.top[step.rank][0] == step.id


def test_the_order_of_a_prompts_parts_does_not_matter(exact: q.Model, image: dict[str, Tensor]) -> None:
    assert next(iter(image)) != "position_ids"
    turned = dict(reversed(list(image.items())))
    assert ids_of(generate(exact, turned, 4)) == ids_of(generate(exact, image, 4))


def test_scoring_a_greedy_continuation_finds_it_greedy(exact: q.Model, image: dict[str, Tensor]) -> None:
    plain = list(generate(exact, image, 12))
    again = list(score(exact, image, ids_of(plain)))
    assert all(step.rank == 0 for step in again)
    assert max(abs(a.log_p - b.log_p) for a, b in zip(plain, again, strict=True)) < FLOAT64_REORDERED


def test_stop_and_length(exact: q.Model) -> None:
    plain = ids_of(generate(exact, [1, 2, 3], 9))
    stop = plain[4]
    for drafts in (0, 3):
        assert ids_of(generate(exact, [1, 2, 3], 9, stop=[stop], drafts=drafts)) == plain[: plain.index(stop) + 1]
        assert [ids_of(generate(exact, [1, 2, 3], n, drafts=drafts)) for n in (0, 1, 2)] == [[], plain[:1], plain[:2]]
    assert ids_of(islice(generate(exact, [1, 2, 3], 10**9), 3)) == plain[:3]  # handed out one by one


@pytest.mark.parametrize("drafts", [0, 2])
def test_no_logits_of_a_prompt_but_its_last_are_computed(exact: q.Model, drafts: int) -> None:
    """They are 2 MB a token in float64 at the real vocabulary."""
    rows: list[int] = []

    def see(site: taps.Site, x: Tensor) -> None:
        if site.name == "next_token_logits":
            rows.append(x.shape[1])

    with taps.attach(see):
        list(generate(exact, range(40), 6, drafts=drafts))
    assert rows and max(rows) == drafts + 1


def test_probabilities_are_cut_as_they_say() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log()
    for settings, kept in (
        (Sampling(1.0), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(1.0, top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1.0, top_p=0.7), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1.0, top_p=0.71), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Sampling(1.0, top_p=0.001), [0, 1, 0, 0]),
        (Sampling(1.0, top_k=2, top_p=0.58), [0, 4 / 7, 0, 3 / 7]),  # 0.57 of what top_k left
        (Sampling(1.0, top_k=2, top_p=0.57), [0, 1, 0, 0]),
        (Sampling(0.5, top_k=9), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
    ):
        torch.testing.assert_close(settings.probabilities(logits), torch.tensor(kept).double(), rtol=0, atol=1e-7)
    ties = Sampling(1.0, top_k=2).probabilities(torch.zeros(4, dtype=torch.float64))
    assert ties.tolist() == [0.5, 0.5, 0, 0]


def test_sampled_tokens_follow_their_probabilities() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log()
    drawn = Counter(Sampling(1.0, seed=seed).choose(logits, n) for seed in range(20) for n in range(200))
    for token, p in enumerate((0.1, 0.4, 0.2, 0.3)):
        assert abs(drawn[token] / 4000 - p) < 4 * (p * (1 - p) / 4000) ** 0.5  # four standard deviations


def test_the_hash_is_splitmix64() -> None:
    """The first outputs for seed 0 by its authors' C program, and numbers pinned for good."""
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [uniform(0, n) for n in range(3)] == [(x >> 11) / 2**53 for x in outputs]
    pinned = (0.275707444980814, 0.9082482092014413, 0.2672497128959862)
    assert (uniform(5, 0), uniform(5, 1), uniform(-1, 7)) == pinned


@pytest.mark.parametrize(("call", "words"), [
    (lambda m: Sampling(temperature=-1.0), "temperature"), (lambda m: Sampling(top_p=0.0), "top_p"),
    (lambda m: Sampling(top_k=-1), "top_k"), (lambda m: list(generate(m, [1], -1)), "max_new_tokens"),
    (lambda m: list(generate(m, torch.ones(2, 3).long())), "one sequence at a time"),
    (lambda m: next(generate(m, embed_prompt(m, torch.ones(2, 3).long()))), "one sequence at a time"),
    (lambda m: next(score(m, embed_prompt(m, RIGHT, attention_mask=RIGHT), [1])), "without padding"),
    (lambda m: list(generate(q.load(FIXTURES / "bf16-hub", text_only=True), [1], drafts=2)), "without text_only"),
    (lambda m: list(generate(m, [])), "B and T at least 1"),
])  # fmt: skip
def test_what_cannot_be_done_is_named(exact: q.Model, call: Any, words: str) -> None:
    with pytest.raises(q.Qwen35Error, match=words):
        call(exact)


def test_nan_is_not_a_token() -> None:
    model = q.load(FIXTURES / "bf16-hub", "float32", text_only=True)
    model.norm.weight.fill_(torch.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(q.Qwen35Error, match="logits hold NaN"):
            list(generate(model, [1, 2], 3, Sampling(temperature)))


def test_every_tap_of_tower_and_draft_head_is_in_the_table(exact: q.Model, expected: dict[str, Tensor]) -> None:
    seen: dict[str, int] = {}
    inputs = {name: expected[f"image/{name}"] for name in ("pixel_values", "image_grid_thw")}
    with taps.attach(lambda site, x: seen.update({site.key: x.dim()})):
        prompt = embed_prompt(exact, expected["image/input_ids"].long(), **inputs)
        _, hidden = with_hidden(exact, **prompt)
        positions = prompt["position_ids"]
        draft_head(exact, exact.mtp, None, hidden, position_ids=positions, next_embeds=prompt["inputs_embeds"])
    for key, rank in seen.items():
        name = base_name(key)
        assert name.endswith(".gain") or name in TAPS, key
        dims_of(name, rank)
    named = {name for name in TAPS if name.startswith(("vis_", "mtp_", "image_", "inputs_"))}
    assert named <= {base_name(key) for key in seen}
    with arithmetic.using(exact.arithmetic):
        assert isinstance(next(generate(exact, prompt)), Step)
