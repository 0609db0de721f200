"""Whether the shared expert is a slot: seen in an engine's files, whatever they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tolerances
import torch
from engine_like import Engine, Value, padded_truth, tiny_model, write_dumper

from qwen35_moe.oracle.dumps.align import align
from qwen35_moe.oracle.dumps.checks import holes
from qwen35_moe.oracle.dumps.readers import read_dump
from qwen35_moe.trace.file import Trace

SEQUENCES = [[5, 9, 200, 7, 31, 8, 77], [5, 9, 4, 250, 3]]
STEPS = [[(0, 0, 7), (1, 0, 5)]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def truth(model) -> Trace:
    return padded_truth(model, SEQUENCES)


def values(model, fused: bool, keep: str = "") -> Iterator[Value]:
    """What an engine writes whose experts take a list of slots: `mlp.experts.inputs.1.{0,1}`."""
    for v in Engine(model, SEQUENCES).values(STEPS):
        if fused and "mlp.shared_expert." in v.name:
            continue
        if keep and v.layer is not None and not any(name in v.name for name in keep.split()):
            continue
        yield v
        for i, extra in ((1, 10.0), (0, 0.5)):
            if v.name.endswith(f"topk.output.{i}"):
                slot = torch.full_like(v.x[:, :1], extra)
                x = torch.cat((v.x, slot), 1) if fused else v.x
                yield Value(v.name.replace(f"topk.output.{i}", f"experts.inputs.1.{i}"), x, v.step, v.rank, v.layer)


def with_fused_sum(some: Iterator[Value]) -> Iterator[Value]:
    """`mlp.experts.output` is the block's sum."""
    found = list(some)
    sums = {v.layer: v.x for v in found if v.name.endswith(".mlp.output")}
    for v in found:
        if v.name.endswith("mlp.experts.output"):
            v.x = sums[v.layer]
        yield v


def read(path: Path, some: Iterator[Value], truth: Trace):
    write_dumper(path, some)
    dump = read_dump(path, config=truth.meta["config"])
    return dump, align(dump, truth)


def close(alignment, key: str) -> None:
    pair = alignment.pair(key)
    torch.testing.assert_close(pair.engine, pair.truth, rtol=0, atol=tolerances.ENGINE_LIKE)


def test_a_list_that_is_k_wide_is_no_fused_one(model, truth: Trace, tmp_path: Path) -> None:
    """SGLang gives its experts a list where nothing is fused too: its last column is no shared gate."""
    dump, alignment = read(tmp_path / "d", values(model, fused=False), truth)
    assert dump.fused == {("", layer): False for layer in range(4)} and not alignment.extra
    assert "layers.1.moe_shared_gate" in alignment.missing
    for name in ("moe_routed_output", "mlp_output", "moe_topk_ids", "moe_topk_weights"):
        close(alignment, f"layers.1.{name}")


def test_a_list_with_one_more_is(model, truth: Trace, tmp_path: Path) -> None:
    """The gate's own module runs before a fused list is made, and says nothing."""
    dump, alignment = read(tmp_path / "d", with_fused_sum(values(model, fused=True)), truth)
    assert dump.fused == {("", layer): True for layer in range(4)}
    assert (alignment.pair("layers.1.moe_shared_gate").engine == 0.5).all()
    close(alignment, "layers.1.mlp_output")
    assert "layers.1.moe_routed_output" in alignment.missing


@pytest.mark.parametrize("fused", [False, True])
def test_few_taps_tell_it_too(model, truth: Trace, tmp_path: Path, fused: bool) -> None:
    """With nothing but the experts and the block's sum (vLLM adds the shared expert inside of `mlp.experts`)."""
    some = values(model, fused, keep=".mlp.experts.output .mlp.output input_layernorm")
    dump, alignment = read(tmp_path / "d", with_fused_sum(some) if fused else some, truth)
    assert set(dump.fused.values()) == {fused}
    close(alignment, "layers.2.mlp_output")
    if not fused:
        close(alignment, "layers.2.moe_routed_output")


def write_atom(path: Path, some: Iterator[Value], classes: dict[str, str], wide_gate: bool = False) -> None:
    path.mkdir()
    for v in some:
        kind = next((k for end, k in classes.items() if v.name.endswith(end)), None)
        if kind is not None and v.layer is not None:
            more = wide_gate and kind.startswith("Merged")
            x = torch.cat((v.x, torch.full_like(v.x[:, :1], 0.25)), 1) if more else v.x
            torch.save({"hidden": x, "shape": list(x.shape)}, path / f"layer{v.layer:02d}_{kind}_rank0_call000.pt")


@pytest.mark.parametrize("classes", [
    {"mlp.experts.output": "FusedMoE", ".mlp.output": "Qwen3NextSparseMoeBlock"},
    {"mlp.experts.output": "FusedMoE"},
])  # fmt: skip
@pytest.mark.parametrize("sum_of", [with_fused_sum, lambda some: some])
def test_atom(model, tmp_path: Path, classes: dict[str, str], sum_of: Callable[..., Iterator[Value]]) -> None:
    """ATOM's FusedMoE returns the block's output where the shared expert is a slot; one sequence, since it has no
    ids. With nothing beside it, the truth tells."""
    engine = Engine(model, SEQUENCES[:1])
    write_atom(tmp_path / "d", sum_of(engine.values([[(0, 0, 7)]])), classes)
    truth = padded_truth(model, SEQUENCES[:1])
    alignment = align(read_dump(tmp_path / "d", config=truth.meta["config"]), truth)
    routed = sum_of is not with_fused_sum
    for name in {"moe_routed_output"} if routed and len(classes) == 1 else {"mlp_output"}:
        for layer in range(4):
            close(alignment, f"layers.{layer}.{name}")
    assert ("layers.0.moe_routed_output" in alignment.missing) is not routed


def test_atoms_gate_has_one_more_column(model, tmp_path: Path) -> None:
    """Its one product makes the router's logits and the shared gate's."""
    engine = Engine(model, SEQUENCES[:1])
    classes = {"mlp.gate.output": "MergedReplicatedLinear", ".mlp.output": "Qwen3NextSparseMoeBlock"}
    write_atom(tmp_path / "d", engine.values([[(0, 0, 7)]]), classes, wide_gate=True)
    truth = padded_truth(model, SEQUENCES[:1])
    alignment = align(read_dump(tmp_path / "d", config=truth.meta["config"]), truth)
    close(alignment, "layers.1.moe_router_logits")
    assert (alignment.pair("layers.1.moe_shared_gate_logit").engine == 0.25).all()


def test_the_first_layer_has_no_residual(model, truth: Trace, tmp_path: Path) -> None:
    """SGLang's first norm reads the embeddings, and writes no sum: that is no hole; one in another layer is."""

    def write(lost: int | None) -> Iterator[Value]:
        for v in values(model, fused=False):
            if v.name.endswith("input_layernorm.output.1") and v.layer in (0, lost):
                continue
            if v.name.endswith("input_layernorm.output.0") and v.layer == 0:
                v.name = v.name.removesuffix(".0")
            yield v

    assert not list(holes(read(tmp_path / "whole", write(None), truth)[1]))
    assert list(holes(read(tmp_path / "lost", write(2), truth)[1])) == ["layers.2.layer_input"]
    never = (v for v in write(None) if not v.name.endswith("input_layernorm.output.1"))
    assert not list(holes(read(tmp_path / "never", never, truth)[1]))  # what no layer has is no hole


def test_layers_that_a_filter_lets_through_are_no_holes(model, truth: Trace, tmp_path: Path) -> None:
    """A dump of layers 0 and 1: what the others hand on carries no layer's number, and is dumped all the same."""
    outside = ("output.0", "output.1", "inputs.hidden_states", "inputs.residual")
    some = (v for v in values(model, fused=False)
            if v.layer in (None, 0, 1) or v.name.partition(f"layers.{v.layer}.")[2] in outside)  # fmt: skip
    assert not list(holes(read(tmp_path / "d", some, truth)[1]))


@pytest.mark.parametrize("gated", [True, False])
def test_a_gate_inside_of_the_shared_expert_is_seen(model, truth: Trace, tmp_path: Path, gated: bool) -> None:
    """vLLM's module returns its sum times the gate, SGLang's the sum: what the values are nearer to."""

    def written() -> Iterator[Value]:
        logits = {v.layer: v.x for v in values(model, fused=False) if v.name.endswith("shared_expert_gate.output")}
        for v in values(model, fused=False):
            if v.name.endswith("shared_expert.down_proj.output"):
                gate = truth[f"layers.{v.layer}.moe_shared_gate"][truth.mask.bool()] if v.layer not in logits else (
                    logits[v.layer].sigmoid())  # fmt: skip
                v.name, v.x = v.name.replace("down_proj.", ""), v.x * gate.to(v.x) if gated else v.x
            elif v.name.endswith("mlp.shared_expert.output"):
                continue
            yield v

    alignment = read(tmp_path / "d", written(), truth)[1]
    close(alignment, f"layers.1.moe_shared_{'gated' if gated else 'output'}")
    assert ("layers.1.moe_shared_output" in alignment.missing) is gated


def test_an_odd_tensor_says_nothing_of_fusion_and_costs_itself(tmp_path: Path) -> None:
    """What tells of fusion is looked at before anything is asked for."""
    for name, x in (("FusedMoE", torch.ones(3, 4).to_sparse()), ("Qwen3NextSparseMoeBlock", torch.ones(3, 4))):
        torch.save({"hidden": x, "shape": (3, 4)}, tmp_path / f"layer00_{name}_rank0_call000.pt")
    assert len(read_dump(tmp_path, config={"hidden_size": 4, "num_experts": 8}))
