"""Many prompts: in groups, in several processes, and joined to the bytes of one process."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command, launch_command_parser
from forked import Child
from tolerances import FLOAT64_REORDERED
from traces import GROUPS, PROMPTS, Traces, stopping

import qwen35_moe as q
from qwen35_moe.cli.main import main
from qwen35_moe.run.files import claim
from qwen35_moe.trace.writer import TraceWriter

LAUNCH = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.fixture
def traces(small, tmp_path, capsys):
    return Traces(small("tiny-mxfp4"), tmp_path, capsys)


@pytest.mark.parametrize("mode", ["stream", "decoded"])
def test_groups_join_to_the_trace_of_one_batch(traces, tmp_path, mode):
    more = ("--experts", "--no-envelope", "--mode", mode)
    traces("whole", PROMPTS, *more)
    traces("joined", PROMPTS, *more, *GROUPS)
    texts = [json.loads(traces.files(out)["trace.json"]) for out in ("whole", "joined")]
    # Bytes differ where sums were added up in another order.
    names = [(sorted(text.pop("files")), len(text.pop("sha256"))) for text in texts]
    assert texts[0] == texts[1] and names[0] == names[1]
    assert {p.name for p in tmp_path.iterdir()} == {"ids.json", "whole", "joined"}
    whole, joined = traces.open("whole"), traces.open("joined")
    for key, x in whole.items():
        assert float((joined[key].double() - x.double()).norm()) <= FLOAT64_REORDERED * float(x.double().norm()), key


def accelerate_launch(arguments: list[str]) -> None:
    launch_command(launch_command_parser().parse_args([*LAUNCH, "-m", "qwen35_moe", *arguments]))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_two_processes_one_of_which_fails_and_resumes(traces, tmp_path):
    """First with what a launcher tells its processes, then by the launcher itself."""
    traces("alone", PROMPTS, *GROUPS)
    traces("shared", PROMPTS, *GROUPS, "--layers", "0-0")
    resume = traces.command("shared", PROMPTS, "--resume")
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with claim(tmp_path / "shared" / "groups" / "00002"):  # the second process's prompt
        both = [Child(tmp_path / f"said{n}", main, resume, RANK=n, LOCAL_RANK=n, **told) for n in "01"]
        assert both[1].wait() == 2
        both[0].kill()  # it waits for the other, as a launcher knows
        both[0].wait()
    failed = both[1].said.read_text()
    assert "another process is writing here" in failed and "prompts 2 to 2, process 1" in failed
    assert max(entry.layer or 0 for entry in traces.open("shared").sites.values()) == 0
    resumed = Child(tmp_path / "said", accelerate_launch, resume, PYTHONPATH=str(Path(q.__file__).parents[1]))
    assert resumed.wait() == 0, resumed.said.read_text()
    assert traces.files("shared") == traces.files("alone") and "envelope.safetensors" in traces.files("alone")


def test_a_kill_while_joining_leaves_no_half_trace(traces, tmp_path):
    run = ("out", PROMPTS, *GROUPS, "--taps", "layer_output_sum")
    traces(*run)
    expected = traces.files("out")
    with stopping(
        TraceWriter, "_begin", len(PROMPTS) + 1, after=True
    ):  # each group begins a trace; then the joined one
        traces(*run)
    traces.open("out")  # the older one
    for _ in range(2):  # the second time nothing is left to do
        traces(*run, "--resume")
        assert traces.files("out") == expected
    traces.refuses("differing: arithmetic", *run, "--resume", "--arithmetic", "float32")
    assert {p.name for p in tmp_path.iterdir()} == {"ids.json", "out"}


def test_foreign_files_stay(traces, tmp_path):
    (tmp_path / "out" / "groups").mkdir(parents=True)
    (tmp_path / "out" / "groups" / "thesis.tex").touch()
    traces.refuses("thesis.tex", "out", PROMPTS, *GROUPS)
    assert (tmp_path / "out" / "groups" / "thesis.tex").exists()


def test_folders_beside_a_trace_are_nobody_elses_business(traces, tmp_path):
    """Groups are in the trace's own directory, so that nothing beside it can be taken for them."""
    for name in ("out.partial", "out.groups"):
        (tmp_path / name / "00000").mkdir(parents=True)
        (tmp_path / name / "00000" / "trace.json").touch()
    for more in (GROUPS, ()):
        traces("out", PROMPTS, "--no-envelope", *more)
    assert all((tmp_path / f"out.{name}" / "00000" / "trace.json").is_file() for name in ("partial", "groups"))
    assert not any(path.is_dir() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "name", ["groups", "groups/00001", "partial", "partial/x", "groups-joined", "00000.safetensors"]
)
def test_a_folder_of_that_name_with_other_things_stays(traces, tmp_path, name):
    for more in (GROUPS, ()):
        (tmp_path / "out" / name / "thesis").mkdir(parents=True, exist_ok=True)
        traces.refuses("the folder is not a trace", "out", PROMPTS, *more)
        assert (tmp_path / "out" / name / "thesis").is_dir()


@pytest.mark.parametrize("batch", [GROUPS, ()], ids=["groups", "one pass"])
def test_a_request_that_fails_leaves_the_trace_that_is_there(traces, tmp_path, batch, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cpu.json").write_text('{"": "cpu"}')
    traces("out", PROMPTS, *batch)
    before = traces.files("out")
    for wrong, words in (
        (["--layers", "0-99"], "no such layer"),
        (["--shared-expert", "fused"], "fused-online"),
        (["--device-map", "cpu.json", "--device", "cuda"], "names all devices"),
        (["--arithmetic", "nonsense"], "unknown arithmetic"),
        (["--ids", "1,2,999999"], "not in the vocabulary"),
        (["--ids", "none.json"], "it does not exist"),
        (["--taps", "moe_topk"], "unknown tap name"),
    ):
        traces.refuses(words, "out", PROMPTS, *batch, *wrong)
        assert traces.files("out") == before, wrong


def test_the_state_of_another_request_is_not_dropped_by_resume(traces):
    more = ("--no-envelope", "--layers", "0-0")
    for first, then in ((GROUPS, ()), ((), GROUPS), (GROUPS, ("--batch", "2"))):
        traces("out", PROMPTS, *more, *first)
        traces.refuses("another run was begun here", "out", PROMPTS, *more, *then, "--resume")
        traces("out", PROMPTS, "--no-envelope", *first, "--resume")
    traces("out", PROMPTS, *more, *GROUPS)
    traces.refuses("differing: ids", "out", [PROMPTS[0], [1, 1, 1], PROMPTS[2]], *more, *GROUPS, "--resume")


def test_what_a_complete_trace_of_groups_resumes_to(traces):
    run = ("out", PROMPTS, *GROUPS, "--no-envelope")
    first = traces(*run)
    assert traces(*run, "--resume") == first and "never used" not in first
    traces.refuses("no such layer", *run, "--resume", "--layers", "0-99")


def test_a_directory_that_is_deleted_under_a_run(traces, tmp_path, monkeypatch):
    """Another run may have filled it again: traces must not mix."""
    real, other = TraceWriter.flush, tmp_path / "out" / "trace.json"

    def deleting(writer: TraceWriter) -> None:
        real(writer)
        if writer.files == 2:
            shutil.rmtree(tmp_path / "out")
            other.parent.mkdir()
            other.write_text("{}")

    monkeypatch.setattr(TraceWriter, "flush", deleting)
    traces.refuses("deleted while this was writing to it", "out", PROMPTS)
    assert traces.files("out") == {"trace.json": b"{}"}
