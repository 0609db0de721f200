"""The README's example runs, and the demo prints what the README shows. Its commands: test_wheel.py."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from peers.transformers_model import quiet

from qwen35_moe.cli import main as cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)


def test_the_first_two_commands_are_targets():
    make = shutil.which("make")
    assert make
    for line in re.findall(r"^```\n(make .*?)^```$", README, re.M | re.S)[0].splitlines():
        target = line.split("#")[0].split()[1]
        assert subprocess.run([make, "-n", target], cwd=ROOT, capture_output=True).returncode == 0


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = (text for name, text in BLOCKS if name == "python")
    exec(compile(block, "README.md", "exec"), {})
    assert "layers.0.moe_topk_ids" in capsys.readouterr().out


def test_the_demo_prints_what_is_shown(tmp_path, monkeypatch, capsys):
    """The README's text stands in the output, in order; figures and line breaks, which differ by machine, aside."""

    def plain(text: str) -> str:
        text = re.sub(r"\S*build/demo", "build/demo", text)
        text = re.sub(r"[\d.]+(e[+-]?\d+)?[=.?X]?|\ball\b", "#", text)  # "all" are equal, or a part of them
        return " ".join(text.split())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    with quiet():
        assert cli.main(["demo"]) == 0
    printed, at = plain(capsys.readouterr().out), 0
    shown = next(text for name, text in BLOCKS if text.startswith("$ make demo")).partition("\n")[2]
    for part in shown.split("\n  ...\n"):
        assert plain(part) in printed[at:], part
        at = printed.index(plain(part), at) + len(plain(part))
