"""Positions: they are compared like any value, and reruns of attention use those of the engine."""

from __future__ import annotations

from torch import Tensor

from ...trace.images import axes_in
from ..dumps.align import Alignment
from .diagnosis import Diagnosis, Hypothesis
from .records import POSITIONS, Record

__all__ = ["POSITIONS", "engine_positions", "judge_positions"]


def engine_positions(alignment: Alignment) -> Tensor:
    """[B, T] the positions that the engine's rotary embedding used; the truth's, if the dump does not hold them. With
    images: [3, B, T], the truth's, since what engines dump as positions counts tokens."""
    if (axes := axes_in(alignment.truth)) is not None:
        return axes
    found = alignment.truth.positions.clone()
    b, t, _, _, theirs = alignment.tokens_of.positions.unbind(1)
    found[b, t] = theirs.to(found)
    return found


def judge_positions(alignment: Alignment) -> Record | None:
    """A record, if the dump holds positions that differ from the truth's: those of the step, or of the rotary
    embedding.

    Positions that are all moved by one number are wrong, too, although RoPE is relative and no value may show it.
    """
    if axes_in(alignment.truth) is not None:
        return None
    rows = alignment.tokens_of.positions
    bad = rows[(rows[:, 3:] != rows[:, 2:3]).any(1)]
    if not len(bad):
        return None
    b, t, ours, *both = bad[0].tolist()
    theirs = next(x for x in both if x != ours)
    mine = rows[rows[:, 0] == b]
    moved = (mine[:, 3] - mine[:, 2]).unique().tolist()
    where = f"sequence {b}, token {t} is at {theirs}, and should be at {ours}"
    if bool((bad[:, 4] == bad[:, 2]).all()):
        where += "; the rotary embedding took the right ones"
    if len(moved) == 1:
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
