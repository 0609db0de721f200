"""The pages of docs/: the table of taps is current, code blocks run, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import qwen35_moe as q
from docs import make_taps
from qwen35_moe.numerics.arithmetics import ARITHMETICS
from qwen35_moe.numerics.tap_table import TAPS
from qwen35_moe.oracle.dumps.readers import read_dump
from weights.build import build

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[str]:
    return BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


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
