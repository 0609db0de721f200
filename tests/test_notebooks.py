"""The notebooks: each runs as a script, and the executed file beside it is of the same cells and says the same."""

from __future__ import annotations

import base64
import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))  # where Jupyter starts a notebook, and so where its `import style` looks

from notebooks.build import read, sources  # noqa: E402

SOURCES = sources()
ANSWER = re.compile(r"^answer = .+$", re.MULTILINE)
WRONG = "answer = []"  # for every question


def test_there_are_nine() -> None:
    assert [s.name[:2] for s in SOURCES] == [f"{i:02d}" for i in range(1, 10)]


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_runs_and_agrees_with_its_pair(source: Path) -> None:
    """Every cell runs (its assertions hold) and prints what the executed notebook shows. Folded answers are right."""
    executed = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    written = read(source)
    assert [(c.cell_type, c.source) for c in written.cells] == [(c.cell_type, c.source) for c in executed.cells], (
        f"run: python -m notebooks.build {source.name[:2]}"
    )
    names: dict[str, Any] = {"__name__": "__main__"}
    questions = 0
    for cell, after in zip(executed.cells, [*executed.cells[1:], None], strict=True):
        if cell.cell_type != "code":
            continue
        assert run(cell.source, names, cell.id) == shown(cell), cell.id
        if ANSWER.search(cell.source):
            questions += 1
            check_question(cell.source, after.source, names, cell.id)
    assert questions >= 1, "a notebook has something to try"


def check_question(cell: str, answer: str, names: dict[str, Any], where: str) -> None:
    """The answer folded away below a question is right, and a wrong one is told so."""
    folded = ANSWER.search(answer)
    assert folded, f"no answer below {where}"
    assert run(ANSWER.sub(lambda _: folded[0], cell, count=1), names, where) == "Right.\n"
    with pytest.raises((AssertionError, TypeError, ValueError, RuntimeError)):  # of another type, too
        run(ANSWER.sub(WRONG, cell, count=1), names, where)


def run(code: str, names: dict[str, Any], where: str) -> str:
    """What a cell prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, where, "exec"), names)
    return out.getvalue()


def shown(cell: Any) -> str:
    """The text below an executed cell; pictures apart."""
    for output in cell.outputs:
        assert output.output_type in ("stream", "display_data"), f"{cell.id}: {output.output_type}"
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_executed_file_is_small_and_says_nothing_of_a_machine(source: Path) -> None:
    target = source.with_suffix(".ipynb")
    assert target.stat().st_size < 300_000
    executed = nbformat.read(target, as_version=4)
    assert set(executed.metadata) == {"kernelspec"}
    outputs = [o for c in executed.cells for o in c.get("outputs", ())]
    text = "".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in outputs)
    assert not re.search(r"/(tmp|home|root|Users|work|var|private)/|[A-Z]:\\\\|\d+:\d\d:\d\d", text)
    assert not any(c.metadata for c in executed.cells)
    assert not any(o.get("name") == "stderr" for o in outputs)
    for output in outputs:
        if "image/png" in output.get("data", {}):
            assert len(output.metadata["image/png"]["alt"]) > 20, "a picture has an alternative text"
            kinds = chunks(base64.b64decode(output.data["image/png"]))
            assert kinds <= {b"IHDR", b"IDAT", b"IEND", b"pHYs"}, "no dates, no programs"


def chunks(png: bytes) -> set[bytes]:
    """The kinds of chunks in a PNG file."""
    found, at = set(), 8
    while at < len(png):
        found.add(png[at + 4 : at + 8])
        at += 12 + int.from_bytes(png[at : at + 4], "big")
    return found
