"""A flipped bit is found: in a finished trace by `verify`, in an unfinished one by `--resume`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen35_moe.cli.main import main
from qwen35_moe.oracle.judge.envelope_file import ENVELOPE, ENVELOPE_STATE
from qwen35_moe.trace.head import PARTIAL, RESUME

Build = Callable[[str], Path]
STATE = f"{PARTIAL}/{RESUME}"


def flip(file: Path, at: float = 0.9) -> None:
    """One bit, this far into the file."""
    held = bytearray(file.read_bytes())
    held[int(at * len(held))] ^= 4
    file.write_bytes(held)


@pytest.fixture(scope="module")
def whole(built: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "truth"
    assert main(["trace", str(built("tiny")), "--ids", "1,2,3,4", "--out", str(out), "--quiet"]) == 0
    return out


def test_what_was_written_verifies(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(whole)]) == 0
    assert "as they were written" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["00000.safetensors", "00003.safetensors", ENVELOPE, "trace.json"])
@pytest.mark.parametrize("at", [0.5, 0.99])
def test_a_flipped_bit_is_found(
    name: str, at: float, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "t")
    flip(tmp_path / "t" / name, at)
    assert main(["verify", str(tmp_path / "t")]) == 2
    said = capsys.readouterr().err
    assert name in said and "Traceback" not in said


def test_a_trace_without_checksums_says_so(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole, tmp_path / "t")
    head = (tmp_path / "t" / "trace.json").read_text()
    (tmp_path / "t" / "trace.json").write_text(head.replace('"files":', '"file_s":'))
    assert main(["verify", str(tmp_path / "t")]) == 2
    assert "no checksum is known" in capsys.readouterr().err


@pytest.fixture
def command(built: Build, tmp_path: Path) -> list[str]:
    return ["trace", str(built("tiny")), "--ids", "1,2,3,4", "--out", str(tmp_path / "t"), "--quiet"]


@pytest.mark.parametrize("name", ["00001.safetensors", STATE])
def test_resume_does_not_go_on_from_a_flipped_bit(
    name: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.append("--no-envelope")
    assert main([*command, "--layers", "0-1"]) == 0
    flip(tmp_path / "t" / name)
    assert main([*command, "--resume"]) == 2
    said = capsys.readouterr().err
    assert name in said and "checksum" in said
    assert main(command) == 0 and main(["verify", str(tmp_path / "t")]) == 0


def test_every_byte_of_a_state_is_under_its_checksum(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The header says which layer comes next: a flipped bit there would go on with other layers."""
    command.append("--no-envelope")
    assert main([*command, "--layers", "0-1"]) == 0
    state = tmp_path / "t" / STATE
    right = state.read_bytes()
    for said in (b'"next\\": 2', b'"ids\\\\\\": [[1', b"files", b"sha256"):
        held = bytearray(right)
        held[held.index(said) + len(said) - 1] ^= 1
        state.write_bytes(held)
        assert main([*command, "--resume"]) == 2
        told = capsys.readouterr().err
        assert STATE in told and "Traceback" not in told


def test_resume_does_not_go_on_from_a_damaged_envelope(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("qwen35_moe.oracle.judge.envelope_file._head", lambda *_: 1 / 0)
        assert main(command) == 2
    flip(tmp_path / "t" / ENVELOPE_STATE, 0.95)
    capsys.readouterr()
    assert main([*command, "--resume"]) == 2
    assert "checksum" in capsys.readouterr().err
