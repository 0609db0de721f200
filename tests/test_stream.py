"""Streaming and long runs: the same values layer by layer, flat memory, and a trace that survives any kill."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kills
import pytest
import torch
from forked import Child
from kills import contents

import qwen35_moe as q
from qwen35_moe.checkpoint import Checkpoint
from qwen35_moe.cli.main import main
from qwen35_moe.oracle.judge.envelope import legal
from qwen35_moe.oracle.judge.envelope_file import remaining, write_envelope
from qwen35_moe.run.files import claim
from qwen35_moe.run.origin import origin_of
from qwen35_moe.run.streamed import HEAD_ROWS, consecutive
from qwen35_moe.trace.file import Trace
from qwen35_moe.trace.layers import trace_layers
from qwen35_moe.trace.writer import TraceWriter

Build = Callable[[str], Path]
IDS = torch.tensor([[3, 7, 11, 5, 100, 17, 29, 31], [1, 2, 3, 4, 5, 0, 0, 0]])
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])


@pytest.fixture(scope="module")
def built(small: Callable[..., Path]) -> Build:
    """Recipes with six experts: these tests write many traces."""
    return lambda recipe: small(recipe, 4)


def streamed(path: Path, arithmetic: Any = "exact") -> q.Model:
    return q.load(path, arithmetic, mode="stream", text_only=True)


@pytest.mark.parametrize("arithmetic", ["exact", "transformers-bf16", "sglang-bf16"])
@pytest.mark.parametrize("mode", ["stream", "decoded"])
def test_layer_by_layer_is_what_one_forward_pass_computes(
    built: Build, tmp_path: Path, mode: str, arithmetic: str
) -> None:
    model = q.load(built("tiny-mxfp4"), arithmetic, mode=mode, text_only=True)
    whole = q.trace(model, IDS, attention_mask=MASK, experts=True)
    found, report = trace_layers(model, IDS, tmp_path / "out", mask=MASK, experts=True, quiet=True)
    assert list(found) == list(whole) and report.complete
    assert all(torch.equal(found[key], whole[key]) for key in whole)
    assert all(
        (found.sites[k].dims, found.sites[k].dtype) == (whole.sites[k].dims, whole.sites[k].dtype) for k in whole
    )
    assert found.meta["steps"] == whole.meta["steps"] and found.meta["checkpoint"] == origin_of(model).identity


def test_the_streamed_head_is_one_tap_however_many_blocks_it_has(
    built: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streamed(built("tiny"))
    before = q.trace(model, IDS)["next_token_logits"]
    monkeypatch.setattr("qwen35_moe.run.streamed.HEAD_ROWS", 100)
    assert HEAD_ROWS > model.config.vocab_size > 100
    assert torch.allclose(q.trace(model, IDS)["next_token_logits"], before, rtol=0, atol=1e-12)
    found, _ = trace_layers(model, IDS, tmp_path / "out", quiet=True)
    assert torch.equal(found["next_token_logits"], q.trace(model, IDS)["next_token_logits"])


def test_runs() -> None:
    assert list(consecutive([3, 4, 5, 9, 11, 12])) == [slice(3, 6), slice(9, 10), slice(11, 13)]
    assert list(consecutive([])) == []


class Stop(BaseException):
    """A kill at a chosen moment."""


@pytest.fixture(scope="module")
def undisturbed(built: Build, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The trace of IDS."""
    out = tmp_path_factory.mktemp("undisturbed")
    trace_layers(streamed(built("tiny-mxfp4")), IDS, out, mask=MASK, quiet=True)
    return contents(out)


@pytest.fixture(scope="module")
def of_commands(built: Build, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Trace and envelope of the run that `kills` kills."""
    out = tmp_path_factory.mktemp("kills") / "out"
    assert main([*kills.arguments(built("tiny-mxfp4"), out)]) == 0
    return contents(out)


@pytest.fixture(scope="module")
def enveloped(built: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of IDS and the envelope of four arithmetics."""
    out = tmp_path_factory.mktemp("enveloped")
    trace_layers(streamed(built("tiny-mxfp4")), IDS, out, mask=MASK, taps="layer_*,next_token_logits", quiet=True)
    write_envelope(Trace.open(out), (streamed(built("tiny-mxfp4"), table) for table in legal("exact")[:4]))
    return out


@pytest.mark.parametrize("call", range(1, 36, 3))
def test_a_run_that_stops_anywhere_resumes_to_the_same_bytes(
    built: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes], call: int
) -> None:
    """Before or after every rename: what a kill there would leave is on disk."""
    model = streamed(built("tiny-mxfp4"))
    real, count = os.replace, 0

    def stopping(source: str, target: str) -> None:
        nonlocal count
        count += 1
        if count == call // 2 + 1 and call % 2 == 0:
            raise Stop
        real(source, target)
        if count == call // 2 + 1:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(os, "replace", stopping)
        trace_layers(model, IDS, tmp_path / "out", mask=MASK, quiet=True)
    (tmp_path / "out" / ".tmpkxSL98").touch()  # as safetensors 0.8 leaves it, when it is killed while it writes
    _, report = trace_layers(streamed(built("tiny-mxfp4")), IDS, tmp_path / "out", mask=MASK, resume=True, quiet=True)
    assert contents(tmp_path / "out") == undisturbed
    assert report.complete


def command(checkpoint: Path, out: Path) -> list[str]:
    return [*kills.arguments(checkpoint, out), "--no-envelope"]


@pytest.mark.parametrize("states", [7])
def test_a_killed_process_resumes_to_the_same_bytes(
    built: Build, tmp_path: Path, of_commands: dict[str, bytes], states: int
) -> None:
    """In the trace, which has 4 states, and in the envelope, which has 5 for each of its 4 arithmetics."""
    checkpoint = built("tiny-mxfp4")
    where = kills.kill(checkpoint, tmp_path / "out", states, delay=random.Random(states).uniform(0, 0.05))
    assert where is not None, "the process was done before it was killed"
    (tmp_path / "out" / ".tmpkxSL98").touch()
    assert main([*kills.arguments(checkpoint, tmp_path / "out"), "--resume"]) == 0
    assert contents(tmp_path / "out") == of_commands


@pytest.mark.parametrize("call", [1, 5, 19, 21])
def test_an_envelope_that_stops_anywhere_resumes_to_the_same_bytes(
    built: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enveloped: Path, call: int
) -> None:
    """After the rename of that number: 5 for each arithmetic, and one for the whole."""
    shutil.copytree(enveloped, tmp_path, dirs_exist_ok=True)
    tables = legal("exact")[:4]
    expected, real, count = contents(tmp_path), os.replace, 0
    (tmp_path / "envelope.safetensors").unlink()

    def stopping(source: str, target: str) -> None:
        nonlocal count
        count += 1
        real(source, target)
        if count == call:
            raise Stop

    truth = Trace.open(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(os, "replace", stopping)
        write_envelope(truth, (streamed(built("tiny-mxfp4"), table) for table in tables))
    left = remaining(truth, tables)
    assert len(left) == max(0, 4 - call // 5)
    write_envelope(truth, (streamed(built("tiny-mxfp4"), table) for table in left), resume=True)
    assert contents(tmp_path) == expected


def test_first_layers_now_the_others_later(built: Build, tmp_path: Path) -> None:
    checkpoint, out = built("tiny-mxfp4"), tmp_path / "out"
    assert main(command(checkpoint, tmp_path / "whole")) == 0
    assert main([*command(checkpoint, out), "--layers", "0-1"]) == 0
    assert max(entry.layer or 0 for entry in Trace.open(out).sites.values()) == 1
    assert main([*command(checkpoint, out), "--resume"]) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_another_run_is_not_continued(built: Build, tmp_path: Path) -> None:
    model = streamed(built("tiny-mxfp4"))
    trace_layers(model, IDS, tmp_path, last=0, quiet=True)
    with pytest.raises(q.Qwen35Error, match=r"(?s)another run.*ids"):
        trace_layers(model, IDS + 1, tmp_path, resume=True, quiet=True)
    with pytest.raises(q.Qwen35Error, match=r"(?s)another run.*arithmetic"):
        trace_layers(streamed(built("tiny-mxfp4"), "float32"), IDS, tmp_path, resume=True, quiet=True)
    trace_layers(model, IDS, tmp_path, quiet=True)
    before = contents(tmp_path)
    with pytest.raises(q.Qwen35Error, match="complete trace of another run"):
        trace_layers(model, IDS + 1, tmp_path, resume=True, quiet=True)
    trace_layers(model, IDS, tmp_path, resume=True, quiet=True)
    assert contents(tmp_path) == before


def test_a_full_disk_or_a_read_error_leaves_a_message_and_a_resumable_state(
    built: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush, preadv = TraceWriter.flush, os.preadv
    trace_layers(streamed(built("tiny-mxfp4")), IDS, tmp_path / "undisturbed", quiet=True)

    def full(writer: TraceWriter) -> None:
        if writer.files == 2:
            raise OSError(28, "No space left on device")
        flush(writer)

    def broken(*args: Any) -> int:
        if (tmp_path / "out" / "partial" / "resume.safetensors").exists():
            raise OSError(5, "Input/output error")
        return preadv(*args)

    for owner, name, failing, words in (
        (TraceWriter, "flush", full, "No space left"),
        (os, "preadv", broken, "cannot read a tensor.*Input/output error"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            with pytest.raises(q.Qwen35Error, match=f"(?s){words}.*--resume"):
                trace_layers(streamed(built("tiny-mxfp4")), IDS, tmp_path / "out", quiet=True)
        trace_layers(streamed(built("tiny-mxfp4")), IDS, tmp_path / "out", resume=True, quiet=True)
        assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
        shutil.rmtree(tmp_path / "out")


def test_progress_names_layer_experts_and_time(
    built: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace_layers(streamed(built("tiny-mxfp4")), IDS, tmp_path, taps="layer_output_sum")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"layer {i}/4" for i in (1, 2, 3, 4)]
    assert all("expert" in line and "GB read" in line and "s left" in line for line in lines)


def test_ids_from_a_file_and_what_the_command_says(
    built: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ids.json").write_text(json.dumps([[1, 2, 3], [4, 5]]))
    options = ["--ids", str(tmp_path / "ids.json"), "--taps", "moe_*", "--shared-expert", "fused-online"]
    assert main(["trace", str(built("tiny-mxfp4")), *options, "--out", str(tmp_path / "o"), "--no-envelope"]) == 0
    printed = capsys.readouterr().out
    assert "tensors used" in printed and "converted to MXFP4, relative error 0." in printed
    found = Trace.open(tmp_path / "o")
    assert found.mask.tolist() == [[1, 1, 1], [1, 1, 0]] and all(".moe_" in key for key in found)
    assert found.meta["fused"] == [True] * 4


def test_a_complete_run_reports_the_same_when_it_is_resumed(built: Build, tmp_path: Path) -> None:
    reports = [
        str(trace_layers(q.load(built("tiny"), mode="stream"), IDS, tmp_path / "out", quiet=True, resume=resume)[1])
        for resume in (False, True)
    ]
    assert reports[0] == reports[1] and "on purpose" in reports[0]


def test_bits_are_not_mixed_of_two_numbers_of_threads(built: Build, tmp_path: Path) -> None:
    model, before = streamed(built("tiny-mxfp4")), torch.get_num_threads()
    trace_layers(model, IDS, tmp_path / "out", quiet=True, last=1)
    torch.set_num_threads(before + 1)
    try:
        with pytest.raises(q.Qwen35Error, match=rf"OMP_NUM_THREADS={before} goes on"):
            trace_layers(model, IDS, tmp_path / "out", quiet=True, resume=True)
    finally:
        torch.set_num_threads(before)
    assert trace_layers(model, IDS, tmp_path / "out", quiet=True, resume=True)[1].complete


def test_a_trace_is_as_readable_as_other_files(built: Build, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    assert main(command(built("tiny-mxfp4"), tmp_path / "out")) == 0
    files = [tmp_path / "other", *(tmp_path / "out").iterdir()]
    assert len({file.stat().st_mode for file in files}) == 1 and len(files) > 5


def test_an_envelope_says_where_it_is(built: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It takes most of the time."""
    assert main(["trace", str(built("tiny-mxfp4")), "--ids", "1,2,3", "--out", str(tmp_path / "out")]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("envelope, pass ")]
    assert len(lines) > 4 and [line.split("layer ")[1][:3] for line in lines[:5]] == ["1/4", "2/4", "3/4", "4/4", "1/4"]


def claims(out: Path) -> None:
    with claim(out):
        print("claimed", flush=True)
        time.sleep(60)


def test_another_process_that_writes_there_is_kept_out(
    built: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs in one directory would mix their files; that of a process which was killed is free."""
    out, checkpoint = tmp_path / "out", built("tiny-mxfp4")
    other = Child(tmp_path / "said", claims, out)
    try:
        while not (tmp_path / "said").is_file() or not (tmp_path / "said").read_text():
            assert other.running
            time.sleep(0.001)
        assert main(command(checkpoint, out)) == 2
        assert "another process is writing here" in capsys.readouterr().err and not list(out.iterdir())
    finally:
        other.kill()
    other.wait()
    assert main(command(checkpoint, out)) == 0
    prompts = [*command(checkpoint, out), "--ids", "[[1, 2], [3, 4]]", "--batch", "1"]
    (tmp_path / "ids.json").write_text("[[1, 2], [3, 4]]")
    prompts[prompts.index("[[1, 2], [3, 4]]")] = str(tmp_path / "ids.json")
    assert main([*prompts, "--layers", "0-0"]) == 0
    with claim(out / "groups" / "00001"):
        assert main(prompts) == 2
    assert "another process is writing here" in capsys.readouterr().err
    assert main([*prompts, "--resume"]) == 0


def test_a_directory_that_was_made_for_nothing_is_removed(built: Build, tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    assert main([*command(built("tiny-mxfp4"), out), "--taps", "moe_topk"]) == 2
    assert not out.exists()


NOT_FINITE = "NaN or infinity, from {} on"


def with_nan(built: Build, tmp_path: Path, tensor: str, at: int = 0) -> Path:
    """The checkpoint with NaN in one place of a bf16 tensor."""
    shutil.copytree(built("tiny"), tmp_path / "broken")
    stored = Checkpoint.open(tmp_path / "broken").stored(tensor)
    with open(stored.file, "r+b") as file:
        file.seek(stored.begin + 2 * at)
        file.write(b"\xff\xff")
    return tmp_path / "broken"


def test_nan_is_not_silent_and_a_resumed_run_says_it_again(
    built: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = with_nan(built, tmp_path, "layers.1.mlp.gate.weight")
    for layers in (["--layers", "0-2"], ["--resume"]):
        assert main([*command(broken, tmp_path / "out"), *layers]) == 0
        assert NOT_FINITE.format("layers.1.moe_router_logits") in capsys.readouterr().err
    assert main(command(built("tiny"), tmp_path / "fine")) == 0
    assert "NaN" not in capsys.readouterr().err


def test_nan_in_the_logits_alone(built: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of a streamed head are never all there."""
    broken = with_nan(built, tmp_path, "lm_head.weight", 64 * 100)
    for mode in ("stream", "decoded"):
        assert main([*command(broken, tmp_path / mode), "--mode", mode]) == 0
        assert NOT_FINITE.format("next_token_logits") in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["decoded", "packed", "stream"])
def test_a_model_that_is_dropped_closes_its_files(built: Build, mode: str) -> None:
    """At once, not when the garbage collector comes by."""
    model = q.load(built("tiny-mxfp4"), mode=mode)
    model(IDS)
    checkpoint = weakref.ref(origin_of(model).checkpoint)
    gc.disable()
    try:
        del model
        assert checkpoint() is None
    finally:
        gc.enable()
