"""Comparing files of many layers: every format, broken files in the middle, flips of experts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.bench_compare import write
from qwen35_moe.cli import main as cli
from qwen35_moe.oracle.compare import compare
from qwen35_moe.oracle.dumps.readers import read_dump
from qwen35_moe.oracle.dumps.readers.own import from_trace
from qwen35_moe.oracle.judge.records import Comparison
from qwen35_moe.oracle.judge.routing import Flip, compare_ids
from qwen35_moe.trace.file import Trace

LAYERS, TOKENS = 6, 4
FORMATS = ("trace", "sglang", "plain")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A truth, and the same dump in every format."""
    folder = tmp_path_factory.mktemp("files")
    write_dump: Callable[[str], None] = write(folder, LAYERS, TOKENS)
    for form in FORMATS:
        write_dump(form)
        (folder / "dump").rename(folder / form)
    return folder


def compared(truth: Path, dump: Path) -> Comparison:
    return compare(Trace.open(truth), read_dump(dump))


def cut(file: Path) -> str:
    """Cut a file in the middle, as a full disk does."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file.name


def test_formats_have_the_same_verdict_and_threads_stay_as_they_were(files: Path) -> None:
    before, rows = torch.get_num_threads(), []
    for form, threads in (*((form, 2) for form in FORMATS), ("trace", 1)):
        torch.set_num_threads(threads)
        try:
            result = compared(files / "truth", files / form)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        assert result.exit_code == 0 and result.compared == len(Trace.open(files / "truth"))
        rows.append([row for row in result.rows() if row["type"] in ("tap", "routing")])
    assert all(some == rows[0] for some in rows)


def test_truncated_truth(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(files / "truth", tmp_path / "truth")
    name = cut(tmp_path / "truth" / "00002.safetensors")
    result = compared(tmp_path / "truth", files / "trace")
    broken = [r for r in result.records if r.cls == "not comparable"]
    assert {r.key.split(".")[1] for r in broken} == {"2"} and all(name in r.note for r in broken)
    assert result.exit_code == 2 and result.compared == len(result.records) - len(broken) > 0
    assert cli.main(["compare", str(tmp_path / "truth"), str(files / "trace")]) == 2
    out = capsys.readouterr().out
    assert "INCOMPLETE" in out and out.count(name) == 1 and "write the trace again" in " ".join(out.split())


@pytest.mark.parametrize("form", FORMATS)
def test_truncated_dump(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    shutil.copytree(files / form, tmp_path / "dump")
    pattern = {"trace": "00003.*", "sglang": "*mlp_output*layer_id=3*", "plain": "layer_03.*"}[form]
    name = cut(next((tmp_path / "dump").glob(pattern)))
    assert cli.main(["compare", str(files / "truth"), str(tmp_path / "dump")]) == 2
    out = "".join(capsys.readouterr().out.split())
    assert "INCOMPLETE" in out and out.count(name) == 1
    result = compared(files / "truth", tmp_path / "dump")
    lost = [r for r in result.records if r.cls in ("not comparable", "missing")]
    assert {r.key.split(".")[1] for r in lost} == {"3"} and len(lost) == (1 if form == "sglang" else len(lost))
    assert result.compared == len(result.records) - len(lost) > 0


@pytest.mark.parametrize("taps", [("layer_input", "moe_topk_ids"), ("layer_input", "moe_topk_ids", "mlp_output")])
def test_what_comes_after_other_experts_is_left_out(files: Path, taps: tuple[str, ...]) -> None:
    """Also where the dump holds nothing between the choice of experts and the next layer."""
    run = Trace.open(files / "trace")
    memory = {key: run[key] for key, site in run.sites.items() if site.name in taps}
    ids = memory["layers.2.moe_topk_ids"].clone()
    ids[1, 0] = next(e for e in range(256) if e not in ids[1])
    memory["layers.2.moe_topk_ids"] = ids
    engine = Trace({key: run.sites[key] for key in memory}, run.meta, memory=memory)
    result = compare(Trace.open(files / "truth"), from_trace(engine))
    excluded = {r.key: r.excluded for r in result.records if r.key in memory and "ids" not in r.key}
    after = TOKENS - 1
    for key, count in excluded.items():
        layer, _, name = key.removeprefix("layers.").partition(".")
        assert count == (after if int(layer) > 2 or (int(layer) == 2 and name == "mlp_output") else 0), key


def one_by_one(truth_RA: Tensor, engine_RA: Tensor, logits_RE: Tensor, delta_R: Tensor) -> tuple[list[Flip], int]:
    """The definition, a row at a time."""
    flips, nonsense = [], 0
    for row, (ours, theirs) in enumerate(zip(truth_RA.tolist(), engine_RA.tolist(), strict=True)):
        if set(ours) == set(theirs) and len(set(theirs)) == len(theirs):
            continue
        if len(set(theirs)) < len(theirs) or not all(0 <= e < logits_RE.shape[1] for e in theirs):
            nonsense += 1
            continue
        lost, won = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
        logits = logits_RE[row].tolist()
        least = min(logits[e] for e in won)
        margin, rank = max(logits[e] for e in lost) - least, sum(x > least for x in logits) + 1
        flips.append(Flip(row, tuple(lost), tuple(won), margin, 2 * float(delta_R[row]), rank))
    return flips, nonsense


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 4), st.integers(4, 9))
def test_routing_of_all_rows_at_once(seed: int, rows: int, chosen: int, experts: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, experts, dtype=torch.float64, generator=generator)
    truth = logits.topk(chosen).indices
    engine = torch.randint(-1, experts + 1, truth.shape, generator=generator)
    engine[::2] = (logits[::2] + 0.3 * torch.randn(logits[::2].shape, generator=generator)).topk(chosen).indices
    noise = torch.rand(rows, generator=generator)
    found = compare_ids(truth, engine, logits, noise)
    assert (found.flips, found.nonsense) == one_by_one(truth, engine, logits, noise)
