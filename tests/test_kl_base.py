"""llama.cpp's KL base file, and logits alone: judged by an envelope, with flips of experts that nobody recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import qwen35_moe as q
from benchmarks.oracle_score.mutants import Bench
from qwen35_moe.cli.main import main
from qwen35_moe.numerics.tables import TRANSFORMERS_BF16
from qwen35_moe.oracle.compare import compare
from qwen35_moe.oracle.dumps.dump import Dump
from qwen35_moe.oracle.dumps.readers import read_dump
from qwen35_moe.oracle.dumps.writers import write_kl_base
from qwen35_moe.oracle.judge import log_p as kl_base
from qwen35_moe.oracle.judge import suspects
from qwen35_moe.oracle.judge.envelope import LIMIT, Norms, legal
from qwen35_moe.oracle.judge.split_k import split_products, splitting
from qwen35_moe.oracle.truth import open_checkpoint

DATA = Path(__file__).parent / "data"
FIXTURE, KL_BASE = DATA / "fixtures/bf16-hub", DATA / "dumps/llama_cpp.kld"


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kl")
    (folder / "ids.json").write_text(json.dumps([t.ids.tolist() for t in read_dump(KL_BASE).tokens.values()]))
    command = ["trace", str(FIXTURE), "--ids", str(folder / "ids.json"), "--out", str(folder / "truth"), "--quiet"]
    assert main(command) == 0
    return folder / "truth"


@pytest.mark.parametrize("options", [[], ["--engine", "float32"]])
def test_llama_cpps_own_file_agrees(truth: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(truth), str(KL_BASE), *options]) == 0
    said = capsys.readouterr().out
    assert "AGREES: 1 taps within rounding" in said and "only the logits were" in said


def spoiled(folder: Path, at: int, *values: int) -> Path:
    """The file with some of its numbers replaced; `at` is that of the first, of row 0."""
    raw, start = bytearray(KL_BASE.read_bytes()), 20 + 4 * 64 + 2 * (4 + at)
    raw[start : start + 2 * len(values)] = b"".join(v.to_bytes(2, "little") for v in values)
    (folder / "wrong.kld").write_bytes(raw)
    return folder / "wrong.kld"


def test_a_wrong_file_diverges(truth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """64 numbers of one row; one number, moved by 20 steps; a model without its shared gate. Without the checkpoint,
    only the envelope beside the truth is known, of bf16, and no sample of flips."""
    model = q.load(FIXTURE, "float32", text_only=True)
    model.layers[3].mlp.shared_expert_gate.weight.data.zero_()
    ids = torch.stack([t.ids for t in read_dump(KL_BASE).tokens.values()])
    write_kl_base(tmp_path / "model.kld", ids, model(ids))
    row = read_dump(KL_BASE).read("next_token_logprobs", 0)[0]
    scale, _, codes = kl_base.to_codes(row)
    moved = int(codes[7]) + 20
    assert 20 * float(scale) < 5e-3  # nat
    for file in (spoiled(tmp_path, 0, *range(64)), spoiled(tmp_path, 7, moved), tmp_path / "model.kld"):
        assert main(["compare", str(truth), str(file), "--engine", "float32"]) == 1
    alone = tmp_path / "truth"
    shutil.copytree(truth, alone)
    head = json.loads((alone / "trace.json").read_text())
    del head["meta"]["checkpoint"]
    (alone / "trace.json").write_text(json.dumps(head))
    assert main(["compare", str(alone), str(KL_BASE)]) == 0
    write_kl_base(tmp_path / "model.kld", ids, model(ids).roll(1, -1))
    capsys.readouterr()
    assert main(["compare", str(alone), str(tmp_path / "model.kld")]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "dump moe_topk_ids" in said and "envelope was made of" in said


def test_the_format_rounds_by_half_a_step_and_clips() -> None:
    logits = torch.randn(5, 77, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 20
    x = kl_base.log_p(logits)
    _, _, codes = kl_base.to_codes(x)
    torch.testing.assert_close(x.amax(-1) - x.amin(-1), torch.full((5,), 16.0, dtype=torch.float64))
    assert (codes.amin(-1) == 0).all() and (codes.amax(-1) == 65535).all()
    assert (x == x.amin(-1, keepdim=True)).sum() > 5  # clipped
    step = 16 / 65535
    assert 0.45 * step < float(kl_base.loss_in_file(x).max.max()) <= step / 2 + 1e-12


def test_log_p_errs_by_no_more_than_its_bound() -> None:
    g = torch.Generator().manual_seed(5)
    shares = []
    for size in (0.1, 1.0, 30.0):
        z = torch.randn(64, 257, generator=g, dtype=torch.float64) * size
        e = torch.randn(64, 257, generator=g, dtype=torch.float64) * 1e-3
        e[:32] = e[:32].sign() * 1e-3
        of_logits = kl_base.error_of_log_p(Norms.of(e), 257)
        found = Norms.of(kl_base.log_p(z + e), minus=kl_base.log_p(z))
        assert (found.max <= of_logits.max + 1e-12).all() and (found.l2 <= of_logits.l2 + 1e-12).all()
        shares.append(float((found.max / of_logits.max).max()))
    assert max(shares) > 0.9


def engine(bench: Bench, folder: Path, table: q.arithmetic.Arithmetic) -> Dump:
    model = q.load(FIXTURE, table, "unfused", mode="decoded", text_only=True)
    with splitting(table):
        write_kl_base(folder / "engine.kld", bench.ids, model(bench.ids))
    return read_dump(folder / "engine.kld", config=bench.source.config.raw)


def bench(seed: int) -> Bench:
    ids = torch.randint(1, 250, (1, 48), generator=torch.Generator().manual_seed(seed))
    return Bench(open_checkpoint(FIXTURE)[1].source, "gate 0.5", ids)


def test_samples_are_whole_runs_where_nothing_was_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that chose another expert somewhere is no false alarm: members run anew from the embedding on."""
    one = bench(0)
    dump = engine(one, tmp_path, split_products(TRANSFORMERS_BF16, 3))
    members = [m for m in legal("exact") if m.name != "transformers-bf16"]
    monkeypatch.setattr(suspects, "SAMPLES", 0)
    first = one.compare(dump, diagnoses=0, members=members)
    monkeypatch.undo()
    second = one.compare(dump, diagnoses=0, members=members)
    assert first.records[-1].ratio > LIMIT > second.records[-1].ratio and second.exit_code == 0


def test_without_ids_and_checkpoint_what_a_flip_may_have_made_is_not_blamed(tmp_path: Path) -> None:
    one = bench(2)
    result = compare(one.truth, engine(one, tmp_path, q.arithmetic.get("sglang-bf16")), limit=2.5)
    (record,) = [r for r in result.records if r.cls != "missing"]
    assert record.inherited > 2.5 and record.cls == "not comparable" and "moe_topk_ids" in record.note
    assert result.exit_code == 2


def test_a_scale_of_logits_is_seen_where_nothing_else_was_dumped(tmp_path: Path) -> None:
    """Rows that took other experts are other values of the same size: no false alarm, and no hiding place."""
    one = bench(0)
    with torch.no_grad():
        logits = q.load(FIXTURE, "sglang-bf16", "unfused", mode="decoded", text_only=True)(one.ids)
    codes = []
    for name, x in (("clean", logits), ("scaled", logits * 1.2), ("log p", (logits / 1.15).log_softmax(-1))):
        torch.save(x, tmp_path / "logits.pt")
        result = one.compare(read_dump(tmp_path / "logits.pt"), diagnoses=1)
        codes.append(result.exit_code)
        said = [d.name for d in result.diagnoses]
        assert name == "clean" or said[0].endswith("% in all rows: a scale, or a temperature"), said
    assert codes == [0, 1, 1]
    assert abs(float(said[0].split()[1]) + 13) < 1
