"""The rules of conftest.py themselves: what does not run is red, and says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest_plugins = ["pytester"]
Run = Callable[..., tuple[int, str]]

FINE = """
import pytest

def test_passes(): pass

@pytest.mark.gpu
def test_gpu(): assert GPU
"""
NOT_RUN = """
import pytest

@pytest.mark.skip(reason="not today")
def test_skipped(): pass

@pytest.mark.xfail
def test_fails(): assert False
"""
WHOLE = "import pytest\npytest.importorskip('nowhere')\n"
WARNS = "import warnings\ndef test_warns(): warnings.warn('careful')\n"


@pytest.fixture
def run(pytester: pytest.Pytester) -> Run:
    """run({name: source}, options) -> (status, output) of pytest in a folder with this project's conftest and settings.

    It runs in this process, which has torch imported already.
    """
    here = Path(__file__).parent

    def run(files: dict[str, str], *options: str) -> tuple[int, str]:
        (pytester.path / "tests").mkdir()
        for name, source in {**files, "conftest.py": (here / "conftest.py").read_text(encoding="utf-8")}.items():
            (pytester.path / "tests" / name).write_text(source, encoding="utf-8")
        settings = f"--rootdir={pytester.path}", f"--config-file={here.parent / 'pyproject.toml'}"
        done = pytester.runpytest_inprocess(*settings, *options)
        return int(done.ret), "\n".join((*done.outlines, *done.errlines))

    return run


def test_a_run_of_everything_is_green(run: Run) -> None:
    gpu = torch.cuda.is_available()
    status, output = run({"test_fine.py": FINE.replace("GPU", str(gpu))}, "--complete")
    assert status == 0, output
    assert gpu or "no GPU here: 1 tests marked gpu were not collected" in output
    assert f"{2 if gpu else 1} passed" in output.splitlines()[-1]


def test_what_did_not_run_is_red_and_named_also_by_workers(run: Run) -> None:
    status, output = run({"test_a.py": NOT_RUN, "test_b.py": WHOLE}, "-n1")
    assert status == 1, output
    for line in ("test_skipped: skipped", "test_fails: expected to fail", "test_b.py: skipped whole"):
        assert line in output, output


def test_a_warning_is_red(run: Run) -> None:
    status, output = run({"test_warns.py": WARNS})
    assert status == 1 and "UserWarning: careful" in output


def test_complete_refuses_a_selection(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = pytestconfig.pluginmanager.get_plugins()
    ours = next(p for p in plugins if (getattr(p, "__file__", None) or "").endswith("conftest.py"))
    monkeypatch.setattr(pytestconfig.option, "complete", True)
    monkeypatch.setattr(pytestconfig.option, "keyword", "passes")
    with pytest.raises(pytest.UsageError, match="drop -k"):
        ours.pytest_configure(pytestconfig)


@pytest.mark.parametrize("path", ["tests/test_fine.py", "tests/test_fine.py::test_passes", "tests"])
def test_complete_refuses_paths(run: Run, path: str) -> None:
    status, output = run({"test_fine.py": FINE}, "--complete", path)
    assert status == pytest.ExitCode.USAGE_ERROR and "drop the paths" in output
