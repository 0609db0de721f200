"""The draft head through the oracle: its truth for the tokens of a run, right engines agree, faults are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import qwen35_moe as q
from qwen35_moe.cli import main as cli
from qwen35_moe.model.mtp import draft_chains, with_hidden
from qwen35_moe.numerics.tap_table import part_of
from qwen35_moe.numerics.taps import Site, attach
from qwen35_moe.oracle.compare import compare
from qwen35_moe.oracle.dumps.dump import Dump
from qwen35_moe.oracle.dumps.readers.own import from_trace
from qwen35_moe.trace.drafts import draft_ids_of
from qwen35_moe.trace.file import Trace
from qwen35_moe.trace.recorder import record, step_record

IDS = torch.arange(20)[None] * 7919 % 251


@pytest.fixture(scope="module")
def truth(built: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Trace:
    out = str(tmp_path_factory.mktemp("truth") / "trace")
    ids = ",".join(map(str, IDS[0].tolist()))
    assert (
        cli.main(["trace", str(built("tiny")), "--ids", ids, "--drafts", "3", "--no-envelope", "--quiet", "--out", out])
        == 0
    )
    return Trace.open(out)


@pytest.mark.parametrize("taps", ["mtp_*", "mtp.layers.0.*", "final_norm,mtp_fc", "vis_*"])
def test_taps_of_parts_that_do_not_run_are_refused(
    built: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], taps: str
) -> None:
    assert cli.main(["trace", str(built("tiny")), "--ids", "1,2", "--taps", taps, "--out", str(tmp_path / "t")]) == 2
    assert "no tap that was asked for would be met" in capsys.readouterr().err
    assert not (tmp_path / "t" / "trace.json").exists()


def engine(path: Path, truth: Trace, how: str = "") -> Dump:
    """sglang-bf16, drafting from the truth's ids, right or not."""
    model, (next_ids, *more), stream = q.load(path, "sglang-bf16", "unfused"), draft_ids_of(truth), list[Tensor]()
    assert model.mtp is not None and len(more) == 2

    def keep(site: Site, x: Tensor) -> None:
        if site.key == "layers.3.layer_output_sum":
            stream.append(x)

    if how == "halves":
        weight = model.mtp.fc.weight
        weight.data = weight.data.roll(weight.shape[1] // 2, 1)
    with record("*", meta={"steps": [step_record(IDS, None, None, None)]}) as recorder, attach(keep):
        _, hidden = with_hidden(model, IDS)
        hidden = stream[0].to(hidden.dtype) if how == "pre-norm" else hidden
        draft_chains(model, model.mtp, [IDS if how == "same token" else next_ids, *more], hidden)
    return from_trace(recorder.trace)


def test_a_right_draft_head_agrees(built: Callable[[str], Path], truth: Trace) -> None:
    found = compare(truth, engine(built("tiny"), truth))
    assert found.exit_code == 0, found.verdict
    for part in ("mtp", "mtp.2", "mtp.3"):
        assert sum(part_of(r.key) == part and r.added is not None for r in found.records) > 30


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("pre-norm", "draft from hidden states before the final norm"),
        ("same token", "draft with the embedding of the same token"),
        ("halves", "halves of the draft's input swapped"),
    ],
)
def test_faults_of_the_draft_head_are_named(built: Callable[[str], Path], truth: Trace, how: str, name: str) -> None:
    found = compare(truth, engine(built("tiny"), truth, how), diagnoses=1)
    assert found.exit_code == 1 and found.first is not None and found.first.block == "mtp", found.verdict
    assert found.diagnoses[0].name == name, str(found.diagnoses[0])
