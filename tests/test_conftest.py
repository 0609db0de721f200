"""The rules of conftest.py themselves: what does not run is red, and says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def run(folder: Path, files: dict[str, str], *options: str) -> tuple[int, str]:
    """pytest in a folder that has this project's conftest.py and settings."""
    here = Path(__file__).parent
    files |= {"conftest.py": (here / "conftest.py").read_text(encoding="utf-8")}
    (folder / "tests").mkdir()
    for name, source in files.items():
        (folder / "tests" / name).write_text(source, encoding="utf-8")
    settings = f"--rootdir={folder}", f"--config-file={here.parent / 'pyproject.toml'}"
    command = [sys.executable, "-m", "pytest", *settings, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_run_of_everything_is_green(tmp_path: Path) -> None:
    gpu = torch.cuda.is_available()
    status, output = run(tmp_path, {"test_fine.py": FINE.replace("GPU", str(gpu))}, "--complete")
    assert status == 0, output
    assert gpu or "no GPU here: 1 tests marked gpu were not collected" in output
    assert f"{2 if gpu else 1} passed" in output.splitlines()[-1]


def test_what_did_not_run_is_red_and_named_also_by_workers(tmp_path: Path) -> None:
    status, output = run(
        tmp_path, {"test_a.py": NOT_RUN, "test_b.py": WHOLE, "test_c.py": FINE.replace("GPU", "True")}, "-n", "1"
    )
    assert status == 1, output
    for line in ("test_skipped: skipped", "test_fails: expected to fail", "test_b.py: skipped whole"):
        assert line in output, output


def test_a_warning_is_red(tmp_path: Path) -> None:
    status, output = run(tmp_path, {"test_warns.py": WARNS})
    assert status == 1 and "UserWarning: careful" in output


def test_complete_refuses_a_selection(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = pytestconfig.pluginmanager.get_plugins()
    ours = next(p for p in plugins if (getattr(p, "__file__", None) or "").endswith("conftest.py"))
    monkeypatch.setattr(pytestconfig.option, "complete", True)
    monkeypatch.setattr(pytestconfig.option, "keyword", "passes")
    with pytest.raises(pytest.UsageError, match="drop -k"):
        ours.pytest_configure(pytestconfig)


@pytest.mark.parametrize("path", ["tests/test_fine.py", "tests/test_fine.py::test_passes", "tests"])
def test_complete_refuses_paths(tmp_path: Path, path: str) -> None:
    status, output = run(tmp_path, {"test_fine.py": FINE}, "--complete", path)
    assert status == pytest.ExitCode.USAGE_ERROR and "drop the paths" in output
