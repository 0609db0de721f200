"""Runs of several steps that play an engine: chunks of a prefill, decode steps, a cached prefix, padding, windows of
drafts of which some are rejected. A fault of the catalogue is at work in all steps; one of `step_faults.py` spoils what
one step hands to the next, at a layer, a step and a sequence that are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from qwen35_moe.model.cache import Cache, LayerState
from qwen35_moe.model.text import Model
from qwen35_moe.numerics.tap_table import TAPS
from qwen35_moe.numerics.taps import REPLAY, FunctionHandler, Handler, Site, attach
from qwen35_moe.oracle.diagnose.step_faults import STEP_FAULTS, StepFault
from qwen35_moe.oracle.dumps.dump import Dump
from qwen35_moe.oracle.dumps.readers.own import from_trace
from qwen35_moe.oracle.judge.hand_over import Handed
from qwen35_moe.trace.recorder import Recorder, record, step_record

MIXED = {name for name, tap in TAPS.items() if tap.dims.startswith("b t ")}  # values of tokens in a mixer
REGIMES = ("chunked", "prefix", "padded", "speculative")
Handlers = Callable[[Tensor], Sequence[Handler]]  # of the positions of a step
# A state that is rounded once errs by one rounding of bf16, which is legal: `--state bf16` is a choice, no fault.
LEGAL_STEPS = ("recurrent state in bf16",)


@dataclass(frozen=True)
class Step:
    """`size` tokens from `start` on. The last `rejected` are drafts that do not count; the last `padded` of the second
    sequence are padding. An unseen step is not in the dump: it filled the prefix cache."""

    start: int
    size: int
    rejected: int = 0
    padded: int = 0
    unseen: bool = False

    @property
    def kept(self) -> int:
        return self.size - self.rejected

    def mask(self, like_BT: Tensor) -> Tensor | None:
        mask = torch.ones_like(like_BT)
        mask[1:, self.size - self.padded :] = 0
        return mask if self.padded else None

    def real(self, ids_BT: Tensor) -> list[Tensor]:
        """The sequences that begin with this step, without its padding."""
        ends = [self.size - self.padded * (b > 0) for b in range(len(ids_BT))]
        return [torch.cat((row[:end], row[self.size :])) for row, end in zip(ids_BT, ends, strict=True)]


def plan(regime: str, tokens: int) -> list[Step]:
    """The steps of a regime."""
    begin = tokens // 2
    if regime == "speculative":
        steps = [Step(0, begin)]
        for number in (1, 2, 1, 0):
            steps.append(Step(begin, 3, number))
            begin += 3 - number
        return [*steps, Step(begin, tokens - begin)]
    sizes = [begin, tokens // 4, 1, 1]
    sizes.append(tokens - sum(sizes))
    steps = [Step(sum(sizes[:i]), size) for i, size in enumerate(sizes)]
    first = replace(steps[0], padded=3 * (regime == "padded"), unseen=regime == "prefix")
    return [first, *steps[1:]]


@dataclass
class Planted:
    """A fault of the steps in one layer: at step `at`, or at `each` from there on, in all sequences or in one (`row`).
    `alike` are the names of all faults that hand over the same."""

    fault: StepFault
    layer: int
    at: int
    start: int  # tokens before that step
    each: bool = False
    row: int | None = None
    struck: int = 0  # how many steps got a wrong state
    alike: set[str] = field(default_factory=lambda: {f.name for f in STEP_FAULTS})

    @classmethod
    def drawn(cls, fault: StepFault, steps: Sequence[Step], layers: Sequence[int], seed: object) -> Planted | None:
        """At a place that the fault can be at; None: there is none."""
        draw = Random(f"{seed} {fault.name}")
        before = dict(enumerate(steps[:-1], 1))
        can = [at for at, step in before.items() if _suits(fault, at, step, steps)]
        if not can:
            return None
        at, padding = draw.choice(can), fault.needs == "padding"
        each = draw.random() < 0.3 and not (fault.shift or fault.rows or fault.page or padding)
        # Where both of two sequences take the other's state again and again, each gets back its own.
        rows = (1,) if padding else (0, 1) if each and fault.needs == "other" else (None, 0, 1)
        layer = draw.choice(layers if fault.shift is None else layers[:1])  # all layers turn by the same positions
        return cls(fault, layer, at, steps[at].start, each, draw.choice(rows))

    def strikes(self, number: int) -> bool:
        return number == self.at or (number > self.at and (self.each or self.fault.shift is not None))

    def names(self, steps: Sequence[Step]) -> tuple[str, ...]:
        """What a diagnosis may say."""
        again = " and each after it" if self.struck > 1 else ""
        at = self.at - sum(step.unseen for step in steps)
        return tuple(f"{name} at step {at}{again}" for name in sorted(self.alike))

    def spoil(self, state: LayerState, handed: Handed) -> None:
        """Change what the layer has of the steps so far."""
        found = {f.name: dict(f.change(handed).tensors()) for f in STEP_FAULTS if f.change and self._could(f, handed)}
        if self.fault.name not in found:  # no drafts were rejected in the step before
            return
        self.struck += 1
        changed = found[self.fault.name]
        self.alike &= {name for name, other in found.items() if _equal(changed, other)}
        for name, right in handed.right.tensors():
            wrong = changed.get(name)
            if self.row is not None and wrong is not None and wrong.shape == right.shape:
                mine = (torch.arange(len(right)) == self.row).view(-1, *[1] * (right.dim() - 1))
                wrong = torch.where(mine, wrong, right)
            setattr(state, name, wrong)

    def _could(self, fault: StepFault, handed: Handed) -> bool:
        """Whether a fault could be at work there."""
        if fault.page and (not self.fault.page or self.start % fault.page != self.start % self.fault.page):
            return False
        if fault.needs in ("rejected", "padding"):
            return fault.block == self.fault.block and handed.ran_on is not None and fault.needs == self.fault.needs
        x = handed.right.state
        return fault.block == self.fault.block and (fault.needs != "square" or x is None or x.shape[-1] == x.shape[-2])


def _suits(fault: StepFault, at: int, before: Step, steps: Sequence[Step]) -> bool:
    """Whether the fault can be at step `at`, which follows the step `before`."""
    if before.padded or fault.needs == "padding":
        return before.padded > 0 and fault.needs == "padding"
    if steps[0].padded and (fault.page or (fault.block == "attn" and fault.change is not None)):
        return False  # the mask of the batch has a column for each row; its pages begin elsewhere in each sequence
    needs = {"rejected": before.rejected > 0, "earlier": at > 1 and not steps[at - 2].unseen}
    start, page = steps[at].start, fault.page
    kept = not page or (start % page > 1 and start - start % page > max(before.start, page - 1))
    return needs.get(fault.needs, True) and fault.rows < start and kept


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


class _Broken:
    """What a fault made of values of tokens in a step. An engine that keeps some of them keeps these: they come from no
    other run, whose rows would lie elsewhere in memory."""

    def __init__(self) -> None:
        self.made: dict[str, Tensor] = {}

    def once(self, handler: Handler) -> Handler:
        def change(site: Site, x: Tensor) -> Tensor | None:
            mixed = site.index is None and site.expert is None and site.name in MIXED
            if mixed and site.key in self.made:
                return self.made[site.key][:, : x.shape[1]]
            y = handler(site, x)
            if mixed and y is not None:
                self.made[site.key] = y
            return y

        return FunctionHandler(change, handler.stage, handler.sees_experts)


class Engine:
    """A model that runs step by step, each step on what the one before left in `cache`."""

    def __init__(self, model: Model, ids_BT: Tensor, handlers: Handlers, planted: Planted | None, recorder: Recorder):
        self.model, self.ids, self.handlers, self.planted = model, ids_BT, handlers, planted
        self.recorder = recorder
        self.cache, self.earlier, self.short = Cache(), Cache(), Cache()
        self.ran_on: Cache | None = None  # after tokens that do not count, too
        self.page = Cache()
        self.tokens = self.rejected = 0  # of the step before
        self.lost_B1 = torch.zeros(len(ids_BT), 1, dtype=torch.long)  # padding so far
        self.shift_B1 = torch.zeros_like(self.lost_B1)  # what the fault adds to positions

    def fed(self, step: Step) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tokens, positions and mask of a step."""
        ids_BT = self.ids[:, step.start : step.start + step.size].clone()
        ids_BT[:, step.kept :] = (ids_BT[:, step.kept :] + 1) % 251
        return ids_BT, step.start + torch.arange(step.size) - self.lost_B1, step.mask(ids_BT)

    def _read(self, site: Site, x: Tensor) -> Tensor | None:
        """What this step's layers read. What an engine keeps of some of its tokens comes from no other run, which might
        choose other experts."""
        key = f"step.{self.recorder.step}.{site.key}" if self.recorder.step else site.key
        seen = self.recorder.trace
        return seen[key][:, : x.shape[1]].to(x) if site.name == "input_layernorm" and key in seen else None

    def run(self, number: int, step: Step) -> None:
        """One step."""
        ids_BT, at_BT, mask_BT = self.fed(step)
        before = self.cache.clone() if number else Cache()
        if self.planted is not None and number:
            self._plant(self.planted, number, at_BT)
        begun = self.cache.clone() if number else Cache()

        broken = _Broken()

        def feed(cache: Cache, count: int, mask_BT: Tensor | None = None) -> Cache:
            if count:
                moved_BT = (at_BT + self.shift_B1)[:, :count]
                with attach(*map(broken.once, self.handlers(at_BT[:, :count]))):
                    self.model(ids_BT[:, :count], cache=cache, position_ids=moved_BT, attention_mask=mask_BT)
            return cache

        feed(self.cache, step.size, mask_BT)
        self.earlier, self.tokens, self.ran_on = before, step.kept, self.cache if step.rejected else None
        self.rejected = step.rejected
        again = () if step.unseen else (FunctionHandler(self._read, REPLAY),)
        with attach(*again, instead_of=self.recorder):
            self.short = feed(begun.clone(), step.kept - 1) if step.kept > 1 else before
            if self.planted is not None and self.planted.fault.page and number == self.planted.at - 1:
                stop = step.start + step.kept
                self.page = feed(begun.clone(), stop - stop % self.planted.fault.page - step.start)
            if step.padded:
                self.ran_on = feed(begun.clone(), step.size)
            if step.rejected:
                self.cache = feed(begun, step.kept)
        self.lost_B1[1:] += step.padded

    def _plant(self, planted: Planted, number: int, at_BT: Tensor) -> None:
        fault, state = planted.fault, self.cache.layer(planted.layer)
        if number == planted.at and fault.shift is not None:
            lost_B1 = self.lost_B1 + self.rejected if fault.needs == "rejected" else self.lost_B1
            rows = enumerate(zip(at_BT[:, 0].tolist(), lost_B1.flatten().tolist(), strict=True))
            shifts = [fault.shift(*one) * (planted.row in (None, b)) for b, one in rows]
            self.shift_B1 = torch.tensor(shifts)[:, None]
            planted.alike = {fault.name, {1: "positions one too high"}.get(max(shifts), fault.name)}
        elif number == planted.at and fault.needs == "padding" and fault.block == "attn":
            mixer = self.model.get_submodule(f"layers.{planted.layer}.self_attn")
            mixer.register_forward_pre_hook(lambda _, given: (*given[:3], None, *given[4:]))  # no mask
        elif planted.strikes(number) and fault.change is not None:
            other = LayerState(**{name: x.flip(0) for name, x in state.tensors()})
            ran_on = None if self.ran_on is None else self.ran_on.layer(planted.layer)
            earlier, short, page = (cache.layer(planted.layer) for cache in (self.earlier, self.short, self.page))
            planted.spoil(state, Handed(replace(state), earlier, short, self.tokens, other, ran_on, page))


def run(
    model: Model, ids_BT: Tensor, steps: Sequence[Step], taps: str, meta: dict[str, Any],
    handlers: Handlers = lambda _: (), planted: Planted | None = None,
) -> Dump:  # fmt: skip
    """Step by step; what a planted shift makes of positions, the dump does not say."""
    with torch.no_grad(), record(taps, meta=dict(meta)) as recorder:
        engine = Engine(model, ids_BT, handlers, planted, recorder)
        for number, step in enumerate(steps):
            if step.unseen:
                with attach(instead_of=recorder):
                    engine.run(number, step)
                continue
            if recorder.meta["steps"]:
                recorder.next_step()
            ids, at, mask = engine.fed(step)
            recorder.meta["steps"].append(step_record(ids, mask, at, engine.cache))
            engine.run(number, step)
    return from_trace(recorder.trace)
