"""What is there before a run stays until the run has something to put in its place, and only equal runs go on."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from kills import contents
from safetensors.torch import save_file

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

Build = Callable[[str], Path]
PROMPTS, OTHERS = [[1, 2, 3, 4, 5], [9, 8, 7], [5, 5, 5, 6]], [[4, 4], [3, 2, 1], [6]]
FEW = ["--taps", "layer_output_sum", "--no-envelope"]
STATE = f"{PARTIAL}/{RESUME}"


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Kill(BaseException):
    """At a chosen moment: nothing is cleaned up."""


@pytest.fixture(scope="module")
def built(small: Callable[..., Path]) -> Build:
    """Recipes with six experts: these tests write many traces."""
    return lambda recipe: small(recipe, 4)


@pytest.fixture
def run(built: Build, tmp_path: Path) -> Callable[..., int]:
    """run(name of --out, ids, options) -> exit code"""
    shutil.copytree(built("tiny-mxfp4"), tmp_path / "weights")

    def trace(out: str, ids: Any, *more: str) -> int:
        (tmp_path / "ids.json").write_text(json.dumps(ids))
        command = ["trace", str(tmp_path / "weights"), "--ids", str(tmp_path / "ids.json"), "--quiet"]
        return main([*command, "--out", str(tmp_path / out), *more])

    return trace


@contextmanager
def killed(where: Any, name: str, calls: int, error: BaseException | None = None) -> Iterator[None]:
    """Instead of the call after so many."""
    real, left = getattr(where, name), [calls]

    def dying(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise error or Kill
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, dying)
        if error is None:
            with pytest.raises(Kill):
                yield
        else:
            yield


def change_weights(folder: Path) -> None:
    """All of a tensor, which no header tells."""
    stored = Checkpoint.open(folder).stored("embed_tokens.weight")
    data = bytearray(stored.file.read_bytes())
    data[stored.begin : stored.end] = bytes(stored.nbytes)
    stored.file.write_bytes(data)


@pytest.mark.parametrize("done", [1, 2])
def test_groups_of_other_weights_are_not_joined(
    run: Callable[..., int], tmp_path: Path, done: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with killed(trace_cli, "_trace_group", done):
        run("out", PROMPTS, "--batch", "1", *FEW)
    change_weights(tmp_path / "weights")
    assert run("out", PROMPTS, "--batch", "1", *FEW, "--resume") == 2
    assert "differing: checkpoint" in capsys.readouterr().err
    with killed(trace_cli, "_trace_group", 1):  # as advised, without --resume; then killed, and gone on with
        run("out", PROMPTS, "--batch", "1", *FEW)
    assert run("out", PROMPTS, "--batch", "1", *FEW, "--resume") == 0 == run("whole", PROMPTS, "--batch", "1", *FEW)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_groups_and_envelopes_are_of_one_number_of_threads(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    with killed(trace_cli, "_trace_group", 1):
        run("groups", PROMPTS, "--batch", "1", *FEW)
    with killed(envelope_file._Errors, "write", 3):
        run("envelope", [1, 2, 3])
    torch.set_num_threads(threads + 1)
    try:
        assert run("groups", PROMPTS, "--batch", "1", *FEW, "--resume") == 2
        assert "differing: threads" in capsys.readouterr().err
        assert run("envelope", [1, 2, 3], "--resume") == 2
        assert f"OMP_NUM_THREADS={threads} goes on" in capsys.readouterr().err
    finally:
        torch.set_num_threads(threads)
    assert run("groups", PROMPTS, "--batch", "1", *FEW, "--resume") == 0 == run("envelope", [1, 2, 3], "--resume")


def test_an_envelope_is_of_its_traces_weights(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with killed(envelope_file._Errors, "write", 3):
        run("out", [1, 2, 3])
    change_weights(tmp_path / "weights")
    assert run("out", [1, 2, 3], "--resume") == 2
    assert "a complete trace of another run" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "out"), str(tmp_path / "out")]) == 2
    assert "another checkpoint" in capsys.readouterr().err


def test_the_first_layers_are_not_taken_for_all(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("out", PROMPTS, "--batch", "1", *FEW, "--layers", "0-1") == 0
    shutil.rmtree(tmp_path / "out" / "groups")
    assert run("out", PROMPTS, "--batch", "1", *FEW, "--resume") == 0
    assert len(Trace.open(tmp_path / "out")) == 4 and Trace.open(tmp_path / "out").meta["layers"] == 4


@pytest.mark.parametrize("there", ["complete", "unfinished"])
@pytest.mark.parametrize(
    "moment", ["in the first layer", "no room for it", "no room for all of it", "no room for its state", "in a group"]
)
def test_what_is_there_stays_until_a_layer_takes_its_place(
    run: Callable[..., int], tmp_path: Path, there: str, moment: str
) -> None:
    assert run("out", [1, 2, 3], *FEW, *([] if there == "complete" else ["--layers", "0-1"])) == 0
    before = contents(tmp_path / "out")
    if moment == "in the first layer":
        with killed(MoE, "forward", 0):
            run("out", [4, 5, 6], "--no-envelope")
    elif moment.startswith("no room"):
        state = moment == "no room for its state"
        with killed(files, "save_file", int(moment == "no room for all of it"), FULL):
            late = ["--taps", "next_token_logits"] if state else []
            assert run("out", [4, 5, 6], "--no-envelope", *late) == 2
    else:
        with killed(trace_cli, "_trace_group", 1):
            run("out", PROMPTS, "--batch", "1", *FEW)
    after = contents(tmp_path / "out")
    begun = moment in ("in the first layer", "no room for all of it")  # a first file is in its place
    stays = [name for name in before if not (begun and name.startswith(PARTIAL))]
    assert {name: after.get(name) for name in stays} == {name: before[name] for name in stays}
    assert run("out", [1, 2, 3], *FEW, "--resume") == 0
    assert len(Trace.open(tmp_path / "out")) == 4


def test_a_state_without_values_survives_a_full_disk(run: Callable[..., int], tmp_path: Path) -> None:
    late = ["--taps", "next_token_logits", "--no-envelope"]
    assert run("out", [1, 2, 3], *late, "--layers", "0-1") == 0
    before = contents(tmp_path / "out")
    with killed(files, "save_file", 0, FULL):
        assert run("out", [1, 2, 3], *late, "--resume") == 2
    assert (tmp_path / "out" / STATE).read_bytes() == before[STATE]
    assert run("out", [1, 2, 3], *late, "--resume") == 0 == run("whole", [1, 2, 3], *late)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_complete_trace_gets_its_envelope_later(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever was begun there since. Of groups only before they are joined."""
    assert run("out", [1, 2, 3], "--no-envelope") == 0
    with killed(trace_cli, "_trace_group", 1):
        run("out", PROMPTS, "--batch", "1", *FEW)
    assert run("out", [1, 2, 3], "--resume") == 0
    assert "envelope.safetensors" in contents(tmp_path / "out")
    assert run("joined", PROMPTS, "--batch", "1", "--no-envelope") == 0
    assert run("joined", PROMPTS, "--batch", "1", "--resume") == 2
    assert "without an envelope" in capsys.readouterr().err


def test_what_is_no_trace_is_nobody_elses(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names alone do not make a trace."""
    (tmp_path / "out").mkdir()
    save_file({"x": torch.ones(3)}, tmp_path / "out" / "00000.safetensors")
    before = contents(tmp_path / "out")
    assert run("out", [1, 2], *FEW) == 2 and contents(tmp_path / "out") == before
    (tmp_path / "out" / "00000.safetensors").unlink()
    (tmp_path / "out" / "trace.json").write_text('{"traceEvents": []}')
    assert run("out", [1, 2], *FEW) == 2 and (tmp_path / "out" / "trace.json").is_file()
    assert capsys.readouterr().err.count("the folder is not a trace") == 2


def test_a_link_in_the_place_of_parts(run: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "groups").symlink_to(tmp_path / "elsewhere")
    assert run("out", PROMPTS, "--batch", "1", *FEW) == 2
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("out", ["partial", "a directory/ü", "groups/run.json"])
def test_any_name_can_be_resumed(run: Callable[..., int], tmp_path: Path, out: str) -> None:
    assert run(out, [1, 2, 3], *FEW, "--layers", "0-1") == 0 == run(out, [1, 2, 3], *FEW, "--resume")
    assert run(out, PROMPTS, *FEW, "--batch", "1") == 0 == run(out, [1, 2, 3], *FEW)


def test_a_damaged_state_is_an_error(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with killed(trace_cli, "_trace_group", 2):
        run("out", PROMPTS, "--batch", "1", *FEW)
    groups = tmp_path / "out" / "groups"
    for damage in (b"", b"[1]", b"null", b'{"steps"', b"\xff\xfe"):
        (groups / "run.json").write_bytes(damage)
        assert run("out", OTHERS, "--batch", "1", *FEW, "--resume") == 2
        assert "cannot read the state" in capsys.readouterr().err
    assert run("done", [1, 2], *FEW) == 0
    head = '{"format": "qwen35-moe-trace", "version": 1'
    for damage in (head + "}", head + ', "tensors": [], "meta": []}', head + ', "tensors": [7], "meta": {}}'):
        (tmp_path / "done" / "trace.json").write_text(damage)
        assert main(["compare", str(tmp_path / "done"), str(tmp_path / "done")]) == 2
        assert run("done", [1, 2], *FEW, "--resume") == 2
        assert "a bug" not in capsys.readouterr().err
    assert run("done", [1, 2], *FEW) == 0


def test_where_results_are_written(tmp_path: Path) -> None:
    """What a link points to is replaced, not the link; what is no file is written to."""
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with whole(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    with whole(tmp_path / "pipe") as temporary:
        assert temporary == tmp_path / "pipe"
    with whole(Path("/dev/null")) as temporary:
        assert temporary == Path("/dev/null")


@pytest.mark.parametrize("setting", ["WORLD_SIZE=2", "PMI_SIZE=", "OMPI_COMM_WORLD_SIZE=abc"])
def test_processes_that_nobody_started(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(*setting.split("="))
    try:
        assert run("out", [1, 2], *FEW) == 2
    finally:
        PartialState._reset_state()
    assert "cannot join the other processes" in capsys.readouterr().err


def test_long_lists_of_ids_are_no_file_names(run: Callable[..., int], built: Build, tmp_path: Path) -> None:
    ids = ",".join(["248000"[:3]] * 90)
    assert main(["trace", str(built("tiny")), "--ids", ids, "--out", str(tmp_path / "o"), "--quiet", *FEW]) == 0


@pytest.mark.parametrize("groups", [[], ["--batch", "1"]], ids=["one pass", "groups"])
def test_another_configuration_is_another_run(
    run: Callable[..., int], tmp_path: Path, groups: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same tensors."""
    assert run("out", PROMPTS, *FEW, *groups, "--layers", "0-1") == 0 == run("done", PROMPTS, *FEW, *groups)
    config = json.loads((tmp_path / "weights" / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.1
    (tmp_path / "weights" / "config.json").write_text(json.dumps(config))
    for out in ("out", "done"):
        assert run(out, PROMPTS, *FEW, *groups, "--resume") == 2
        assert "differing: checkpoint" in capsys.readouterr().err


def test_an_envelope_needs_the_checkpoint_of_its_trace(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which may be replaced while the trace is written."""
    real = trace_cli._legal_models

    def replaced(*args: Any) -> Any:
        change_weights(tmp_path / "weights")
        return real(*args)

    monkeypatch.setattr(trace_cli, "_legal_models", replaced)
    assert run("out", [1, 2, 3]) == 2
    assert "the checkpoint is not the truth's any more" in capsys.readouterr().err


@pytest.mark.parametrize("taps", ["final_norm.gain", "layer_output_sum,final_norm.gain", "final_norm", "*.gain"])
def test_groups_of_any_taps_join(run: Callable[..., int], tmp_path: Path, taps: str) -> None:
    few = ["--taps", taps, "--no-envelope"]
    assert run("joined", PROMPTS, *few, "--batch", "1") == 0 == run("whole", PROMPTS, *few)
    joined, whole = Trace.open(tmp_path / "joined"), Trace.open(tmp_path / "whole")
    assert list(joined) == list(whole) and all(joined[key].shape == whole[key].shape for key in whole)


def test_what_a_kill_left_of_joined_groups_is_removed(run: Callable[..., int], tmp_path: Path) -> None:
    groups = [*FEW, "--batch", "1"]
    with killed(trace_folder.shutil, "rmtree", 0):
        run("out", PROMPTS, *groups)
    assert list((tmp_path / "out" / "groups").iterdir())
    for more in (["--resume"], [], ["--resume"]):
        assert run("out", PROMPTS, *groups, *more) == 0
        assert not (tmp_path / "out" / "groups").exists()


@pytest.mark.parametrize("name", [RESUME, "envelope.safetensors", "envelope-state.safetensors", "00077.safetensors"])
def test_files_are_known_by_what_they_hold(run: Callable[..., int], tmp_path: Path, name: str) -> None:
    for content in ("text", "tensors", "link"):
        for there in (False, True):
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            if there:
                assert run("out", [1, 2], *FEW) == 0
            file = tmp_path / "out" / name
            file.parent.mkdir(exist_ok=True)
            if content == "text":
                file.write_text("mine")
            elif content == "tensors":
                save_file({"x": torch.ones(3)}, file)
            else:
                file.symlink_to(tmp_path / "ids.json")
            assert run("out", [1, 2], *FEW) == 2 and file.exists()


def test_fewer_layers_than_are_done(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("out", [1, 2], *FEW, "--layers", "0-2") == 0
    before = contents(tmp_path / "out")
    assert run("out", [1, 2], *FEW, "--layers", "0-0", "--resume") == 2
    assert "more layers are done already" in capsys.readouterr().err and contents(tmp_path / "out") == before


def test_a_file_of_a_temporary_name_stays(tmp_path: Path) -> None:
    (tmp_path / "report.json.tmp").write_text("mine")
    with whole(tmp_path / "report.json") as temporary:
        temporary.write_text("{}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.json.tmp"]


def test_an_older_file_that_cannot_be_removed(run: Callable[..., int], tmp_path: Path) -> None:
    """Comes last: what takes its place is there by then."""
    assert run("out", [1, 2, 3], "--no-envelope") == 0
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == "00003.safetensors":
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        real(path, missing_ok=missing_ok)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        assert run("out", [4, 5], "--no-envelope") == 2
    assert {"embed_tokens", "layers.0.layer_input"} <= set(Trace.open(tmp_path / "out", partial=True))
    assert run("out", [4, 5], "--no-envelope") == 0 == run("whole", [4, 5], "--no-envelope")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_was_used_and_what_was_not(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = Checkpoint.open(tmp_path / "weights").names()
    first = [name for name in names if name.startswith(("layers.0.", "embed_tokens", "norm."))]
    for mode in ("stream", "decoded"):
        assert run("out", [1, 2], "--layers", "0", "--taps", "final_norm", "--mode", mode) == 0
        said = capsys.readouterr()
        assert "no tap that was asked for" in said.err
        if mode == "stream":
            assert f"{len(first)} tensors used\n{len(names) - len(first)} left out on purpose" in said.out
    assert run("out", [1, 2], "--taps", "layers.1.moe_topk_ids") == 0  # an envelope adds those of all layers
    assert "no tap that was asked for" not in capsys.readouterr().err
