"""Many prompts: in groups, in several processes, and joined to the bytes of one process."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command, launch_command_parser
from forked import Child
from kills import contents
from tolerances import FLOAT64_REORDERED

import qwen35_moe as q
from qwen35_moe.cli.main import main
from qwen35_moe.run.files import claim
from qwen35_moe.trace.file import Trace
from qwen35_moe.trace.writer import TraceWriter

Build = Callable[[str], Path]
PROMPTS = [[1, 2, 3, 4, 5], [9, 8, 7], [5, 5, 5, 6, 7, 8]]
LAUNCH = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.fixture(scope="module")
def built(small: Callable[..., Path]) -> Build:
    """Small recipes: these tests write many traces."""
    return small


def options(checkpoint: Path, folder: Path, out: str, *more: str) -> list[str]:
    (folder / "ids.json").write_text(json.dumps(PROMPTS))
    ids = ["--ids", str(folder / "ids.json"), "--out", str(folder / out), "--quiet"]
    return ["trace", str(checkpoint), *ids, *more]


def test_groups_join_to_the_trace_of_one_batch(built: Build, tmp_path: Path) -> None:
    checkpoint = built("tiny-mxfp4")
    for mode in ("stream", "decoded"):
        more = ("--experts", "--no-envelope", "--mode", mode)
        assert main(options(checkpoint, tmp_path, "whole", *more)) == 0
        assert main(options(checkpoint, tmp_path, "joined", *more, "--batch", "1")) == 0
        whole, joined = Trace.open(tmp_path / "whole"), Trace.open(tmp_path / "joined")
        texts = [json.loads((t.path / "trace.json").read_text()) for t in (whole, joined) if t.path]
        # Bytes differ where sums were added up in another order.
        names = [(sorted(text.pop("files")), len(text.pop("sha256"))) for text in texts]
        assert texts[0] == texts[1] and names[0] == names[1]
        assert {p.name for p in tmp_path.iterdir()} == {"ids.json", "whole", "joined"}
        for key, x in whole.items():
            size = float(x.double().norm())
            assert float((joined[key].double() - x.double()).norm()) <= FLOAT64_REORDERED * size, key


def accelerate_launch(arguments: list[str]) -> None:
    launch_command(launch_command_parser().parse_args([*LAUNCH, "-m", "qwen35_moe", *arguments]))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_two_processes_one_of_which_fails_and_resumes(built: Build, tmp_path: Path) -> None:
    """First with what a launcher tells its processes, then by the launcher itself."""
    assert main(options(built("tiny-mxfp4"), tmp_path, "alone", "--batch", "1")) == 0
    assert main(options(built("tiny-mxfp4"), tmp_path, "shared", "--batch", "1", "--layers", "0-0")) == 0
    resume = options(built("tiny-mxfp4"), tmp_path, "shared", "--resume")
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with claim(tmp_path / "shared" / "groups" / "00002"):  # the second process's prompt
        both = [Child(tmp_path / f"said{n}", main, resume, RANK=n, LOCAL_RANK=n, **told) for n in "01"]
        assert both[1].wait() == 2
        both[0].kill()  # it waits for the other, as a launcher knows
        both[0].wait()
    failed = both[1].said.read_text()
    assert "another process is writing here" in failed and "prompts 2 to 2, process 1" in failed
    assert max(entry.layer or 0 for entry in Trace.open(tmp_path / "shared").sites.values()) == 0
    resumed = Child(tmp_path / "said", accelerate_launch, resume, PYTHONPATH=str(Path(q.__file__).parents[1]))
    assert resumed.wait() == 0, resumed.said.read_text()
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    assert "envelope.safetensors" in contents(tmp_path / "shared")


class Stop(BaseException):
    """A kill at a chosen moment."""


def test_a_kill_while_joining_leaves_no_half_trace(
    built: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = options(built("tiny-mxfp4"), tmp_path, "out", "--batch", "1", "--taps", "layer_output_sum")
    assert main(arguments) == 0
    expected = contents(tmp_path / "out")
    real = TraceWriter._begin

    def stopping(writer: TraceWriter, new: Path) -> None:
        real(writer, new)
        if writer.out.name == "out":
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(TraceWriter, "_begin", stopping)
        main(arguments)
    Trace.open(tmp_path / "out")  # the older one
    assert main([*arguments, "--resume"]) == 0
    assert contents(tmp_path / "out") == expected
    assert main([*arguments, "--resume"]) == 0  # nothing is left to do
    assert contents(tmp_path / "out") == expected
    assert main([*arguments, "--resume", "--arithmetic", "float32"]) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"ids.json", "out"}


def test_foreign_files_stay(built: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out" / "groups").mkdir(parents=True)
    (tmp_path / "out" / "groups" / "thesis.tex").touch()
    assert main(options(built("tiny-mxfp4"), tmp_path, "out", "--batch", "1")) == 2
    assert "thesis.tex" in capsys.readouterr().err and (tmp_path / "out" / "groups" / "thesis.tex").exists()


def test_folders_beside_a_trace_are_nobody_elses_business(built: Build, tmp_path: Path) -> None:
    """Groups are in the trace's own directory, so that nothing beside it can be taken for them."""
    for name in ("out.partial", "out.groups"):
        (tmp_path / name / "00000").mkdir(parents=True)
        (tmp_path / name / "00000" / "trace.json").touch()
    assert main(options(built("tiny-mxfp4"), tmp_path, "out", "--batch", "1", "--no-envelope")) == 0
    assert main(options(built("tiny-mxfp4"), tmp_path, "out", "--no-envelope")) == 0
    assert all((tmp_path / f"out.{name}" / "00000" / "trace.json").is_file() for name in ("partial", "groups"))
    assert not any(path.is_dir() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "name", ["groups", "groups/00001", "partial", "partial/x", "groups-joined", "00000.safetensors"]
)
def test_a_folder_of_that_name_with_other_things_stays(
    built: Build, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in (["--batch", "1"], []):
        (tmp_path / "out" / name / "thesis").mkdir(parents=True, exist_ok=True)
        assert main(options(built("tiny-mxfp4"), tmp_path, "out", *more)) == 2
        assert "the folder is not a trace" in capsys.readouterr().err
        assert (tmp_path / "out" / name / "thesis").is_dir()


@pytest.mark.parametrize("batch", [["--batch", "1"], []], ids=["groups", "one pass"])
def test_a_request_that_fails_leaves_the_trace_that_is_there(
    built: Build, tmp_path: Path, batch: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cpu.json").write_text('{"": "cpu"}')
    good = options(built("tiny-mxfp4"), tmp_path, "out", *batch)
    assert main(good) == 0
    before = contents(tmp_path / "out")
    for wrong in (
        ["--layers", "0-99"],
        ["--shared-expert", "fused"],
        ["--device-map", "cpu.json", "--device", "cuda"],
        ["--arithmetic", "nonsense"],
        ["--ids", "1,2,999999"],
        ["--ids", "none.json"],
        ["--taps", "moe_topk"],
    ):
        assert main([*good, *wrong]) == 2, wrong
        assert contents(tmp_path / "out") == before, wrong


def test_the_state_of_another_request_is_not_dropped_by_resume(
    built: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--no-envelope", "--layers", "0-0"]
    for first, then in ((["--batch", "1"], []), ([], ["--batch", "1"]), (["--batch", "1"], ["--batch", "2"])):
        assert main(options(built("tiny-mxfp4"), tmp_path, "out", *more, *first)) == 0
        assert main(options(built("tiny-mxfp4"), tmp_path, "out", *more, *then, "--resume")) == 2
        assert "another run was begun here" in capsys.readouterr().err
        assert main(options(built("tiny-mxfp4"), tmp_path, "out", "--no-envelope", *first, "--resume")) == 0
    assert main(options(built("tiny-mxfp4"), tmp_path, "out", *more, "--batch", "1")) == 0
    command = options(built("tiny-mxfp4"), tmp_path, "out", *more, "--batch", "1", "--resume")
    (tmp_path / "ids.json").write_text(json.dumps([PROMPTS[0], [1, 1, 1], PROMPTS[2]]))
    assert main(command) == 2
    assert "differing: ids" in capsys.readouterr().err


def test_what_a_complete_trace_of_groups_resumes_to(
    built: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = options(built("tiny-mxfp4"), tmp_path, "out", "--batch", "1", "--no-envelope")
    assert main(command) == 0
    first = capsys.readouterr().out
    assert main([*command, "--resume"]) == 0
    assert capsys.readouterr().out == first and "never used" not in first
    assert main([*command, "--resume", "--layers", "0-99"]) == 2


def test_a_directory_that_is_deleted_under_a_run(
    built: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another run may have filled it again: traces must not mix."""
    real, other = TraceWriter.flush, tmp_path / "out" / "trace.json"

    def deleting(writer: TraceWriter) -> None:
        real(writer)
        if writer.files == 2:
            shutil.rmtree(tmp_path / "out")
            other.parent.mkdir()
            other.write_text("{}")

    with monkeypatch.context() as patch:
        patch.setattr(TraceWriter, "flush", deleting)
        assert main(options(built("tiny-mxfp4"), tmp_path, "out")) == 2
    assert "deleted while this was writing to it" in capsys.readouterr().err
    assert contents(tmp_path / "out") == {"trace.json": b"{}"}
