"""Where blocks run again: the device, the map, the mode; and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qwen35_moe.cli.main import main
from qwen35_moe.errors import Qwen35Error
from qwen35_moe.oracle.judge import where
from qwen35_moe.oracle.judge.where import Where


def test_a_map_says_where_each_layer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Where().of("layers.3", 8) == torch.device("cpu")
    some = Where(device_map={"": "disk", "layers.1": "cpu", "layers.11": "nowhere"})
    assert some.of("layers.1", 12) == some.of("norm", 12) == torch.device("cpu")
    with pytest.raises(Qwen35Error, match="no such device"):
        some.of("layers.11", 12)
    assert Where(device_map="auto").of("layers.1", 4) == torch.device("cpu")  # no GPU here
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    spread = [str(Where(device_map="auto").of(f"layers.{i}", 4)) for i in range(4)]
    assert spread == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]


def test_compare_and_diagnose_take_the_options_of_trace(
    small: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, engine, truth = str(small("tiny")), str(tmp_path / "engine"), str(tmp_path / "truth")
    common = ["trace", path, "--ids", "1,2,3,4,5,6", "--quiet", "--out"]
    assert main([*common, engine, "--no-envelope", "--arithmetic", "sglang-bf16"]) == main([*common, truth]) == 0
    capsys.readouterr()
    said = []
    monkeypatch.setattr(where, "SECONDS_BETWEEN_LINES", 1e9)
    for options in ([], ["--mode", "packed"], ["--device-map", "auto", "--mode", "decoded"]):
        assert main(["compare", truth, engine, *options]) == 0
        out = capsys.readouterr()
        said.append(out.out)
        assert not out.err  # it is over before there is anything to say
    assert said[0] == said[1] == said[2]
    monkeypatch.setattr(where, "SECONDS_BETWEEN_LINES", 0.0)
    assert main(["diagnose", path, engine, "--device", "cpu"]) == 0
    assert "layer 2/2  run again under 5 arithmetics  0 s left" in capsys.readouterr().err
    assert main(["diagnose", path, engine, "--quiet"]) == 0
    assert not capsys.readouterr().err
    assert main(["compare", truth, engine, "--device", "nowhere"]) == 2
    assert main(["compare", truth, engine, "--device-map", "auto", "--max-memory", "cpu=1GB"]) == 2
    assert "one layer is held at a time" in capsys.readouterr().err
