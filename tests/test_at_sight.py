"""What is named without a fault of the catalogue, and faults of each step of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.oracle_score.mutants import Bench
from benchmarks.oracle_score.tasks import CHECKPOINTS
from qwen35_moe.oracle.diagnose.at_sight import OTHER_CHECKPOINT, OWN_LOGITS, VICTIM, against_own_logits
from qwen35_moe.oracle.diagnose.fault_parts import on_packed
from qwen35_moe.oracle.diagnose.faults import BrokenSource, Fault, FaultSite
from qwen35_moe.oracle.diagnose.guilty import OTHERS
from qwen35_moe.oracle.dumps.readers.own import from_trace
from qwen35_moe.oracle.play import known_fault
from qwen35_moe.oracle.truth import open_checkpoint
from qwen35_moe.quant.mxfp4 import PackedMXFP4
from qwen35_moe.run.load import build
from qwen35_moe.run.source import WeightSource
from qwen35_moe.trace.recorder import trace
from weights.build import build as build_checkpoint

IDS = (torch.arange(32) * 7919 % 251)[None]
IN_EACH_STEP = {
    "prefix": ("a, a strided view, read as contiguous",),
    "speculative": ("decay with the wrong sign", "b, a strided view, read as contiguous"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bench(small: Callable[[str], Path]) -> Bench:
    return Bench(open_checkpoint(small("tiny-mxfp4"))[1].source, "gate 0.5", IDS)


@pytest.fixture(scope="module")
def grows(tmp_path_factory: pytest.TempPathFactory) -> WeightSource:
    """A checkpoint on which a memory that grows leaves float32's range within a prompt, but not within one step."""
    _, recipe, seed, sizes = CHECKPOINTS["c"]
    path = build_checkpoint(recipe, tmp_path_factory.mktemp("c") / "checkpoint", jobs=1, seed=seed, text_config=sizes)
    return open_checkpoint(path)[1].source


@pytest.mark.parametrize("regime", IN_EACH_STEP)
def test_faults_of_each_step_are_named_in_runs_of_several(grows: WeightSource, regime: str) -> None:
    """The rows of rejected drafts lie between those of the sequences, the cached tokens in no step of the dump."""
    bench = Bench(grows, regime, (torch.arange(52) * 7919 % 251)[None])
    for name in IN_EACH_STEP[regime]:
        found = bench.planted(known_fault(name))
        assert found.found and found.named_right, found


def _last_is_another(ids: Tensor, _: dict[str, Tensor], place: FaultSite) -> Tensor:
    others = torch.ones(len(ids), place.config.num_experts).scatter(1, ids, 0)
    return torch.cat((ids[:, :-1], others.argmax(1, keepdim=True)), 1)


def test_ids_that_the_engines_own_logits_contradict_need_no_truth(bench: Bench) -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 2.0]] * 4)
    ids = torch.tensor([[0, 1], [3, 0], [0, 2], [0, 9]])  # right, a tie, wrong, no expert
    assert against_own_logits(ids, logits).tolist() == [False, False, True, False]
    result = bench.compare(bench.engine(Fault("foreign", "mlp", taps={"moe_topk_ids": _last_is_another})), diagnoses=1)
    assert result.exit_code == 1 and result.diagnoses[0].name == OWN_LOGITS, result.verdict
    assert result.diagnoses[0].layer == 1


def test_a_block_whose_input_is_nan_is_a_victim(small: Callable[..., Path]) -> None:
    bench = Bench(open_checkpoint(small("tiny-mxfp4", 3))[1].source, "gate 0.5", IDS)

    def nan_from(x: Tensor, _: dict[str, Tensor], __: FaultSite) -> Tensor:
        return torch.cat((x[:20], x[20:] * torch.nan))

    result = bench.compare(bench.engine(Fault("NaN", "mlp", taps={"mlp_output": nan_from})))
    assert [d.layer for d in result.diagnoses] == [1]
    assert result.first is not None and result.first.key == "layers.1.mlp_output"
    later = [r for r in result.records if r.bad and (r.layer or 0) > 1]
    assert later and all(r.note == VICTIM for r in later)


def test_another_checkpoint_is_asked_about(bench: Bench) -> None:
    """All experts with other codes: no bug of a kernel, but another member of the family."""
    change = on_packed(lambda w: PackedMXFP4(w.codes ^ 1, w.scales))
    everywhere = FaultSite(bench.source.config, bench.truth.positions)
    source = BrokenSource(bench.source, Fault("other", "mlp", slot=change), everywhere)
    model = build(source, bench.table, bench.unfused, torch.device("cpu"), "decoded")
    result = bench.compare(from_trace(trace(model, IDS, taps=bench.taps)), diagnoses=1)
    assert not result.diagnoses[0].named and any(OTHER_CHECKPOINT in note for note in result.notes)
    one = bench.compare(bench.engine(Fault("one", "mlp", slot=change)), diagnoses=1)
    assert not any(OTHER_CHECKPOINT in note for note in one.notes)


def test_experts_other_than_those_dumped_are_solved_for(bench: Bench) -> None:
    """The experts' kernel of an engine reads other ids than its router wrote, for some tokens."""

    def others(ids: Tensor, _: dict[str, Tensor], place: FaultSite) -> Tensor:
        free = torch.ones(len(ids), place.config.num_experts).scatter(1, ids, 0).argmax(1)
        ids = ids.clone()
        ids[8:12, 0] = free[8:12]
        return ids

    fault = Fault("others", "mlp", taps={"moe_topk_ids": others}, late=True)
    run = bench.engine(fault)
    result = bench.compare(run, diagnoses=1)
    said = result.diagnoses[0]
    assert said.name == OTHERS and said.layer == 1 and said.hypotheses[0].where.startswith("4 tokens, token 8: "), said
