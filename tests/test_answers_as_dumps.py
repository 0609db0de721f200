"""Saved answers of servers as dumps: ids first, every answer, routing and log p of the tokens that are named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_real_dumps import DATA, IDS, real, said

from qwen35_moe.errors import Qwen35Error
from qwen35_moe.oracle.compare import compare
from qwen35_moe.oracle.dumps.align import align
from qwen35_moe.oracle.dumps.readers import read_dump
from qwen35_moe.oracle.truth import write_truth
from qwen35_moe.trace.file import Trace

ANSWERS: list[Any] = json.loads((DATA / "base.response.json").read_text())
__all__ = ["real"]


@pytest.fixture(scope="module")
def truth(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("answers") / "truth"
    write_truth(real / "checkpoint", IDS, out, with_envelope=False)
    return out


def saved(folder: Path, change: Callable[[list[Any]], Any] = lambda found: None) -> Path:
    found = copy.deepcopy(ANSWERS)
    change(found)
    (folder / "answer.json").write_text(json.dumps(found))
    return folder / "answer.json"


def test_all_of_an_answer_is_read(truth: Path, tmp_path: Path) -> None:
    opened = Trace.open(truth)
    alignment = align(read_dump(saved(tmp_path), config=opened.meta["config"]), opened)
    assert alignment.matched == 69 and sorted(alignment.keys) == [
        *(f"layers.{i}.moe_topk_ids" for i in range(4)), "next_token_logits"]  # fmt: skip
    pair = alignment.pair("next_token_logits")
    assert pair.chosen is not None and pair.truth.shape == pair.engine.shape == pair.chosen.shape  # type: ignore[union-attr]
    assert set(pair.rows[:, 0].tolist()) == {0, 1}  # the second answer of the list too


def test_a_real_answer_agrees(real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, "diagnose", real / "checkpoint", saved(tmp_path), "--width", 120)
    assert code == 0 and "AGREES: 5 taps" in text and "71 of 71 tokens" in text


def off(found: list[Any]) -> None:
    for entry in found[1]["meta_info"]["input_token_logprobs"][5:9]:
        entry[0] -= 5
    for row in found[1]["meta_info"]["input_top_logprobs"][5:9]:
        for entry in row:
            entry[0] -= 5


def test_log_p_that_is_off_by_five(truth: Path, tmp_path: Path) -> None:
    """With routing that is right."""
    result = compare(truth, saved(tmp_path, off), diagnoses=0)
    assert result.exit_code == 1 and "tap next_token_logits" in result.verdict and result.first is not None
    assert result.first.starts == [(1, 4, "")] and result.first.bad_rows == 4


def test_an_answer_to_another_prompt(truth: Path, tmp_path: Path) -> None:
    """Is refused by its ids, before anything is compared; a missing one is told."""

    def other(found: list[Any]) -> None:
        for answer in found:
            for entry in answer["meta_info"]["input_token_logprobs"]:
                entry[1] = (entry[1] + 1) % 2000

    opened = Trace.open(truth)
    with pytest.raises(Qwen35Error, match="dump is of other tokens"):
        align(read_dump(saved(tmp_path, other), config=opened.meta["config"]), opened)
    alignment = align(read_dump(saved(tmp_path, lambda found: found.pop()), config=opened.meta["config"]), opened)
    assert alignment.tokens_of.absent == ["all of sequence 1 (26 tokens)"]
