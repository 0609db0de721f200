"""Dumps that a real SGLang 0.5.17 wrote on a GPU (tests/data/real), through the commands."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from qwen35_moe.cli import main as cli
from qwen35_moe.oracle.dumps.readers import read_dump
from qwen35_moe.oracle.dumps.sequences import sequences_of
from qwen35_moe.oracle.truth import write_truth
from weights.build import build

DATA = Path(__file__).parent / "data/real"
IDS: list[list[int]] = json.loads((DATA / "ids.json").read_text())


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dumps, and the checkpoint that they are of."""
    folder = tmp_path_factory.mktemp("real")
    with tarfile.open(DATA / "dumps.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    build(DATA / "engine-size.toml", folder / "checkpoint")
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = cli.main([str(a) for a in arguments])
    out = capsys.readouterr()
    return code, out.out + out.err


def test_a_clean_engine_agrees(real: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It fuses nothing, and gives its experts a list of slots all the same; layer 0 has no residual."""
    code, text = said(capsys, "diagnose", real / "checkpoint", real / "base", "--width", 120)
    assert code == 0 and "AGREES: 42 taps" in text and "65 of 65 tokens" in text


def test_a_speculative_engine_agrees(real: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The draft head's layer is called like the target's first."""
    code, text = said(capsys, "diagnose", real / "checkpoint", real / "spec", "--width", 120)
    text = " ".join(text.split())
    assert code == 0 and "AGREES: " in text and "65 of 65 tokens" in text
    assert "3 steps are those of the draft head" in text and "4 rejected drafts were compared" in text
    assert "67 rows of 3 steps were compared; 4 rows after rejected drafts were not" in text


def test_which_steps_are_the_draft_heads(real: Path, tmp_path: Path) -> None:
    """By its own modules, or where those were not dumped by the kind of its layer."""
    assert read_dump(real / "spec").drafts == {1: 1, 2: 2, 4: 1}
    shutil.copytree(real / "spec", tmp_path / "few")
    for file in [*(tmp_path / "few").glob("*pre_fc*"), *(tmp_path / "few").glob("*__fc.*")]:
        file.unlink()
    dump = read_dump(tmp_path / "few")
    assert dump.drafts == {1: 1, 2: 2, 4: 1} and "layers.0.attn_q_gate" not in dump
    assert [row.tolist() for row in sequences_of(dump)] == [IDS[0][:41], IDS[1][:24]]


@pytest.mark.parametrize("ids", [IDS, [row[:-3] for row in IDS]])  # with what was generated, or prompts alone
def test_ids_are_given_where_the_files_hold_none(
    real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ids: list[list[int]]
) -> None:
    code, text = said(capsys, "diagnose", real / "checkpoint", real / "pass")
    assert code == 2 and "--ids" in text
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    whole = sum(map(len, ids))
    code, text = said(
        capsys, "diagnose", real / "checkpoint", real / "pass", "--ids", tmp_path / "ids.json", "--width", 120
    )
    assert code == 0 and "AGREES" in text and f"{whole - 2 * (ids is IDS)} of {whole} tokens" in text


def test_compare_takes_ids_too(real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The truth has more sequences than the dump: only what is asked for is expected."""
    ids = [IDS[1][:3], *IDS]
    write_truth(real / "checkpoint", [torch.tensor(row) for row in ids], tmp_path / "truth", with_envelope=False)
    options = ["--ids", DATA / "ids.json", "--width", 120]
    code, text = said(capsys, "compare", tmp_path / "truth", real / "pass", *options)
    assert (
        code == 2 and "AGREES on 67 of 72 tokens" in text and "all of sequence 0 (3 tokens)" in " ".join(text.split())
    )
    code, text = said(capsys, "compare", tmp_path / "truth", real / "pass", *options, "--partial")
    assert code == 0 and "AGREES on 67 of 72 tokens" in text
