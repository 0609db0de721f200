"""One odd tensor costs its own tap: whatever a dump holds, there is a verdict, and only a verdict exits with 1."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qwen35_moe as q
from qwen35_moe.cli.main import main
from qwen35_moe.oracle import compare as comparing
from qwen35_moe.oracle.dumps.pieces import plain_values
from qwen35_moe.oracle.dumps.readers.common import lengths, request_ids
from qwen35_moe.trace.file import Trace

Build = Callable[[str], Path]
Make = Callable[..., Any]
IDS = (torch.arange(12) * 7919 % 251)[None]


@pytest.fixture(scope="module")
def files(small: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A truth and a clean dump of an engine."""
    folder = tmp_path_factory.mktemp("fences")
    q.write_truth(small("tiny"), IDS, folder / "truth")
    q.play_engine(small("tiny"), IDS, folder / "dump")
    return folder


@pytest.fixture
def saved(files: Path, tmp_path: Path) -> Make:
    """The dump, one tensor changed, of layer 1 unless `at` says another place; or keys of its `meta`, or its file."""

    def make(change: Callable[[Tensor], Any], tap: str = "mlp_output", at: str = "___layer_id=1",
             index: str = "", **meta: Any) -> Path:  # fmt: skip
        dump = shutil.copytree(files / "dump", tmp_path / "dump")
        file = next(dump.glob(f"*name={tap}{at}.pt"))
        held = torch.load(file, weights_only=True)
        torch.save({**held, "value": change(held["value"]), "meta": {**held["meta"], **meta}}, file)
        file.rename(dump / file.name.replace("dump_index=", f"dump_index={index}"))
        return dump

    return make


@pytest.fixture
def verdict(files: Path, capsys: pytest.CaptureFixture[str]) -> Make:
    """(exit code of `compare`, what it says) of a dump."""

    def compared(dump: Path, *more: str, truth: Path = files / "truth") -> tuple[int, str]:
        code = main(["compare", str(truth), str(dump), *more])
        said = capsys.readouterr()
        assert "a bug in qwen35-moe" not in said.err and "Traceback" not in said.out + said.err
        return code, said.out + said.err

    return compared


@pytest.fixture
def compared(files: Path, small: Build) -> Make:
    return lambda dump, truth=files / "truth", **more: q.compare(truth, dump, small("tiny"), **more)


ODD: dict[str, Callable[[Tensor], Any]] = {
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "requires grad": lambda x: x.float().requires_grad_(),
    "sparse": lambda x: x.float().to_sparse(),
    "complex": lambda x: x.to(torch.complex64),
    "bool": lambda x: x > 0,
    "no tensor": lambda x: [1, 2],
    "a string": lambda x: "tensor",
    "empty": lambda x: x[:0],
    "no dimension": lambda x: x.flatten()[0],
    "eight dimensions": lambda x: x.reshape(1, 1, 1, 1, 1, 1, *x.shape[-2:]),
    "one row": lambda x: x[:1],
    "one column": lambda x: x[..., :1],
}


def test_a_dump_goes_to_another_process(files: Path) -> None:
    dump = pickle.loads(pickle.dumps(q.read_dump(files / "dump")))
    assert torch.equal(dump["layers.1.mlp_output"], q.read_dump(files / "dump")["layers.1.mlp_output"])


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_tensor_costs_its_own_tap(odd: str, saved: Make, compared: Make) -> None:
    found = compared(saved(ODD[odd]), members=[q.arithmetic.get("sglang-bf16")], diagnoses=0)
    expected = {"requires grad": 0, "float8": 1, "eight dimensions": 0}
    assert found.exit_code == expected.get(odd, 2), found.verdict
    judged = {r.key: r.cls for r in found.records}
    assert judged["layers.1.attn_output"] in ("bit-equal", "within rounding")
    assert (judged["layers.1.mlp_output"] == "not comparable") == (odd not in expected)


@pytest.mark.parametrize(("tap", "odd"), [("next_token_logits", "no tensor"), ("positions", "empty"),
                                          ("positions", "no tensor"), ("input_ids", "no tensor")])  # fmt: skip
def test_an_odd_tensor_of_no_layer_is_told(tap: str, odd: str, saved: Make, verdict: Make) -> None:
    """There is no other layer whose tap it could be missing beside."""
    code, said = verdict(saved(ODD[odd], tap, ""))
    assert code == 2, said


@pytest.mark.parametrize(("tap", "at"), [("moe_topk_ids", "___layer_id=1"), ("input_ids", ""), ("positions", "")])
def test_fractions_are_no_ids(tap: str, at: str, saved: Make, compared: Make) -> None:
    """A cast would cut them off, and make the right ids of them."""
    found = compared(saved(lambda x: x + 0.25, tap, at), diagnoses=0)
    assert found.exit_code == 2 and str(found.problems + found.records).count("not whole numbers") == 1


@pytest.mark.parametrize("world", [10**9, 0, "x"])
def test_a_size_that_no_group_of_ranks_has_costs_its_tensor(world: Any, saved: Make) -> None:
    found = q.read_dump(saved(lambda x: x, world_size=world))
    assert [error.what for error in found.problems] == ["world_size is none"]
    assert "layers.1.mlp_output" not in found and "layers.0.mlp_output" in found


def test_a_file_with_an_odd_name_costs_itself(saved: Make) -> None:
    found = q.read_dump(saved(lambda x: x, index="x"))
    assert "layers.1.mlp_output" not in found and "1 files were not understood" in " ".join(found.notes)


def test_ids_of_experts_in_a_dtype_without_comparisons(saved: Make, verdict: Make) -> None:
    assert verdict(saved(lambda x: x.to(torch.uint16), "moe_topk_ids"))[0] == 0


@pytest.mark.parametrize("tap", ["mlp_output", "moe_router_logits", "layer_input"])
def test_nan_in_one_row_of_a_right_engine_diverges(tap: str, saved: Make, verdict: Make) -> None:
    code, said = verdict(saved(lambda x: x.index_fill(0, torch.tensor(3), torch.nan), tap))
    layer = 0 if tap == "layer_input" else 1  # which the layer before hands on
    assert code == 1 and f"layer {layer}" in said


def test_a_diagnosis_that_fails_takes_no_verdict(saved: Make, verdict: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "explain", lambda *_: 1 / 0)
    code, said = verdict(saved(lambda x: x * 3))
    assert code == 1 and "the diagnosis failed; the verdict stands" in " ".join(said.split())


def test_infinity_on_both_sides_never_agrees(files: Path, compared: Make) -> None:
    truth = Trace.open(files / "truth")
    held = {key: truth[key].clone() for key in truth}
    held["layers.1.mlp_output"][3] = math.inf
    dump = q.read_dump(files / "dump", config=truth.meta["config"])
    assert compared(dump, Trace(dict(truth.sites), truth.meta, memory=held)).exit_code != 0
    held["next_token_logits"][0, 3, 5] = math.inf
    assert compared(files / "dump", Trace(dict(truth.sites), truth.meta, memory=held)).exit_code != 0


def test_a_page_that_cannot_be_written_keeps_the_verdict(
    files: Path, verdict: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen35_moe.cli.report_options.whole", lambda *_: int("no page"))
    code, said = verdict(files / "dump", "--html", str(tmp_path / "page.html"))
    assert code == 2 and "AGREES" in said and "cannot write" in said


NO_VALUES = [torch.zeros(2, device="meta"), torch.zeros(2).to_sparse(), torch.zeros(2, dtype=torch.cfloat)]


@pytest.mark.parametrize("x", NO_VALUES)
def test_what_has_no_plain_values_is_one_error(x: Tensor) -> None:
    with pytest.raises(q.Qwen35Error, match="plain values"):
        plain_values(x, "here")


MEANINGLESS: list[tuple[str, Any]] = [
    ("meta", []), ("meta", {"steps": 3}), ("meta", {"steps": [{}]}), ("meta", {"steps": [{"ids": "x"}]}),
    ("meta.steps", [{"ids": [[1, 2]], "positions": [[0]], "mask": [[1, 1]]}]), ("meta.steps", []),
    ("meta.config", "no"), ("meta.checkpoint", 3), ("meta.arithmetic", 7), ("meta.arithmetic", "nobody's"),
    ("meta.fused", "yes"), ("tensors", {}), ("tensors", [1]), ("tensors.0.shape", "x"), ("tensors.0.file", "../x"),
    ("tensors.0.file", 5), ("tensors.0.key", 5), ("tensors.0.layer", "a"), ("tensors.0.dtype", None),
    ("version", 2), ("format", None), ("tensors.0.name", []), ("tensors.0.step", -1), ("tensors.0.extra", 1),
    ("meta.steps", [{"ids": [[2**70]], "positions": [[0]], "mask": [[1]]}]),
    ("meta.steps.0.ids", [[-1] * 12]), ("meta.steps.0.axes", 5), ("meta.steps.0.axes", [[[0] * 12]] * 2 + [[["a"]]]),
    ("meta.steps", [{"ids": [[0]], "positions": [[0]], "mask": [[1]]}]),  # the tensors are of 12 tokens
    ("meta.steps.1", None), ("meta.images", 5), ("meta.images", {}), ("meta.images", {"grids": {}, "placeholders": []}),
    ("meta.images", {"grids": {"image": [[1, 2]]}, "placeholders": [1]}), ("meta.draft_ids", 5),
    ("meta.draft_ids", [[["a"]]]), ("tensors.0.layer", 10**18), ("tensors.0.shape", [2**70]),
    ("meta.checkpoint.path", 0.5), ("meta.checkpoint.path", ["x"]), ("meta.branches", 5), ("meta.branches", [[0]]),
    ("meta.branches", [[9, 1]]), ("meta.branches", [[0, 99]]), ("meta.branches", [[0, 1]] * 9),
]  # fmt: skip


@pytest.mark.parametrize(("where", "value"), MEANINGLESS, ids=[f"{w}={v}" for w, v in MEANINGLESS])
def test_a_trace_edited_by_hand_is_one_clear_error(
    where: str, value: Any, files: Path, tmp_path: Path, verdict: Make
) -> None:
    truth = shutil.copytree(files / "truth", tmp_path / "truth")
    head = json.loads((truth / "trace.json").read_text())
    *path, last = (int(name) if name.isdigit() else name for name in where.split("."))
    place = reduce(lambda place, name: place[name], path, head)
    if isinstance(place, list) and last == len(place):  # one more, as the last
        place.append(value or place[-1])
    else:
        place[last] = value
    (truth / "trace.json").write_text(json.dumps(head))
    assert verdict(files / "dump", truth=truth)[0] == 2


def test_lengths_and_requests_of_other_types_are_none() -> None:
    assert lengths(torch.tensor([3, 4])) == [3, 4] and lengths([3, 4]) == [3, 4] and request_ids(["a", 7]) == ["a", 7]
    for odd in ([[1], 2], [1.5], torch.tensor([0.5]), [-7], torch.tensor([-7]), {"a": 1}, None, 3):
        assert lengths(odd) is None
    assert request_ids([[1], {}]) is None
