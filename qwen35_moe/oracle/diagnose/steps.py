"""Hypotheses about what one step hands to the next (`step_faults.py`), for the steps of a dump where errors begin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import Qwen35Error
from ...model.config import FULL
from ..dumps.align import Alignment
from ..judge.hand_over import Foreign, HandOver
from ..judge.rerun import Rerun
from .faults import Fault
from .step_faults import STEP_FAULTS, StepFault

OTHER_SEQUENCES = 3  # other sequences that a state may be of: more are not tried
SHORT_STEP = 3  # tokens: what is wrong in a step of no more may be within rounding there, and beyond it later
EXPLAINED = 0.9  # of the error: no other step is tried then


@dataclass(frozen=True)
class Cut:
    """Where a step begins in a sequence: index among its real tokens."""

    at: int
    step: int


@dataclass(frozen=True)
class Onset:
    """Where the error of one sequence begins: the cuts from there on, and the step before."""

    b: int
    cuts: tuple[Cut, ...]
    before: Cut


def cuts_of(alignment: Alignment, real_BT: Tensor) -> dict[int, list[Cut]]:
    """By sequence, where the steps of a dump begin. A prefix that was cached is a step of its own, -1."""
    found: dict[int, dict[int, int]] = {}
    index_BT = real_BT.long().cumsum(1) - 1
    for step, table in sorted(alignment.tokens_of.where.items()):
        for b in table[:, 1].unique().tolist():
            at = int(index_BT[b, table[table[:, 1] == b, 2]].min())
            found.setdefault(b, {})[at] = step
    return {b: [Cut(at, step) for at, step in sorted({0: -1, **cuts}.items())] for b, cuts in found.items()}


def onsets(cuts: Mapping[int, Sequence[Cut]], bad: Mapping[int, int]) -> list[Onset]:
    """bad: sequence -> index of its first bad token. Empty where an error begins in a sequence's first step: no step
    before has handed anything over then."""
    found = []
    for b, first in bad.items():
        own = cuts.get(b, [Cut(0, -1)])
        start = max(i for i, cut in enumerate(own) if cut.at <= first)
        found.append(Onset(b, tuple(own[start:]), own[max(start - 1, 0)]))
    return found


def earlier(found: Sequence[Onset], cuts: Mapping[int, Sequence[Cut]]) -> Iterator[list[Onset]]:
    """Where the errors may have begun: where they are first beyond rounding; in all sequences in the earliest step that
    has one; one step before that, and two, as long as those are short."""
    yield list(found)
    step = min((o.cuts[0].step for o in found), default=-1)
    together = [_from(o.b, cuts[o.b], step) if o.b in cuts else o for o in found]
    if together != found:
        yield together
    for _ in range(2):
        if not found or any(o.cuts[0].at - o.before.at > SHORT_STEP or o.before.at == 0 for o in together):
            return
        together = [_from(o.b, cuts[o.b], o.before.step) for o in together]
        yield together


def _from(b: int, own: Sequence[Cut], step: int) -> Onset:
    """A sequence whose errors begin in its first step from this one on."""
    start = next((i for i, cut in enumerate(own) if cut.step >= step), len(own) - 1)
    return Onset(b, tuple(own[start:]), own[max(start - 1, 0)])


def hypotheses(
    rerun: Rerun, layer: int, block: str, alignment: Alignment, bad: Mapping[int, int], explained: Callable[[], float]
) -> Iterator[Fault]:
    """Faults of the catalogue, bound to the steps where the error of each sequence begins, or may have begun.
    explained: the share of the error that the best of those explains that were tried so far."""
    real_BT = rerun.tokens.mask.bool()
    cuts = cuts_of(alignment, real_BT)
    has = "attn" if rerun.config.layer_types[layer] == FULL else "gdn"
    first, foreign = onsets(cuts, bad) if block == has else [], _Foreign(alignment, layer, real_BT, cuts)
    for number, begun in enumerate(earlier(first, cuts)):
        if number and explained() > EXPLAINED:
            return
        for fault in (f for f in STEP_FAULTS if f.block == block) if begun else ():
            for name, plan, kind in _plans(fault, begun, foreign, rerun, cuts):
                step, at = begun[0].cuts[0].step, begun[0].cuts[0].at
                column = int(real_BT[begun[0].b].nonzero()[at])
                whose = "" if len(real_BT) == 1 else f"sequence {begun[0].b}, "
                more = f"; {len(begun)} sequences" if len(begun) > 1 else ""
                yield Fault(f"{name} at step {step}{kind}", block, seen=fault.seen, hand_over=plan,
                            where=f"{whose}token {column} on{more}")  # fmt: skip


def _plans(
    fault: StepFault, begun: Sequence[Onset], foreign: _Foreign, rerun: Rerun, cuts: Mapping[int, Sequence[Cut]]
) -> Iterator[tuple[str, HandOver, str]]:
    """A fault's ways to happen: at one step, or at each from there on; with the state of one or another sequence."""
    from_start = all(o.cuts[0].at == 0 for o in begun)
    if any(o.cuts[0].at == 0 for o in begun) and not (from_start and fault.needs == "padding"):
        return
    if fault.needs == "earlier" and not all(o.before.at > 0 for o in begun):
        return
    c = rerun.config
    if fault.needs == "square" and c.linear_key_head_dim != c.linear_value_head_dim:
        return
    for kind in ("", " and each after it"):
        if kind and (all(len(o.cuts) == 1 for o in begun) or fault.rows):
            return
        broken = {o.b: tuple(cut.at for cut in (o.cuts if kind or fault.shift else o.cuts[:1])) for o in begun}
        plan = HandOver(broken, {o.b: o.before.at for o in begun}, fault.change, fault.shift)
        if fault.needs in ("rejected", "padding"):
            plan = foreign.added(plan, fault.needs)
            if not plan.foreign:
                return
        if fault.shift is not None:
            if not kind:
                yield fault.name, plan, ""
            return
        if fault.needs != "other":
            yield fault.name, plan, kind
            continue
        for number in range(1, min(len(cuts), OTHER_SEQUENCES + 1)):
            other = {o.b: found for o in begun if (found := _other(o, cuts, number, rerun.tokens.mask))}
            if len(other) == len(begun) and all(fault.rows < min(o.cuts[0].at, other[o.b][1]) for o in begun):
                yield f"{fault.name} ({other[begun[0].b][0]})", _with_other(plan, other), kind


def _other(onset: Onset, cuts: Mapping[int, Sequence[Cut]], number: int, mask_BT: Tensor) -> tuple[int, int] | None:
    """The number-th other sequence, and how many of its tokens had been run before the step; None: none."""
    b = sorted(cuts)[(sorted(cuts).index(onset.b) + number) % len(cuts)]
    later = [cut.at for cut in cuts[b] if cut.step >= onset.cuts[0].step]
    count = min(later, default=int(mask_BT[b].sum()))
    return (b, count) if count else None


def _with_other(plan: HandOver, other: Mapping[int, tuple[int, int]]) -> HandOver:
    return HandOver(plan.broken, plan.earlier, plan.change, plan.shift, other, plan.foreign, plan.padding)


class _Foreign:
    """Rows of a dump that are no tokens of the truth, beside those that are: rejected drafts, padding."""

    def __init__(self, alignment: Alignment, layer: int, real_BT: Tensor, cuts: Mapping[int, Sequence[Cut]]):
        self.alignment, self.layer, self.real, self.cuts = alignment, layer, real_BT, cuts

    def added(self, plan: HandOver, needs: str) -> HandOver:
        found: dict[tuple[int, int], Foreign] = {}
        padding: dict[int, int] = {}
        for b, broken in plan.broken.items():
            for at in broken:
                step, rows = self._rows(b, at, needs)
                if rows and (x := self._read(step, rows)) is not None:
                    found[b, at], padding[b] = x, len(rows)
        return HandOver(plan.broken, plan.earlier, plan.change, plan.shift, {}, found, padding)

    def _rows(self, b: int, at: int, needs: str) -> tuple[int, list[int]]:
        """Rows of the step before, after this sequence's own; of the first step, those before them."""
        own = self.cuts[b]
        number = next(i for i, cut in enumerate(own) if cut.at == at)
        step = own[number - 1].step if number else own[0].step
        table, tokens = self.alignment.tokens_of.where.get(step), self.alignment.dump.tokens.get(step)
        if table is None or tokens is None:
            return step, []
        mine, all_rows = table[table[:, 1] == b, 0], set(table[:, 0].tolist())
        count = tokens.count or 0
        low, high = 0, count
        if tokens.batch is not None:
            low = int(mine.min()) // tokens.batch[1] * tokens.batch[1]
            high = low + tokens.batch[1]
        if number:
            last = int(mine.max()) + 1
            rows = list(range(last, next((r for r in range(last, high) if r in all_rows), high)))
        else:
            rows = list(range(low, int(mine.min()))) if tokens.batch is not None else []
        pads = tokens.mask is not None and any(not bool(tokens.mask[r]) for r in rows)
        return step, rows if pads == (needs == "padding") else []

    def _read(self, step: int, rows: list[int]) -> Foreign | None:
        for name, normed in (("input_layernorm", True), ("layer_input", False)):
            key = f"layers.{self.layer}.{name}"
            if step in self.alignment.dump.sources.get(key, {}):
                try:
                    return Foreign(self.alignment.dump.read(key, step)[torch.tensor(rows)], normed)
                except (Qwen35Error, IndexError):
                    continue
        return None
