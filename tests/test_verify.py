"""A flipped bit is found: in a finished trace by `verify`, in an unfinished one by `--resume`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from traces import Traces, stopping

from qwen35_moe.cli.main import main
from qwen35_moe.oracle.judge import envelope_file
from qwen35_moe.oracle.judge.envelope_file import ENVELOPE, ENVELOPE_STATE
from qwen35_moe.trace.head import PARTIAL, RESUME

IDS, PLAIN = [1, 2, 3, 4], "--no-envelope"
STATE = f"{PARTIAL}/{RESUME}"


def flip(file: Path, at: float = 0.9) -> None:
    """One bit, this far into the file."""
    held = bytearray(file.read_bytes())
    held[int(at * len(held))] ^= 4
    file.write_bytes(held)


@pytest.fixture
def traces(built, tmp_path, capsys):
    return Traces(built("tiny"), tmp_path, capsys)


@pytest.fixture(scope="module")
def whole(built, tmp_path_factory):
    """A truth that nobody changes."""
    out = tmp_path_factory.mktemp("verify") / "truth"
    assert main(["trace", str(built("tiny")), "--ids", "1,2,3,4", "--out", str(out), "--quiet"]) == 0
    return out


def verified(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `verify` says of a truth in which something is wrong."""
    assert main(["verify", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_what_was_written_verifies(whole, capsys):
    assert main(["verify", str(whole)]) == 0
    assert "as they were written" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["00000.safetensors", "00003.safetensors", ENVELOPE, "trace.json"])
@pytest.mark.parametrize("at", [0.5, 0.99])
def test_a_flipped_bit_is_found(name, at, whole, tmp_path, capsys):
    flip(shutil.copytree(whole, tmp_path / "t") / name, at)
    assert name in verified(tmp_path / "t", capsys)


def test_a_trace_without_checksums_says_so(whole, tmp_path, capsys):
    head = shutil.copytree(whole, tmp_path / "t") / "trace.json"
    head.write_text(head.read_text().replace('"files":', '"file_s":'))
    assert "no checksum is known" in verified(tmp_path / "t", capsys)


@pytest.mark.parametrize("name", ["00001.safetensors", STATE])
def test_resume_does_not_go_on_from_a_flipped_bit(name, traces):
    traces("t", IDS, PLAIN, "--layers", "0-1")
    flip(traces.root / "t" / name)
    traces.refuses(f"{name}\n  expected: sha256", "t", IDS, PLAIN, "--resume")
    traces("t", IDS, PLAIN)
    assert main(["verify", str(traces.root / "t")]) == 0


def test_every_byte_of_a_state_is_under_its_checksum(traces):
    """The header says which layer comes next: a flipped bit there would go on with other layers."""
    traces("t", IDS, PLAIN, "--layers", "0-1")
    right = traces.files("t")[STATE]
    for said in (b'"next\\": 2', b'"ids\\\\\\": [[1', b"files", b"sha256"):
        held = bytearray(right)
        held[held.index(said) + len(said) - 1] ^= 1
        (traces.root / "t" / STATE).write_bytes(held)
        traces.refuses(STATE, "t", IDS, PLAIN, "--resume")


def test_resume_does_not_go_on_from_a_damaged_envelope(traces):
    with stopping(envelope_file, "_head", 0):
        traces("t", IDS)
    flip(traces.root / "t" / ENVELOPE_STATE, 0.95)
    traces.refuses("checksum", "t", IDS, "--resume")
