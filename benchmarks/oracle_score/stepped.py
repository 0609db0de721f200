"""Runs of several steps that play an engine: chunks of a prefill, decode steps, windows of drafts of which some are
rejected. A fault of the catalogue is at work in all steps; one of `step_faults.py` spoils what one step hands on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qwen35_moe.model.cache import Cache, LayerState
from qwen35_moe.model.text import Model
from qwen35_moe.numerics.taps import REPLAY, FunctionHandler, Handler, Site, attach
from qwen35_moe.oracle.diagnose.step_faults import STEP_FAULTS, StepFault
from qwen35_moe.oracle.dumps.dump import Dump
from qwen35_moe.oracle.dumps.readers.own import from_trace
from qwen35_moe.oracle.judge.hand_over import Handed
from qwen35_moe.trace.recorder import record, step_record

Handlers = Callable[[Tensor], Sequence[Handler]]  # of the positions of a step
# A state that is rounded once errs by one rounding of bf16, which is legal: `--state bf16` is a choice, no fault.
LEGAL_STEPS = ("recurrent state in bf16",)


@dataclass(frozen=True)
class Step:
    """`size` tokens from `start` on, of which the last `rejected` are drafts that do not count."""

    start: int
    size: int
    rejected: int = 0


def plan(regime: str, tokens: int) -> list[Step]:
    """The steps of a regime; the fault is planted at the third."""
    if regime == "chunked":
        sizes = [tokens // 2, tokens // 4, 1, 1]
        sizes.append(tokens - sum(sizes))
        return [Step(sum(sizes[:i]), size) for i, size in enumerate(sizes)]
    begin, rejected = tokens // 2, (1, 2, 1, 0)
    steps = [Step(0, begin)]
    for number in rejected:
        steps.append(Step(begin, 3, number))
        begin += 3 - number
    return [*steps, Step(begin, tokens - begin)]


AT = 2  # the step that gets a wrong state
ROWS = ("k", "v", "conv", "state")


def step_faults(regime: str, square: bool) -> list[StepFault]:
    """Those that a run of this regime can have."""
    needs = {"", "earlier", "other", "rejected" if regime == "speculative" else "", "square" if square else ""}
    return [f for f in STEP_FAULTS if f.needs in needs and f.name not in LEGAL_STEPS]


@dataclass
class Planted:
    """A fault of the steps in one layer."""

    fault: StepFault
    layer: int

    def spoil(self, cache: Cache, before: Cache, short: Cache, saw_drafts: Cache | None, tokens: int) -> None:
        """Change what the layer has of the steps so far."""
        if self.fault.change is None:
            return
        state = cache.layer(self.layer)
        other = LayerState(**{name: x.flip(0) for name, x in state.tensors()})
        ran_on = None if saw_drafts is None else saw_drafts.layer(self.layer)
        handed = Handed(replace(state), before.layer(self.layer), short.layer(self.layer), tokens, other, ran_on)
        changed = dict(self.fault.change(handed).tensors())
        for name in ROWS:
            setattr(state, name, changed.get(name))


def run(
    model: Model, ids_BT: Tensor, steps: Sequence[Step], taps: str, meta: dict[str, Any],
    handlers: Handlers = lambda _: (), planted: Planted | None = None,
) -> Dump:  # fmt: skip
    """Step by step; what a planted shift makes of positions, the dump does not say."""
    cache, before, short, saw_drafts = Cache(), Cache(), Cache(), None
    with torch.no_grad(), record(taps, meta=dict(meta)) as recorder:
        for number, step in enumerate(steps):
            if number:
                recorder.next_step()
            fed = ids_BT[:, step.start : step.start + step.size].clone()
            kept = step.size - step.rejected
            fed[:, kept:] = (fed[:, kept:] + 1) % 251
            positions = (step.start + torch.arange(step.size)).expand_as(fed)
            recorder.meta["steps"].append(step_record(fed, None, positions, cache))
            if planted is not None and number == AT:
                planted.spoil(cache, before, short, saw_drafts, steps[number - 1].size - steps[number - 1].rejected)
            shift = planted.fault.shift if planted is not None and number >= AT else None
            moved = positions + (0 if shift is None else shift(steps[AT].start, 0))
            begun = cache.clone() if number else Cache()

            def again(
                count: int,
                step_number: int = number,
                begun: Cache = begun,
                fed: Tensor = fed,
                moved: Tensor = moved,
                at: Tensor = positions,
            ) -> Cache:
                """The cache after the first tokens of this step, of the values that this step's layers read. What an
                engine keeps of them comes from no other run, which might choose other experts."""
                found, seen = begun.clone(), recorder.trace

                def read(site: Site, x: Tensor) -> Tensor | None:
                    key = site.key if not step_number else f"step.{step_number}.{site.key}"
                    return seen[key][:, : x.shape[1]].to(x) if site.name == "input_layernorm" else None

                if count:
                    with attach(FunctionHandler(read, REPLAY), *handlers(at[:, :count]), instead_of=recorder):
                        model(fed[:, :count], cache=found, position_ids=moved[:, :count])
                return found

            with attach(*handlers(positions)):
                model(fed, cache=cache, position_ids=moved)
            if number == AT - 1:
                before, short = begun, again(kept - 1)
            saw_drafts = cache if step.rejected else None
            cache = again(kept) if step.rejected else cache
    return from_trace(recorder.trace)
