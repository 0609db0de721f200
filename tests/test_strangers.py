"""What somebody tries who has not read the code: odd arguments, wrong ids, absent devices, full disks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

import qwen35_moe as q
from qwen35_moe.cli import main as cli
from qwen35_moe.oracle.dumps.readers import read_dump

Build = Callable[[str], Path]
IDS = [[3, 1, 4], [1, 5, 9]]


@pytest.mark.parametrize("given", [list, numpy.array])
def test_ids_and_masks_need_not_be_tensors(built: Build, given: Callable[[list[list[int]]], object]) -> None:
    model = q.load(built("tiny"), text_only=True)
    mask = [[0, 1, 1], [1, 1, 1]]
    expected = model(torch.tensor(IDS), attention_mask=torch.tensor(mask))
    assert torch.equal(model(given(IDS), attention_mask=given(mask)), expected)
    traced = q.trace(model, given(IDS), attention_mask=given(mask), taps="next_token_logits")
    assert torch.equal(traced["next_token_logits"], expected)


@pytest.mark.parametrize("command", [["trace", "--out", "out"], ["generate"]])
def test_a_device_that_is_absent_is_named(built: Build, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    assert cli.main([*command[:1], str(built("tiny")), "--ids", "1,2", *command[1:], "--device", "cuda:77"]) == 2
    assert "no such device here\n  where: --device cuda:77" in capsys.readouterr().err


def test_a_file_where_a_directory_should_be_is_one_line(
    built: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert cli.main(["trace", str(built("tiny")), "--ids", "1,2", "--quiet", "--out", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert "file" in error and "Traceback" not in error
    assert (tmp_path / "file").read_text() == "mine"


def test_a_bug_is_not_a_verdict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 means "diverges"."""
    monkeypatch.setattr("qwen35_moe.cli.gate.config_and_specs", lambda *_: 1 / 0)
    assert cli.main(["gate", "anything"]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(("closed", "code"), [(">&-", 0), (">&- 2>&-", 0), ("<&- >&- 2>&-", 0), (">/dev/full", 2)])
def test_streams_that_are_closed_or_full_are_no_verdict(closed: str, code: int) -> None:
    """Python has None for a closed stream, and the next file that is opened gets its number."""
    command = f"{sys.executable} -m qwen35_moe dump-config sglang {closed}"
    assert subprocess.run(["sh", "-c", command], cwd=Path(__file__).parents[1], timeout=60).returncode == code


def test_an_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen35_moe.cli.gate.config_and_specs", interrupted)
    assert cli.main(["gate", "anything"]) == 2
    assert capsys.readouterr().err == "qwen35-moe: interrupted\n"


def test_an_interrupt_during_imports_ends_the_command() -> None:
    """Some callbacks of torch and of the import system drop the exception that an interrupt raises."""
    code = """if True:
        import os, signal
        from qwen35_moe.cli import main as cli
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
        def dropping(name):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                pass
        cli.importlib.import_module = dropping
        cli.main(["gate", "anything"])"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, b"qwen35-moe: interrupted\n")


def test_the_output_of_attention_is_not_taken_for_the_layers(built: Build, tmp_path: Path) -> None:
    model = q.load(built("tiny"), text_only=True)
    truth = q.trace(model, torch.tensor(IDS[:1]), taps="attn_output")
    save_file({"model.layers.3.self_attn.output": truth["layers.3.attn_output"][0]}, tmp_path / "a.safetensors")
    dump = read_dump(tmp_path, config=model.config.raw)
    assert torch.equal(dump["layers.3.attn_output"], truth["layers.3.attn_output"][0])
    assert "layers.3.mlp_output" not in dump


def config_with(**quant: object) -> dict[str, object]:
    sizes = dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32)
    return {"num_hidden_layers": 1, "num_experts": 2, **sizes, "quantization_config": quant}


def test_a_method_that_is_an_enum_is_called_by_its_value() -> None:
    method = Enum("Method", {"MXFP4": "mxfp4"}, type=str).MXFP4
    decision = q.can_fuse_shared_expert(config_with(quant_method=method), rule="sglang-0.5.23")
    assert decision.reason == "the gate does not look at method 'mxfp4'"
