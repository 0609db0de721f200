"""Reading ahead for a GPU, here on a CPU: where bytes go, every layout of experts, and what breaks."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qwen35_moe as q
from qwen35_moe.checkpoint.reader import Reader, Rows
from qwen35_moe.model.moe import MoE
from qwen35_moe.oracle.diagnose.catalogue import FAULTS
from qwen35_moe.oracle.diagnose.faults import FaultSite, SlotChange
from qwen35_moe.run.gpu import passing, prefetch
from qwen35_moe.run.gpu.passing import PassingExperts
from qwen35_moe.run.gpu.prefetch import Fetch, Layout
from qwen35_moe.run.origin import origin_of
from qwen35_moe.run.source import WeightSource
from qwen35_moe.run.streamed import StreamedHead, StreamedLayers

Build = Callable[[str], Path]
RECIPES = sorted(p.stem for p in (Path(__file__).parents[1] / "weights" / "recipes").glob("tiny*.toml"))
CPU, CHUNK = torch.device("cpu"), 3000


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads with small buffers, so that all is cut."""
    monkeypatch.setattr(prefetch, "READER_THREADS", 2)
    monkeypatch.setattr(prefetch, "READ_AT_ONCE", CHUNK)
    prefetch.readers.cache_clear()
    yield
    prefetch.readers(CPU).pool.shutdown()
    prefetch.readers.cache_clear()


def source(path: Path, online: bool = False) -> WeightSource:
    model = q.load(path, mode="stream", text_only=True, shared_expert="fused-online" if online else "unfused")
    return origin_of(model).source


def passing_experts(found: WeightSource, mlp: str, count: int) -> PassingExperts:
    read, stored = partial(found.slot, mlp), partial(found.stored, mlp)
    return PassingExperts(count, 0, read, torch.float32, False, CPU, stored=stored)


def streamed(path: Path, table: str = "float32") -> q.Model:
    """A model that reads ahead."""
    model = q.load(path, table, mode="stream", text_only=True)
    assert isinstance(model.layers, StreamedLayers) and isinstance(model.lm_head, StreamedHead)
    model.layers.ahead = model.lm_head.ahead = True
    return model


@pytest.mark.parametrize("recipe", RECIPES)
def test_experts_of_every_layout(built: Build, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passing, "BATCH_BYTES", 100_000)  # some experts
    monkeypatch.setattr(passing, "FEW_EXPERTS", 2)
    found = source(built(recipe), online=recipe == "tiny-moe-mxfp4")
    E = found.config.num_experts
    experts = passing_experts(found, "layers.0.mlp", E + 1)
    for begun in (False, True):
        for hit in ([0], [1, 2, E - 1], list(range(E)), list(range(E + 1))):
            if begun:
                experts.begin()
            had = {}
            for some, *stacks in experts.batches(hit):
                had |= {e: [stack[i] for stack in stacks] for i, e in enumerate(some)}
            assert list(had) == (list(range(E + 1)) if 8 * len(hit) > 7 * (E + 1) else hit)
            for e, ours in had.items():
                for ours_x, theirs in zip(ours, experts.at(e), strict=True):
                    assert torch.equal(ours_x, theirs), e


@pytest.mark.parametrize("recipe", ["tiny", "tiny-fp8", "tiny-mxfp4"])
def test_experts_that_stay_are_read_once_for_all_dtypes(
    built: Build, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = source(built(recipe))
    E = found.config.num_experts
    wide, narrow, alone = (passing_experts(found, "layers.0.mlp", E) for _ in range(3))
    narrow.dtype = torch.bfloat16
    for experts in (wide, narrow):
        experts.stay_with(wide)
    monkeypatch.setattr(passing, "Fetch", None)  # no more is read
    for experts in (wide, narrow, narrow):
        had = {e: stacks[1][i] for some, *stacks in experts.batches([0]) for i, e in enumerate(some)}
        alone.dtype = experts.dtype
        assert list(had) == list(range(E)) and all(torch.equal(had[e], alone.at(e)[1]) for e in range(E))


@pytest.mark.parametrize("recipe", ["tiny", "tiny-fp8", "tiny-mxfp4", "tiny-gpt-oss"])
def test_what_stays_is_decoded_as_a_fault_changes_it(
    built: Build, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of stacks of packed weights is the change of each of them."""
    monkeypatch.setattr(passing, "BATCH_BYTES", 100_000)
    found, mlp = source(built(recipe)), "layers.0.mlp"
    experts = passing_experts(found, mlp, found.config.num_experts)
    experts.stay_with(experts)
    everywhere, changed = FaultSite(found.config, torch.zeros(1, 1)), 0
    for fault in (f for f in FAULTS if isinstance(f.slot, SlotChange) and not (f.single or f.slot.shift)):
        if fault.applies(found, 0, a4=False):
            broken, decoded = fault.source(found, everywhere), experts.resident(torch.float64, False, fault.slot.on)
            changed += 1
            for e in range(found.config.num_experts):
                for ours, theirs in zip(decoded.at(e), broken.slot(mlp, e), strict=True):
                    assert torch.equal(ours, theirs.decode(torch.float64)), (fault.name, e)
    assert changed == {"tiny": 0, "tiny-fp8": 3, "tiny-mxfp4": 6, "tiny-gpt-oss": 6}[recipe]


@pytest.mark.parametrize("recipe", ["tiny", "tiny-fp8", "tiny-mxfp4"])
def test_layers_and_head(built: Build, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("qwen35_moe.run.streamed"), "HEAD_ROWS", 100)
    ids = torch.arange(60)[None]
    plain = q.load(built(recipe), "float32", mode="stream", text_only=True)
    model = streamed(built(recipe))
    for _ in range(2):
        assert torch.equal(model(ids), plain(ids))
    assert origin_of(model).checkpoint.used == origin_of(plain).checkpoint.used
    assert origin_of(model).checkpoint.reader.bytes_read > 0 and len(model.layers.dense) == len(model.layers)
    empty = model.layers.empty[0]
    assert all(not p.is_meta for p in model.layers[0].parameters()) and all(p.is_meta for p in empty.parameters())


def test_a_layer_is_gone_when_nobody_holds_it(built: Build) -> None:
    """At once: weights that wait for the garbage collector take the memory of a GPU."""
    model = streamed(built("tiny-mxfp4"))
    gc.disable()
    try:
        assert not any(ref() for ref in [weakref.ref(layer) for layer in model.layers])
    finally:
        gc.enable()


def test_what_adjoins_is_read_at_once(built: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk by chunk, each byte once, whatever the tensors are that it belongs to."""
    checkpoint, reads = source(built("tiny")).checkpoint, []
    read = Reader.read
    monkeypatch.setattr(
        Reader, "read", lambda self, stored, at, into: reads.append(into.nbytes) or read(self, stored, at, into)
    )
    stored = checkpoint.stored("lm_head.weight")
    halves = Layout(checkpoint.reader, [[Rows.of(stored).part(i, 2)] for i in range(2)])
    both = Fetch(halves, CPU).result()[0]
    assert torch.equal(both.flatten(0, 1), checkpoint.tensors and Rows.of(stored).read(checkpoint.reader))
    assert sum(reads[:-1]) == stored.nbytes and len(reads[:-1]) == -(-stored.nbytes // CHUNK)


def cut(file: Path, at: int) -> None:
    with open(file, "r+b") as handle:
        handle.truncate(at)


def poison(file: Path, at: int) -> None:
    with open(file, "r+b") as handle:
        handle.seek(at)
        handle.write(b"\xff")


@pytest.mark.parametrize(("change", "says"), [(cut, "the file ends"), (poison, "1 such scales")])
def test_what_cannot_be_read_is_an_error_and_the_next_can(
    built: Build, tmp_path: Path, change: Callable[[Path, int], None], says: str
) -> None:
    shutil.copytree(built("tiny-mxfp4"), tmp_path / "broken")
    found = source(tmp_path / "broken")
    stored = found.checkpoint.stored("layers.3.mlp.experts.2.down_proj.weight_scale")
    change(stored.file, stored.end - 1)  # after it was opened
    for _ in range(2):
        with pytest.raises(q.errors.Qwen35Error, match=says):
            list(passing_experts(found, "layers.3.mlp", 8).batches(range(8)))
    assert len(list(passing_experts(source(built("tiny-mxfp4")), "layers.3.mlp", 8).batches(range(8)))) == 1


@pytest.fixture
def grouped_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are read ahead and multiplied in groups, as on a GPU."""

    def fill_experts(module: nn.Module, prefix: str, found: WeightSource, *_: Any) -> None:
        for path, block in module.named_modules(prefix=prefix):
            if isinstance(block, MoE):
                block.experts = passing_experts(found, path, found.config.num_experts)

    monkeypatch.setattr(import_module("qwen35_moe.run.streamed"), "fill_experts", fill_experts)
    monkeypatch.setattr(PassingExperts, "combine", PassingExperts.combine_grouped)


def test_experts_of_the_next_layer_are_read_ahead_if_nearly_all_are_hit(
    built: Build, grouped_experts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streamed(built("tiny-mxfp4"))
    begun, begin = [], PassingExperts.begin
    monkeypatch.setattr(PassingExperts, "begin", lambda self: begun.append(bool(self.coming)) or begin(self))
    long, short = torch.arange(120)[None], torch.tensor([[7]])
    plain = q.load(built("tiny-mxfp4"), "float32", mode="stream", text_only=True)
    for ids in (long, short, long, short, short):
        begun.clear()
        assert torch.equal(model(ids), plain(ids))
    assert not begun  # the pass before was short, and so is this one
    model(long)
    begun.clear()
    model(long)
    assert begun.count(True) >= len(model.layers)  # when the router has chosen, they are there already


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("listed", [False, True])
def test_a_broken_scale_is_an_error_of_the_pass(
    built: Build, grouped_experts: None, tmp_path: Path, layer: int, listed: bool
) -> None:
    """Though nobody waits for the check of a layer before the next; or where all layers are taken before the first is
    computed."""
    shutil.copytree(built("tiny-mxfp4"), tmp_path / "broken")
    name = f"layers.{layer}.mlp.experts.2.down_proj.weight_scale"
    stored = source(tmp_path / "broken").checkpoint.stored(name)
    poison(stored.file, stored.end - 1)
    model = streamed(tmp_path / "broken")
    if listed:
        model.layers = list(model.layers)
    for _ in range(2):
        with pytest.raises(q.errors.Qwen35Error, match=rf"(?s)a scale is NaN.*layers.{layer}.mlp.experts.2"):
            model(torch.arange(60)[None])


def test_an_interrupted_pass_can_be_had_again(
    built: Build, grouped_experts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C at any moment."""
    model, ids = streamed(built("tiny-mxfp4")), torch.arange(60)[None]
    expected = model(ids)
    result, left = Fetch.result, [0]

    def interrupted(self: Fetch) -> list[torch.Tensor]:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return result(self)

    monkeypatch.setattr(Fetch, "result", interrupted)
    for moment in (1, 2, 5, 9):
        left[0] = moment
        with pytest.raises(KeyboardInterrupt):
            model(ids)
        assert torch.equal(model(ids), expected)
