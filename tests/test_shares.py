"""Many prompts: in groups, in several processes, and joined to the bytes of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tolerances import FLOAT64_REORDERED

import qwen35_moe as q
from qwen35_moe import shares
from qwen35_moe.cli import main
from qwen35_moe.oracle.trace_file import Trace

Build = Callable[[str], Path]
PROMPTS = [[1, 2, 3, 4, 5], [9, 8, 7], [5, 5, 5, 6, 7, 8]]
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def options(checkpoint: Path, folder: Path, out: str, *more: str) -> list[str]:
    (folder / "ids.json").write_text(json.dumps(PROMPTS))
    ids = ["--ids", str(folder / "ids.json"), "--out", str(folder / out), "--quiet"]
    return ["trace", str(checkpoint), *ids, *more]


def test_groups_join_to_the_trace_of_one_batch(built: Build, tmp_path: Path) -> None:
    checkpoint = built("tiny-mxfp4")
    for mode in ("stream", "decoded"):
        more = ("--experts", "--no-envelope", "--mode", mode)
        assert main(options(checkpoint, tmp_path, "whole", *more)) == 0
        assert main(options(checkpoint, tmp_path, "joined", *more, "--batch", "2")) == 0
        whole, joined = Trace.open(tmp_path / "whole"), Trace.open(tmp_path / "joined")
        texts = [json.loads((t.path / "trace.json").read_text()) for t in (whole, joined) if t.path]
        assert texts[0] == texts[1] and {p.name for p in tmp_path.iterdir()} == {"ids.json", "whole", "joined"}
        for key, x in whole.items():
            size = float(x.double().norm())
            assert float((joined[key].double() - x.double()).norm()) <= FLOAT64_REORDERED * size, key


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(q.__file__).parents[1])}
    command = [sys.executable, *LAUNCH, "-m", "qwen35_moe.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_two_processes_one_of_which_fails_and_resumes(built: Build, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(options(built("tiny-mxfp4"), tmp_path, "alone", "--batch", "1")) == 0
    finally:
        torch.set_num_threads(threads)
    obstacle = tmp_path / "shared.parts" / "00002" / "notes.txt"  # the second process's prompt
    obstacle.parent.mkdir(parents=True)
    obstacle.touch()
    failed = launch(*options(built("tiny-mxfp4"), tmp_path, "shared"))
    assert failed.returncode and "directory is not a trace" in failed.stderr, failed.stderr
    assert "prompts 2 to 2, process 1" in failed.stderr
    with pytest.raises(q.Qwen35Error):
        Trace.open(tmp_path / "shared")
    obstacle.unlink()
    resumed = launch(*options(built("tiny-mxfp4"), tmp_path, "shared", "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    assert "envelope.safetensors" in contents(tmp_path / "shared") and not obstacle.parent.exists()


class Stop(BaseException):
    """A kill at a chosen moment."""


def test_a_kill_while_joining_leaves_no_half_trace(
    built: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = options(built("tiny-mxfp4"), tmp_path, "out", "--batch", "1", "--taps", "layer_output_sum")
    assert main(arguments) == 0
    expected = contents(tmp_path / "out")
    real = shares.TraceWriter.flush

    def stopping(writer: shares.TraceWriter) -> None:
        real(writer)
        if writer.path.name == "out" and writer.files == 2:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(shares.TraceWriter, "flush", stopping)
        main(arguments)
    with pytest.raises(q.Qwen35Error, match="unfinished"):
        Trace.open(tmp_path / "out")
    assert main([*arguments, "--resume"]) == 0
    assert contents(tmp_path / "out") == expected
    assert main([*arguments, "--resume"]) == 0  # nothing is left to do
    assert contents(tmp_path / "out") == expected
    assert main([*arguments, "--resume", "--arithmetic", "float32"]) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"ids.json", "out"}


def test_first_layers_of_groups_now_the_others_later(built: Build, tmp_path: Path) -> None:
    more = ("--batch", "2", "--no-envelope")
    assert main(options(built("tiny-mxfp4"), tmp_path, "whole", *more)) == 0
    assert main(options(built("tiny-mxfp4"), tmp_path, "out", *more, "--layers", "0-1")) == 0
    assert max(entry.layer or 0 for entry in Trace.open(tmp_path / "out").sites.values()) == 1
    assert main(options(built("tiny-mxfp4"), tmp_path, "out", *more, "--resume")) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_foreign_files_stay(built: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.parts").mkdir()
    (tmp_path / "out.parts" / "thesis.tex").touch()
    assert main(options(built("tiny-mxfp4"), tmp_path, "out", "--batch", "1")) == 2
    assert "thesis.tex" in capsys.readouterr().err and (tmp_path / "out.parts" / "thesis.tex").exists()
