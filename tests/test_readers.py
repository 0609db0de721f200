"""Readers and alignment: real files of engines, an engine-like run under TP and EP, and all that can be wrong."""

from __future__ import annotations

import base64
import io
import json
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from engine_like import Engine, Value, padded_truth, tiny_model, write_dumper, write_passes
from fixture_models import read as read_fixture
from safetensors.torch import save_file

import qwen35_moe as q
from qwen35_moe import Qwen35Error
from qwen35_moe.numerics.tap_table import TAPS
from qwen35_moe.oracle.dumps.align import Alignment, align
from qwen35_moe.oracle.dumps.checks import holes
from qwen35_moe.oracle.dumps.dump import Dump
from qwen35_moe.oracle.dumps.engine_names import SGLANG_NAMES, TRANSFORMERS_NAMES, TapRule, letters
from qwen35_moe.oracle.dumps.ranks import join_ranks
from qwen35_moe.oracle.dumps.readers import read_dump
from qwen35_moe.oracle.dumps.readers.own import from_trace
from qwen35_moe.oracle.dumps.readers.transformers import capture_transformers
from qwen35_moe.trace.file import Trace
from qwen35_moe.trace.recorder import trace
from tests.peers.transformers_model import cached, load_transformers, new_cache, quiet

SEQUENCES = [[5, 9, 200, 7, 31, 8, 77], [5, 9, 4, 250, 3]]
# Prefill of a chunk each; one goes on by a chunk while the other decodes; both decode. Order in the batch changes.
STEPS = [[(0, 0, 4), (1, 0, 3)], [(1, 3, 4), (0, 4, 6)], [(0, 6, 7), (1, 4, 5)]]
ALL_AT_ONCE = [[(0, 0, 7), (1, 0, 5)]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def truth(model) -> Trace:
    return padded_truth(model, SEQUENCES)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    with tarfile.open(Path(__file__).parent / "data/dumps/dumps.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def fixture_truth() -> Trace:
    return trace(read_fixture("bf16-hub", torch.float64)[0], torch.tensor(SEQUENCES[:1]))


def worst(alignment: Alignment) -> float:
    """The largest error of any tap, relative to its largest value; each tap must have been comparable."""
    errors = []
    for pair in alignment:
        assert not pair.problem and pair.engine is not None, (pair.key, pair.problem)
        assert pair.truth.shape == pair.engine.shape and len(pair.rows) == len(pair.truth), pair.key
        errors.append(float((pair.truth - pair.engine).abs().max() / pair.truth.abs().max()))
    return max(errors)


# Real files.


@pytest.mark.parametrize(("folder", "taps"), [("sglang_tp2", 47), ("sglang_passes", 42)])
def test_sglang_files(real: Path, truth: Trace, folder: str, taps: int) -> None:
    dump = read_dump(real / folder, config=truth.meta["config"])
    alignment = align(dump, truth)
    assert (len(alignment.keys), alignment.matched, alignment.extra, dump.unknown) == (taps, 12, [], [])
    assert worst(alignment) < tolerances.ENGINE_LIKE_FLOAT32


@pytest.mark.parametrize(("folder", "taps"), [("sglang_transformers", 46), ("transformers_tree", 45)])
def test_transformers_files(real: Path, fixture_truth: Trace, folder: str, taps: int) -> None:
    alignment = align(read_dump(real / folder, config=fixture_truth.meta["config"]), fixture_truth)
    assert (len(alignment.keys), alignment.matched, alignment.extra) == (taps, 7, [])
    assert worst(alignment) < tolerances.TRANSFORMERS_TAPS_BF16


def test_transformers_live() -> None:
    """Padded batch; then prefill and decode steps with a cache, whose scores have as many columns as keys by then."""
    ours = read_fixture("bf16-hub", torch.float64)[0]
    theirs = load_transformers(Path(__file__).parent / "data/fixtures/bf16-hub", torch.float32)
    ids = torch.tensor([SEQUENCES[0], SEQUENCES[1] + [0, 0]])
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    with quiet():
        dump = capture_transformers(theirs, input_ids=ids, attention_mask=mask, use_cache=False)
        cache = cached(new_cache(theirs))
        calls = [{"input_ids": ids[:1, a:b], **cache} for a, b in ((0, 5), (5, 6), (6, 7))]
        steps = capture_transformers(theirs, *calls)
    alignment = align(dump, trace(ours, ids, attention_mask=mask))
    assert len(alignment.keys) == 98 and alignment.matched == 12 and not alignment.extra
    assert worst(alignment) < tolerances.TRANSFORMERS_TAPS_FLOAT32
    alignment = align(steps, trace(ours, ids[:1]))
    assert alignment.matched == 7 and "layers.3.attn_probs" in alignment.keys
    assert worst(alignment) < tolerances.TRANSFORMERS_TAPS_FLOAT32


# Alignment.


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (2, 2)])
def test_flat_batch_in_steps_under_tp_and_ep(model, truth: Trace, tmp_path: Path, tp: int, ep: int) -> None:
    """Two sequences of different length, chunked prefill and decode, shares and partial sums: back in place."""
    write_dumper(tmp_path / "d", Engine(model, SEQUENCES, tp, ep).values(STEPS), tp)
    alignment = align(read_dump(tmp_path / "d", config=truth.meta["config"]), truth)
    assert (len(alignment.keys), alignment.matched, alignment.tokens, alignment.extra) == (89, 12, 12, [])
    assert not alignment.problems
    assert worst(alignment) < tolerances.ENGINE_LIKE
    pair = alignment.pair("next_token_logits")  # of last tokens only, with a padded vocabulary
    assert pair.rows.tolist() == [[0, 3], [1, 2], [1, 3], [0, 5], [0, 6], [1, 4]]
    assert "8 padded columns" in pair.notes[0]
    assert alignment.pair("layers.0.mlp_output").dtype == torch.float64


def test_passes_are_shifted_back(model, truth: Trace, tmp_path: Path) -> None:
    write_passes(tmp_path / "d", Engine(model, SEQUENCES, 2).values(STEPS))
    alignment = align(read_dump(tmp_path / "d", config=truth.meta["config"]), truth)
    assert worst(alignment) < tolerances.ENGINE_LIKE
    assert alignment.pair("next_token_logits").rows.tolist() == [
        [0, 3],
        [1, 2],
        [1, 3],
        [0, 5],
    ]  # the last pass has none


def test_truth_in_steps_too(model, truth: Trace) -> None:
    """A chunked trace against a whole one, as dumps of each other."""
    from qwen35_moe import Cache

    ids = torch.tensor(SEQUENCES[:1])
    steps, whole = trace(model, ids, cache=Cache(), chunks=[4, 2, 1]), trace(model, ids)
    for dump, other in ((from_trace(steps), whole), (from_trace(whole), steps)):
        alignment = align(dump, other)
        alignment.keys = [k for k in alignment.keys if not k.endswith(("attn_qk", "attn_scores"))]  # of later keys too
        assert alignment.matched == 7 and worst(alignment) < tolerances.ENGINE_LIKE


def edited(values: Iterator[Value], edit: Callable[[Value], Value | None]) -> Iterator[Value]:
    return (new for v in values if (new := edit(v)) is not None)


def test_fused_shared_slot(model, truth: Trace, tmp_path: Path) -> None:
    """With the shared expert as slot E, mlp.experts returns the block's output, and ids and weights are one wider."""
    sums = {v.layer: v.x for v in Engine(model, SEQUENCES).values(ALL_AT_ONCE) if v.name.endswith("mlp.output")}

    def fuse(v: Value) -> Value | None:
        if "shared_expert" in v.name or v.name.endswith("mlp.output"):
            return None
        if v.name.endswith("mlp.experts.output"):
            v.x = sums[v.layer]
        for end, extra in (("topk.output.1", 8.0), ("topk.output.0", 0.5)):
            if v.name.endswith(end):
                v.x = torch.cat((v.x, torch.full_like(v.x[:, :1], extra)), 1)
                v.name = v.name.replace(f"topk.output.{end[-1]}", f"experts.inputs.1.{end[-1]}")
        return v

    write_dumper(tmp_path / "d", edited(Engine(model, SEQUENCES).values(ALL_AT_ONCE), fuse))
    dump = read_dump(tmp_path / "d", config=truth.meta["config"])
    alignment = align(dump, truth)
    assert "fused in 4 layers" in dump.notes[0]
    for name in ("mlp_output", "moe_topk_ids", "moe_topk_weights"):
        pair = alignment.pair(f"layers.1.{name}")
        torch.testing.assert_close(pair.engine, pair.truth, rtol=0, atol=1e-11)
    assert "layers.1.moe_routed_output" in alignment.missing
    assert (alignment.pair("layers.1.moe_shared_gate").engine == 0.5).all()


def test_declared_dims_decide(model, truth: Trace, tmp_path: Path) -> None:
    """Patched-in names with SGLang's dims: partial over one axis, replicated over the other."""
    rows = torch.cat([truth["layers.0.mlp_output"].unflatten(0, (2, 7))[b, :n] for b, n in ((0, 7), (1, 5))])
    values = [
        v for v in Engine(model, SEQUENCES).values(ALL_AT_ONCE) if v.layer is None and v.name != "next_token_logits"
    ]
    write_dumper(tmp_path / "d", iter(values), 4)
    for rank in range(4):
        tags = {"step": 0, "rank": rank, "dump_index": 99, "name": "mlp_output", "layer_id": 0}
        info = {"moe_ep_rank": rank // 2, "moe_ep_size": 2, "moe_tp_rank": rank % 2, "moe_tp_size": 2}
        meta = {
            **tags,
            "dims": "t d[moe_ep:partial] # moe_tp:replicated",
            "sglang_parallel_info": info,
            "world_size": 4,
        }
        part = rows * (0.25 if rank < 2 else 0.75)
        name = "___".join(f"{k}={v}" for k, v in tags.items())
        torch.save({"value": part, "meta": meta}, tmp_path / "d" / f"{name}.pt")
    pair = align(read_dump(tmp_path / "d"), truth).pair("layers.0.mlp_output")
    torch.testing.assert_close(pair.engine, pair.truth, rtol=0, atol=1e-12)


def test_more_ranks_than_key_value_heads() -> None:
    """With G = 2 heads on 4 ranks each head is held twice, and counts once."""
    sizes = {"n": 4, "g": 2, "h": 3}
    q, k, v = torch.randn(5, 24), torch.randn(5, 6), torch.randn(5, 6)
    ranks = [torch.cat((q.chunk(4, 1)[r], k.chunk(2, 1)[r // 2], v.chunk(2, 1)[r // 2]), 1) for r in range(4)]
    blocks = TapRule.parse(SGLANG_NAMES["qkv_proj.output"]).blocks
    for name, whole in (("attn_q_gate", q), ("attn_k_proj", k), ("attn_v", v)):
        assert torch.equal(join_ranks(f"layers.0.{name}", ranks, "cat", blocks, sizes), whole)


def test_names_are_known_taps() -> None:
    """Each rule ends in taps of the table; columns of the table and rules say the same."""
    for table in (SGLANG_NAMES, TRANSFORMERS_NAMES):
        for text in table.values():
            assert {name for name, _ in TapRule.parse(text).blocks if name != "-"} <= set(TAPS), text
    for name, tap in TAPS.items():
        for column, table in ((tap.sglang, SGLANG_NAMES), (tap.transformers, TRANSFORMERS_NAMES)):
            for path in (p.rstrip("*") for p in column.split(" | ") if "." in p):
                assert name in [n for n, _ in TapRule.parse(table[path]).blocks], (name, path)
    assert letters({"text_config": {"hidden_size": 64}}) == {"d": 64}


# Other formats.


def test_vllm_hidden_states_and_routing(truth: Trace, model, tmp_path: Path) -> None:
    single = trace(model, torch.tensor(SEQUENCES[:1]))
    states = torch.stack(
        [single[f"layers.{i}.layer_input"][0] for i in range(4)] + [single["layers.3.layer_output_sum"][0]], 1
    )
    (tmp_path / "h").mkdir()
    file = tmp_path / "h/request.safetensors"
    save_file({"hidden_states": states.to(torch.bfloat16), "token_ids": torch.tensor(SEQUENCES[0])}, file)
    dump = read_dump(tmp_path / "h", config=truth.meta["config"])
    alignment = align(dump, truth)  # one of the truth's two sequences
    assert alignment.matched == 7 and "5 of 12 tokens" in alignment.notes[0]
    assert sorted(alignment.keys) == [f"layers.{i}.layer_input" for i in range(4)] + ["layers.3.layer_output_sum"]
    assert worst(alignment) < 2**-8 and not list(holes(alignment))  # what layer 2 hands on is what layer 3 reads
    with pytest.raises(Qwen35Error, match="not known(.|\n)*give --layer-ids"):
        read_dump(file)
    assert len(read_dump(file, layers=[0, 1, 2, 3, 4])) == 5
    for strange in ([0, 1, 2, 3, 3], [0, 1, 2, 3, 5], [-1, 0, 1, 2, 3], [0, 1]):
        with pytest.raises(Qwen35Error, match="do not fit(.|\n)*5 different layer ids, 0 to 4"):
            read_dump(file, layers=strange, config=truth.meta["config"])
    save_file({"hidden_states": states[:, :1].clone(), "token_ids": torch.tensor(SEQUENCES[0])}, file)
    with pytest.raises(Qwen35Error, match="not known"):  # one layer need not be the first
        read_dump(tmp_path / "h", config=truth.meta["config"])

    ids = torch.stack([single[f"layers.{i}.moe_topk_ids"] for i in range(4)], 1).numpy().astype(np.uint8)
    np.save(tmp_path / "routed.npy", ids)
    buffer = io.BytesIO()
    np.save(buffer, ids)
    (tmp_path / "http.json").write_text(
        json.dumps({"choices": [{"routed_experts": base64.b64encode(buffer.getvalue()).decode()}]})
    )
    bare = base64.b64encode(ids.astype(np.int32).tobytes()).decode()
    answer = {"meta_info": {"routed_experts": bare, "routed_experts_shape": list(ids.shape)}}
    (tmp_path / "sglang.json").write_text(json.dumps(answer))
    for name in ("routed.npy", "http.json", "sglang.json"):
        alignment = align(read_dump(tmp_path / name), single)
        assert worst(alignment) == 0 and len(alignment.keys) == 4
    # SGLang says no shape; the last token of a request has no routing.
    bare = base64.b64encode(ids[:-1].astype(np.int32).tobytes()).decode()
    (tmp_path / "sglang.json").write_text(json.dumps({"meta_info": {"routed_experts": bare}}))
    alignment = align(read_dump(tmp_path / "sglang.json", config=truth.meta["config"]), single)
    assert worst(alignment) == 0 and (alignment.matched, alignment.tokens) == (6, 7)
    with pytest.raises(Qwen35Error, match="shape"):
        read_dump(tmp_path / "sglang.json")
    np.save(tmp_path / "routed.npy", ids * 0)
    with pytest.raises(Qwen35Error, match="all zero"):
        read_dump(tmp_path / "routed.npy")


def test_atom(model, tmp_path: Path) -> None:
    """No ids, several calls: the warm-up of another length is left out, the rest goes by number of tokens."""
    single = trace(model, torch.tensor(SEQUENCES[:1]))
    for name, tap, kind in (("Qwen3_5DecoderLayer", "mlp_output", 0), ("Qwen3_5GatedDeltaNet", "attn_output", 0)):
        rows = single[f"layers.0.{tap}"].reshape(7, 64)
        for call, x in enumerate((torch.randn(64, 64), rows[:6], rows[6:])):
            torch.save(
                {"hidden": x, "shape": tuple(x.shape)}, tmp_path / f"layer00_{name}_rank{kind}_call{call:03d}.pt"
            )
    torch.save(
        {"_tp_rank": 0, "_layer": 0, "model.layers.0.norm.weight": torch.ones(3)}, tmp_path / "weight_rank0_layer0.pt"
    )
    dump = read_dump(tmp_path)
    alignment = align(dump, single)
    assert worst(alignment) == 0 and alignment.keys == ["layers.0.attn_output", "layers.0.mlp_output"]
    assert "1 other steps were left out" in alignment.notes[-1] and list(dump.weights) == [
        "model.layers.0.norm.weight@0"
    ]
    for file in tmp_path.glob("*call00[12].pt"):
        file.unlink()
    with pytest.raises(Qwen35Error, match="do not fit(.|\n)*warm-up"):
        align(read_dump(tmp_path), single)


def test_llama_cpp_logits(model, tmp_path: Path) -> None:
    single = trace(model, torch.tensor(SEQUENCES[:1]))
    last = single["next_token_logits"][0, -1].to(torch.float32).numpy()
    last.tofile(tmp_path / "llamacpp-tiny.bin")
    (pair,) = align(read_dump(tmp_path), single)  # without ids: the last token
    assert pair.rows.tolist() == [[0, 6]]
    np.array(SEQUENCES[0], np.int32).tofile(tmp_path / "llamacpp-tiny-tokens.bin")
    alignment = align(read_dump(tmp_path), single)
    assert worst(alignment) < 1e-6 and alignment.pair("next_token_logits").rows.tolist() == [[0, 6]]
    last[:-1].tofile(tmp_path / "llamacpp-tiny.bin")
    (tmp_path / "llamacpp-tiny.bin").write_bytes(last.tobytes()[:-2])
    with pytest.raises(Qwen35Error, match="truncated"):
        read_dump(tmp_path)


def test_llama_cpp_wrote_a_base_file() -> None:
    dump = read_dump(Path(__file__).parent / "data/dumps/llama_cpp.kld")
    model = q.load(Path(__file__).parent / "data/fixtures/bf16-hub", "exact", text_only=True)
    for step in (0, 1):
        truth = model(dump.tokens[step].ids[None]).log_softmax(-1)[0, 16:31]
        kept = truth > truth.amax(-1, keepdim=True) - 15.9  # what is less likely by 16 was clipped
        assert kept.double().mean() > 0.95
        read = dump.read("next_token_logprobs", step).double()
        torch.testing.assert_close(read[kept], truth[kept], rtol=0, atol=tolerances.LLAMA_KL_BASE)


def test_plain_files_with_a_name_map(truth: Trace, tmp_path: Path) -> None:
    x = truth["layers.2.mlp_output"].reshape(2, 7, 64)
    arrays = {"blk.2.ffn_out": x.numpy(), "tokens": truth.ids.numpy()}
    np.savez(tmp_path / "a.npz", **arrays)
    names = {r"blk\.(\d+)\.ffn_out": r"layers.\1.mlp_output", "tokens": "input_ids"}
    (tmp_path / "names.json").write_text(json.dumps(names))
    with_map, in_words = read_dump(tmp_path), read_dump(tmp_path / "a.npz", name_map=names)
    assert list(with_map) == list(in_words) == ["layers.2.mlp_output"]
    assert torch.equal(with_map["layers.2.mlp_output"], x.flatten(0, 1))
    save_file({"layers.2.mlp_output": x.to(torch.float32)}, tmp_path / "b.safetensors")
    assert list(read_dump(tmp_path / "b.safetensors")) == ["layers.2.mlp_output"]  # names that are keys need no map
    np.save(tmp_path / "final_norm.npy", x.numpy())
    assert list(read_dump(tmp_path / "final_norm.npy")) == ["final_norm"]
    with pytest.raises(Qwen35Error, match="no(.|\n)*known name(.|\n)*ffn_out(.|\n)*name map"):
        read_dump(tmp_path / "a.npz", name_map={"x": "y"})


@pytest.mark.parametrize(("names", "what"), [
    ({r"blk\.(\d)": r"layers.\7.mlp_output"}, "bad pattern"), ({1: "x"}, "not a map"), ({"x": None}, "not a map"),
    ({"(": "x"}, "bad pattern"), (dict.fromkeys(map(str, range(9000)), "x"), "too long")])  # fmt: skip
def test_a_name_map_in_words_is_checked_as_one_in_a_file(names: Any, what: str, tmp_path: Path) -> None:
    save_file({"blk.1": torch.ones(2, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(Qwen35Error, match=what):
        read_dump(tmp_path / "a.safetensors", name_map=names)


def test_a_name_map_gives_no_two_tensors_one_key(tmp_path: Path) -> None:
    """One of them would never be compared."""
    save_file({"blk.1": torch.ones(2, 3), "blk.2": torch.ones(2, 3)}, tmp_path / "a.safetensors")
    dump = read_dump(tmp_path / "a.safetensors", name_map={r"blk\.\d": "layers.0.mlp_output"})
    assert [error.what for error in dump.problems] == ["the name map gives two tensors one key"]


# What can be wrong: one clear message each, and the rest goes on.


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_truncated_foreign_and_code(model, truth: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_dumper(tmp_path / "d", Engine(model, SEQUENCES).values(ALL_AT_ONCE))
    cut, code, foreign = (
        next((tmp_path / "d").glob(f"*layers.0.{n}.output_*")) for n in ("mlp.gate", "mlp", "mlp.experts")
    )
    cut.write_bytes(cut.read_bytes()[:700])
    with code.open("wb") as file:
        pickle.dump({"value": Evil()}, file)
    foreign.write_bytes(b"GIF89a" * 20)
    dump = read_dump(tmp_path / "d", config=truth.meta["config"])
    messages = sorted(str(p) for p in dump.problems)
    assert len(messages) == 3 and not (tmp_path / "executed").exists()
    assert "was not executed" in messages[2] and code.name in messages[2]
    assert all("truncated or not a torch file" in m for m in messages[:2]), messages
    alignment = align(dump, truth)
    assert len(alignment.keys) == 86 and worst(alignment) < tolerances.ENGINE_LIKE
    assert {"layers.0.moe_router_logits", "layers.0.mlp_output"} <= set(alignment.missing)


def test_other_tokens_and_warm_up(model, truth: Trace, tmp_path: Path) -> None:
    other = [[1, 2, 3]]
    write_dumper(tmp_path / "other", Engine(model, other).values([[(0, 0, 3)]]))
    with pytest.raises(Qwen35Error, match=r"other tokens(.|\n)*\[5, 9, 200(.|\n)*\[1, 2, 3\]"):
        align(read_dump(tmp_path / "other"), truth)
    write_dumper(tmp_path / "warm", Engine(model, [[0] * 6]).values([[(0, 0, 5)], [(0, 5, 6)]]))
    with pytest.raises(Qwen35Error, match="only warm-up"):
        read_dump(tmp_path / "warm")
    # Warm-up, then another request, then the real one.
    engine = Engine(model, [[0] * 6, [1, 2, 3], *SEQUENCES])
    write_dumper(tmp_path / "d", engine.values([[(0, 0, 6)], [(1, 0, 3), (2, 0, 7)], [(3, 0, 5)]]))
    dump = read_dump(tmp_path / "d", config=truth.meta["config"])
    alignment = align(dump, truth)
    assert alignment.matched == 12 and worst(alignment) < tolerances.ENGINE_LIKE
    assert alignment.notes == [
        "warm-up left out: steps 0",
        "1 runs of other tokens left out (warm-up or other requests)",
    ]


def test_graph_capture(model, tmp_path: Path) -> None:
    decode = [[(0, 0, 4)], [(0, 4, 5)], [(0, 5, 6)]]
    stuck = list(Engine(model, SEQUENCES).values(decode))
    held = {v.name: v.x for v in stuck if v.step == 1}
    for v in stuck:
        if v.step == 2 and v.name.startswith("non_intrusive"):
            v.x = held[v.name]
    write_dumper(tmp_path / "d", iter(stuck))
    assert "identical" in str(read_dump(tmp_path / "d").problems[0])
    write_dumper(tmp_path / "clean", Engine(model, SEQUENCES).values(decode))
    assert read_dump(tmp_path / "clean").problems == []


def test_missing_rank_nan_and_shape(model, truth: Trace, tmp_path: Path) -> None:
    write_dumper(tmp_path / "d", (v for v in Engine(model, SEQUENCES, 2).values(ALL_AT_ONCE) if v.rank == 0), 2)
    alignment = align(read_dump(tmp_path / "d", config=truth.meta["config"]), truth)
    problems = {pair.problem for pair in alignment if pair.problem}
    assert len(problems) == 1 and "layers.0.mlp_output" not in str(problems)  # one line of the report
    for said in ("rank 1 is missing", "found: rank 0 of 2", "step=*___rank=1___*.pt"):
        assert said in alignment.pair("layers.0.mlp_output").problem
    assert not alignment.pair("layers.0.moe_router_logits").problem  # replicated: one rank will do

    def spoil(v: Value) -> Value:
        if v.name.endswith("layers.0.mlp.output"):
            v.x[3, 5] = torch.nan
        if v.name.endswith("layers.1.mlp.output"):
            v.x = v.x[:, :-1]
        if v.name.endswith("layers.2.mlp.output"):
            v.x = v.x[:-1]
        return v

    write_dumper(tmp_path / "e", edited(Engine(model, SEQUENCES).values(ALL_AT_ONCE), spoil))
    alignment = align(read_dump(tmp_path / "e", config=truth.meta["config"]), truth)
    assert alignment.pair("layers.0.mlp_output").nan == 1 and not alignment.pair("layers.0.mlp_output").problem
    assert "63 features for 64" in alignment.pair("layers.1.mlp_output").problem
    assert "11 rows for 12 tokens" in alignment.pair("layers.2.mlp_output").problem
    assert sum(1 for pair in alignment if pair.problem) == 2


def test_one_rank_of_two_that_does_not_say_so(model, truth: Trace, tmp_path: Path) -> None:
    """By its shares of fused columns: a partial sum alone would look like a wrong one."""
    write_dumper(tmp_path / "d", (v for v in Engine(model, SEQUENCES, 2).values(ALL_AT_ONCE) if v.rank == 1), 1)
    alignment = align(read_dump(tmp_path / "d", config=truth.meta["config"]), truth)
    assert "found: rank 1 of 2" in alignment.pair("layers.0.attn_output").problem
    assert alignment.matched == 12 and not alignment.pair("layers.0.moe_router_logits").problem


@pytest.mark.parametrize("spoiled", [lambda x: x[:, :3], lambda x: (x * 100).to(torch.int8)])
def test_tensors_of_a_rank_that_cannot_be_values(model, truth: Trace, tmp_path: Path, spoiled: object) -> None:
    values = list(Engine(model, SEQUENCES, 2).values(ALL_AT_ONCE))
    value = next(v for v in values if v.name.endswith("layers.1.mlp.gate.output"))
    value.x = spoiled(value.x)  # type: ignore[operator]
    write_dumper(tmp_path / "d", iter(values), 2)
    alignment = align(read_dump(tmp_path / "d", config=truth.meta["config"]), truth)
    assert [p.key for p in alignment if p.problem] == ["layers.1.moe_router_logits"]


def test_other_objects_in_files(tmp_path: Path) -> None:
    torch.save([1], tmp_path / "layer00_FusedMoE_rank0.pt")
    with pytest.raises(Qwen35Error, match=r"something else(.|\n)*hidden(.|\n)*list"):
        read_dump(tmp_path)
    (tmp_path / "p").mkdir()
    torch.save([1], tmp_path / "p/Pass00000.pt")
    with pytest.raises(Qwen35Error, match=r"not a pass(.|\n)*list"):
        read_dump(tmp_path / "p")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(Qwen35Error, match="cannot be read"):
        read_dump(tmp_path / "cut.npz")


def test_lost_ids_are_the_message(model, tmp_path: Path) -> None:
    write_dumper(tmp_path / "d", Engine(model, SEQUENCES).values(ALL_AT_ONCE))
    next((tmp_path / "d").glob("*name=input_ids*")).write_bytes(b"")
    with pytest.raises(Qwen35Error, match=r"truncated(.|\n)*name=input_ids"):
        read_dump(tmp_path / "d")


def test_fused_without_sizes(model, truth: Trace, tmp_path: Path) -> None:
    write_dumper(tmp_path / "d", Engine(model, SEQUENCES).values(ALL_AT_ONCE))
    alignment = align(read_dump(tmp_path / "d"), truth)
    assert "config.json" in alignment.pair("layers.0.gdn_z").problem
    wrong = {**truth.meta["config"], "linear_num_value_heads": 8}
    alignment = align(read_dump(tmp_path / "d", config=wrong), truth)
    assert "do not add up" in alignment.pair("layers.0.gdn_z").problem


def test_ranks_that_differ(tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    with pytest.raises(Qwen35Error, match="replicated ranks differ"):
        join_ranks("layers.0.moe_router_logits", [x, x + 1e-3], "same", (("moe_router_logits", ""),), {"e": 8})


def test_unknown_paths(tmp_path: Path) -> None:
    with pytest.raises(Qwen35Error, match="no such dump"):
        read_dump(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(Qwen35Error, match="no known format(.|\n)*a.txt(.|\n)*dump-config"):
            read_dump(path)
    for name in ("one", "two"):
        write_dumper(tmp_path / "d" / name, iter([Value("moe_router_logits", torch.ones(2, 3), 0, 0, 1)]))
    with pytest.raises(Qwen35Error, match="several dumps"):
        read_dump(tmp_path / "d")
    assert list(read_dump(tmp_path / "d" / "one")) == ["layers.1.moe_router_logits"]
    (tmp_path / "x.npy").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(Qwen35Error, match="cannot be read|no(.|\n)*known name"):
        _ = Dump.__getitem__(read_dump(tmp_path / "x.npy"), "x")
    (tmp_path / "k.kld").write_bytes(b"_logits_" + b"\x08\0\0\0" * 3)
    with pytest.raises(Qwen35Error, match="truncated"):
        read_dump(tmp_path / "k.kld")
    (tmp_path / "Foo_debug_tree_FULL_TENSORS.json").write_text(
        '{"module_path": "Foo", "outputs": {"shape": "x", "dtype": "y", "value": ["tensor("]}}'
    )
    with pytest.raises(Qwen35Error, match="printed text(.|\n)*use_repr=False"):
        read_dump(tmp_path / "Foo_debug_tree_FULL_TENSORS.json")


def test_atoms_newer_names_and_files_that_nobody_understands(model, tmp_path: Path) -> None:
    single = trace(model, torch.tensor(SEQUENCES[:1]))
    rows = single["layers.0.mlp_output"].reshape(7, 64)
    for context, x in ((0, rows[:6]), (6, rows[6:])):
        name = f"layer00_Qwen3_5DecoderLayer_rank0_ctx{context:05d}_fp9f3a0c1d_bs1.pt"
        torch.save({"hidden": x, "shape": tuple(x.shape), "input": None}, tmp_path / name)
    for name in ("moe_prefill_0_rank0.pt", "notes.txt", "extra.npy"):
        (tmp_path / name).write_bytes(b"?")
    dump = read_dump(tmp_path)
    assert torch.equal(dump["layers.0.mlp_output"], rows) and dump.steps == [0, 1]
    assert dump.notes[-1] == "2 files were not understood, and left out: extra.npy, moe_prefill_0_rank0.pt"


def test_plain_tensors_with_modules_of_transformers(tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    name = "model.language_model.layers.0.linear_attn.in_proj_qkv.output"
    save_file({"lm_head.output": x}, tmp_path / "a.safetensors")
    assert list(read_dump(tmp_path / "a.safetensors")) == ["next_token_logits"]
    save_file({"lm_head.output": x, name: x + 1, "model.layers.0.mlp.gate.output.0": x - 1}, tmp_path / "a.safetensors")
    dump = read_dump(tmp_path / "a.safetensors")
    assert not dump.unknown and torch.equal(dump["layers.0.gdn_qkv"], x + 1)
    modules = {name.removesuffix(".output"): x + 1, "lm_head": x, "model.layers.3.self_attn.o_proj": x - 1}
    save_file({**modules, "model.layers.3.act_fn": x * 2}, tmp_path / "a.safetensors")
    dump = read_dump(tmp_path / "a.safetensors")  # a module's name alone is what it returns
    assert set(dump) == {"layers.0.gdn_qkv", "next_token_logits", "layers.3.attn_output"}
    assert dump.unknown == ["model.layers.3.act_fn"]


def test_sglang_files_are_unpickled_once(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dumper(tmp_path / "d", Engine(model, SEQUENCES).values(ALL_AT_ONCE))
    opened: Counter[str] = Counter()
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda path, **how: opened.update([Path(path).name]) or load(path, **how))
    dump = read_dump(tmp_path / "d")
    assert all(dump[key].numel() for key in ("layers.0.mlp_output", "layers.3.attn_output"))
    assert len(opened) > 50 and set(opened.values()) == {1}
