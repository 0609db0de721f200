"""Reading ahead for a GPU, here on a CPU: the processes, where bytes go, every layout of experts, and what breaks."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qwen35_moe as q
from qwen35_moe.checkpoint.reader import Rows
from qwen35_moe.model.moe import MoE
from qwen35_moe.run.experts import PassingExperts
from qwen35_moe.run.gpu import feed as ahead
from qwen35_moe.run.gpu import grouped, plan, read_pool
from qwen35_moe.run.gpu.feed import Feed
from qwen35_moe.run.gpu.plan import Plan
from qwen35_moe.run.gpu.read_pool import Slot
from qwen35_moe.run.source import Source
from qwen35_moe.run.streamed import StreamedLayers

Build = Callable[[str], Path]
RECIPES = sorted(p.stem for p in (Path(__file__).parents[1] / "weights" / "recipes").glob("tiny*.toml"))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def feed() -> Iterator[Feed]:
    """Two processes with small pieces of memory, so that all is cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_pool, "READERS", 2)
        patch.setattr(plan, "CHUNK", 3000)
        patch.setattr(ahead, "AHEAD", 40_000)
        made = Feed(CPU)
        for module in ("experts", "streamed"):
            patch.setattr(sys.modules[f"qwen35_moe.run.{module}"], "feed", lambda device, made=made: made)
        yield made
        made.pool.close()
    del made
    gc.collect()  # closes what it had open: other tests count that


def source(path: Path, online: bool = False) -> Source:
    return q.load(path, mode="stream", text_only=True, shared_expert="fused-online" if online else "unfused").source


def passing(found: Source, mlp: str, count: int) -> PassingExperts:
    read, stored = partial(found.slot, mlp), partial(found.stored, mlp)
    return PassingExperts(count, 0, read, torch.float32, False, CPU, stored=stored)


@pytest.mark.parametrize("recipe", RECIPES)
def test_experts_of_every_layout(built: Build, feed: Feed, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["qwen35_moe.run.experts"], "BATCH", 100_000)  # bytes: some experts
    monkeypatch.setattr(sys.modules["qwen35_moe.run.experts"], "FEW", 2)
    found = source(built(recipe), online=recipe == "tiny-moe-mxfp4")
    E = found.config.num_experts
    experts = passing(found, "layers.0.mlp", E + 1)
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
def test_layers_and_head(built: Build, feed: Feed, recipe: str) -> None:
    model = q.load(built(recipe), "float32", mode="stream", text_only=True)
    ids, layers, used = torch.arange(60)[None], model.layers, model.source.checkpoint.used
    assert isinstance(layers, StreamedLayers)
    before = set(used)
    expected, after = model(ids), set(used)
    used.intersection_update(before)
    layers.ahead = True
    for _ in range(2):
        assert torch.equal(model(ids), expected)
    assert used == after and len(layers.dense) == len(layers)
    assert all(not p.is_meta for p in layers[0].parameters()) and all(p.is_meta for p in layers.empty[0].parameters())


def test_a_layer_is_gone_when_nobody_holds_it(built: Build, feed: Feed) -> None:
    """At once: weights that wait for the garbage collector take the memory of a GPU."""
    model = q.load(built("tiny-mxfp4"), "float32", mode="stream", text_only=True)
    assert isinstance(model.layers, StreamedLayers)
    model.layers.ahead = True
    gc.disable()
    try:
        assert not any(ref() for ref in [weakref.ref(layer) for layer in model.layers])
    finally:
        gc.enable()


def test_what_is_asked_for_comes_first(built: Build, feed: Feed) -> None:
    checkpoint = source(built("tiny")).checkpoint
    wanted = Plan(checkpoint.reader, [[Rows.of(checkpoint.stored("lm_head.weight"))]])
    orders = [feed.order(wanted) for _ in range(6)]
    assert torch.equal(orders[5].result()[0][0], checkpoint.read("lm_head.weight"))
    begun = sum(order.plan.nbytes for order in orders[:5] if order.target is not None)
    assert begun < ahead.AHEAD + wanted.nbytes < 5 * wanted.nbytes
    assert all(torch.equal(order.result()[0][0], orders[5].result()[0][0]) for order in orders)


def test_a_file_that_was_closed_is_opened_again(built: Build, feed: Feed, tmp_path: Path) -> None:
    """Though its descriptor may be another file's by then."""
    checkpoint = source(built("tiny")).checkpoint
    wanted = Plan(checkpoint.reader, [[Rows.of(checkpoint.stored("lm_head.weight"))]])
    expected = feed.order(wanted).result()[0][0]
    checkpoint.close()
    (tmp_path / "zeros").write_bytes(bytes(wanted.nbytes + 2**20))
    with ExitStack() as others:
        for _ in range(8):
            others.enter_context(open(tmp_path / "zeros", "rb"))
        assert torch.equal(feed.order(wanted).result()[0][0], expected)
    for descriptor in checkpoint.reader._descriptors.values():
        os.close(descriptor)


def test_nobody_waits_for_what_was_forgotten(built: Build, feed: Feed) -> None:
    checkpoint = source(built("tiny")).checkpoint
    wanted = Plan(checkpoint.reader, [[Rows.of(checkpoint.stored("lm_head.weight"))]])
    for _ in range(3):
        orders = [feed.order(wanted) for _ in range(5)]
        assert torch.equal(orders[3].result()[0][0], checkpoint.read("lm_head.weight"))
        del orders
    while feed.chunks or len(feed.free) < len(feed.pool.slots):
        feed.go_on(wait=1)
    assert not feed.begun


def broken(path: Path, to: Path, change: Callable[[Path, int], None], name: str) -> Source:
    """After it was opened."""
    shutil.copytree(path, to)
    found = source(to)
    stored = found.checkpoint.stored(name)
    change(stored.file, stored.end - 1)
    return found


def cut(file: Path, at: int) -> None:
    with open(file, "r+b") as handle:
        handle.truncate(at)


def poison(file: Path, at: int) -> None:
    with open(file, "r+b") as handle:
        handle.seek(at)
        handle.write(b"\xff")


@pytest.mark.parametrize(("change", "says"), [(cut, "the file ends"), (poison, "1 such scales")])
def test_what_cannot_be_read_is_an_error_and_the_next_can(
    built: Build, feed: Feed, tmp_path: Path, change: Callable[[Path, int], None], says: str
) -> None:
    name = "layers.3.mlp.experts.2.down_proj.weight_scale"
    found = broken(built("tiny-mxfp4"), tmp_path / "broken", change, name)
    for _ in range(2):
        with pytest.raises(q.errors.Qwen35Error, match=says):
            list(passing(found, "layers.3.mlp", 8).batches(range(8)))
    assert len(list(passing(source(built("tiny-mxfp4")), "layers.3.mlp", 8).batches(range(8)))) == 1


@pytest.fixture
def grouped_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are read ahead and multiplied in groups, as on a GPU."""

    def fill_experts(module: nn.Module, prefix: str, found: Source, *_: Any) -> None:
        for path, block in module.named_modules(prefix=prefix):
            if isinstance(block, MoE):
                block.experts = passing(found, path, found.config.num_experts)

    monkeypatch.setattr(sys.modules["qwen35_moe.run.streamed"], "fill_experts", fill_experts)
    monkeypatch.setattr(grouped, "applies", lambda experts, x_TD: isinstance(experts, PassingExperts))


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("listed", [False, True])
def test_a_broken_scale_is_an_error_of_the_pass(
    built: Build, feed: Feed, grouped_experts: None, tmp_path: Path, layer: int, listed: bool
) -> None:
    """Though nobody waits for the verdict on a layer before the next; or where all layers are taken before the first
    is computed."""
    shutil.copytree(built("tiny-mxfp4"), tmp_path / "broken")
    name = f"layers.{layer}.mlp.experts.2.down_proj.weight_scale"
    stored = source(tmp_path / "broken").checkpoint.stored(name)
    poison(stored.file, stored.end - 1)
    model = q.load(tmp_path / "broken", "float32", mode="stream", text_only=True)
    assert isinstance(model.layers, StreamedLayers)
    model.layers.ahead = True
    if listed:
        model.layers = list(model.layers)
    for _ in range(2):
        with pytest.raises(q.errors.Qwen35Error, match=rf"(?s)a scale is NaN.*layers.{layer}.mlp.experts.2"):
            model(torch.arange(60)[None])


def test_another_system_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.memfd_create")
    with pytest.raises(q.errors.Qwen35Error, match="needs Linux"):
        Feed(CPU)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Feed]]:
    """The present feed of the CPU, with two processes."""
    monkeypatch.setattr(read_pool, "READERS", 2)
    monkeypatch.setattr(plan, "CHUNK", 3000)
    monkeypatch.setattr(ahead, "_feeds", {})
    yield partial(ahead.feed, CPU)
    ahead._feeds.clear()
    gc.collect()


@pytest.mark.parametrize("number", [1, 2])
def test_a_process_that_ends_is_an_error_and_another_follows(
    built: Build, own: Callable[[], Feed], number: int
) -> None:
    checkpoint, feed = source(built("tiny")).checkpoint, own()
    wanted = Plan(checkpoint.reader, [[Rows.of(checkpoint.stored("lm_head.weight"))]])
    order, later = feed.order(wanted), feed.order(wanted)
    for process in feed.pool.processes[:number]:
        process.kill()
        process.wait()
    with pytest.raises(q.errors.Qwen35Error, match="has ended"):
        order.result()
    assert feed.broken and own() is not feed
    for again in (later, order, own().order(wanted)):
        assert torch.equal(again.result()[0][0], checkpoint.read("lm_head.weight"))


def test_an_interrupted_pass_can_be_had_again(
    built: Build, own: Callable[[], Feed], grouped_experts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C at any moment."""
    model = q.load(built("tiny-mxfp4"), "float32", mode="stream", text_only=True)
    ids = torch.arange(60)[None]
    assert isinstance(model.layers, StreamedLayers)
    model.layers.ahead = True
    expected = model(ids)
    copy, left = Feed._copy, [0]

    def interrupted(self: Feed, slots: list[Slot]) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        copy(self, slots)

    monkeypatch.setattr(Feed, "_copy", interrupted)
    for moment in (1, 2, 7, 20):
        left[0] = moment
        with pytest.raises(KeyboardInterrupt):
            model(ids)
        assert torch.equal(model(ids), expected)
