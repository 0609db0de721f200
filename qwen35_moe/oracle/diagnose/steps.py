"""Faults between steps (`step_faults.py`), bound to the steps of a dump at which errors begin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...model.config import FULL
from ..dumps.align import Alignment
from ..judge.hand_over import Foreign, HandOver
from ..judge.rerun import Rerun
from .faults import Fault
from .step_faults import STEP_FAULTS, StepFault

OTHER_SEQUENCES = 3  # other sequences that a state may be of: more are not tried
SHORT_STEP = 3  # tokens: what is wrong in a step of no more may be within rounding there, and beyond it later


@dataclass(frozen=True)
class Cut:
    """Where a step begins in a sequence; at: an index among its real tokens."""

    at: int
    step: int


@dataclass(frozen=True)
class Onset:
    """Where the error of sequence b begins: at cut `number` of those of the sequence."""

    b: int
    own: Sequence[Cut]
    number: int

    @property
    def cuts(self) -> Sequence[Cut]:
        """The cuts from there on."""
        return self.own[self.number :]

    @property
    def before(self) -> Cut:
        """The step before; of the first step, itself."""
        return self.own[max(self.number - 1, 0)]

    def moved(self, step: int) -> Onset:
        """The error begins in the sequence's first step from `step` on."""
        number = next((i for i, cut in enumerate(self.own) if cut.step >= step), len(self.own) - 1)
        return replace(self, number=number)


def cuts_of(tables: Mapping[int, Tensor], real_BT: Tensor) -> dict[int, list[Cut]]:
    """By sequence, where steps begin. What comes before the first step of the dump, a cached prefix, is step -1.
    tables: step -> [n, 3] row, b, t of its tokens."""
    found: dict[int, dict[int, int]] = {}
    index_BT = real_BT.long().cumsum(1) - 1
    for step, table in sorted(tables.items()):
        for b in table[:, 1].unique().tolist():
            at = int(index_BT[b, table[table[:, 1] == b, 2]].min())
            found.setdefault(b, {0: -1})[at] = step
    return {b: [Cut(at, step) for at, step in sorted(cuts.items())] for b, cuts in found.items()}


def onsets(cuts: Mapping[int, Sequence[Cut]], bad: Mapping[int, int]) -> list[Onset]:
    """The onset of each sequence that has an error. bad: sequence -> index of its first bad token."""
    with_own = [(b, cuts.get(b, [Cut(0, -1)]), first) for b, first in bad.items()]
    return [Onset(b, own, max(i for i, cut in enumerate(own) if cut.at <= first)) for b, own, first in with_own]


def earlier(found: list[Onset]) -> Iterator[list[Onset]]:
    """Where the errors may have begun, one guess after another: where each is first beyond rounding; all of them in the
    earliest of these steps; one step before that, and two, if these steps are short."""
    if not found:
        return
    yield found
    step = min(o.cuts[0].step for o in found)
    together = [o.moved(step) for o in found]
    if together != found:
        yield together
    for _ in range(2):
        if any(o.cuts[0].at - o.before.at > SHORT_STEP or o.before.at == 0 for o in together):
            return
        together = [o.moved(o.before.step) for o in together]
        yield together


def in_engine_steps(fault: Fault, rerun: Rerun, alignment: Alignment) -> Iterator[Fault]:
    """The fault; then, for DeltaNet that ran in several steps, the same fault in a run of these steps. Where its memory
    grows, sums within a step are far from those of one pass, in float32."""
    yield fault
    if fault.block == "gdn" and fault.hand_over is None and not fault.rows:
        cuts = cuts_of(alignment.tokens_of.read, rerun.tokens.mask.bool())
        starts = {b: tuple(cut.at for cut in own) for b, own in cuts.items() if len(own) > 1}
        if starts:
            yield replace(fault, hand_over=HandOver(starts, {}))


def hypotheses(
    rerun: Rerun, layer: int | None, block: str, alignment: Alignment, bad: Mapping[int, int],
    known: Callable[[], str],
) -> Iterator[Fault]:  # fmt: skip
    """Faults between steps, bound to where the error of each sequence begins (`bad`), or may have begun. The draft head
    (layer None) has those of an attention layer.

    known() is the name of the best hypothesis so far, if it explains nearly all of the error: then, at earlier steps,
    only the fault that it names is tried."""
    real_BT = rerun.tokens.mask.bool()
    has = "attn" if layer is None or rerun.config.layer_types[layer] == FULL else "gdn"
    if block not in ("mtp", has):
        return
    plans = _Plans(rerun, alignment, layer)
    for number, begun in enumerate(earlier(onsets(plans.cuts, bad))):
        name = known() if number else ""
        step, at = begun[0].cuts[0].step, begun[0].cuts[0].at
        whose = "" if len(real_BT) == 1 else f"sequence {begun[0].b}, "
        more = f"; {len(begun)} sequences" if len(begun) > 1 else ""
        where = f"{whose}token {int(real_BT[begun[0].b].nonzero()[at])} on{more}"
        for fault in (f for f in STEP_FAULTS if f.block == has and (not name or f"{f.name} " in name)):
            for what, plan, kind in plans.of(fault, begun):
                said = f"{'draft head: ' * (layer is None)}{what} at step {step}{kind}"
                yield Fault(said, block, seen=fault.seen, hand_over=plan, where=where)


class _Plans:
    """What each fault hands over at the steps of a dump. Foreign tokens are rows of the dump that are no tokens of the
    truth: rejected drafts, padding. The draft head (layer None) has those of further drafts, which it drops when the
    next step begins; its steps are those of first drafts, if the dump has any of its own, else the target's."""

    def __init__(self, rerun: Rerun, alignment: Alignment, layer: int | None):
        self.rerun, self.alignment, self.layer = rerun, alignment, layer
        self.mask, self.branches = rerun.tokens.mask, alignment.tokens_of.branches
        drafts = alignment.tokens_of.drafts if layer is None else {}
        first = {step: table for step, table in drafts.items() if alignment.dump.drafts.get(step) == 1}
        self.tables = first or alignment.tokens_of.read
        self.cuts = cuts_of(self.tables, self.mask.bool())

    def of(self, fault: StepFault, begun: Sequence[Onset]) -> Iterator[tuple[str, HandOver, str]]:
        """(name, plan, "" or " and each after it") of a fault: at one step, or at each from there on; with the state of
        one or another sequence."""
        for kind in ("", " and each after it") if self._can(fault, begun) else ():
            if kind and (fault.shift is not None or fault.rows or all(len(o.cuts) == 1 for o in begun)):
                return
            broken = {o.b: tuple(cut.at for cut in (o.cuts if kind or fault.shift else o.cuts[:1])) for o in begun}
            plan = HandOver(broken, {o.b: o.before.at for o in begun}, fault.change, fault.shift, page=fault.page)
            if fault.needs in ("rejected", "padding"):
                plan = self._with_foreign(plan, fault.needs)
                if not plan.foreign or (kind and len(plan.foreign) <= len(begun)):
                    return
            if fault.needs != "other":
                yield fault.name, plan, kind
                continue
            for number in range(1, min(len(self.cuts.keys() - self.branches), OTHER_SEQUENCES + 1)):
                other = self._others(broken, number)
                if other and all(fault.rows < min(at, other[b, at][1]) for b, at in other):
                    whose = other[begun[0].b, begun[0].cuts[0].at][0]
                    yield f"{fault.name} ({whose})", replace(plan, other=other), kind

    def _can(self, fault: StepFault, begun: Sequence[Onset]) -> bool:
        """Whether what the fault hands over exists, and is no other fault's: neither right nor one token short."""
        starts, config = [o.cuts[0].at for o in begun], self.rerun.config
        if not all(starts):
            return not any(starts) and fault.needs == "padding"
        square = config.linear_key_head_dim == config.linear_value_head_dim
        needs = {"earlier": all(o.before.at > 0 for o in begun), "square": square}
        return needs.get(fault.needs, True) and (
            not fault.page or all(at > fault.page and at % fault.page > 1 for at in starts)
        )

    def _others(self, broken: Mapping[int, Sequence[int]], number: int) -> dict[tuple[int, int], tuple[int, int]]:
        """`HandOver.other`, if each takes the state of the number-th sequence after it; empty if one had not begun."""
        found, order = {}, sorted(self.cuts.keys() - self.branches)
        for b, starts in broken.items():
            whose = self.branches[b][0] if b in self.branches else b
            other, step_of = order[(order.index(whose) + number) % len(order)], {c.at: c.step for c in self.cuts[b]}
            for at in starts:
                later = [cut.at for cut in self.cuts[other] if cut.step >= step_of[at]]
                found[b, at] = (other, min(later, default=int(self.mask[other].sum())))
        return found if all(count for _, count in found.values()) else {}

    def _with_foreign(self, plan: HandOver, needs: str) -> HandOver:
        found: dict[tuple[int, int], Foreign] = {}
        for b, at in ((b, at) for b, broken in plan.broken.items() for at in broken):
            if self.layer is not None:
                x = self.alignment.step_rows.mixer_input(self.layer, *self._rows(b, at, needs))
            else:
                x = self._chain(b, at) if needs == "rejected" else None
            if x is not None:
                found[b, at] = x
        return replace(plan, foreign=found, padding={b: len(x.x) for (b, _), x in found.items()})

    def _chain(self, b: int, at: int) -> Foreign | None:
        """What attention read in the further drafts that started from the token before `at`."""
        row, tokens = b * self.mask.shape[1] + int(self.mask[b].nonzero().flatten()[at - 1]), self.rerun.tokens
        keys = [f"mtp.{k}.layers.0.input_layernorm" for k in range(2, len(tokens.drafts) + 1)]
        whole = [self.rerun.captured.whole(key, tokens.count) for key in keys if at]
        rows = [x[row] for x in whole if x is not None and x[row].isfinite().all()]
        return Foreign(torch.stack(rows), True) if rows else None

    def _rows(self, b: int, at: int, needs: str) -> tuple[int, list[int]]:
        """The step before `at`, and its rows that follow this sequence's own; in its first step, those before them."""
        number = next(i for i, cut in enumerate(self.cuts[b]) if cut.at == at)
        step = self.cuts[b][max(number - 1, 0)].step
        table, tokens = self.tables.get(step), self.alignment.dump.tokens.get(step)
        if table is None or tokens is None:
            return step, []
        sequences = len(self.mask) - len(self.branches)
        mine, all_rows = table[table[:, 1] == b, 0], set(table[table[:, 1] < sequences, 0].tolist())
        first, last = int(mine.min()), int(mine.max()) + 1
        low, high = first, tokens.count or 0
        if tokens.batch is not None:
            low = first // tokens.batch[1] * tokens.batch[1]
            high = low + tokens.batch[1]
        end = next((r for r in range(last, high) if r in all_rows), high)
        rows = list(range(last, end) if number else range(low, first))
        pads = tokens.mask is not None and any(not bool(tokens.mask[r]) for r in rows)
        return step, rows if pads == (needs == "padding") else []
