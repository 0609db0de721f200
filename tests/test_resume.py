"""What is there before a run stays until the run has something to put in its place, and only equal runs go on."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from traces import FEW, GROUPS, PROMPTS, Traces, stopping

from qwen35_moe.checkpoint import Checkpoint
from qwen35_moe.cli import trace as trace_cli
from qwen35_moe.cli.main import main
from qwen35_moe.model.moe import MoE
from qwen35_moe.oracle.judge import envelope_file
from qwen35_moe.run import files
from qwen35_moe.run.files import whole
from qwen35_moe.trace import folder as trace_folder
from qwen35_moe.trace.file import Trace
from qwen35_moe.trace.head import PARTIAL, RESUME

OTHERS = [[4, 4], [3, 2, 1], [6]]
BY_GROUP = ("out", PROMPTS, *GROUPS, *FEW)
STATE = f"{PARTIAL}/{RESUME}"
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def traces(small, tmp_path, capsys):
    """Of weights that a test may change."""
    return Traces(shutil.copytree(small("tiny-mxfp4", 4), tmp_path / "weights"), tmp_path, capsys)


def after_groups(count: int):
    return stopping(trace_cli, "_trace_group", count)


def change_weights(folder: Path) -> None:
    """All of a tensor, which no header tells."""
    stored = Checkpoint.open(folder).stored("embed_tokens.weight")
    data = bytearray(stored.file.read_bytes())
    data[stored.begin : stored.end] = bytes(stored.nbytes)
    stored.file.write_bytes(data)


@pytest.mark.parametrize("done", [1, 2])
def test_groups_of_other_weights_are_not_joined(traces, done):
    with after_groups(done):
        traces(*BY_GROUP)
    change_weights(traces.weights)
    traces.refuses("differing: checkpoint", *BY_GROUP, "--resume")
    with after_groups(1):  # as advised, without --resume; then killed, and gone on with
        traces(*BY_GROUP)
    traces(*BY_GROUP, "--resume")
    traces("whole", PROMPTS, *GROUPS, *FEW)
    assert traces.files("out") == traces.files("whole")


def test_groups_and_envelopes_are_of_one_number_of_threads(traces):
    threads = torch.get_num_threads()
    with after_groups(1):
        traces(*BY_GROUP)
    with stopping(envelope_file._Errors, "write", 3):
        traces("envelope", [1, 2, 3])
    torch.set_num_threads(threads + 1)
    try:
        traces.refuses("differing: threads", *BY_GROUP, "--resume")
        traces.refuses(f"OMP_NUM_THREADS={threads} goes on", "envelope", [1, 2, 3], "--resume")
    finally:
        torch.set_num_threads(threads)
    traces(*BY_GROUP, "--resume")
    traces("envelope", [1, 2, 3], "--resume")


def test_an_envelope_is_of_its_traces_weights(traces, capsys):
    with stopping(envelope_file._Errors, "write", 3):
        traces("out", [1, 2, 3])
    change_weights(traces.weights)
    traces.refuses("a complete trace of another run", "out", [1, 2, 3], "--resume")
    assert main(["compare", str(traces.root / "out"), str(traces.root / "out")]) == 2
    assert "another checkpoint" in capsys.readouterr().err


def test_the_first_layers_are_not_taken_for_all(traces):
    traces(*BY_GROUP, "--layers", "0-1")
    shutil.rmtree(traces.root / "out" / "groups")
    traces(*BY_GROUP, "--resume")
    assert len(traces.open("out")) == 4 and traces.open("out").meta["layers"] == 4


@pytest.mark.parametrize("there", ["complete", "unfinished"])
@pytest.mark.parametrize(
    "moment", ["in the first layer", "no room for it", "no room for all of it", "no room for its state", "in a group"]
)
def test_what_is_there_stays_until_a_layer_takes_its_place(traces, there, moment):
    traces("out", [1, 2, 3], *FEW, *([] if there == "complete" else ["--layers", "0-1"]))
    before = traces.files("out")
    if moment == "in the first layer":
        with stopping(MoE, "forward", 0):
            traces("out", [4, 5, 6], "--no-envelope")
    elif moment.startswith("no room"):
        late = ["--taps", "next_token_logits"] if moment == "no room for its state" else []
        with stopping(files, "save_file", int(moment == "no room for all of it"), FULL):
            traces.refuses("No space left", "out", [4, 5, 6], "--no-envelope", *late)
    else:
        with after_groups(1):
            traces(*BY_GROUP)
    after = traces.files("out")
    begun = moment in ("in the first layer", "no room for all of it")  # a first file is in its place
    stays = [name for name in before if not (begun and name.startswith(PARTIAL))]
    assert {name: after.get(name) for name in stays} == {name: before[name] for name in stays}
    traces("out", [1, 2, 3], *FEW, "--resume")
    assert len(traces.open("out")) == 4


def test_a_state_without_values_survives_a_full_disk(traces):
    late = ("--taps", "next_token_logits", "--no-envelope")
    traces("out", [1, 2, 3], *late, "--layers", "0-1")
    before = traces.files("out")
    with stopping(files, "save_file", 0, FULL):
        traces.refuses("No space left", "out", [1, 2, 3], *late, "--resume")
    assert traces.files("out")[STATE] == before[STATE]
    traces("out", [1, 2, 3], *late, "--resume")
    traces("whole", [1, 2, 3], *late)
    assert traces.files("out") == traces.files("whole")


def test_a_complete_trace_gets_its_envelope_later(traces):
    """Whatever was begun there since. Of groups only before they are joined."""
    traces("out", [1, 2, 3], "--no-envelope")
    with after_groups(1):
        traces(*BY_GROUP)
    traces("out", [1, 2, 3], "--resume")
    assert "envelope.safetensors" in traces.files("out")
    traces("joined", PROMPTS, *GROUPS, "--no-envelope")
    traces.refuses("without an envelope", "joined", PROMPTS, *GROUPS, "--resume")


def test_what_is_no_trace_is_nobody_elses(traces):
    """Names alone do not make a trace."""
    file, head = traces.root / "out" / "00000.safetensors", traces.root / "out" / "trace.json"
    file.parent.mkdir()
    save_file({"x": torch.ones(3)}, file)
    before = traces.files("out")
    traces.refuses("the folder is not a trace", "out", [1, 2], *FEW)
    assert traces.files("out") == before
    file.unlink()
    head.write_text('{"traceEvents": []}')
    traces.refuses("the folder is not a trace", "out", [1, 2], *FEW)
    assert head.is_file()


def test_a_link_in_the_place_of_parts(traces, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "groups").symlink_to(tmp_path / "elsewhere")
    traces.refuses("the folder is not a trace", *BY_GROUP)
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("out", ["partial", "a directory/ü", "groups/run.json"])
def test_any_name_can_be_resumed(traces, out):
    for ids, more in (([1, 2, 3], ["--layers", "0-1"]), ([1, 2, 3], ["--resume"]), (PROMPTS, GROUPS), ([1, 2, 3], [])):
        traces(out, ids, *FEW, *more)


def test_a_damaged_state_is_an_error(traces):
    with after_groups(2):
        traces(*BY_GROUP)
    for damage in (b"", b"[1]", b"null", b'{"steps"', b"\xff\xfe"):
        (traces.root / "out" / "groups" / "run.json").write_bytes(damage)
        traces.refuses("cannot read the state", "out", OTHERS, *GROUPS, *FEW, "--resume")
    traces("done", [1, 2], *FEW)
    head = '{"format": "qwen35-moe-trace", "version": 1'
    for damage in (head + "}", head + ', "tensors": [], "meta": []}', head + ', "tensors": [7], "meta": {}}'):
        (traces.root / "done" / "trace.json").write_text(damage)
        assert main(["compare", str(traces.root / "done"), str(traces.root / "done")]) == 2
        traces.refuses("trace.json", "done", [1, 2], *FEW, "--resume")  # and no bug, of either
    traces("done", [1, 2], *FEW)


def test_where_results_are_written(tmp_path):
    """What a link points to is replaced, not the link; what is no file is written to."""
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with whole(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with whole(path) as temporary:
            assert temporary == path


@pytest.mark.parametrize("setting", ["WORLD_SIZE=2", "PMI_SIZE=", "OMPI_COMM_WORLD_SIZE=abc"])
def test_processes_that_nobody_started(traces, monkeypatch, setting):
    monkeypatch.setenv(*setting.split("="))
    try:
        traces.refuses("cannot join the other processes", "out", [1, 2], *FEW)
    finally:
        PartialState._reset_state()


def test_long_lists_of_ids_are_no_file_names(traces):
    traces("out", [1], *FEW, "--ids", ",".join(["248"] * 90))


@pytest.mark.parametrize("groups", [(), GROUPS], ids=["one pass", "groups"])
def test_another_configuration_is_another_run(traces, groups):
    """Of the same tensors."""
    traces("out", PROMPTS, *FEW, *groups, "--layers", "0-1")
    traces("done", PROMPTS, *FEW, *groups)
    config = json.loads((traces.weights / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.1
    (traces.weights / "config.json").write_text(json.dumps(config))
    for out in ("out", "done"):
        traces.refuses("differing: checkpoint", out, PROMPTS, *FEW, *groups, "--resume")


def test_an_envelope_needs_the_checkpoint_of_its_trace(traces, monkeypatch):
    """Which may be replaced while the trace is written."""
    real = trace_cli._legal_models

    def replaced(*args):
        change_weights(traces.weights)
        return real(*args)

    monkeypatch.setattr(trace_cli, "_legal_models", replaced)
    traces.refuses("the checkpoint is not the truth's any more", "out", [1, 2, 3])


@pytest.mark.parametrize("taps", ["final_norm.gain", "layer_output_sum,final_norm.gain", "final_norm", "*.gain"])
def test_groups_of_any_taps_join(traces, taps):
    few = ("--taps", taps, "--no-envelope")
    traces("joined", PROMPTS, *few, *GROUPS)
    traces("whole", PROMPTS, *few)
    joined, whole = traces.open("joined"), traces.open("whole")
    assert list(joined) == list(whole) and all(joined[key].shape == whole[key].shape for key in whole)


def test_what_a_kill_left_of_joined_groups_is_removed(traces):
    with stopping(trace_folder.shutil, "rmtree", 0):
        traces(*BY_GROUP)
    assert list((traces.root / "out" / "groups").iterdir())
    for more in (["--resume"], [], ["--resume"]):
        traces(*BY_GROUP, *more)
        assert not (traces.root / "out" / "groups").exists()


@pytest.mark.parametrize("name", [RESUME, "envelope.safetensors", "envelope-state.safetensors", "00077.safetensors"])
@pytest.mark.parametrize("there", [False, True])
def test_files_are_known_by_what_they_hold(traces, name, there):
    file = traces.root / "out" / name
    for write in (
        lambda: file.write_text("mine"),
        lambda: save_file({"x": torch.ones(3)}, file),
        lambda: file.symlink_to(traces.root / "ids.json"),
    ):
        shutil.rmtree(file.parent, ignore_errors=True)
        if there:
            traces("out", [1, 2], *FEW)
        file.parent.mkdir(exist_ok=True)
        write()
        traces.refuses("the folder is not a trace", "out", [1, 2], *FEW)
        assert file.exists()


def test_fewer_layers_than_are_done(traces):
    traces("out", [1, 2], *FEW, "--layers", "0-2")
    before = traces.files("out")
    traces.refuses("more layers are done already", "out", [1, 2], *FEW, "--layers", "0-0", "--resume")
    assert traces.files("out") == before


def test_a_file_of_a_temporary_name_stays(tmp_path):
    (tmp_path / "report.json.tmp").write_text("mine")
    with whole(tmp_path / "report.json") as temporary:
        temporary.write_text("{}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.json.tmp"]


def test_an_older_file_that_cannot_be_removed(traces, monkeypatch):
    """Comes last: what takes its place is there by then."""
    traces("out", [1, 2, 3], "--no-envelope")
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == "00003.safetensors":
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        real(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        traces.refuses("Operation not permitted", "out", [4, 5], "--no-envelope")
    assert {"embed_tokens", "layers.0.layer_input"} <= set(Trace.open(traces.root / "out", partial=True))
    traces("out", [4, 5], "--no-envelope")
    traces("whole", [4, 5], "--no-envelope")
    assert traces.files("out") == traces.files("whole")


def test_what_was_used_and_what_was_not(traces):
    names = Checkpoint.open(traces.weights).names()
    first = [name for name in names if name.startswith(("layers.0.", "embed_tokens", "norm."))]
    for mode in ("stream", "decoded"):
        said = traces("out", [1, 2], "--layers", "0", "--taps", "final_norm", "--mode", mode)
        assert "no tap that was asked for" in said
        used = f"{len(first)} tensors used\n{len(names) - len(first)} left out on purpose"
        assert mode == "decoded" or used in said
    # An envelope adds those of all layers.
    assert "no tap that was asked for" not in traces("out", [1, 2], "--taps", "layers.1.moe_topk_ids")
