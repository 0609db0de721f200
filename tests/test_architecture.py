"""docs/architecture.md and docs/judge.md name files and functions that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
# `name` or `Class.name`, then the file in brackets behind it.
JUDGE = (ROOT / "docs/judge.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`([A-Za-z_][\w.]*)`s?\s+\(`([\w/]+\.py)`\)", PAGE + JUDGE)


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
    assert set(re.findall(r"`qwen35_moe/(\w+)`", PAGE)) == folders


def test_every_file_of_the_page_is_there() -> None:
    for file in re.findall(r"`((?:tests|docs)/[\w/.]+)`", PAGE):
        assert (ROOT / file).is_file(), file
