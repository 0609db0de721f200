"""Faults between steps: planted in runs of several steps that play an engine, found at their step and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import qwen35_moe as q
from qwen35_moe.model.cache import Cache, LayerState
from qwen35_moe.oracle.compare import compare
from qwen35_moe.oracle.dumps.dump import Dump
from qwen35_moe.oracle.dumps.readers.own import from_trace
from qwen35_moe.oracle.dumps.writers import DUMPED
from qwen35_moe.oracle.judge.records import Comparison
from qwen35_moe.oracle.truth import open_checkpoint
from qwen35_moe.trace.file import Trace
from qwen35_moe.trace.recorder import record, step_record

IDS = torch.stack([torch.arange(36) * 7919 % 251, torch.arange(36) * 6151 % 241])
STEPS = (20, 9, 1, 1, 5)  # chunks of a prefill, two decode steps, a window of drafts
GDN, ATTN = 1, 3
Plant = Callable[[int, Cache, Cache], None]  # (step, cache, the cache of one step before)


class Setting:
    """One checkpoint: its truth for the ids, and engines to compare with it."""

    def __init__(self, path: Path):
        self.path, self.source = path, open_checkpoint(path)[1].source
        self.truth = q.trace(q.load(path, text_only=True), IDS)
        self.model = q.load(path, "sglang-bf16", "unfused", text_only=True)

    def run(self, plant: Plant = lambda *_: None, ids: Tensor = IDS, shift: int = 0) -> Dump:
        """Step by step. `shift` is added to the positions of step 2 on, which the dump does not say."""
        cache, before, at = Cache(), Cache(), 0
        with record(DUMPED, meta={"config": self.truth.meta["config"]}) as recorder:
            for step, size in enumerate(STEPS):
                if step:
                    recorder.next_step()
                here = ids[:, at : at + size]
                at += size
                positions = torch.arange(at - size, at).expand_as(here)
                recorder.meta["steps"].append(step_record(here, None, positions, cache))
                copy = cache.clone() if step else Cache()
                plant(step, cache, before)
                before = copy
                self.model(here, cache=cache, position_ids=positions + (shift if step >= 2 else 0))
        return from_trace(recorder.trace)

    def compare(self, dump: Dump, truth: Trace | None = None) -> Comparison:
        return compare(truth or self.truth, dump, self.source, diagnoses=1)


@pytest.fixture(scope="module")
def tiny(built: Callable[[str], Path]) -> Setting:
    return Setting(built("tiny"))


def in_layer(
    layer: int,
    change: Callable[[LayerState, LayerState], None],
    step: int = 2,
    each: bool = False,
    row: int | None = None,
) -> Plant:
    """A fault of one layer at a step (or at each from there on), in all sequences or in one."""

    def plant(now: int, cache: Cache, before: Cache) -> None:
        if now != step and not (each and now > step):
            return
        state, right = cache.layer(layer), replace(cache.layer(layer))
        change(state, before.layer(layer))
        for name, x in right.tensors() if row is not None else ():
            wrong = getattr(state, name)
            setattr(state, name, torch.where((torch.arange(len(x)) == row).view(-1, *[1] * (x.dim() - 1)), wrong, x))

    return plant


def put(**changes: Callable[[LayerState, LayerState], Tensor]) -> Callable[[LayerState, LayerState], None]:
    def change(state: LayerState, before: LayerState) -> None:
        new = {name: function(state, before) for name, function in changes.items()}
        for name, x in new.items():
            setattr(state, name, x)

    return change


def kv(function: Callable[[Tensor], Tensor]) -> Callable[[LayerState, LayerState], None]:
    return put(k=lambda s, _: function(s.k), v=lambda s, _: function(s.v))


FAULTS = {
    "state not handed over": (GDN, put(state=lambda s, _: s.state * 0, conv=lambda s, _: s.conv * 0)),
    "recurrent state not handed over": (GDN, put(state=lambda s, _: s.state * 0)),
    "conv state not handed over": (GDN, put(conv=lambda s, _: s.conv * 0)),
    "state of an earlier step": (GDN, put(state=lambda _, b: b.state, conv=lambda _, b: b.conv)),
    "recurrent state of an earlier step": (GDN, put(state=lambda _, b: b.state)),
    "conv state of an earlier step": (GDN, put(conv=lambda _, b: b.conv)),
    "state of another sequence": (GDN, put(state=lambda s, _: s.state.flip(0), conv=lambda s, _: s.conv.flip(0))),
    "recurrent state transposed": (GDN, put(state=lambda s, _: s.state.mT)),
    "conv state reversed": (GDN, put(conv=lambda s, _: s.conv.flip(-1))),
    "conv state in the other layout": (GDN, put(conv=lambda s, _: s.conv.mT.reshape(s.conv.shape))),
    "KV not handed over": (ATTN, put(k=lambda *_: None, v=lambda *_: None)),
    "last KV row missing": (ATTN, kv(lambda x: x[:, :-1])),
    "KV rows of the step before missing": (ATTN, kv(lambda x: x[:, :-9])),
    "KV rows of the step before zero": (ATTN, kv(lambda x: torch.cat((x[:, :-9], x[:, -9:] * 0), 1))),
    "last KV row doubled": (ATTN, kv(lambda x: torch.cat((x, x[:, -1:]), 1))),
    "KV rows of the step before doubled": (ATTN, kv(lambda x: torch.cat((x, x[:, -9:]), 1))),
    "KV rows of another sequence": (ATTN, kv(lambda x: x.flip(0))),
}


def check(found: Comparison, name: str, layer: int, at: str) -> None:
    first, said = found.first, found.diagnoses[0]
    assert found.exit_code == 1 and first is not None and first.layer == layer, found.verdict
    assert said.named and said.name.startswith(f"{name} "), str(said)
    assert at in f"{said.name} ({said.hypotheses[0].where})", str(said)


CHOSEN = (
    "state not handed over", "state of another sequence", "recurrent state transposed", "conv state reversed",
    "last KV row missing", "KV rows of the step before doubled",
)  # fmt: skip


@pytest.mark.parametrize("name", CHOSEN)
def test_fault_at_one_step_is_named(tiny: Setting, name: str) -> None:
    layer, change = FAULTS[name]
    check(tiny.compare(tiny.run(in_layer(layer, change))), name, layer, "at step 2 (sequence 0, token 29 on")


def test_runs_of_several_steps_pass(tiny: Setting) -> None:
    found = tiny.compare(tiny.run())
    assert found.exit_code == 0, found.verdict


@pytest.mark.parametrize("name", ["state of an earlier step", "KV rows of the step before missing"])
def test_fault_at_each_step_is_told_from_one_step(tiny: Setting, name: str) -> None:
    layer, change = FAULTS[name]
    if layer == ATTN:
        change = kv(lambda x: x[:, :-1])
        name = "last KV row missing"
    found = tiny.compare(tiny.run(in_layer(layer, change, each=True)))
    check(found, name, layer, "at step 2 and each after it (sequence 0, token 29 on")


def test_one_row_of_a_batch(tiny: Setting) -> None:
    layer, change = FAULTS["recurrent state not handed over"]
    found = tiny.compare(tiny.run(in_layer(layer, change, row=1)))
    check(found, "recurrent state not handed over", layer, "at step 2 (sequence 1, token 29 on)")


@pytest.mark.parametrize(("shift", "name"), [(1, "positions one too high"), (-29, "positions restarted")])
def test_positions(tiny: Setting, shift: int, name: str) -> None:
    """The first layer of attention reads them; what the dump says of its positions is right."""
    found = tiny.compare(tiny.run(shift=shift))
    check(found, name, ATTN, "at step 2 (sequence 0, token 29 on")
