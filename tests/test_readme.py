"""The README's example runs, and the demo prints what the README shows. Its commands: test_wheel.py."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from peers.transformers_model import quiet

from qwen35_moe.cli import main as cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder with the project's folders in it, in which commands may write."""
    root = tmp_path_factory.mktemp("readme")
    for name in ("qwen35_moe", "weights"):
        (root / name).symlink_to(ROOT / name)
    tools = root / "tools"
    tools.mkdir()
    python = sys.executable
    for name, command in (("python", f'exec "{python}" "$@"'), ("qwen35-moe", f'exec "{python}" -m qwen35_moe "$@"')):
        tool = tools / name
        tool.write_text(f"#!/bin/sh\n{command}\n")
        tool.chmod(0o755)
    return root


def run(command: str, checkout: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "PATH": f"{checkout / 'tools'}:{os.environ['PATH']}", "PYTHONPATH": str(checkout)}
    env |= {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    return subprocess.run(["bash", "-c", command], cwd=checkout, env=env, capture_output=True, text=True, timeout=300)


def test_the_first_two_commands_are_targets():
    make = shutil.which("make")
    assert make
    for line in re.findall(r"^```\n(make .*?)^```$", README, re.M | re.S)[0].splitlines():
        target = line.split("#")[0].split()[1]
        assert subprocess.run([make, "-n", target], cwd=ROOT, capture_output=True).returncode == 0


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


@pytest.fixture(scope="module")
def demo(checkout) -> str:
    """What `qwen35-moe demo` prints there. Other commands read what it leaves."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), quiet():
        patch.chdir(checkout)
        patch.setenv("COLUMNS", "80")
        assert cli.main(["demo"]) == 0
    return printed.getvalue()


def test_the_example_runs(checkout):
    for block in blocks("python"):
        (checkout / "example.py").write_text(block)
        done = run("python -W error example.py", checkout)
        assert done.returncode == 0, done.stderr
        assert "layers.0.moe_topk_ids" in done.stdout


def test_the_demo_prints_what_is_shown(demo):
    """The README's text stands in the output, in order; figures and line breaks, which differ by machine, aside."""

    def plain(text: str) -> str:
        text = re.sub(r"\S*build/demo", "build/demo", text)
        text = re.sub(r"[\d.]+(e[+-]?\d+)?[=.?X]?|\ball\b", "#", text)  # "all" are equal, or a part of them
        return " ".join(text.split())

    shown = next(text for name, text in BLOCKS if text.startswith("$ make demo")).partition("\n")[2]
    printed, at = plain(demo), 0
    for part in shown.split("\n  ...\n"):
        assert plain(part) in printed[at:], part
        at = printed.index(plain(part), at) + len(plain(part))
