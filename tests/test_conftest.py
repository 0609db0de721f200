"""The rules of conftest.py themselves: what does not run is red, and says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

CASES = """
import pytest

def test_passes(): pass

@pytest.mark.gpu
def test_gpu(): raise AssertionError("where is the GPU?")
"""
SKIP = "\n@pytest.mark.skip(reason='not today')\ndef test_skipped(): pass\n"
XFAIL = "\n@pytest.mark.xfail(strict=False)\ndef test_xfail(): assert False\n"
WARNS = "\nimport warnings\ndef test_warns(): warnings.warn('careful')\n"


def run(folder: Path, source: str, *options: str) -> tuple[int, str]:
    """pytest in a folder that has this project's conftest.py and settings, and one test file."""
    here = Path(__file__).parent
    (folder / "conftest.py").write_text((here / "conftest.py").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "test_case.py").write_text(source, encoding="utf-8")
    settings = f"--rootdir={folder}", f"--config-file={here.parent / 'pyproject.toml'}"
    command = [sys.executable, "-m", "pytest", *settings, *options, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=here.parent, check=False)
    return done.returncode, done.stdout + done.stderr


def test_only_a_run_of_everything_is_green(tmp_path: Path) -> None:
    gpu = torch.cuda.is_available()
    status, output = run(tmp_path, CASES.replace("raise", "return") if gpu else CASES, "--complete", "-n", "2")
    assert status == 0, output
    assert gpu or "no GPU here: 1 tests marked gpu were not collected" in output
    assert " passed" in output.splitlines()[-1]


def test_what_did_not_run_is_red_and_named(tmp_path: Path) -> None:
    status, output = run(tmp_path, CASES + SKIP + XFAIL, "-n", "2")
    assert status == 1, output
    assert "test_skipped: skipped" in output and "test_xfail: expected to fail" in output
    status, output = run(tmp_path, CASES + WARNS)
    assert status == 1 and "careful" in output
    status, output = run(tmp_path, CASES.replace("import pytest", "import pytest\npytest.importorskip('nowhere')"))
    assert status != 0 and "skipped whole" in output, output


def test_complete_refuses_a_selection(tmp_path: Path) -> None:
    status, output = run(tmp_path, CASES, "--complete", "-k", "passes")
    assert status == 4 and "drop -k" in output
