"""Every command block of the README runs, and the demo prints what the README shows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder with the project's folders in it, in which commands may write. `make` stands for the demo's command."""
    root = tmp_path_factory.mktemp("readme")
    for name in ("qwen35_moe", "weights"):
        (root / name).symlink_to(ROOT / name)
    tools = root / "tools"
    tools.mkdir()
    python = sys.executable
    for name, command in (
        ("python", f'exec "{python}" "$@"'),
        ("qwen35-moe", f'exec "{python}" -m qwen35_moe.cli "$@"'),
        ("make", f'[ "$1" = demo ] && exec "{python}" -m qwen35_moe.demo'),
    ):
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
    for line in re.findall(r"^```\n(.*?)^```$", README, re.M | re.S)[0].splitlines():
        target = line.split("#")[0].split()[1]
        assert subprocess.run([make, "-n", target], cwd=ROOT, capture_output=True).returncode == 0


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def test_every_command_runs(checkout):
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) > 10
    for command in commands:
        done = run(command, checkout)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr


def test_the_example_runs(checkout):
    for block in blocks("python"):
        (checkout / "example.py").write_text(block)
        done = run("python -W error example.py", checkout)
        assert done.returncode == 0, done.stderr
        assert "layers.0.moe_topk_ids" in done.stdout


def test_the_demo_prints_what_is_shown(checkout):
    """Lines of the README in the order of the output, with figures aside that differ from machine to machine."""

    def plain(line: str) -> str:
        return re.sub(
            r"\s+", " ", re.sub(r"[\d.]+(e[+-]?\d+)?", "#", re.sub(r"\S*build/demo", "build/demo", line))
        ).strip()

    shown = next(text for name, text in BLOCKS if text.startswith("$ make demo")).splitlines()[1:]
    printed = [plain(line) for line in run("make demo", checkout).stdout.splitlines()]
    at = 0
    for line in shown:
        if line.strip() in ("...", ""):
            continue
        assert plain(line) in printed[at:], line
        at = printed.index(plain(line), at) + 1
