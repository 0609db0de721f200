"""What is compared of tokens, beside their taps: positions, and the drafts that were accepted.

A pass of the target verifies K drafts after a known token. Greedy decoding accepts draft i if all drafts before it are
accepted and it is the likeliest token after them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ...model.mtp import greedy
from ...trace.drafts import draft_ids_of
from ...trace.images import axes_in
from ..dumps.align import Alignment, joined
from ..dumps.runs import Run, runs
from ..dumps.sequences import LOGITS
from .diagnosis import Diagnosis, Hypothesis
from .records import POSITIONS, Record


def engine_positions(alignment: Alignment) -> Tensor:
    """[B, T] the positions that the engine's rotary embedding used; the truth's, if the dump does not hold them. With
    images: [3, B, T], the truth's, since what engines dump as positions counts tokens."""
    if (axes := axes_in(alignment.truth)) is not None:
        return axes
    found = alignment.truth.positions.clone()
    told = alignment.tokens_of.positions
    which, places = alignment.tokens_of.beginnings(told[:, :2])
    for rows, (b, t) in ((told, told[:, :2].T), (told[which], places.T)):
        found[b, t] = rows[:, 4].to(found)
    return found


def judge_positions(alignment: Alignment) -> Record | None:
    """A record, if the dump holds positions that differ from the truth's: those of the step, or of the rotary
    embedding.

    Positions that are all off by one number are wrong, too, although RoPE is relative and may hide it from all values.
    """
    rows = alignment.tokens_of.positions
    bad = rows[(rows[:, 3:] != rows[:, 2:3]).any(1)]
    if axes_in(alignment.truth) is not None or not len(bad):
        return None
    b, t, ours, *both = bad[0].tolist()
    theirs = next(x for x in both if x != ours)
    mine = rows[rows[:, 0] == b]
    moved = (mine[:, 3] - mine[:, 2]).unique().tolist()
    where = f"sequence {b}, token {t} is at {theirs}, and should be at {ours}"
    if bool((bad[:, 4] == bad[:, 2]).all()):
        where += "; the rotary embedding took the right ones"
    if len(moved) == 1 and b not in alignment.tokens_of.branches:
        where = f"all of sequence {b} are {_by(moved[0])}, which RoPE does not see"
    note = f"{len(bad)} of {len(rows)} are wrong: {where}"
    return Record(POSITIONS, "wrong", POSITIONS, None, float("inf"), rows=len(rows), bad_rows=len(bad), worst=(b, t),
                  starts=alignment.tokens_of.starts(bad[:, :2]), note=note)  # fmt: skip


def moved_alike(alignment: Alignment) -> list[Diagnosis]:
    """The diagnosis of positions that are all off by one number from some step of each sequence on."""
    rows = alignment.tokens_of.positions
    bad = rows[rows[:, 3] != rows[:, 2]]
    off = (bad[:, 3] - bad[:, 2]).unique().tolist()
    if len(off) != 1:
        return []
    b, t = bad[0, :2].tolist()
    step = next(s for s, table in sorted(alignment.tokens_of.where.items()) if [b, t] in table[:, 1:].tolist())
    name = f"positions {_by(off[0])} at step {step}"
    cause = Hypothesis(name, 1.0, "mlx-vlm 1621", "", f"sequence {b}, token {t} on")
    return [Diagnosis(None, POSITIONS, POSITIONS, [cause], True)]


def _by(off: int) -> str:
    return f"{'one' if abs(off) == 1 else abs(off)} too {'high' if off > 0 else 'low'}"


@dataclass
class Acceptance:
    """The counts of one draft of a chain: how often it was verified; how often the engine accepted it; how often the
    truth accepts it; how often the truth's draft head drafts the same token; how often the truth accepts the draft of
    its own head. None: not known, because the drafts are not known."""

    draft: int
    verified: int = 0
    accepted: int = 0
    truth_accepts: int | None = 0
    alike: int | None = 0
    own_accepted: int = 0

    def __str__(self) -> str:
        theirs = f" the truth accepts {self.truth_accepts}, and its head drafts the same token {self.alike} times;"
        theirs = "" if self.truth_accepts is None else theirs
        return (f"draft {self.draft}: verified {self.verified} times, accepted {self.accepted} times;{theirs} "
                f"of what its head drafts, the truth accepts {self.own_accepted}")  # fmt: skip


def acceptance(alignment: Alignment) -> list[Acceptance]:
    """From the passes of a dump, or from the counts that servers report. Empty if either side has no drafts."""
    truth, drafts = alignment.truth, draft_ids_of(alignment.truth)
    heads = [LOGITS, *(f"mtp.{k}.{LOGITS}" if k > 1 else f"mtp.{LOGITS}" for k in range(1, len(drafts) + 1))]
    if not drafts or any(key not in truth for key in heads):
        return []
    best_BT, *own = (greedy(joined(truth, key)) for key in heads)
    if alignment.dump.accepted:
        return _of_servers(alignment, own)
    found = [Acceptance(k + 1) for k in range(len(own))]
    for run, b, t, right in _verified(alignment, len(own)):
        truths = True
        for k, (token, said) in enumerate(zip(run.ids[1:].tolist(), found, strict=True)):
            known = k < right  # whether the tokens before this draft are the truth's
            truths = truths and known and int(best_BT[b, t + k]) == token
            said.verified += 1
            said.accepted += k + 1 < right
            said.truth_accepts = (said.truth_accepts or 0) + truths
            said.alike = (said.alike or 0) + (int(own[k][b, t - 1]) == token)
            said.own_accepted += known and int(own[k][b, t - 1]) == int(best_BT[b, t + k])
    return [said for said in found if said.verified]


def _verified(alignment: Alignment, count: int) -> Iterator[tuple[Run, int, int, int]]:
    """(run, b, t of its first token, how many of its tokens are the truth's) of passes that verify `count` drafts."""
    dump, where = alignment.dump, alignment.tokens_of.where
    own = len(alignment.truth.ids) - len(alignment.tokens_of.branches)
    for run in runs(dump):
        if len(run) == count + 1 and run.start and run.step in where and run.step - 1 in dump.drafts:
            table = where[run.step]
            mine = table[(table[:, :1] == run.rows).any(1) & (table[:, 1] < own)]
            if len(mine) and int(mine[0, 2]):
                yield run, int(mine[0, 1]), int(mine[0, 2]), len(mine)


def _of_servers(alignment: Alignment, own: Sequence[Tensor]) -> list[Acceptance]:
    """The engine's counts are what servers say, answer by answer. The truth's are of its own chains, at the tokens from
    which a server with these drafts would start a pass."""
    truth, found = alignment.truth, [Acceptance(k + 1, truth_accepts=None, alike=None) for k in range(len(own))]
    for step, (at, histogram) in alignment.dump.accepted.items():
        table = alignment.tokens_of.where.get(step)
        if table is None or not len(table):
            continue
        b = int(table[0, 1])
        ids = truth.ids[b][truth.mask[b].bool()].tolist()
        for k, said in enumerate(found):
            said.verified += sum(histogram)
            said.accepted += sum(histogram[k + 1 :])
        while at < len(ids) - 1:
            right = 0
            while right < len(own) and at + right + 1 < len(ids) and int(own[right][b, at - 1]) == ids[at + right + 1]:
                found[right].own_accepted += 1
                right += 1
            at += right + 1
    return found
