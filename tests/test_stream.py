"""Streaming and long runs: the same values layer by layer, flat memory, and a trace that survives any kill."""

from __future__ import annotations

import gc
import os
import random
import shutil
import time
import weakref

import kills
import pytest
import torch
from forked import Child
from kills import contents
from traces import GROUPS, Traces, stopping

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

IDS = torch.tensor([[3, 7, 11, 5, 100, 17, 29, 31], [1, 2, 3, 4, 5, 0, 0, 0]])
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
SOME = [3, 7, 11, 5, 100]


@pytest.fixture(scope="module")
def built(small):
    """Recipes with six experts: these tests write many traces."""
    return lambda recipe: small(recipe, 4)


@pytest.fixture(scope="module")
def streamed(built):
    """streamed(arithmetic) is a streamed model of tiny-mxfp4."""
    return lambda arithmetic="exact": q.load(built("tiny-mxfp4"), arithmetic, mode="stream", text_only=True)


@pytest.fixture
def traces(built, tmp_path, capsys):
    return Traces(built("tiny-mxfp4"), tmp_path, capsys)


def write(model, out, **options):
    """The trace of IDS, and what was read for it."""
    return trace_layers(model, IDS, out, **{"mask": MASK, "quiet": True, **options})


@pytest.mark.parametrize("arithmetic", ["exact", "transformers-bf16", "sglang-bf16"])
@pytest.mark.parametrize("mode", ["stream", "decoded"])
def test_layer_by_layer_is_what_one_forward_pass_computes(built, tmp_path, mode, arithmetic):
    model = q.load(built("tiny-mxfp4"), arithmetic, mode=mode, text_only=True)
    whole = q.trace(model, IDS, attention_mask=MASK, experts=True)
    found, report = write(model, tmp_path / "out", experts=True)
    assert list(found) == list(whole) and report.complete
    for key, site in whole.sites.items():
        assert torch.equal(found[key], whole[key]), key
        assert (found.sites[key].dims, found.sites[key].dtype) == (site.dims, site.dtype), key
    assert found.meta["steps"] == whole.meta["steps"] and found.meta["checkpoint"] == origin_of(model).identity


def test_the_streamed_head_is_one_tap_however_many_blocks_it_has(built, tmp_path, monkeypatch):
    model = q.load(built("tiny"), mode="stream", text_only=True)
    before = q.trace(model, IDS)["next_token_logits"]
    monkeypatch.setattr("qwen35_moe.run.streamed.HEAD_ROWS", 100)
    assert HEAD_ROWS > model.config.vocab_size > 100
    assert torch.allclose(q.trace(model, IDS)["next_token_logits"], before, rtol=0, atol=1e-12)
    found, _ = write(model, tmp_path / "out", mask=None)
    assert torch.equal(found["next_token_logits"], q.trace(model, IDS)["next_token_logits"])


def test_runs():
    assert list(consecutive([3, 4, 5, 9, 11, 12])) == [slice(3, 6), slice(9, 10), slice(11, 13)]
    assert list(consecutive([])) == []


@pytest.fixture(scope="module")
def undisturbed(streamed, tmp_path_factory):
    """The files of the trace of IDS."""
    out = tmp_path_factory.mktemp("undisturbed")
    write(streamed(), out)
    return contents(out)


@pytest.fixture(scope="module")
def of_commands(built, tmp_path_factory):
    """Trace and envelope of the run that `kills` kills."""
    out = tmp_path_factory.mktemp("kills") / "out"
    assert main([*kills.arguments(built("tiny-mxfp4"), out)]) == 0
    return contents(out)


@pytest.fixture(scope="module")
def enveloped(streamed, tmp_path_factory):
    """A trace of IDS and the envelope of four arithmetics."""
    out = tmp_path_factory.mktemp("enveloped")
    truth, _ = write(streamed(), out, taps="layer_*,next_token_logits")
    write_envelope(truth, map(streamed, legal("exact")[:4]))
    return out


@pytest.mark.parametrize("call", range(1, 36, 3))
def test_a_run_that_stops_anywhere_resumes_to_the_same_bytes(streamed, tmp_path, undisturbed, call):
    """Before or after every rename: what a kill there would leave is on disk."""
    with stopping(os, "replace", (call + 1) // 2, after=bool(call % 2)):
        write(streamed(), tmp_path / "out")
    (tmp_path / "out" / ".tmpkxSL98").touch()  # as safetensors 0.8 leaves it, when it is killed while it writes
    _, report = write(streamed(), tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == undisturbed and report.complete


@pytest.mark.parametrize("states", [7])
def test_a_killed_process_resumes_to_the_same_bytes(built, tmp_path, of_commands, states):
    """In the trace, which has 4 states, and in the envelope, which has 5 for each of its 4 arithmetics."""
    checkpoint = built("tiny-mxfp4")
    where = kills.kill(checkpoint, tmp_path / "out", states, delay=random.Random(states).uniform(0, 0.05))
    assert where is not None, "the process was done before it was killed"
    (tmp_path / "out" / ".tmpkxSL98").touch()
    assert main([*kills.arguments(checkpoint, tmp_path / "out"), "--resume"]) == 0
    assert contents(tmp_path / "out") == of_commands


@pytest.mark.parametrize("call", [1, 5, 19, 21])
def test_an_envelope_that_stops_anywhere_resumes_to_the_same_bytes(streamed, tmp_path, enveloped, call):
    """After the rename of that number: 5 for each arithmetic, and one for the whole."""
    shutil.copytree(enveloped, tmp_path, dirs_exist_ok=True)
    tables, expected, truth = legal("exact")[:4], contents(tmp_path), Trace.open(tmp_path)
    (tmp_path / "envelope.safetensors").unlink()
    with stopping(os, "replace", call, after=True):
        write_envelope(truth, map(streamed, tables))
    left = remaining(truth, tables)
    assert len(left) == max(0, 4 - call // 5)
    write_envelope(truth, map(streamed, left), resume=True)
    assert contents(tmp_path) == expected


def test_first_layers_now_the_others_later(traces):
    traces("whole", SOME, "--no-envelope")
    traces("out", SOME, "--no-envelope", "--layers", "0-1")
    assert max(entry.layer or 0 for entry in traces.open("out").sites.values()) == 1
    traces("out", SOME, "--no-envelope", "--resume")
    assert traces.files("out") == traces.files("whole")


def test_another_run_is_not_continued(streamed, tmp_path):
    model = streamed()
    write(model, tmp_path, last=0)
    with pytest.raises(q.Qwen35Error, match=r"(?s)another run.*ids"):
        trace_layers(model, IDS + 1, tmp_path, mask=MASK, resume=True, quiet=True)
    with pytest.raises(q.Qwen35Error, match=r"(?s)another run.*arithmetic"):
        write(streamed("float32"), tmp_path, resume=True)
    write(model, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(q.Qwen35Error, match="complete trace of another run"):
        trace_layers(model, IDS + 1, tmp_path, mask=MASK, resume=True, quiet=True)
    write(model, tmp_path, resume=True)
    assert contents(tmp_path) == before


def test_a_full_disk_or_a_read_error_leaves_a_message_and_a_resumable_state(
    streamed, tmp_path, monkeypatch, undisturbed
):
    flush, preadv = TraceWriter.flush, os.preadv

    def full(writer):
        if writer.files == 2:
            raise OSError(28, "No space left on device")
        flush(writer)

    def broken(*args):
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
                write(streamed(), tmp_path / "out")
        write(streamed(), tmp_path / "out", resume=True)
        assert contents(tmp_path / "out") == undisturbed
        shutil.rmtree(tmp_path / "out")


def test_progress_names_layer_experts_and_time(streamed, tmp_path, capsys):
    write(streamed(), tmp_path, taps="layer_output_sum", quiet=False)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"layer {i}/4" for i in (1, 2, 3, 4)]
    assert all("expert" in line and "GB read" in line and "s left" in line for line in lines)


def test_ids_from_a_file_and_what_the_command_says(traces):
    options = ("--taps", "moe_*", "--shared-expert", "fused-online", "--no-envelope")
    printed = traces("o", [[1, 2, 3], [4, 5]], *options)
    assert "tensors used" in printed and "converted to MXFP4, relative error 0." in printed
    found = traces.open("o")
    assert found.mask.tolist() == [[1, 1, 1], [1, 1, 0]] and all(".moe_" in key for key in found)
    assert "of 5 tokens" in printed and found.meta["fused"] == [True] * 4


def test_a_complete_run_reports_the_same_when_it_is_resumed(built, tmp_path):
    reports = [
        str(write(q.load(built("tiny"), mode="stream"), tmp_path / "out", resume=resume)[1]) for resume in (False, True)
    ]
    assert reports[0] == reports[1] and "on purpose" in reports[0]


def test_bits_are_not_mixed_of_two_numbers_of_threads(streamed, tmp_path):
    model, before = streamed(), torch.get_num_threads()
    write(model, tmp_path / "out", last=1)
    torch.set_num_threads(before + 1)
    try:
        with pytest.raises(q.Qwen35Error, match=rf"OMP_NUM_THREADS={before} goes on"):
            write(model, tmp_path / "out", resume=True)
    finally:
        torch.set_num_threads(before)
    assert write(model, tmp_path / "out", resume=True)[1].complete


def test_a_trace_is_as_readable_as_other_files(traces, tmp_path):
    (tmp_path / "other").touch()
    traces("out", SOME, "--no-envelope")
    files = [tmp_path / "other", *(tmp_path / "out").iterdir()]
    assert len({file.stat().st_mode for file in files}) == 1 and len(files) > 5


def test_an_envelope_says_where_it_is(built, tmp_path, capsys):
    """It takes most of the time."""
    assert main(["trace", str(built("tiny-mxfp4")), "--ids", "1,2,3", "--out", str(tmp_path / "out")]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("envelope, pass ")]
    assert len(lines) > 4 and [line.split("layer ")[1][:3] for line in lines[:5]] == ["1/4", "2/4", "3/4", "4/4", "1/4"]


def claims(out):
    with claim(out):
        print("claimed", flush=True)
        time.sleep(60)


def test_another_process_that_writes_there_is_kept_out(traces, tmp_path):
    """Two runs in one directory would mix their files; that of a process which was killed is free."""
    out = tmp_path / "out"
    other = Child(tmp_path / "said", claims, out)
    try:
        while not (tmp_path / "said").is_file() or not (tmp_path / "said").read_text():
            assert other.running
            time.sleep(0.001)
        traces.refuses("another process is writing here", "out", SOME, "--no-envelope")
        assert not list(out.iterdir())
    finally:
        other.kill()
    other.wait()
    traces("out", SOME, "--no-envelope")
    prompts = ("out", [[1, 2], [3, 4]], *GROUPS, "--no-envelope")
    traces(*prompts, "--layers", "0-0")
    with claim(out / "groups" / "00001"):
        traces.refuses("another process is writing here", *prompts)
    traces(*prompts, "--resume")


def test_a_directory_that_was_made_for_nothing_is_removed(traces, tmp_path):
    traces.refuses("unknown tap name", "a/out", SOME, "--taps", "moe_topk")
    assert not (tmp_path / "a" / "out").exists()


NOT_FINITE = "NaN or infinity, from {} on"


@pytest.fixture
def with_nan(built, tmp_path, capsys):
    """with_nan(tensor, at): traces of a checkpoint with NaN in one place of a bf16 tensor."""

    def of(tensor: str, at: int = 0) -> Traces:
        broken = shutil.copytree(built("tiny"), tmp_path / "broken")
        stored = Checkpoint.open(broken).stored(tensor)
        with open(stored.file, "r+b") as file:
            file.seek(stored.begin + 2 * at)
            file.write(b"\xff\xff")
        return Traces(broken, tmp_path, capsys)

    return of


def test_nan_is_not_silent_and_a_resumed_run_says_it_again(with_nan, traces):
    broken = with_nan("layers.1.mlp.gate.weight")
    for layers in (["--layers", "0-2"], ["--resume"]):
        said = broken("out", SOME, "--no-envelope", *layers)
        assert NOT_FINITE.format("layers.1.moe_router_logits") in said
    assert "NaN" not in traces("fine", SOME, "--no-envelope")


def test_nan_in_the_logits_alone(with_nan):
    """Those of a streamed head are never all there."""
    broken = with_nan("lm_head.weight", 64 * 100)
    for mode in ("stream", "decoded"):
        assert NOT_FINITE.format("next_token_logits") in broken(mode, SOME, "--no-envelope", "--mode", mode)


@pytest.mark.parametrize("mode", ["decoded", "packed", "stream"])
def test_a_model_that_is_dropped_closes_its_files(built, mode):
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
