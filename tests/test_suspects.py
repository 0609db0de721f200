"""Taps of a dump that holds neither choices of experts nor the stream: what is said of the few rows that are wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from qwen35_moe.oracle.judge.records import Record
from qwen35_moe.oracle.judge.replay import Captured
from qwen35_moe.oracle.judge.suspects import FLIPS, UNSAID, excuse, other_experts, suspects

KINDS, TOKENS = ("gdn", "gdn", "attn"), 40


@dataclass
class Work:
    """What `other_experts` reads of a judgement: at token 10 of the first layer other experts would be legal."""

    bad_at: dict[str, Tensor]
    undecided: dict[int, Tensor] = field(default_factory=lambda: {0: torch.arange(TOKENS) == 10})
    members: tuple[str, ...] = ("sglang-bf16",)

    @property
    def result(self) -> SimpleNamespace:
        return SimpleNamespace(members=self.members)

    @property
    def alignment(self) -> SimpleNamespace:
        return SimpleNamespace(truth=SimpleNamespace(ids=torch.zeros(1, TOKENS)))


def said(
    tokens: list[int], layer: int = 1, captured: str = "", nan: int = 0, members: tuple[str, ...] = ("all-bf16",)
) -> Record:
    """The record of a product of DeltaNet with these bad rows."""
    known, key = Captured(), f"layers.{layer}.gdn_z"
    if captured:
        known[captured] = torch.arange(TOKENS), torch.zeros(TOKENS, 2)
    record = Record(key, "wrong", "gdn", layer, added=14.0, rows=TOKENS, bad_rows=len(tokens), nan=nan)
    work = Work({key: torch.tensor([[0, t] for t in tokens])}, members=members)
    excuse([record], lambda r: other_experts(r, suspects(known, KINDS), work))
    return record


@pytest.mark.parametrize("tokens", [[10], [17], [12, 39]])
def test_few_rows_after_a_choice_that_could_differ_are_no_fault(tokens: list[int]) -> None:
    found = said(tokens)
    assert (found.cls, found.note) == ("not comparable", UNSAID)


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": [9, 17]},  # no choice before it could differ
        {"tokens": list(range(10, 10 + int(FLIPS * TOKENS) + 2))},  # more than flips make
        {"tokens": [17], "layer": 0},  # before the experts
        {"tokens": [17], "captured": "layers.1.layer_input"},
        {"tokens": [17], "nan": 1},
        {"tokens": [17], "members": ("float32", "float32/reversed")},
    ],
)
def test_all_else_is_one(options: dict) -> None:
    assert said(**options).cls == "wrong"
