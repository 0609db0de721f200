"""The matrix of docs/exit-codes.md, row by row."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen35_moe.errors import Qwen35Error
from qwen35_moe.oracle.judge.diagnosis import Weight
from qwen35_moe.oracle.judge.records import Comparison, Record

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (Path(__file__).parents[1] / "docs/exit-codes.md").read_text().splitlines()
    if line.startswith("| ")
][1:]
GOOD = Record("layers.0.mlp_output", "within rounding", "mlp", 0, 1.0)
BAD = Record("layers.1.mlp_output", "wrong", "mlp", 1, 9.0)
LOST = {"absent": ["the last 4 tokens of sequence 0"], "tokens": (36, 40)}
CASES = [
    [Comparison([GOOD, BAD]), Comparison([GOOD, BAD], **LOST), Comparison([GOOD], weights=[Weight("w", "wrong")]),
     Comparison([GOOD, Record("positions", "wrong", "positions", None, float("inf"), note="1 of 2")])],
    [Comparison([Record("embed_tokens", "missing", "embedding", None)])],
    [Comparison([GOOD], problems=[Qwen35Error("truncated")]),
     Comparison([GOOD, Record("final_norm", "not comparable", "final_norm", None)], **LOST)],
    [Comparison([GOOD], holes=["layers.1.mlp_output"])],
    [Comparison([GOOD], **LOST)],
    [Comparison([GOOD]), Comparison([GOOD], tokens=(36, 40))],
]  # fmt: skip


@pytest.mark.parametrize(("row", "cases"), list(zip(ROWS, CASES, strict=True)), ids=[row[0][:30] for row in ROWS])
def test_matrix(row: list[str], cases: list[Comparison]) -> None:
    begins = row[1].strip("`").replace("N of M", "36 of 40")
    for result in cases:
        assert result.verdict.startswith(begins), result.verdict
        assert result.exit_code == int(row[2])
        result.partial = True
        assert result.exit_code == int(row[3])
