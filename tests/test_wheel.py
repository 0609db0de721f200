"""What `pip install` gives to somebody without the repository: the commands run, and need the core's packages alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Commands in one process, in which the packages of the extras cannot be imported.
SCRIPT = """
import contextlib, io, json, sys
import shlex, subprocess
from pathlib import Path
for name in ("transformers", "accelerate", "PIL", "psutil", "pytest", "weights"):
    sys.modules[name] = None
from qwen35_moe.cli.main import main

def run(line):
    words, out, err = shlex.split(line), io.StringIO(), io.StringIO()
    if words[0] != "qwen35-moe":
        return [line, subprocess.call(line, shell=True), ""]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words[1:])
        except SystemExit as stop:
            code = stop.code
    return [line, code, out.getvalue() + err.getvalue()]

found = [run(line) for line in sys.argv[1:]]
import qwen35_moe.testing as qt
case = qt.rms_norm_case()
qt.assert_legal(case.truth["input_layernorm"].float(), case)
print(json.dumps([qt.__file__, found]))
"""
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
LINES = [line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = {line.removeprefix("! "): (int(line.startswith("! ")), "") for line in LINES} | {
    "qwen35-moe --version": (0, "qwen35-moe 0."),
    "qwen35-moe gate build/ckpt --rule SGLang": (0, "unfused, BREAKS"),
    "qwen35-moe trace build/ckpt --ids build/ids.json --out other --device-map auto --mode packed": (
        2, "pip install 'qwen35-moe[placement]'"),
    "qwen35-moe generate build/ckpt --prompt hi": (2, ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The wheel's content."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder)
    return folder


def test_commands_run_from_the_wheel(site, tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *COMMANDS], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
    )
    assert len(LINES) > 10 and done.returncode == 0, done.stdout + done.stderr
    path, found = json.loads(done.stdout.splitlines()[-1])
    assert Path(path).is_relative_to(site)
    for line, code, text in found:
        expected, words = COMMANDS[line]
        assert (code, words in text, "Traceback" in text) == (expected, True, False), f"{line}: {code}\n{text}"


def test_the_wheel_holds_the_recipes_and_nothing_twice(site):
    assert (site / "qwen35_moe/weights/recipes/tiny.toml").is_file()
    assert (site / "qwen35_moe/weights/build.py").is_file()
    assert not (site / "qwen35_moe/weights.py").exists() and not (site / "weights").exists()


def test_dependencies_of_the_core():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [line.partition(">")[0] for line in project["dependencies"]] == ["torch", "safetensors", "numpy"]
    assert set(project["optional-dependencies"]) == {"hf", "placement", "vision", "all"}
