"""Dumps that real engines wrote on a GPU: clean ones agree; bugs that were planted in the running engine are named."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import qwen35_moe as q
from benchmarks.real_engine import judge
from benchmarks.real_engine.bugs import BUGS, CLEAN
from benchmarks.real_engine.prompts import VOCABULARY, prompts
from benchmarks.real_engine.sglang_bugs import PLANT as SGLANG
from benchmarks.real_engine.sglang_images import PLANT as IMAGES
from benchmarks.real_engine.sglang_images import RECIPE, write_processor
from benchmarks.real_engine.transformers_bugs import PLANT as TRANSFORMERS
from benchmarks.real_engine.vllm_bugs import PLANT as VLLM
from qwen35_moe.model.cache import LayerState
from qwen35_moe.numerics.arithmetics import using
from qwen35_moe.numerics.tap_keys import part_of
from qwen35_moe.oracle.compare import diagnose
from qwen35_moe.oracle.dumps.dump import Dump
from qwen35_moe.oracle.dumps.readers import read_dump
from qwen35_moe.oracle.judge.records import Comparison
from qwen35_moe.oracle.report import html, text
from qwen35_moe.run.prompt import Images, load_images
from weights.build import build

Built = Callable[[str], Path]
NAMES = ("dumps", "spec", "last-expert", "ranks", "images")
DUMPS = [Path(__file__).parent / "data" / "real_gpu" / f"{name}.tar.xz" for name in NAMES]


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real_gpu")
    for file in DUMPS:
        with tarfile.open(file) as archive:
            archive.extractall(folder, filter="data")
    return folder


def right(built: Built, dumps: Path, name: str, **options: Any) -> Comparison:
    """What is said of a dump of a named bug, or of none: it is the layer, the block and the name of that bug."""
    result = diagnose(built("engine-size"), read_dump(dumps / name), **options)
    assert judge.said(result, name).right, result.verdict
    return result


BROKEN = ("shared-dropped", "no-renormalisation", "last-expert-dropped", "gdn-state-zeroed", "full-rotary")


@pytest.mark.parametrize("bug", BROKEN)
def test_a_bug_planted_in_a_running_sglang_is_found_and_named(built: Built, dumps: Path, bug: str) -> None:
    layer = BUGS[bug].layer
    assert layer is not None
    result = right(built, dumps, f"bf16.{bug}", layers=[layer])
    if bug == "gdn-state-zeroed":  # before the second decode step
        first = result.first
        assert first is not None and first.starts == [(0, 17, "first of a step"), (1, 10, "first of a step")]
        said = "first bad row: sequence 0, token 17 (first of a step), sequence 1, token 10 (first of a step)"
        assert said in text.worst(first) and said in html.html(result)


def test_a_clean_sglang_on_a_gpu_agrees(built: Built, dumps: Path) -> None:
    """Parts of its dump: so the verdict is that some taps were dumped for other layers only, and the rest agrees."""
    result = diagnose(built("engine-size"), read_dump(dumps / "bf16.clean"), layers=[1, 3])
    assert not result.diverges and result.exit_code == 2, result.verdict
    assert result.compared == 26 and result.tokens == (55, 55)


def test_the_drafts_of_a_sglang_with_a_bug_in_its_target_are_right(built: Built, dumps: Path) -> None:
    """Two steps of its draft head start from the target's hidden states, two go on from its own."""
    result = diagnose(built("engine-size"), dumps / "spec.no-decay", diagnoses=1)
    assert judge.said(result, "spec.no-decay").right, result.verdict
    drafts = {part: [r for r in result.records if part_of(r.key) == part and r.added is not None]
              for part in ("mtp", "mtp.2")}  # fmt: skip
    assert [len(rows) for rows in drafts.values()] == [16, 16]
    assert not [r for rows in drafts.values() for r in rows if r.bad]
    assert {r.rows for r in drafts["mtp.2"]} == {4}


@pytest.mark.parametrize("bug", [CLEAN, "as-released", "position-table-ignored"])
def test_images_of_a_real_sglang(dumps: Path, tmp_path: Path, bug: str) -> None:
    """As released, 0.5.17 gives all axes of an image the position in time; `clean` takes another path of its own."""
    checkpoint = build(RECIPE, tmp_path / "checkpoint")
    write_processor(checkpoint)
    name = f"image.{bug}"
    images = Images(*load_images(checkpoint, [dumps / f"{name}.{i}.png" for i in range(2)]))
    result = diagnose(checkpoint, read_dump(dumps / name), images=images, diagnoses=1)
    if bug == CLEAN:
        assert result.compared == 5 and not result.diverges, result.verdict
        tower = [r.ratio or 0.0 for r in result.records if r.key.startswith("visual.") and r.added is not None]
        assert 0.3 < max(tower) < 1.5, tower  # a wide envelope would let any tower pass
    else:
        assert judge.said(result, name).right, (result.verdict, result.diagnoses)
    if bug == "position-table-ignored":
        assert result.first is not None and "worst row: patch " in text.worst(result.first)
        state = replace(result.first, key="layers.0.gdn_state", worst=(1, -1))  # after the end of a sequence
        assert text.row_text(state) == "sequence 1, token -1"


@pytest.mark.parametrize("setup", ["tp2", "ep2"])
def test_two_ranks_of_a_clean_sglang_are_joined_and_agree(built: Built, dumps: Path, setup: str) -> None:
    """Columns of its projections, partial sums of both, and what both hold."""
    result = diagnose(built("engine-size"), read_dump(dumps / f"{setup}.clean"), layers=[1])
    assert not result.diverges and not result.problems, result.verdict
    assert result.compared == 13 and result.tokens == (47, 47)


@pytest.mark.parametrize("name", ["ep2.rank-1-shared-twice", "tp2.rank-1-experts-swapped", "tp2.rank-1-not-reduced"])
def test_a_bug_of_one_rank_is_named_with_its_rank(built: Built, dumps: Path, name: str) -> None:
    assert "on rank 1" in right(built, dumps, name, layers=[1]).diagnoses[0].name


@pytest.fixture
def drafting(built: Built, dumps: Path) -> tuple[Path, Dump, Callable[[torch.Tensor], torch.Tensor]]:
    """A clean SGLang that drafts, and what its layer 1 mixes from the inputs of some passes: the last one's outputs."""
    checkpoint = built("engine-size")
    mixer = q.load(checkpoint, "sglang-bf16", text_only=True).layers[1].linear_attn

    def mixed(*passes: torch.Tensor) -> torch.Tensor:
        state = LayerState()
        with torch.inference_mode(), using("sglang-bf16"):
            return [mixer(x[None], None, state)[0] for x in passes][-1]

    return checkpoint, read_dump(dumps / "spec.clean"), mixed


MIXED, MIXED_INPUT = "layers.1.attn_output", "layers.1.input_layernorm"


def test_a_state_that_saw_rejected_drafts(drafting: Any) -> None:
    """In the second pass that verifies drafts, the state has the first pass's rejected drafts in it."""
    checkpoint, dump, mixed = drafting
    x = {step: dump.read(MIXED_INPUT, step) for step in (0, 3, 6)}
    made = [mixed(x[0][some], *(x[step][rows] for step in (3, 6)))
            for some, rows in ((slice(30), slice(3)), (slice(30, 47), slice(3, 6)))]  # fmt: skip
    dump.sources[MIXED][6].pieces[0].load = lambda: torch.cat(made)
    result = diagnose(checkpoint, dump, diagnoses=1)
    assert result.diverges, result.verdict
    assert result.diagnoses[0].name == "state not rolled back after rejected drafts at step 6"
    assert result.first is not None and result.first.starts[0] == (0, 31, "first after a rejected draft")


def test_a_fault_of_rejected_drafts_alone_is_found(drafting: Any) -> None:
    """In the first pass that verifies drafts, the second draft of each sequence reads the state that the first draft
    read. No token that was kept is touched."""
    checkpoint, dump, mixed = drafting
    clean = diagnose(checkpoint, dump, diagnoses=0)
    assert not clean.diverges and "8 rejected drafts were compared, each after the tokens that it was" in str(
        clean.notes
    )
    x = {step: dump.read(MIXED_INPUT, step) for step in (0, 3)}
    made = dump.read(MIXED, 3).clone()
    for row, before in ((0, slice(30)), (3, slice(30, 47))):
        made[row + 2] = mixed(torch.cat((x[0][before], x[3][[row, row + 2]])))[-1]
    dump.sources[MIXED][3].pieces[0].load = lambda: made
    result = diagnose(checkpoint, dump, diagnoses=0)
    assert result.diverges and result.first is not None and result.first.key == MIXED, result.verdict
    assert result.first.starts == [(2, 32, "rejected draft of sequence 0"), (3, 19, "rejected draft of sequence 1")]


@pytest.mark.parametrize("name", ["vllm.clean", "vllm.shared-twice"])
def test_hidden_states_of_a_real_vllm(built: Built, dumps: Path, name: str) -> None:
    result = diagnose(built("engine-size"), read_dump(dumps / name, layers=[0, 1, 2, 3, 4]))
    assert judge.said(result, name).right, result.verdict


def test_every_bug_of_an_engine_says_where_it_is_found() -> None:
    assert {*SGLANG, *TRANSFORMERS, *VLLM, *IMAGES} == {*BUGS, CLEAN}
    rows = prompts((5, 9, 1))
    assert [len(row) for row in rows] == [5, 9, 1] and all(0 <= x < VOCABULARY for row in rows for x in row)
    assert len({row[0] for row in rows}) == 3
