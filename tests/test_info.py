"""`qwen35-moe info`: what it says is what the files hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from forked import Child

from qwen35_moe.cli.main import main

MANIFEST = str(Path(__file__).parents[1] / "weights" / "manifests" / "tiny.txt")


@pytest.fixture
def info(capsys):
    """info(path, options) is what the command prints as JSON."""

    def run(path, *options):
        assert main(["info", str(path), "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize(("recipe", "module", "spec"), [
    ("tiny", "layers.*.mlp.experts.gate_up_proj", "bf16"),
    ("tiny-mxfp4", "layers.*.mlp.experts.*.gate_proj", "mxfp4 (block 32)"),
    ("tiny-gpt-oss", "layers.*.mlp.experts.gate_up_proj", "mxfp4 (block 32)"),
    ("tiny-compressed-tensors", "layers.*.mlp.experts.*.up_proj", "mxfp4 (block 32)"),
])  # fmt: skip
def test_modules_with_formats_and_sizes(built, info, recipe, module, spec):
    found = info(built(recipe))
    rows = {row["module"]: row for row in found["modules"]}
    assert rows[module]["format"] == spec
    headers = sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in built(recipe).glob("*.safetensors"))
    assert sum(row["bytes"] for row in found["modules"]) == found["bytes"] - headers


def test_gate_and_estimate(built, info, capsys):
    assert info(built("tiny"))["gate"]["model"]["fused"]
    found = info(built("tiny-mxfp4"), "--arithmetic", "float32", "--tokens", "7")
    assert not found["gate"]["model"]["fused"]
    memory = found["estimate"]["memory"]
    assert memory["packed"] < memory["decoded"]
    assert main(["info", str(built("tiny-mxfp4"))]) == 0
    printed = capsys.readouterr().out
    assert "layers.0-3     unfused" in printed and "peak memory: stream" in printed


def estimates_then_traces(path: str, out: str) -> int:
    told = main(["info", path, "--tokens", "64", "--json"])
    ids = ",".join(["7"] * 64)
    traced = main(["trace", path, "--ids", ids, "--out", out, "--quiet", "--no-envelope"])
    print(Path("/proc/self/status").read_text())
    return told or traced


def test_the_estimates_of_a_trace_hold(built, tmp_path):
    """What is written is known but for a few taps that not every run has; memory is an upper bound."""
    child = Child(tmp_path / "said", estimates_then_traces, str(built("tiny-mxfp4")), str(tmp_path / "t"))
    assert child.wait() == 0
    printed = child.said.read_text()
    estimate = json.JSONDecoder().raw_decode(printed)[0]["estimate"]
    peak = next(int(line.split()[1]) << 10 for line in printed.splitlines() if line.startswith("VmHWM"))
    assert 0.5 * estimate["memory"]["stream"] < peak <= estimate["memory"]["stream"]
    written = sum(file.stat().st_size for file in (tmp_path / "t").glob("*.safetensors"))
    assert 0.8 * estimate["trace_bytes"] < written < 1.2 * estimate["trace_bytes"]


def test_checksums(built, info, tmp_path, capsys):
    for options in (("--verify", "--manifest", MANIFEST), ("--manifest", MANIFEST)):
        found = info(built("tiny"), *options)
        assert len(found["checksums"]) > 100 and all(c["ok"] for c in found["checksums"])
    folder = shutil.copytree(built("tiny"), tmp_path / "damaged")
    file = next(folder.glob("*.safetensors"))
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    assert main(["info", str(folder), "--verify", "--manifest", MANIFEST]) == 1
    assert capsys.readouterr().out.count("DIFFERS") == 1


def test_bad_input(tmp_path, built, capsys):
    (tmp_path / "empty").touch()
    for options, words in (
        ([tmp_path / "nowhere"], "no such checkpoint"),
        ([built("tiny"), "--tokens", 0], "nothing to estimate"),
        ([built("tiny"), "--tokens", 10**20 - 1], "nothing to estimate"),
        ([built("tiny"), "--manifest", tmp_path / "empty"], "an empty manifest verifies nothing"),
    ):
        assert main(["info", *map(str, options)]) == 2
        assert words in capsys.readouterr().err
    assert main(["info", str(built("tiny")), "--tokens", "1000000000"]) == 0
