"""The pages of docs/: tables are current, code blocks run, links lead somewhere, what is named is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import qwen35_moe as q
from docs import make_taps
from qwen35_moe.errors import Qwen35Error
from qwen35_moe.numerics.arithmetics import ARITHMETICS
from qwen35_moe.numerics.tap_table import TAPS
from qwen35_moe.oracle.dumps.readers import read_dump
from qwen35_moe.oracle.judge.diagnosis import Weight
from qwen35_moe.oracle.judge.records import Comparison, Record
from weights.build import build

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)


def test_table_of_taps_is_current() -> None:
    text = make_taps.TARGET.read_text(encoding="utf-8")
    assert text == make_taps.page(), "run: python -m docs.make_taps"
    assert all(f"| `{name}` |" in text for name in TAPS)


def test_extending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    try:
        for block in blocks("extending.md"):
            exec(compile(block, "extending.md", "exec"), names)
    finally:
        ARITHMETICS.pop("my-engine", None)
    assert len(blocks("extending.md")) == 4


def test_trace_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    model = q.load(build("tiny", tmp_path / "tiny"), text_only=True)
    q.trace(model, torch.tensor([[5, 17, 200]]), out="truth")
    read, write = blocks("trace-format.md")
    exec(compile(read, "trace-format.md", "exec"), {})
    assert "layers.3.moe_topk_ids t a torch.Size([3, 3])" in capsys.readouterr().out
    exec(compile(write, "trace-format.md", "exec"), {})
    dump = read_dump(tmp_path / "mine")
    assert dump["layers.3.mlp_output"].shape == (3, 64)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda p: p.name)
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


# `name` or `Class.name`, then the file in brackets behind it.
NAMED = re.findall(r"`([A-Za-z_][\w.]*)`s?\s+\(`([\w/]+\.py)`\)", read("architecture.md") + read("judge.md"))


def defined(file: Path) -> set[str]:
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_the_page_names_enough() -> None:
    assert len(NAMED) >= 25 and len({file for _, file in NAMED}) >= 15


@pytest.mark.parametrize(("name", "file"), NAMED, ids=[f"{name} in {file}" for name, file in NAMED])
def test_what_the_walks_name_is_there(name: str, file: str) -> None:
    assert name in defined(ROOT / "qwen35_moe" / file)


def test_the_table_names_every_folder() -> None:
    folders = {p.name for p in (ROOT / "qwen35_moe").iterdir() if (p / "__init__.py").is_file()}
    assert set(re.findall(r"`qwen35_moe/(\w+)`", read("architecture.md"))) == folders


def test_every_file_of_the_page_is_there() -> None:
    for file in re.findall(r"`((?:tests|docs)/[\w/.]+)`", read("architecture.md")):
        assert (ROOT / file).is_file(), file


# docs/exit-codes.md, row by row.
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in read("exit-codes.md").splitlines()
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
def test_exit_codes(row: list[str], cases: list[Comparison]) -> None:
    begins = row[1].strip("`").replace("N of M", "36 of 40")
    for result in cases:
        assert result.verdict.startswith(begins), result.verdict
        assert result.exit_code == int(row[2])
        result.partial = True
        assert result.exit_code == int(row[3])
