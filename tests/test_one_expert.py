"""Faults of one expert in the answers of a server: found by the positions that chose it, and by nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35_moe.numerics import arithmetics
from qwen35_moe.oracle.report.servers import verdict_text
from qwen35_moe.oracle.servers.answer import Answer, row
from qwen35_moe.oracle.servers.one_expert import SingleExperts, firsts
from qwen35_moe.oracle.servers.probe import How, drawn_prompts, prepare
from qwen35_moe.oracle.servers.readers import read_answers
from qwen35_moe.oracle.truth import open_checkpoint
from qwen35_moe.run.experts import PackedExpert, PackedExperts
from qwen35_moe.run.load import build as build_model
from weights.build import build

DATA = Path(__file__).parent / "data"
P, T, E, A = 8, 50, 256, 8  # prompts, tokens of each, experts, chosen ones


def single(known: Any, clean: Tensor) -> SingleExperts:
    rows = torch.arange(P * T)
    return SingleExperts(known, known, rows // T, rows % T, clean)


@pytest.fixture
def known() -> SimpleNamespace:
    """What SingleExperts asks of a Replay and of a Branch."""
    g = torch.Generator().manual_seed(3)
    chosen = [torch.rand(P * T, E, generator=g).topk(A).indices for _ in range(4)]
    return SimpleNamespace(ids=torch.randint(1000, (P, T), generator=g), config=SimpleNamespace(num_experts=E),
                           routing=[(torch.empty(0), ids) for ids in chosen])  # fmt: skip


def noise(seed: int) -> Tensor:
    """z of rounding: a heavy tail, and in each prompt a flip that moves all positions after it."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(P, T, generator=g, dtype=torch.float64).abs() / torch.rand(P, T, generator=g).sqrt()
    after = torch.arange(T) >= torch.randint(T, (P, 1), generator=g)
    return torch.where(after, 4 * z, z).flatten()


def test_rounding_accuses_no_expert_and_a_broken_one_is_named(known: SimpleNamespace) -> None:
    tests = single(known, torch.stack([noise(seed) for seed in range(8)]))
    assert 0.5 < tests.shown / tests.count < 1 and 16 < tests.need < 25
    gains = []
    for seed in range(100, 200):
        accused, worst = tests.look(noise(seed))
        gains.append(worst.gain)
        assert not accused, (seed, worst)
    # a gain of G has a chance of e^-G: of 100 runs of 1,024 experts the median of the worst is log(1024 / log 2)
    assert abs(sorted(gains)[50] - 7.3) < 1
    busiest = int(known.routing[2][1].flatten().bincount().argmax())
    own, found = (known.routing[2][1] == busiest).any(1), 0
    for seed in range(100, 120):
        accused, _ = tests.look(noise(seed) * torch.where(own, 10, 1))
        assert all((x.layer, x.expert) == (2, busiest) for x in accused)
        found += len(accused)
    assert found >= 15, found


def test_one_prompt_accuses_no_expert_however_bad_it_is(known: SimpleNamespace) -> None:
    tests = single(known, torch.stack([noise(seed) for seed in range(8)]))
    z, own = noise(9), (known.routing[1][1] == 5).any(1)
    z[:T] *= 1e3  # a prompt as a whole says nothing of an expert
    assert not tests.look(z)[0]
    z[own & (torch.arange(P * T) < T)] *= 1e3
    assert not tests.look(z)[0]


def test_experts_with_positions_enough_are_those_that_can_be_accused(known: SimpleNamespace) -> None:
    """One prompt accuses none, and nothing sets an expert apart that nearly all tokens choose."""
    clean = torch.stack([noise(seed) for seed in range(8)])
    rows = torch.arange(T)
    alone = SingleExperts(known, known, torch.zeros(T, dtype=torch.long), rows, clean[:, :T])
    assert alone.positions.sum() == 4 * A * T and alone.shown == 0
    for _, chosen in known.routing:
        chosen[:] = torch.arange(A)
        chosen[::100] += A
    tests = single(known, clean)
    assert tests.positions[:, :A].eq(P * T - 4).all() and tests.shown == 0


def test_an_expert_that_differs_less_than_legal_ones_is_not_accused(known: SimpleNamespace) -> None:
    """An engine that computes one expert in bf16 and all else in float32, as kernels that are chosen by an expert's
    number of tokens may do."""
    tests = single(known, torch.stack([noise(seed) for seed in range(8)]))
    own = (known.routing[2][1] == int(known.routing[2][1].flatten().bincount().argmax())).any(1)
    for much, count in ((1e-3, 0), (10, 1)):
        accused, worst = tests.look(noise(9) * torch.where(own, much, 1e-6))
        assert worst.gain > tests.need and worst.ratio > 100 and len(accused) == count


def test_a_ratio_to_nothing_is_a_number(known: SimpleNamespace) -> None:
    """Answers may be those of the truth itself, but at one expert's positions."""
    tests = single(known, torch.stack([noise(seed) for seed in range(8)]))
    own = (known.routing[2][1] == int(known.routing[2][1].flatten().bincount().argmax())).any(1)
    accused, _ = tests.look(torch.where(own, 100.0, 0.0).double())
    assert json.loads(json.dumps([x.ratio for x in accused], allow_nan=False)) == [1000.0]
    assert tests.look(torch.zeros(P * T, dtype=torch.float64))[1].ratio == 1


def test_equal_values_and_tokens_that_repeat_speak_of_nothing(known: SimpleNamespace) -> None:
    tests = single(known, torch.ones(2, P * T, dtype=torch.float64))
    accused, worst = tests.look(torch.ones(P * T, dtype=torch.float64))
    assert not accused and worst.gain == pytest.approx(0.6931, abs=1e-3)  # log 2
    known.ids[:] = torch.tensor([4, 9]).repeat(T // 2)
    for _, chosen in known.routing:  # a token's experts are always the same, and one token is worse than the other
        chosen[:] = chosen[:2].repeat(P * T // 2, 1)
    z = torch.tensor([1.0, 5.0], dtype=torch.float64).repeat(P * T // 2)
    assert not single(known, torch.rand(2, P * T, dtype=torch.float64)).look(z)[0]


def test_the_first_of_equal_pairs_counts() -> None:
    assert firsts(torch.tensor([-1, 3, 4, 3, 4]), torch.tensor([3, 4, 3, 4, 4])).tolist() == [0, 1, 2, 4]


def exchanged(read: Callable[[int], PackedExpert]) -> Callable[[int], PackedExpert]:
    return lambda e: read({20: 41, 41: 20}.get(e, e))


def test_two_experts_of_many_exchanged_are_named(tmp_path: Path) -> None:
    """An engine in bf16 whose layer holds two of 64 experts in each other's place: no fault of the catalogue."""
    path = build("tiny", tmp_path / "many", text_config={"num_experts": 64, "num_experts_per_tok": 4}, mtp=False)
    loaded = open_checkpoint(path)[1]
    ids = drawn_prompts(loaded.source.config, 12, 50)
    known = prepare(loaded.source, loaded.fused, ids, How(faults="none"))
    model = build_model(loaded.source, arithmetics.get("sglang-bf16"), loaded.fused, torch.device("cpu"), "decoded")
    findings = []
    for broken in (False, True):
        if broken:
            experts = model.layers[1].mlp.experts
            assert isinstance(experts, PackedExperts)
            experts.read = exchanged(experts.read)
        log_p = model(torch.tensor(ids)).double().log_softmax(-1)
        answers = []
        for one, x in zip(ids, log_p, strict=True):
            told = [x[t].topk(8).indices.tolist() + [one[t + 1]] for t in range(len(one) - 1)]
            rows = [row(t + 1, [(i, float(x[t, i])) for i in dict.fromkeys(some)], True) for t, some in enumerate(told)]
            answers.append(Answer("test", one, rows))
        findings.append(known.judge(answers))
    clean, found = findings
    assert clean.finding == "cannot tell without a dump" and not clean.experts  # no fault was replayed
    assert found.finding == "diverges" and {(x.layer, x.expert) for x in found.experts} <= {(1, 20), (1, 41)}
    what = "a fault of one expert" if len(found.experts) == 1 else "faults of single experts"
    assert f"it looks like {what}: {found.experts[0]}" in verdict_text(found).replace("\n", " ")
    assert json.loads(json.dumps(found.to_dict()))["experts"][0]["layer"] == 1


def test_a_real_sglang_agrees_and_broken_it_diverges(tmp_path: Path) -> None:
    """SGLang 0.5.17 on an H200, 8 prompts of 64 tokens: as released, and with one layer broken in memory."""
    path = build(DATA / "real" / "engine-size.toml", tmp_path / "size", flat=True, mtp=False)
    loaded = open_checkpoint(path)[1]
    answers = {name: read_answers(DATA / "servers" / f"sglang_512_{name}.jsonl")
               for name in ("clean", "experts-swapped", "rotary-theta")}  # fmt: skip
    ids = [a.ids[:64] for a in answers["clean"]]
    known = prepare(loaded.source, loaded.fused, ids, How(faults="all"))
    verdicts = {name: known.judge(some) for name, some in answers.items()}
    assert verdicts["clean"].finding == "agrees", verdicts["clean"]
    assert all(0.3 < q.ratio < 1.5 for q in verdicts["clean"].quantiles)
    assert {(x.layer, x.expert) for x in verdicts["experts-swapped"].experts} == {(1, 0), (1, 1)}
    assert [e.name for e in verdicts["rotary-theta"].alike] == ["rotary theta 10000, all layers"]
    assert verdicts["experts-swapped"].finding == verdicts["rotary-theta"].finding == "diverges"
