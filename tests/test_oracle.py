"""The oracle's parts: envelope, verdict, routing, replay, added and inherited error, weights, logits, reports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen35_moe import Qwen35Error
from qwen35_moe.cli import main as cli
from qwen35_moe.numerics.arithmetics import get
from qwen35_moe.numerics.taps import BREAK, Handler, Site
from qwen35_moe.oracle.compare import compare
from qwen35_moe.oracle.diagnose.catalogue import FAULTS
from qwen35_moe.oracle.diagnose.faults import FaultSite
from qwen35_moe.oracle.dumps.dump import Dump, Piece
from qwen35_moe.oracle.dumps.pair import Pair
from qwen35_moe.oracle.dumps.readers.own import from_trace
from qwen35_moe.oracle.dumps.writers import DUMPED
from qwen35_moe.oracle.judge.conclude import compare_logits
from qwen35_moe.oracle.judge.diagnosis import Weight
from qwen35_moe.oracle.judge.envelope import LIMIT, Norms, envelope, judge, legal
from qwen35_moe.oracle.judge.envelope_file import write_envelope
from qwen35_moe.oracle.judge.records import Comparison, Record
from qwen35_moe.oracle.judge.replay import Captured, ReplayRouting
from qwen35_moe.oracle.judge.rerun import Rerun
from qwen35_moe.oracle.judge.routing import compare_ids, could_flip
from qwen35_moe.oracle.judge.suspects import accuse, suspects
from qwen35_moe.oracle.judge.weights_check import check_weights
from qwen35_moe.oracle.play import known_fault
from qwen35_moe.oracle.report import html as report_html
from qwen35_moe.oracle.report import report as page_and_lines
from qwen35_moe.oracle.report import text as report
from qwen35_moe.oracle.truth import open_checkpoint, write_truth
from qwen35_moe.quant.layouts import shuffle_scales, shuffle_weight
from qwen35_moe.run.load import load
from qwen35_moe.run.source import WeightSource
from qwen35_moe.trace.file import Trace
from qwen35_moe.trace.recorder import trace

IDS = (torch.arange(24) * 7919 % 251).view(4, 6)


class Bench:
    """A checkpoint, the truth of IDS with its envelope, and a clean engine."""

    def __init__(self, path: Path):
        self.path, self.source = path, open_checkpoint(path)[1].source
        self.truth = self.exact(DUMPED)
        write_envelope(self.truth, [load(path, table, "unfused", text_only=True) for table in legal("exact")])
        self.engine = self.run()

    def exact(self, taps: str, ids: torch.Tensor = IDS, **options: Any) -> Trace:
        return trace(load(self.path, text_only=True), ids, taps=taps, **options)

    def run(self, taps: str = DUMPED, replay: Sequence[Handler] = (), ids: torch.Tensor = IDS) -> Trace:
        """The engine, with faults."""
        return trace(load(self.path, "sglang-bf16", "unfused", text_only=True), ids, taps=taps, replay=replay)

    def fault(self, name: str, layer: int, expert: int = 0) -> list[Handler]:
        place = FaultSite(self.source.config, self.truth.positions, frozenset({layer}), expert)
        return known_fault(name).handlers(place)

    def changed(self, values: Mapping[str, torch.Tensor | None]) -> Dump:
        """The clean engine's dump with some of its tensors replaced, or left out (None)."""
        memory = {**self.engine.memory, **values}
        sites = {key: site for key, site in self.engine.sites.items() if memory[key] is not None}
        return from_trace(Trace(sites, self.engine.meta, memory={key: memory[key] for key in sites}))

    def compare(self, values: Mapping[str, torch.Tensor | None], **options: Any) -> Comparison:
        return compare(self.truth, self.changed(values), self.source, **{"diagnoses": 0, **options})


def record(found: Comparison, key: str) -> Record:
    return next(r for r in found.records if r.key == key)


WITHOUT_IDS = {f"layers.{i}.moe_topk_ids": None for i in range(4)}


@pytest.fixture(scope="module")
def bench(small: Callable[..., Path]) -> Bench:
    return Bench(small("tiny-mxfp4", 4))


def noise(shape: tuple[int, ...], size: float) -> torch.Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_placeholders_of_images_are_pointed_out(bench: Bench) -> None:
    """An engine that saw the image is right, and diverges."""
    ids = torch.tensor([[3, 250, 252, 252, 251], [7, 5, 253, 9, 252]])
    run = bench.exact(DUMPED, ids, attention_mask=torch.tensor([[1] * 5, [1] * 4 + [0]]))
    notes = compare(run, from_trace(run), bench.source).notes
    assert notes == ["3 placeholders of images or videos: the truth takes them for text"]


def test_judge_is_free_of_scale_and_sees_one_bad_row() -> None:
    y = noise((64, 256), 1.0)
    member = y + noise((64, 256), 1e-3).flip(0)
    for scale in (1.0, 2.0**-20):
        bound = envelope(y * scale, [member * scale], torch.bfloat16)
        good = judge((y * scale).to(torch.bfloat16), y * scale, bound, torch.bfloat16)
        assert good.cls == "bit-equal" and good.ratio <= 1.0
        within = judge(member * scale, y * scale, bound, torch.bfloat16)
        assert within.cls == "within rounding"
        bad = member.clone()
        bad[17] *= 1.05
        found = judge(bad * scale, y * scale, bound, torch.bfloat16)
        assert (found.cls, found.worst) == ("wrong", 17)


def test_max_norm_finds_one_element() -> None:
    y = noise((8, 4096), 1.0)
    bound = envelope(y, [y.to(torch.bfloat16)], torch.bfloat16)
    x = y.clone()
    x[3, 100] += 0.1  # 0.2 % of the row's norm
    found = judge(x, y, bound, torch.bfloat16)
    assert found.ratio > LIMIT > float(Norms.of(x, minus=y).l2[3] / bound.l2[3]) and found.worst == 3


def test_nan_is_infinitely_wrong_and_zero_is_equal() -> None:
    y = torch.zeros(4, 8, dtype=torch.float64)
    bound = envelope(y, [], torch.float32)
    assert judge(y, y, bound, torch.float32).cls == "bit-equal"
    x = y.clone()
    x[1, 1] = torch.nan
    assert judge(x, y, bound, torch.float32).ratio == torch.inf
    infinite = torch.full((4, 8), -torch.inf, dtype=torch.float64)
    assert judge(infinite, infinite, bound, torch.float32).cls == "bit-equal"


def test_twice_the_limit_is_wrong() -> None:
    y, one = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for times, cls in ((0.9, "within rounding"), (1.1, "suspicious"), (1.9, "suspicious"), (2.1, "wrong")):
        assert judge(y + times * LIMIT, y, Norms(one, one), torch.float64).cls == cls
    assert judge(y, 0 * y, Norms(one, one), torch.float64).rel == 1


def test_narrow_rows_borrow_from_all_rows() -> None:
    truth_R1 = torch.tensor([[1e-9], [1.0], [2.0]], dtype=torch.float64)
    bound = Norms.of(torch.full((3, 1), 1e-3)).pooled(Norms.of(truth_R1), narrow=True)
    assert bound.l2.min() >= 1e-3


def test_routing_compares_sets_and_weighs_margins() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 4, dtype=torch.float64)
    logits[1, 2] = 2.99
    ours = torch.tensor([[0, 1]] * 4)
    theirs = torch.tensor([[1, 0], [0, 2], [0, 3], [0, 0]])
    found = compare_ids(ours, theirs, logits, torch.full((4,), 0.01, dtype=torch.float64), 5)
    assert found.agree == 1 and found.nonsense == 1
    assert [(f.row, f.legal, f.rank) for f in found.flips] == [(1, True, 3), (2, False, 4)]
    assert could_flip(logits, torch.full((4,), 0.01), 2).tolist() == [False, True, False, False]
    tie = compare_ids(ours[:1], theirs[1:2], torch.tensor([[4.0, 3.0, 3.0, 1.0]]), torch.zeros(1))
    assert not tie.illegal and len(tie.flips) == 1


def test_ids_that_are_none_are_where_the_report_says(bench: Bench) -> None:
    ids = bench.engine["layers.2.moe_topk_ids"].clone()
    ids[17] = ids[17, 0]
    found = bench.compare({"layers.2.moe_topk_ids": ids})
    assert found.exit_code == 1 and found.first is not None and found.first.worst == (2, 5)
    assert "1 with ids that are repeated or no expert's" in " ".join(report.text(found).split())


def test_replay_repeats_a_routing(bench: Bench) -> None:
    key, weights, engine = "layers.2.moe_topk_ids", "layers.2.moe_topk_weights", bench.engine
    shifted = {k: engine[k].roll(1, 0) for k in WITHOUT_IDS}
    found = bench.exact(DUMPED, replay=ReplayRouting(shifted))
    assert torch.equal(found[key].sort(1).values, shifted[key].sort(1).values)
    assert not torch.equal(found[weights].float(), engine[weights].float())


def test_a_stream_that_was_stored_rounded_keeps_the_digits_of_the_sum() -> None:
    ours = torch.tensor([[1.001], [2.0]], dtype=torch.float64)
    captured = Captured()
    captured["x"] = torch.tensor([0, 1]), torch.tensor([[1.0], [3.0]], dtype=torch.bfloat16)
    assert captured.put("x", ours, 2, keep_sums=True).flatten().tolist() == [1.001, 3.0]
    assert captured.put("x", ours, 2).flatten().tolist() == [1.0, 3.0]


def test_clean_engine_agrees_everywhere(bench: Bench) -> None:
    found = bench.compare({}, diagnoses=2)
    assert found.exit_code == 0 and not found.diagnoses, found.verdict
    counts = found.summary
    assert sum(n for c, n in counts.items() if c != "total") == counts["total"] == len(bench.truth.sites)
    assert all(r.equal_to == "sglang-bf16" for r in found.records if r.added and r.key.endswith("mlp_output"))
    inherited = [r.inherited for r in found.records if r.inherited is not None]
    assert len(inherited) > 20 and max(inherited) < LIMIT  # the others come after a flip


def test_added_error_names_the_first_block_and_not_its_victims(bench: Bench) -> None:
    """A bug in layer 1 reaches every later tap; only the guilty one has an error of its own."""
    wrong = {key: bench.engine[key] * x for key, x in (("layers.1.mlp_output", 1.2), ("layers.3.layer_input", 1.1))}
    found = bench.compare(wrong, diagnoses=1)
    assert found.first is not None and (found.first.layer, found.first.key) == (1, "layers.1.mlp_output")
    assert str(found.diagnoses[0]).startswith("layer 1, mlp: whole block times 1.2")
    stream = record(found, "layers.3.layer_input")
    assert stream.bad and stream.layer == 2 and stream.block == "stream"


@pytest.mark.parametrize(
    ("name", "layer", "block"), [("shared expert counted twice", 1, "mlp"), ("no decay", 2, "gdn")]
)
def test_a_bug_is_named_by_the_residual_stream_alone(bench: Bench, name: str, layer: int, block: str) -> None:
    """As vLLM's hidden states hold it: what a layer hands on is known as what the next one reads."""
    run = bench.run("layer_input", bench.fault(name, layer))
    found = compare(bench.truth, from_trace(run), bench.source, diagnoses=1)
    assert found.exit_code == 1 and found.first is not None and found.first.key == f"layers.{layer + 1}.layer_input"
    assert str(found.diagnoses[0]).startswith(f"layer {layer}, {block}: {name}")


@pytest.mark.parametrize(
    ("tap", "name", "said"),
    [
        ("next_token_logits", "shared expert counted twice", "layer 3, mlp: shared expert counted twice"),
        ("final_norm", "no rotary at all", "layer 3, attn: no rotary at all"),
        ("final_norm", "one expert's slot is zero", "layer 3, mlp: one expert's slot is zero (expert 1)"),
        ("final_norm", "final norm without 1 +", "final_norm: final norm without 1 +"),
        ("next_token_logits", "final norm without 1 +", "final_norm: final norm without 1 +"),
        ("next_token_logits", "no known bug", "layer 3, input_layernorm, to {tap}: unknown (the best guess"),
    ],
)
def test_a_bug_of_the_last_layer_is_named_by_what_comes_after_it(bench: Bench, tap: str, name: str, said: str) -> None:
    unknown = name == "no known bug"
    wrong = [Scaled("layers.3.attn_output", 2.5)] if unknown else bench.fault(name, 3, expert=1)
    run = bench.run(f"layer_input,{tap}", wrong)
    found = compare(bench.truth, from_trace(run), bench.source, diagnoses=1)
    block = "head" if tap == "next_token_logits" else tap
    assert str(found.diagnoses[0]).startswith(said.format(tap=block))
    if unknown:
        assert found.verdict.endswith(f"made somewhere in layer 3, input_layernorm, to {block}")


class Scaled(Handler):
    stage = BREAK

    def __init__(self, key: str, factor: float):
        self.key, self.factor = key, factor

    def __call__(self, site: Site, x: torch.Tensor) -> torch.Tensor | None:
        return x * self.factor if site.key == self.key else None


@pytest.mark.parametrize(
    ("taps", "name", "factor", "said"),
    [
        ("layer_input", "mlp_output", 2.5, "whole block times 2.5"),
        ("layer_input", "moe_shared_gated", 1.7, "shared expert times 1.7"),
        ("layer_output_sum", "mlp_output", 0.0, "whole block times 0 "),
        ("mlp_output", "moe_shared_gated", 1.7, "shared expert times 1.7"),
    ],
)
def test_factors_are_fitted_to_the_stream_as_to_the_block(
    bench: Bench, taps: str, name: str, factor: float, said: str
) -> None:
    run = bench.run(taps, [Scaled(f"layers.1.{name}", factor)])
    found = compare(bench.exact(taps), from_trace(run), bench.source, diagnoses=1)
    assert str(found.diagnoses[0]).startswith(f"layer 1, mlp: {said}")


def test_layers_that_were_not_dumped_are_suspects(bench: Bench) -> None:
    """The first tap that shows an error need not be of the layer, nor of the block, that made it."""
    run = bench.run(replay=bench.fault("no decay", 1))

    def found(*keys: str, **options: Any) -> Comparison:
        return bench.compare({key: run[key] if key in keys else None for key in run.sites}, **options)

    both = found("layers.0.mlp_output", "layers.0.layer_input", "layers.3.layer_input", "layers.3.mlp_output")
    assert "first seen at tap layers.3.layer_input" in both.verdict
    assert both.verdict.endswith("made somewhere in layer 1, input_layernorm, to layer 2, mlp")
    norms = found(*(f"layers.{i}.{n}" for i in range(4) for n in ("input_layernorm", "pre_mlp_layernorm_output")))
    assert norms.verdict.endswith("made somewhere in layer 1, gdn to post_attention_layernorm")
    routing = found("layers.1.layer_input", "layers.1.moe_router_logits", "layers.2.layer_input", diagnoses=1)
    assert "made somewhere in layer 1, input_layernorm to mlp" in routing.verdict
    assert str(routing.diagnoses[0]).startswith("layer 1, gdn: no decay")
    stream = [f"layers.{i}.{n}" for i in range(4) for n in ("layer_input", "moe_topk_ids")]
    assert [found(*stream, layers=[i]).exit_code for i in range(3)] == [0, 1, 0]


def test_no_block_is_suspect_that_runs_after_the_tap() -> None:
    for tap, last in (("pre_mlp_residual", "gdn"), ("pre_mlp_residual_sum", "gdn"), ("layer_output_sum", "mlp")):
        record = Record(f"layers.1.{tap}", "wrong", "stream", 1)
        accuse([record], suspects(Captured(), ("gdn", "gdn")), set())
        assert record.suspects[0] == (None, "embedding") and record.suspects[-1] == (1, last)


@pytest.mark.parametrize("key", ["embed_tokens", "layers.0.pre_mlp_residual", "layers.0.layer_output_sum"])
def test_suspects_begin_after_the_last_value_of_the_stream(key: str) -> None:
    captured = Captured()
    captured[key] = torch.arange(1), torch.ones(1, 1)
    blocks = {"embed_tokens": (0, "input_layernorm"), "layers.0.pre_mlp_residual": (0, "post_attention_layernorm")}
    place = blocks.get(key, (1, "input_layernorm"))
    assert suspects(captured, ("gdn", "attn"))[place] == [place]


def test_who_is_cleared() -> None:
    """By a good value: all blocks before its own. By ids and gains: none."""
    found, first = suspects(Captured(), ("gdn", "attn")), (None, "embedding")
    for tap, block, suspect in (
        ("moe_router_logits", "mlp", (0, "mlp")),
        ("moe_topk_ids", "mlp", first),
        ("pre_mlp_layernorm_output.gain", "post_attention_layernorm", first),
    ):
        good, bad = (
            Record(f"layers.0.{tap}", "bit-equal", block, 0),
            Record("layers.1.layer_input", "wrong", "stream", 0),
        )
        accuse([good, bad], found, set())
        assert bad.suspects[0] == suspect and bad.suspects[-1] == (0, "mlp")
    gain = Record("layers.0.input_layernorm.gain", "wrong", "input_layernorm", 0)
    accuse([gain], found, set())
    assert not gain.suspects  # it is made of weights alone


def test_without_checkpoint_errors_are_inherited(bench: Bench) -> None:
    truth, engine = bench.truth, bench.engine
    clean = compare(truth, from_trace(engine))
    assert not clean.diverges and clean.compared > 20
    found = compare(truth, bench.changed({"layers.1.mlp_output": engine["layers.1.mlp_output"] * 2}))
    assert found.exit_code == 1 and found.first is not None and found.first.key == "layers.1.mlp_output"
    bare = Trace(truth.sites, {k: v for k, v in truth.meta.items() if k != "_envelope"}, memory=truth.memory)
    with pytest.raises(Qwen35Error, match="no envelope"):
        compare(bare, from_trace(engine))


def test_without_ids_a_layer_whose_experts_may_be_others_is_not_judged(bench: Bench) -> None:
    truth, key = bench.truth, "layers.0.mlp_output"
    logits = truth["layers.0.moe_router_logits"].clone()
    logits[7] = 1.0  # all experts tie
    tied = Trace(truth.sites, truth.meta, memory={**truth.memory, "layers.0.moe_router_logits": logits})
    for row, cls in ((7, "not comparable"), (6, "wrong")):
        bad = bench.engine[key].clone()
        bad[row] *= 2
        assert record(compare(tied, bench.changed({**WITHOUT_IDS, key: bad})), key).cls == cls


def test_nan_missing_misshapen_and_holes_are_counted(bench: Bench) -> None:
    engine, key = bench.engine, "layers.1.mlp_output"
    nan = engine["layers.0.attn_output"].clone()
    nan[0, 5, 3] = torch.nan
    found = bench.compare({"layers.0.attn_output": nan})
    assert found.exit_code == 1 and next(r for r in found.records if r.nan).key == "layers.0.attn_output"

    # A token whose experts could be others is not judged where the dump does not say which; NaN is no other expert's.
    for t in (0, 5):
        nan = engine[key].clone()
        nan.view(4, 6, -1)[2, t, 7] = torch.nan
        alone = bench.changed({**dict.fromkeys(engine.sites), key: nan})
        for known in (None, bench.source):
            found = compare(bench.truth, alone, known, diagnoses=0)
            assert found.exit_code == 1 and found.first is not None and found.first.worst == (2, t)
    assert "rows of 1 taps were not judged" in found.notes[-1]

    found = bench.compare({"layers.2.mlp_output": None})
    assert found.exit_code == 2 and found.holes == ["layers.2.mlp_output"] and found.summary["missing"] == 1

    found = bench.compare({"layers.2.mlp_output": engine["layers.2.mlp_output"][:, :32]})
    assert found.exit_code == 2 and "misshapen" in next(r.note for r in found.records if r.cls == "not comparable")


@pytest.mark.parametrize(
    ("layer", "taps"),
    [(3, "layer_input,final_norm"), (3, "layer_input,next_token_logits"), (1, "input_layernorm,pre_mlp_residual")],
)
def test_a_flip_that_nothing_shows_is_no_fault_of_what_reads_the_stream(bench: Bench, layer: int, taps: str) -> None:
    """At the token whose choice is closest, the engine takes the next expert."""
    ids, key = (torch.arange(64) * 7919 % 251)[None], f"layers.{layer}.moe_topk_ids"
    plain = bench.run("moe_router_logits,moe_topk_ids", ids=ids)
    chosen = plain[key].clone().flatten(0, -2)
    best = plain[f"layers.{layer}.moe_router_logits"].flatten(0, -2).topk(chosen.shape[1] + 1, 1)
    row = (best.values[:, -2] - best.values[:, -1]).argmin()
    chosen[row] = torch.cat((best.indices[row, :-2], best.indices[row, -1:]))
    run = bench.run(taps, [ReplayRouting({key: chosen})], ids)
    found = compare(bench.exact(taps, ids), from_trace(run), bench.source, diagnoses=1)
    assert found.exit_code == 0, found.verdict
    assert any(r.excluded for r in found.records if not r.key.endswith("layer_input"))


def test_illegal_flip_diverges(bench: Bench) -> None:
    ids = bench.engine["layers.1.moe_topk_ids"].clone()
    ids[7, 0] = worst = bench.truth["layers.1.moe_router_logits"][7].argmin()
    found = bench.compare({"layers.1.moe_topk_ids": ids})
    flip = next(r for r in found.routing if r.layer == 1).illegal[0]
    assert found.exit_code == 1 and flip.won == (int(worst),) and flip.margin > flip.noise


@pytest.mark.parametrize("e", [-1, 6, 12345])  # the model has experts 0 to 5
def test_ids_that_no_expert_has_diverge(bench: Bench, e: int) -> None:
    ids = bench.engine["layers.1.moe_topk_ids"].clone()
    ids[7, 0] = e
    found = bench.compare({"layers.1.moe_topk_ids": ids})
    assert found.exit_code == 1 and next(r for r in found.routing if r.layer == 1).nonsense == 1
    assert found.first is not None and found.first.key == "layers.1.moe_topk_ids"


def test_nothing_compared_is_not_green() -> None:
    assert Comparison().exit_code == 2 and "NOT COMPARED" in Comparison().verdict
    assert Comparison([Record("x", "missing", "mlp", 0)]).exit_code == 2
    one = [Record("x", "bit-equal", "mlp", 0)]
    assert Comparison(one, unknown=["a", "b"]).verdict.endswith("; 2 names of the dump are unknown")
    assert Comparison(one, unknown=["a"]).verdict.endswith("1 taps within rounding")


def test_dump_without_ids_judges_no_token_that_could_have_flipped(bench: Bench) -> None:
    found = bench.compare(WITHOUT_IDS, diagnoses=2)
    assert found.exit_code == 0, found.verdict


def weights(source: WeightSource, name: str, x: torch.Tensor, rank: int = 0, **parallel: int) -> list[Weight]:
    """What is said of a parameter of an engine's rank."""
    piece = Piece(name, lambda: x, rank=rank, parallel=parallel)
    return check_weights(Dump("", "", [], weights={f"model.{name}@{rank}": piece}), source)


def test_weights_slot_by_slot(bench: Bench) -> None:
    source = bench.source
    codes = torch.stack([source.slot("layers.0.mlp", e)[1].codes for e in range(6)])

    def states(name: str, x: torch.Tensor) -> list[tuple[str, str]]:
        return [(w.state, w.detail) for w in weights(source, name, x)]

    name = "layers.0.mlp.experts.w2_weight"
    assert states(name, codes) == [("equal", "")] * 6

    wrong = codes.clone()
    wrong[3] = (codes[3] << 4) | (codes[3] >> 4)
    wrong[4], wrong[5] = codes[2], 0
    assert [d for _, d in states(name, wrong)][3:6] == ["nibbles swapped", "holds expert 2", "all zero"]
    assert states(name, torch.cat((codes, codes[:1])))[-1][0] == "wrong"

    a_log = source.tensor("layers.0.linear_attn.A_log")
    assert states("layers.0.linear_attn.A_log", a_log)[0][0] == "equal"
    assert states("layers.0.linear_attn.A_log", a_log.to(torch.bfloat16)) == [
        ("wrong", "rounded to bfloat16 from float32")
    ]
    joined = torch.cat([source.weight(f"layers.0.linear_attn.in_proj_{n}").values for n in "ba"])
    assert states("layers.0.linear_attn.in_proj_ba.weight", joined)[0][0] == "equal"
    assert states("layers.0.linear_attn.in_proj_ba.weight", joined.roll(4, 0)) == [("wrong", "halves swapped")]
    for nothing in ("nonsense", "linear_attn.in_proj_ba.input_scale"):
        assert states(f"layers.0.{nothing}", joined)[0][0] == "unknown"

    head = source.weight("lm_head").values
    padded = torch.cat((head, head.new_zeros(64 - len(head) % 64, head.shape[1])))
    assert states("lm_head.weight", padded) == [("equal", "")]
    assert states("embed_tokens.weight", padded)[0][0] == "wrong"
    assert states("lm_head.weight", torch.cat((head, head)))[0][0] == "wrong"
    assert states("layers.0.mlp.gate.weight", torch.zeros(64, head.shape[1]))[0][0] == "wrong"


def test_weights_in_aiters_layout(bench: Bench) -> None:
    source, name = bench.source, "layers.0.mlp.experts.w13_weight"
    gate_up = [source.slot("layers.0.mlp", e)[0] for e in range(6)]
    codes = torch.stack([torch.cat([p.codes for p in g.parts]) for g in gate_up])
    scales = torch.stack([torch.cat([p.scales for p in g.parts]) for g in gate_up])
    assert {w.state for w in weights(source, name, shuffle_weight(codes))} == {"reordered"}
    assert {w.detail for w in weights(source, f"{name}_scale", scales + 1)} == {"one step high"}
    assert shuffle_scales(scales[0]).shape == (256, 8)


def test_weights_of_ranks(bench: Bench) -> None:
    """A rank of EP holds whole experts, one of TP a share of each: neither is another expert's."""
    source, name = bench.source, "layers.0.mlp.experts.w2_weight"
    codes = torch.stack([source.slot("layers.0.mlp", e)[1].codes for e in range(6)])

    def found(x: torch.Tensor, **parallel: int) -> list[tuple[str, str, str]]:
        return [(w.name.removeprefix(name), w.state, w.detail) for w in weights(source, name, x, 1, **parallel)]

    second = {"moe_ep_size": 2, "moe_ep_rank": 1}
    assert found(codes[3:], **second) == [(f"[{e}]", "equal", "") for e in range(3, 6)]
    assert found(torch.cat((codes[3:4], codes[3:4], codes[5:])), **second)[1] == ("[4]", "wrong", "holds expert 3")
    assert found(codes[..., 8:].contiguous(), moe_tp_size=2, moe_tp_rank=1) == [
        ("", "sharded", f"{[6, *codes[0, :, 8:].shape]} for 6 of {list(codes[0].shape)}")
    ]
    assert found(codes[..., 8:].contiguous())[0][1] == "sharded"  # a dump that does not tell
    assert found(codes, moe_tp_size=2, moe_tp_rank=1)[0][1] == "sharded"  # a share that is padded
    head = source.weight("lm_head").values
    # of 320 rows, 256 of which are real
    assert [w.state for w in weights(source, "lm_head.weight", head[:160], tp_size=2)] == ["sharded"]
    said = report.text(Comparison(weights=weights(source, name, codes[..., 8:], moe_tp_size=2)), 120)
    assert "0 of 1 as the checkpoint has them, 0 wrong; 1 not compared" in said


def test_weights_that_are_packed(built: Callable[[str], Path], tmp_path: Path) -> None:
    """FP8's and MXFP4's parameters are codes and scales, which are held against codes and scales."""

    def states(path: Path, name: str, x: torch.Tensor) -> set[tuple[str, str]]:
        return {(w.state, w.detail) for w in weights(open_checkpoint(path)[1].source, name, x)}

    path, shared = built("tiny-fp8"), "layers.0.mlp.shared_expert"
    source = open_checkpoint(path)[1].source
    gate, up = (source.weight(f"{shared}.{n}_proj") for n in ("gate", "up"))
    slots = [source.slot("layers.0.mlp", e)[0].parts for e in range(source.config.num_experts)]
    joined = torch.cat((gate.values, up.values))
    assert states(path, f"{shared}.gate_up_proj.weight", joined) == {("equal", "")}
    assert states(path, f"{shared}.gate_up_proj.weight", torch.cat((up.values, gate.values))) == {
        ("wrong", "halves swapped")
    }
    scales = torch.cat((gate.scale, up.scale))
    assert states(path, f"{shared}.gate_up_proj.weight_scale_inv", scales.float()) == {("equal", "as float32")}
    w13 = torch.stack([torch.cat([part.values for part in slot]) for slot in slots])
    assert states(path, "layers.0.mlp.experts.w13_weight", w13) == {("equal", "")}

    path = built("tiny-moe-mxfp4")
    source = open_checkpoint(path)[1].source
    gate, up = (source.weight(f"{shared}.{n}_proj") for n in ("gate", "up"))
    codes = torch.cat((gate.codes, up.codes))
    assert states(path, f"{shared}.gate_up_proj.weight", codes) == {("equal", "")}
    assert states(path, f"{shared}.gate_up_proj.weight", shuffle_weight(codes)) == {("reordered", "Aiter's layout")}
    codes[0, 0] ^= 1
    assert states(path, f"{shared}.gate_up_proj.weight", codes).pop()[0] == "wrong"

    path = built("tiny-mxfp4-attnfp8")
    o_proj = open_checkpoint(path)[1].source.weight("layers.3.self_attn.o_proj")
    for values in (o_proj.values.T, o_proj.values.T.contiguous()):  # as vLLM and SGLang leave weights of FP8 channels
        assert states(path, "layers.3.self_attn.o_proj.weight", values) == {
            ("reordered", "transposed, as kernels of FP8 read it")
        }

    path = shutil.copytree(built("tiny-drawn-fp8"), tmp_path / "one scale each")
    for file in path.glob("*.safetensors"):
        tensors = load_file(file).items()
        save_file({k: x.reshape(()) if "scale" in k and x.numel() == 1 else x for k, x in tensors}, file)
    for name, x in (
        ("mlp.experts.w13_weight_scale", torch.ones(99, 2)),
        ("mlp.experts.w2_weight_scale", torch.ones(99)),
        ("mlp.shared_expert.gate_up_proj.weight", torch.ones(1)),
    ):
        assert {state for state, _ in states(path, f"layers.0.{name}", x)} == {"unknown"}


def test_logits() -> None:
    p = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.001, 0.0], [5.0, 0.0, 0.0]], dtype=torch.float64)
    q = torch.tensor([[2.0, 1.0, 0.0], [1.001, 1.0, 0.0], [0.0, 5.0, 0.0]], dtype=torch.float64)
    rows = torch.tensor([[0, 0], [0, 1], [0, 2]])
    found = compare_logits(Pair("next_token_logits", p, q, rows), torch.full((3,), 0.0006), torch.tensor([[0, 1, 2]]))
    assert (found.tokens, found.flips, found.legal_flips, found.worst) == (3, 2, 1, (0, 2))
    assert found.kl_max == pytest.approx(float((p[2].softmax(-1) * (p[2] - q[2])).sum()))
    p = torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    found = compare_logits(
        Pair("next_token_logits", p, p[:, [5, 1, 2, 3, 4, 0, 6]], rows[:1]), None, torch.tensor([[0, 5]])
    )
    assert found.top5 == 0.8 and found.delta_log_p_max == pytest.approx(5)  # of token 5, which follows


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "line", "circle", "rect", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "circle", "rect", "polyline"):
            assert self.open.pop() == tag


def test_reports_are_views_of_the_same_records(bench: Bench) -> None:
    found = bench.compare({"layers.1.mlp_output": bench.engine["layers.1.mlp_output"] * 1.2}, diagnoses=1)
    for width in (60, 80, 132):
        text = report.text(found, width)
        assert max(map(len, text.splitlines())) <= width
        assert "DIVERGES" in text and "whole block times 1.2" in " ".join(text.split())
    lines = [json.loads(line) for line in page_and_lines(found, "json").splitlines()]
    assert lines[-1]["type"] == "summary" and lines[-1]["exit_code"] == found.exit_code == 1
    assert sum(line["type"] == "tap" for line in lines) == lines[-1]["total"]
    page = Page()
    page.feed(report_html.html(found))
    assert page.open in ([], ["html"])
    assert all(link.startswith("https://github.com/") for link in page.links), "links to reports; nothing is loaded"


def test_layers_that_nobody_asks_for_do_not_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer before runs from its dumped input, whose digits beyond bf16 a whole run has: the norms, which read them
    in a sum, err a little more or less. All else is the same."""
    whole, ran, run_layer = bench.compare({}), list[int](), Rerun.run_layer

    def watched(self: Rerun, i: int, *rest: Any, **more: Any) -> Any:
        ran.append(i)
        return run_layer(self, i, *rest, **more)

    monkeypatch.setattr(Rerun, "run_layer", watched)
    part = bench.compare({}, layers=[2])
    assert set(ran) == {1, 2} and not part.diverges
    ours, theirs = ({r.key: r for r in one.records if r.layer == 2 and r.added is not None} for one in (part, whole))
    assert len(ours) > 9 and all(r.cls in (theirs[key].cls, "within rounding") for key, r in ours.items())
    assert {key for key, r in ours.items() if r.added != theirs[key].added} == {
        "layers.2.input_layernorm", "layers.2.pre_mlp_layernorm_output"
    }  # fmt: skip


def test_reports_of_60_layers() -> None:
    names = [n for n in DUMPED.split(",") if n not in ("embed_tokens", "final_norm", "next_token_logits")] * 4
    records = [
        Record(f"layers.{i}.{n}_{k}", "within rounding", "mlp", i, 1 + i / 100, 1.2, rel=1e-3, worst=(0, 511), rows=512)
        for i in range(60)
        for k, n in enumerate(names)
    ]
    lost = "trace file cannot be read\n  where: 00041.safetensors"
    for r in records:
        if r.layer == 31 and "mlp_output" in r.key:
            r.cls, r.added = "wrong", 556.0
        if r.layer == 41:
            r.cls, r.added, r.inherited, r.note = "not comparable", None, None, lost
    records.append(Record("mtp.layers.0.layer_output_sum", "within rounding", "mtp", None, inherited_rel=1e-3))
    result = Comparison(records, layers=("gdn",) * 60)
    assert len(report_html.html(result).encode()) < 1_000_000
    # Layers with nothing to see are one row, and show the largest of their ratios; a bad layer's neighbours stay.
    text = report.text(result)
    assert all(len(line) <= 80 for line in text.splitlines())
    rows = {line[:9].strip(): line for line in text.splitlines() if line[8:9] == " " and line[:3].strip().isdigit()}
    assert list(rows) == ["0-29", "30 gdn", "31 gdn", "32 gdn", *(f"{i} gdn" for i in range(33, 43)), "43-59"]
    assert "1.29." in rows["0-29"] and "1.59." in rows["43-59"]
    # One reason is told once, however many taps it concerns.
    assert text.count("00041.safetensors") == 1 == report_html.html(result).split("<h2>What")[1].count("00041")


def test_commands(built: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(built("tiny"))
    (tmp_path / "ids.json").write_text(json.dumps([[1, 5, 9, 200, 7, 8], [3, 4]]))
    common = ["trace", checkpoint, "--ids", str(tmp_path / "ids.json"), "--taps", DUMPED]
    assert cli.main([*common, "--out", str(tmp_path / "truth")]) == 0
    assert (
        cli.main([*common, "--out", str(tmp_path / "dump"), "--arithmetic", "transformers-bf16", "--no-envelope"]) == 0
    )
    out = ["--html", str(tmp_path / "r.html"), "--json", str(tmp_path / "r.jsonl")]
    assert cli.main(["compare", str(tmp_path / "truth"), str(tmp_path / "dump"), *out]) == 0
    assert "AGREES" in capsys.readouterr().out and (tmp_path / "r.html").stat().st_size < 100_000
    assert cli.main(["diagnose", checkpoint, str(tmp_path / "dump"), "--layer", "1"]) == 0
    assert cli.main(["compare", str(tmp_path / "truth"), str(tmp_path / "none")]) == 2
    capsys.readouterr()
    both = [str(tmp_path / "truth"), str(tmp_path / "dump")]
    for strange, said in (
        (["diagnose", checkpoint, both[1], "--layer", "-1"], "no such layer"),
        (["diagnose", checkpoint, both[1], "--layer", "9"], "0 to 3"),
        (["compare", *both, "--name-map", "names.json"], "a name map is for plain files"),
        (["compare", *both, "--json", str(tmp_path)], f"{tmp_path} is a folder"),
        (["compare", *both, "--html", str(tmp_path / "no/r.html")], "no/r.html cannot be written"),
    ):
        try:
            code: object = cli.main(strange)
        except SystemExit as stop:
            code = stop.code
        assert code == 2 and said in capsys.readouterr().err, strange
    (tmp_path / "ids.json").write_text('["a"]')
    assert cli.main([*common, "--out", str(tmp_path / "truth")]) == 2
    assert "not a list of token ids" in capsys.readouterr().err


def test_layer_ids_of_hidden_states(built: Callable[[str], Path], tmp_path: Path, capsys) -> None:
    """One layer of a right engine, with its id and with another's: nothing before it can be run on its own input."""
    run = trace(load(built("tiny"), "sglang-bf16", text_only=True), IDS[:1], taps="layer_input")
    hidden = {"hidden_states": run["layers.2.layer_input"].reshape(6, 1, -1), "token_ids": IDS[0]}
    save_file(hidden, tmp_path / "request.safetensors")
    command = ["diagnose", str(built("tiny")), str(tmp_path / "request.safetensors")]
    for more, code, said in (
        (["--layer-ids", "2"], 0, "AGREES"),
        (["--layer-ids", "0"], 1, "DIVERGES: first at embedding"),
        ([], 2, "--layer-ids"),
    ):
        assert cli.main([*command, *more]) == code
        out = capsys.readouterr()
        assert said in out.out + out.err


def test_truth_of_another_checkpoint_is_refused(built: Callable[[str], Path], tmp_path: Path) -> None:
    write_truth(built("tiny"), IDS[:1], tmp_path / "truth", taps=DUMPED, with_envelope=False)
    arguments = ["compare", str(tmp_path / "truth"), str(tmp_path / "truth"), "--checkpoint", str(built("tiny-mxfp4"))]
    assert cli.main(arguments) == 2


def test_catalogue_is_data_with_names_of_taps() -> None:
    from qwen35_moe.numerics.tap_table import TAPS

    assert len({f.name for f in FAULTS}) == len(FAULTS) >= 50
    for fault in FAULTS:
        for name in (*fault.taps, *fault.remembers):
            assert name in TAPS or name.endswith(".gain"), (fault.name, name)
        how = (fault.taps, fault.slot, fault.weight, fault.tensor, fault.draft, fault.hand_over, fault.switches)
        assert any(how), fault.name


def test_envelope_of_a_declared_arithmetic() -> None:
    mine = replace(get("sglang-bf16"), name="mine")
    assert legal("exact", mine)[0] is mine and len(legal("exact", mine)) == len(legal("exact")) + 1
    assert all(m.dtype == torch.float32 for m in legal("exact", "float32"))
