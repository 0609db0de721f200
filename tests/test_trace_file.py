"""Traces: what is recorded, how it lies on disk, what a broken one says."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_like import padded_truth, tiny_model

from qwen35_moe import Cache, Qwen35Error
from qwen35_moe.cli.main import main
from qwen35_moe.numerics.tap_keys import base_name, check_patterns, dims_of
from qwen35_moe.numerics.tap_table import TAPS
from qwen35_moe.numerics.taps import Site, scope, tap
from qwen35_moe.oracle.judge.envelope_file import write_envelope
from qwen35_moe.run.load import load
from qwen35_moe.trace import writer as writer_module
from qwen35_moe.trace.file import Trace
from qwen35_moe.trace.head import Entry
from qwen35_moe.trace.recorder import record, trace
from qwen35_moe.trace.writer import TraceWriter

SEQUENCES = [[5, 9, 200, 7, 31, 8, 77], [5, 9, 4, 250, 3]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_every_tap_of_the_model_is_in_the_table_with_its_dims(model) -> None:
    """The table is what readers and users go by; a tap that it does not hold cannot be aligned."""
    found = trace(model, torch.tensor(SEQUENCES[:1]), experts=True)
    unknown = {base_name(key) for key in found} - set(TAPS)
    assert {name for name in unknown if not name.endswith(".gain")} == set()
    for key, site in found.sites.items():
        assert len(site.dims.split()) == found[key].dim(), key


def test_disk_and_memory_hold_the_same(model, tmp_path: Path) -> None:
    memory = padded_truth(model, SEQUENCES)
    disk = padded_truth(model, SEQUENCES, out=tmp_path / "t")
    assert list(memory) == list(disk) and memory.meta == disk.meta
    assert all(torch.equal(memory[key], disk[key]) for key in memory)
    with TraceWriter(tmp_path / "again", memory.meta) as writer:
        for key, entry in memory.sites.items():
            writer.add(entry, memory[key])
    again = Trace.open(tmp_path / "again")
    assert again.sites == disk.sites
    assert again.ids.tolist()[0] == SEQUENCES[0] and again.mask[1].tolist() == [1, 1, 1, 1, 1, 0, 0]
    assert disk.meta["arithmetic"] == "exact" and disk.meta["config"]["num_experts"] == 8


def test_a_large_layer_is_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that memory holds a chunk, and not all values of single experts of a layer."""
    monkeypatch.setattr(writer_module, "CHUNK_BYTES", 1000)
    with TraceWriter(tmp_path / "t") as writer:
        for i in range(10):
            x = torch.full((100,), float(i))  # 400 bytes
            writer.add(Entry.of(Site(f"x{i}", layer=0), x, "t"), x)
    found = Trace.open(tmp_path / "t")
    assert [entry.file[4] for entry in found.sites.values()] == list("0001112223")
    assert all(found[f"layers.0.x{i}"].eq(i).all() for i in range(10))


def test_a_padded_batch_in_pieces(model) -> None:
    ids = torch.tensor([[0, 0, 5, 9, 7, 31], [1, 2, 3, 4, 5, 6]])
    mask = (ids > 0).long()
    whole = trace(model, ids, attention_mask=mask)
    pieces = trace(model, ids, attention_mask=mask, cache=Cache(), chunks=[3, 2, 1])
    assert torch.equal(pieces.positions[mask > 0], whole.positions[mask > 0]) and torch.equal(pieces.mask, mask)
    last = pieces["step.2.next_token_logits"][:, 0]
    assert torch.allclose(last, whole["next_token_logits"][:, -1], rtol=0, atol=1e-9)


def test_positions_go_on_after_padding(model) -> None:
    cache, mask = Cache(), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    model(torch.tensor([[0, 0, 5, 9], [1, 2, 3, 4]]), attention_mask=mask, cache=cache)
    found = trace(model, torch.tensor([[7, 8], [7, 8]]), taps="rope_cos", cache=cache)
    assert found.positions.tolist() == [[2, 3], [4, 5]] and found.mask.tolist() == [[1, 1], [1, 1]]
    first = trace(model, torch.tensor([[1] * 6]), taps="rope_cos")["rope_cos"][0]
    assert torch.equal(found["rope_cos"], first[found.positions])


def test_format_is_readable_without_this_package(model, tmp_path: Path) -> None:
    """As a program in another language would: JSON, then the safetensors header by hand."""
    truth = trace(model, torch.tensor(SEQUENCES[:1]), taps="moe_router_logits", out=tmp_path / "t")
    head = json.loads((tmp_path / "t/trace.json").read_text())
    assert (head["format"], head["version"], head["meta"]["steps"][0]["ids"]) == ("qwen35-moe-trace", 1, SEQUENCES[:1])
    record = head["tensors"][2]
    assert (record["key"], record["dims"], record["dtype"]) == ("layers.2.moe_router_logits", "t e", "float64")
    raw = (tmp_path / "t" / record["file"]).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    begin, end = json.loads(raw[8 : 8 + size])[record["key"]]["data_offsets"]
    values = torch.frombuffer(bytearray(raw[8 + size + begin : 8 + size + end]), dtype=torch.float64)
    assert torch.equal(values.reshape(record["shape"]), truth[record["key"]])


def test_steps_of_a_cached_run(model) -> None:
    whole = trace(model, torch.tensor(SEQUENCES[:1]), taps="next_token_logits")
    steps = trace(model, torch.tensor(SEQUENCES[:1]), taps="next_token_logits", cache=Cache(), chunks=[4, 2, 1])
    assert list(steps) == ["next_token_logits", "step.1.next_token_logits", "step.2.next_token_logits"]
    assert steps.positions.tolist() == whole.positions.tolist() and steps.ids.tolist() == whole.ids.tolist()
    torch.testing.assert_close(torch.cat(list(steps.values()), 1), whole["next_token_logits"], rtol=0, atol=1e-11)


def test_memory_stays_flat_and_one_layer_is_one_file(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t") as writer:
        for layer in range(4):
            for name in ("layer_input", "mlp_output"):
                x = torch.randn(1, 3, 4)
                writer.add(Entry.of(Site(name, layer), x, "b t d"), x)
    names = [f"{i:05d}.safetensors" for i in range(4)]
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == [*names, "trace.json"]


def test_interrupted_run(model, tmp_path: Path) -> None:
    """A kill leaves no trace.json: the directory says so, and what was written can still be read."""
    with pytest.raises(KeyboardInterrupt), record("layer_input", out=tmp_path / "t"):
        for layer in range(3):
            with scope(layer=layer):
                tap("layer_input", torch.ones(1, 2, 4))
        raise KeyboardInterrupt
    with pytest.raises(Qwen35Error, match="unfinished(.|\n)*2 files"):
        Trace.open(tmp_path / "t")
    assert list(Trace.open(tmp_path / "t", partial=True)) == ["layers.0.layer_input", "layers.1.layer_input"]
    # A new run into the same place replaces it.
    trace(model, torch.tensor(SEQUENCES[:1]), taps="final_norm", out=tmp_path / "t")
    assert list(Trace.open(tmp_path / "t")) == ["final_norm"]


def test_bad_traces(model, tmp_path: Path) -> None:
    with pytest.raises(Qwen35Error, match="no trace here"):
        Trace.open(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(Qwen35Error, match="not a trace(.|\n)*notes.txt"):
        TraceWriter(tmp_path)
    truth = trace(model, torch.tensor(SEQUENCES[:1]), taps="layer_input", out=tmp_path / "t")
    victim = tmp_path / "t/00001.safetensors"
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(Qwen35Error, match="cannot read(.|\n)*00001"):
        truth["layers.1.layer_input"]
    victim.unlink()
    with pytest.raises(Qwen35Error, match="lost files(.|\n)*00001"):
        Trace.open(tmp_path / "t")
    (tmp_path / "t/trace.json").write_text('{"format": "qwen35-moe-trace", "version": 2}')
    with pytest.raises(Qwen35Error, match="another format(.|\n)*qwen35-moe-trace 2"):
        Trace.open(tmp_path / "t")


def test_a_path_that_is_not_utf8(model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strange = tmp_path / os.fsdecode(b"w\xff")
    with pytest.raises(Qwen35Error, match="not UTF-8(.|\n)*rename"):
        trace(model, torch.tensor([[1, 2]]), out=strange)
    strange.mkdir()
    with pytest.raises(Qwen35Error, match="not UTF-8"):
        Trace.open(strange)
    np.savez(strange / "a.npz", **{"layers.0.mlp_output": np.zeros((2, 64))})
    written = trace(model, torch.tensor([[1, 2]]), out=tmp_path / "truth")
    write_envelope(written, [model])
    page = strange / "x.html"
    assert main(["compare", str(tmp_path / "truth"), str(strange), "--html", str(page)]) == 1
    assert "udcff" in capsys.readouterr().out and page.is_file()


def test_names(model) -> None:
    with pytest.raises(Qwen35Error, match="unknown tap name(.|\n)*moe_router_logits"):
        trace(model, torch.tensor(SEQUENCES[:1]), taps="moe_router_logit")
    check_patterns(("layers.3.*", "gdn_*", "*.gain", "layers.0.moe_expert_7_down", "mtp.*"))
    with pytest.raises(Qwen35Error, match="wrong rank"):
        dims_of("layer_input", 2)
    ids = torch.tensor(SEQUENCES[:1])
    assert not any("moe_expert" in key for key in trace(model, ids))
    assert "layers.0.moe_expert_2_down" in trace(model, ids, taps="moe_expert_down")
    with pytest.raises(Qwen35Error, match="twice"), record("layer_input"):
        tap("layer_input", torch.ones(1, 2, 4))
        tap("layer_input", torch.ones(1, 2, 4))


def test_recorded_values_are_copies() -> None:
    x = torch.zeros(1, 2, 4)
    with record("layer_input") as recorder:
        tap("layer_input", x)
        x += 1
    assert not recorder.trace["layer_input"].any()


@pytest.mark.parametrize("pattern", ["moe_a2", "moe_expert_weighted", "moe_partial_sum", "layers.0.moe_expert_*"])
def test_taps_inside_of_experts_can_be_named(built, pattern: str) -> None:
    model = load(built("tiny-mxfp4"), mode="stream", text_only=True)
    found, everything = trace(model, torch.tensor([[1, 2, 3]]), taps=pattern), trace(model, torch.tensor([[1, 2, 3]]))
    assert found and all("experts" in key or "moe_" in key for key in found)
    assert not found.keys() & everything.keys()
    assert all(found.sites[key].dims.split()[0] in ("r", "t") for key in found)
