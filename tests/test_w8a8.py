"""FP8 as engines run it: products of FP8 weights take inputs that are quantised to FP8 (W8A8)."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.oracle_score.mutants import Bench
from benchmarks.oracle_score.variants import variants
from qwen35_moe.oracle.compare import compare, diagnose
from qwen35_moe.oracle.dumps.readers.own import from_trace
from qwen35_moe.oracle.dumps.writers import DUMPED
from qwen35_moe.oracle.judge.envelope import LIMIT
from qwen35_moe.oracle.judge.envelope_file import write_envelope
from qwen35_moe.oracle.judge.function import SAYS
from qwen35_moe.oracle.play import known_fault
from qwen35_moe.oracle.truth import open_checkpoint
from qwen35_moe.quant.fp8 import mx_quantise_dequantise, quantise_dequantise, round_to_e4m3
from qwen35_moe.run.load import load
from qwen35_moe.run.source import WeightSource
from qwen35_moe.trace.recorder import trace
from weights.build import build

REAL = Path(__file__).parent / "data" / "real"
IDS = (torch.arange(32) * 7919 % 251)[None]
SIZES = {
    "hidden_size": 192, "moe_intermediate_size": 160, "shared_expert_intermediate_size": 64, "num_experts": 6,
    "num_experts_per_tok": 3, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


def _values(rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows + width)
    return torch.randn(rows, width, generator=generator) * 10 ** (4 * torch.rand(rows, 1, generator=generator) - 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elements_are_what_ml_dtypes_says(dtype: torch.dtype) -> None:
    halves = torch.arange(0, 448 * 512 + 1, dtype=torch.float32) / 1024  # ties, subnormals and what rounds to zero
    x = torch.cat((halves, -halves, _values(64, 64).flatten().clamp(-448, 448)))
    theirs = torch.from_numpy(x.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float64)).to(dtype)
    assert torch.equal(round_to_e4m3(x.to(dtype)), theirs)
    beyond = round_to_e4m3(torch.tensor([500.0, -1e9, torch.nan], dtype=dtype))
    assert beyond[:2].tolist() == [448.0, -448.0] and beyond[2].isnan()


@pytest.mark.parametrize("columns", [128, None])
def test_a_scale_for_each_token_and_group_of_columns(columns: int | None) -> None:
    x = _values(5, 300).double()  # two groups and a part of one
    x[3, 128:256] = 0
    got = quantise_dequantise(x, columns)
    for row in range(5):
        for start in range(0, 300, columns or 300):
            part = x[row, start : start + (columns or 300)]
            scale = max(float(part.abs().max()), 1e-10) / 448
            codes = torch.from_numpy((part / scale).numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float64))
            assert torch.equal(got[row, start : start + (columns or 300)], codes * scale)
    ways = [quantise_dequantise(x, columns, way) for way in ("multiply", "multiply-up", "multiply-down")]
    for way in ways:  # they differ in ties alone, and in the last bits
        assert float((way - got).norm() / got.norm()) < 1e-6


def test_mxfp8_never_saturates_and_scales_are_powers_of_two() -> None:
    x = _values(6, 96).double()
    x[0, :32], x[1, :32], x[2, :32] = 0, 448.0, 449.0
    got = mx_quantise_dequantise(x).unflatten(1, (3, 32))
    amax = x.unflatten(1, (3, 32)).abs().amax(-1, keepdim=True)
    scale = torch.where(amax > 0, 2.0 ** torch.ceil(torch.log2(amax / 448)), 1.0)
    theirs = (x.unflatten(1, (3, 32)) / scale).numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert torch.equal(got, torch.from_numpy(theirs) * scale)
    assert float(got[2].max()) == 448.0  # to the nearest of 16 s = 32, not cut at 448


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, WeightSource]:
    root = tmp_path_factory.mktemp("fp8")
    recipes = {"block": "tiny-drawn-fp8", "channel": "tiny-mxfp4-attnfp8"}
    return {
        kind: open_checkpoint(build(recipe, root / kind, jobs=1, seed=11, text_config=SIZES))[1].source
        for kind, recipe in recipes.items()
    }


def test_exactly_the_linears_with_fp8_weights_take_quantised_inputs(sources: dict[str, WeightSource]) -> None:
    source = sources["block"]
    run = trace(load(source.checkpoint.path, "exact+a8", "unfused", text_only=True), IDS, experts=True)

    def product(module: str, x: Tensor, quantised: bool = True) -> Tensor:
        return F.linear(quantise_dequantise(x) if quantised else x, source.weight(module).decode(torch.float64))

    def same(key: str, y: Tensor) -> None:
        assert torch.equal(run[key].flatten(0, -2), y.flatten(0, -2)), key

    x = run["layers.0.input_layernorm"]
    same("layers.0.gdn_qkv", product("layers.0.linear_attn.in_proj_qkv", x))
    same("layers.0.gdn_b", product("layers.0.linear_attn.in_proj_b", x, quantised=False))
    same("layers.0.attn_output", product("layers.0.linear_attn.out_proj", run["layers.0.gdn_norm_out"].flatten(2)))
    same("layers.1.attn_v", product("layers.1.self_attn.v_proj", run["layers.1.input_layernorm"]))
    same("layers.1.attn_output", product("layers.1.self_attn.o_proj", run["layers.1.attn_pre_o_proj"].flatten(2)))
    x = run["layers.1.pre_mlp_layernorm_output"].flatten(0, 1)
    same("layers.1.moe_router_logits", product("layers.1.mlp.gate", x, quantised=False))
    same("layers.1.moe_shared_up_proj", product("layers.1.mlp.shared_expert.up_proj", x))
    same("layers.1.moe_shared_output", product("layers.1.mlp.shared_expert.down_proj", run["layers.1.moe_shared_act"]))
    e = int(run["layers.1.moe_topk_ids"][0, 0])
    tokens = (run["layers.1.moe_topk_ids"] == e).any(1)
    gate_up, down = (packed.decode(torch.float64) for packed in source.slot("layers.1.mlp", e))
    act = run[f"layers.1.moe_expert_{e}_act"]
    got = F.linear(quantise_dequantise(x[tokens]), gate_up)
    assert torch.equal(run[f"layers.1.moe_expert_{e}_gate_up"], got)
    assert torch.equal(run[f"layers.1.moe_expert_{e}_down"], F.linear(quantise_dequantise(act), down))


def test_other_arithmetics_and_checkpoints_have_no_such_taps(sources: dict[str, WeightSource]) -> None:
    for name in ("exact", "sglang-bf16", "exact+w4a8"):
        run = trace(load(sources["block"].checkpoint.path, name, "unfused", text_only=True), IDS[:, :3])
        assert not [key for key in run if key.endswith(("_a1", "_a2"))]


@pytest.mark.parametrize(
    ("kind", "engine", "agrees"),
    [
        ("block", "sglang-bf16", True),
        ("block", "sglang-bf16+a8-token", False),  # a scale a token beside block-scaled weights is another function
        ("channel", "sglang-bf16+a8", True),
        ("channel", "sglang-bf16+a8-token", True),
    ],
)
def test_the_function_is_the_one_that_the_dump_shows(
    sources: dict[str, WeightSource], kind: str, engine: str, agrees: bool
) -> None:
    path, source = sources[kind].checkpoint.path, sources[kind]
    truth = trace(load(path, "exact", "unfused", text_only=True), IDS, taps=DUMPED)
    dump = from_trace(trace(load(path, engine, "unfused", text_only=True), IDS, taps=DUMPED))
    result = compare(truth, dump, source, diagnoses=0)
    assert (result.exit_code == 0) == agrees, result.verdict
    if agrees:
        function = engine.removeprefix("sglang-bf16")
        assert result.members[0].endswith(function) and f"are read {SAYS[function]}:" in result.notes[0]
        assert max(r.added or 0 for r in result.records) < 2.5


@pytest.fixture(scope="module")
def bench(sources: dict[str, WeightSource]) -> Bench:
    return Bench(sources["block"], "gate 0.5", IDS, "+a8")


@pytest.mark.parametrize("name", ["FP8 scales of the experts rotated", "FP8 scales of DeltaNet rotated", "no decay"])
def test_a_fault_of_a_w8a8_engine_is_found_and_named(bench: Bench, name: str) -> None:
    found = bench.planted(known_fault(name))
    assert found.found and found.named_right, found


def test_clean_w8a8_engines_pass_without_their_own_arithmetic(bench: Bench) -> None:
    for variant in variants("+a8", IDS.shape[1])[:6:2]:
        assert bench.clean(variant).found, variant.name


def test_a_real_w8a8_engine_agrees(tmp_path: Path) -> None:
    """SGLang 0.5.17 on an H200. Of its products with FP8 weights nothing is left but one rounding to bf16."""
    with tarfile.open(REAL / "fp8-layer-0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    path = build(REAL / "engine-size.toml", tmp_path / "checkpoint", layout="fp8")
    result = diagnose(path, tmp_path / "fp8")
    assert result.exit_code == 0, result.verdict
    assert any("are read in FP8 by 128 columns" in note for note in result.notes)
    found = {r.key: r.added or 0.0 for r in result.records}
    assert max(found.values()) < 2.5
    assert all(found[f"layers.0.{n}"] < 1.1 for n in ("gdn_qkv", "gdn_z", "moe_shared_gate_proj", "moe_shared_up_proj"))


def test_mxfp4_weights_with_mxfp8_inputs(small: Callable[..., Path]) -> None:
    """W4A8: its own arithmetic passes, a dropped shared expert is named."""
    source = open_checkpoint(small("tiny-mxfp4"))[1].source
    bench = Bench(source, "gate 0.5", IDS[:, :16], "+w4a8")
    clean = next(v for v in variants("+w4a8", 16) if v.name == "sglang-bf16")
    assert bench.clean(clean).found
    found = bench.planted(known_fault("shared expert dropped"))
    assert found.found and found.named_right, found
    run = trace(load(source.checkpoint.path, "exact+w4a8", "unfused", text_only=True), IDS[:, :4])
    x = run["layers.0.pre_mlp_layernorm_output"].flatten(0, 1)
    assert torch.equal(run["layers.0.moe_a1"], mx_quantise_dequantise(x))


def test_where_the_function_differs_from_the_traces_inherited_errors_are_judged_too(
    sources: dict[str, WeightSource],
) -> None:
    """The truth is of inputs as they are; the engine quantises them: it is held against its own function's truth."""
    source = sources["block"]
    path = source.checkpoint.path
    truth = trace(load(path, "exact", "unfused", text_only=True), IDS, taps=DUMPED)
    write_envelope(
        truth, [load(path, table, "unfused", text_only=True) for table in ("sglang-bf16", "transformers-bf16")]
    )
    dump = from_trace(trace(load(path, "sglang-bf16+a8", "unfused", text_only=True), IDS, taps=DUMPED))
    result = compare(truth, dump, source, diagnoses=0)
    assert result.exit_code == 0, result.verdict
    inherited = [r.inherited for r in result.records if r.inherited is not None]
    assert len(inherited) > 10 and max(inherited) < LIMIT
    assert all(r.inherited is not None for r in result.records if r.key.endswith("input_layernorm") and r.layer == 0)
