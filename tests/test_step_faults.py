"""Faults between steps: planted in runs of several steps that play an engine, found at their step and named."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peers.transformers_model import cached, load_transformers, new_cache
from torch import Tensor

import qwen35_moe as q
from qwen35_moe.model.cache import Cache, LayerState
from qwen35_moe.numerics.taps import REPLAY, FunctionHandler, Site, attach
from qwen35_moe.oracle.compare import compare
from qwen35_moe.oracle.diagnose.steps import Cut, earlier, onsets
from qwen35_moe.oracle.dumps.dump import Dump
from qwen35_moe.oracle.dumps.readers.own import from_trace
from qwen35_moe.oracle.dumps.readers.transformers import TransformersCapture
from qwen35_moe.oracle.dumps.writers import DUMPED
from qwen35_moe.oracle.judge.records import Comparison
from qwen35_moe.oracle.truth import open_checkpoint
from qwen35_moe.run.prompt import padded
from qwen35_moe.trace.file import Trace
from qwen35_moe.trace.recorder import record, step_record

IDS = torch.stack([torch.arange(36) * 7919 % 251, torch.arange(36) * 6151 % 241])
STEPS = (20, 9, 1, 1, 5)  # chunks of a prefill, two decode steps, a window of drafts
GDN, ATTN = 0, 1
Plant = Callable[[int, Cache, Cache], None]  # (step, cache, the cache of one step before)


class Setting:
    """One checkpoint: its truth for the ids, and engines to compare with it."""

    def __init__(self, path: Path):
        self.path, self.source = path, open_checkpoint(path)[1].source
        self.truth = q.trace(q.load(path, text_only=True), IDS)
        self.model = q.load(path, "sglang-bf16", "unfused", text_only=True)

    def run(self, plant: Plant = lambda *_: None, ids: Tensor = IDS, shift: int = 0, unseen: int = 0) -> Dump:
        """Step by step. `shift` is added to the positions of step 2 on, which the dump does not say. The dump lacks the
        first `unseen` steps: they filled a prefix cache."""
        cache, before, at = Cache(), Cache(), 0
        with record(DUMPED, meta={"config": self.truth.meta["config"]}) as recorder:
            for step, size in enumerate(STEPS):
                if step > unseen:
                    recorder.next_step()
                here = ids[:, at : at + size]
                at += size
                positions = torch.arange(at - size, at).expand_as(here)
                if step >= unseen:
                    recorder.meta["steps"].append(step_record(here, None, positions, cache))
                copy = cache.clone() if step else Cache()
                plant(step, cache, before)
                before = copy
                with nullcontext() if step >= unseen else attach(instead_of=recorder):
                    self.model(here, cache=cache, position_ids=positions + (shift if step >= 2 else 0))
        return from_trace(recorder.trace)

    def compare(self, dump: Dump, truth: Trace | None = None, diagnoses: int = 1) -> Comparison:
        return compare(truth or self.truth, dump, self.source, diagnoses=diagnoses)


@pytest.fixture(scope="module")
def tiny(small: Callable[..., Path]) -> Setting:
    return Setting(small("tiny"))


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
    "state of an earlier step": (GDN, put(state=lambda _, b: b.state, conv=lambda _, b: b.conv)),
    "state of another sequence": (GDN, put(state=lambda s, _: s.state.flip(0), conv=lambda s, _: s.conv.flip(0))),
    "recurrent state transposed": (GDN, put(state=lambda s, _: s.state.mT)),
    "last KV row missing": (ATTN, kv(lambda x: x[:, :-1])),
    "KV rows of the step before doubled": (ATTN, kv(lambda x: torch.cat((x, x[:, -9:]), 1))),
}


def check(found: Comparison, name: str, layer: int, at: str) -> None:
    first, said = found.first, found.diagnoses[0]
    assert found.exit_code == 1 and first is not None and first.layer == layer, found.verdict
    assert said.named and said.name.startswith(f"{name} "), str(said)
    assert at in str(said)


@pytest.mark.parametrize(
    "name",
    ["state not handed over", "state of another sequence", "recurrent state transposed",
     "KV rows of the step before doubled"],
)  # fmt: skip
def test_fault_at_one_step_is_named(tiny: Setting, name: str) -> None:
    layer, change = FAULTS[name]
    check(tiny.compare(tiny.run(in_layer(layer, change))), name, layer, "at step 2 (sequence 0, token 29 on")


def test_runs_of_several_steps_pass(tiny: Setting) -> None:
    found = tiny.compare(tiny.run())
    assert found.exit_code == 0, found.verdict


def test_rows_after_cached_tokens_may_differ_for_a_reason_that_the_dump_lacks(tiny: Setting) -> None:
    layer, change = FAULTS["recurrent state not handed over"]

    def told(plant: Plant = lambda *_: None, unseen: int = 0) -> list[str]:
        notes = tiny.compare(tiny.run(plant, unseen=unseen), diagnoses=0).notes
        return [note for note in notes if "in rows after cached tokens" in note]

    (note,) = told(in_layer(layer, change), unseen=1)
    assert f"layers.{layer}." in note
    assert not told(in_layer(layer, change)) and not told(unseen=1)


def test_other_experts_of_a_cached_token_are_no_fault(tiny: Setting) -> None:
    """They are not in the dump, and so the rows that read the token have no verdict."""

    def choose(site: Site, x: Tensor) -> Tensor | None:
        if site.name != "moe_topk_ids" or site.layer != 0 or len(x) != 2 * STEPS[0]:
            return None
        free = [e for e in range(tiny.source.config.num_experts) if e not in x[-1]]
        return torch.cat((x[:-1], torch.tensor([free[: x.shape[1]]])))

    with attach(FunctionHandler(choose, REPLAY)):
        cached, whole = tiny.run(unseen=1), tiny.run()
    found = tiny.compare(cached)
    assert found.exit_code == 2 and "prefix cache" in str([r.note for r in found.records if r.cls == "not comparable"])
    assert tiny.compare(whole).exit_code == 1  # here the dump has the ids, which no rounding allows


@pytest.mark.parametrize("name", ["state of an earlier step", "last KV row missing"])
def test_fault_at_each_step_is_told_from_one_step(tiny: Setting, name: str) -> None:
    layer, change = FAULTS[name]
    found = tiny.compare(tiny.run(in_layer(layer, change, each=True)))
    check(found, name, layer, "at step 2 and each after it (sequence 0, token 29 on")


def test_one_row_of_a_batch(tiny: Setting) -> None:
    layer, change = FAULTS["recurrent state not handed over"]
    found = tiny.compare(tiny.run(in_layer(layer, change, row=1)))
    check(found, "recurrent state not handed over", layer, "at step 2 (sequence 1, token 29 on;")


@pytest.mark.parametrize(("shift", "name"), [(1, "positions one too high"), (-29, "positions restarted")])
def test_positions(tiny: Setting, shift: int, name: str) -> None:
    """The first layer of attention reads them; what the dump says of its positions is right."""
    found = tiny.compare(tiny.run(shift=shift))
    check(found, name, ATTN, "at step 2 (sequence 0, token 29 on")


@pytest.mark.parametrize("which", ["state", "KV"])
def test_rejected_drafts_are_not_rolled_back(tiny: Setting, which: str) -> None:
    """Step 1 runs a token and two drafts; the drafts are rejected, and stay in one layer's state."""
    layer = ATTN if which == "KV" else GDN
    kept = ("k", "v") if which == "KV" else ("state", "conv")
    ids, model, cache = IDS[:1], tiny.model, Cache()
    drafts = torch.cat((ids[:, 20:21], ids[:, 21:23] + 1), 1)
    with record(DUMPED, meta={"config": tiny.truth.meta["config"]}) as recorder:
        for step, (start, fed) in enumerate(((0, ids[:, :20]), (20, drafts), (21, ids[:, 21:22]), (22, ids[:, 22:]))):
            positions = start + torch.arange(fed.shape[1])[None]
            recorder.meta["steps"].append(step_record(fed, None, positions, None))
            before = cache.clone() if step else Cache()
            model(fed, cache=cache, position_ids=positions)
            if step == 1:  # what the engine goes on with: the accepted token, and one state that saw the drafts too
                saw_drafts, cache = cache, before
                with attach(instead_of=recorder):
                    model(fed[:, :1], cache=cache, position_ids=positions[:, :1])
                for name in kept:
                    setattr(cache.layer(layer), name, getattr(saw_drafts.layer(layer), name))
            recorder.next_step()
    truth = q.trace(q.load(tiny.path, text_only=True), ids)
    found = tiny.compare(from_trace(recorder.trace), truth)
    name = "KV rows of rejected drafts kept" if which == "KV" else f"{which} not rolled back after rejected drafts"
    check(found, name, layer, "at step 2 (token 21 on;")


@pytest.mark.parametrize("left", [True, False])
def test_padding_runs_through_the_state(tiny: Setting, left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer does not know of the mask: on the left it is wrong from the start, on the right from the next step."""
    T, mask = 16, torch.ones(2, 16).long()
    mask[1, slice(0, 5) if left else slice(11, 16)] = 0
    ids = IDS[:, :T] * mask
    mixer = tiny.model.layers[GDN].linear_attn
    monkeypatch.setattr(mixer, "forward", lambda x, real, past, right=mixer.forward: right(x, None, past))
    cache, more = Cache(), IDS[:, 20:26]
    both = torch.cat((mask, torch.ones_like(more)), 1)
    run = q.trace(tiny.model, torch.cat((ids, more), 1), taps=DUMPED, attention_mask=both, cache=cache, chunks=(T, 6))
    whole, real = padded([torch.cat((IDS[0, :T], more[0])), torch.cat((ids[1][mask[1].bool()], more[1]))])
    truth = q.trace(q.load(tiny.path, text_only=True), whole, attention_mask=real)
    found = tiny.compare(from_trace(run), truth)
    at = "at step 0 (sequence 1, token 0 on" if left else "at step 1 (sequence 1, token 11 on"
    check(found, "state with padding in it", GDN, at)


def transformers_run(path: Path, plant: Callable[[int, Any], None]) -> Dump:
    """transformers in bf16, live, in the same steps."""
    model = load_transformers(path, torch.bfloat16)
    cache, at = new_cache(model), 0
    with TransformersCapture(model) as capture, torch.no_grad():
        for step, size in enumerate(STEPS):
            plant(step, cache)
            model(input_ids=IDS[:1, at : at + size], **cached(cache))
            at += size
    return capture.dump()


def reversed_conv(step: int, cache: Any) -> None:
    if step == 2:
        last = cache.layers[GDN].conv_states[0][..., -3:]
        last.copy_(last.flip(-1))


def lost_rows(step: int, cache: Any) -> None:
    if step == 2:
        for x in (cache.layers[ATTN].keys, cache.layers[ATTN].values):
            x[:, :, -9:] = 0


@pytest.mark.parametrize(
    ("plant", "name", "layer"),
    [
        (reversed_conv, "conv state reversed", GDN),
        (lost_rows, "KV rows of the step before zero", ATTN),
        (lambda *_: None, "", 0),
    ],
)
def test_transformers_live(tiny: Setting, plant: Callable[[int, Any], None], name: str, layer: int) -> None:
    truth = q.trace(q.load(tiny.path, text_only=True), IDS[:1])
    found = tiny.compare(transformers_run(tiny.path, plant), truth)
    if name:
        check(found, name, layer, "at step 2 (token 29 on;")
    else:
        assert found.exit_code == 0, found.verdict


def test_steps_where_an_error_may_have_begun() -> None:
    """Where it is first beyond rounding, in all sequences in the earliest step that has one, and before short steps."""
    cuts = {b: [Cut(0, 0), Cut(20, 1), Cut(29, 2), Cut(30, 3), Cut(31, 4)] for b in (0, 1)}
    tried = [[onset.cuts[0].step for onset in begun] for begun in earlier(onsets(cuts, {0: 30, 1: 33}))]
    assert tried == [[3, 4], [3, 3], [2, 2]]  # step 1 has 9 tokens: there it would have been seen
    assert not list(earlier(onsets(cuts, {})))
