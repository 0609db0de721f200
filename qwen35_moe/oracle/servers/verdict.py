"""Compares answers with the truth at the positions that both have, and gives one of three verdicts.

agrees        no test speaks against it, and the tests would have spoken: every replayed fault would be seen here, but
              those that only round (a format of the cache or of the state)
diverges      a quantile of z is surely beyond the limit, a fault explains the answers far better than rounding does, or
              the positions of one expert differ more than others do
cannot tell   neither: too few positions, or a suspicion. A dump decides, and the layers to dump are named
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import Qwen35Error
from .answer import FAR, UNKNOWN, Answer
from .judge import Explanation, Judge, Positions, Quantile
from .one_expert import OneExpert

Outcome = Literal["agrees", "diverges", "cannot tell without a dump"]
EXIT: dict[Outcome, int] = {"agrees": 0, "diverges": 1, "cannot tell without a dump": 2}
ALIKE = 5.0  # nats: hypotheses that are no further apart are not told apart
TOKENS_PER_POSITION = 64  # tokens of one position that the tests look at


@dataclass
class Told:
    """What answers tell of the prompts: positions, log p [R, K] there, the likeliest token (-1: not told) [R]; and the
    same with all tokens that are told, where these are more than TOKENS_PER_POSITION."""

    at: Positions
    log_p: Tensor
    best: Tensor
    notes: list[str] = field(default_factory=list)
    whole: tuple[Positions, Tensor] | None = None


@dataclass
class Verdict:
    """`evidence`: lines of text, what was measured and what it says. `alike`: the hypotheses that explain best, and
    cannot be told apart; empty where nothing has to be explained, or nothing explains it."""

    finding: Outcome
    why: str
    evidence: list[str]
    alike: list[Explanation]
    nearest: Explanation | None
    positions: int
    sequences: int
    quantiles: list[Quantile]
    suspect: Explanation | None  # the best of those that would be seen here
    notes: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)  # faults of the catalogue that these answers would not show
    experts: list[OneExpert] = field(default_factory=list)  # those whose positions differ more than others do

    @property
    def exit_code(self) -> int:
        return EXIT[self.finding]

    def add(self, what: str, other: Verdict) -> None:
        """Add the verdict on more answers, which `what` names: its evidence, and its finding if it is worse."""
        self.evidence += [f"{what}, {other.positions} positions: {line}" for line in other.evidence]
        if other.finding == "diverges" and self.finding != "diverges":
            self.finding, self.why, self.unseen = "diverges", f"{what}: {other.why}", []
            self.alike, self.nearest, self.suspect = other.alike, other.nearest, other.suspect
            self.experts = other.experts

    def to_dict(self) -> dict[str, Any]:
        records = asdict(self)
        for q in records["quantiles"]:  # JSON has no infinity
            q["high"] = q["high"] if math.isfinite(q["high"]) else None
        return records


def told(answers: Sequence[Answer], ids: Sequence[Sequence[int]], vocab: int) -> Told:
    """The rows of answers that follow tokens of a prompt. Errors: no such row; an id that is no token."""
    rows: dict[tuple[int, int], tuple[dict[int, float], int]] = {}
    notes, elsewhere, empty = list[str](), 0, 0
    for answer in answers:
        notes += answer.notes
        if wrong := [i for i in answer.clamped if i < vocab - 1]:
            raise Qwen35Error("the answer is for other tokens", where=answer.engine, expected=f"id {wrong[0]}", found=0)
        if large := [i for row in answer.rows for i in row.log_p if i >= vocab]:
            raise Qwen35Error("the server has another vocabulary: it serves another model", where=answer.engine,
                              expected=f"ids below {vocab}", found=large[0])  # fmt: skip
        for row in answer.rows:
            if not row.log_p or row.place < 1:
                empty += row.place > 0
                continue
            b = next((b for b, known in enumerate(ids) if _same(answer.ids, known, row.place)), None)
            if b is None:
                elsewhere += 1
            else:
                rows.setdefault((b, row.place - 1), (row.log_p, -1 if row.best is None else row.best))
    if not rows:
        first = next((a.ids[:8] for a in answers if a.ids), "none")
        raise Qwen35Error("the answers are for other tokens", where="answers", expected=f"ids {list(ids[0][:8])} ...",
                          found=f"{first}, {elsewhere} positions, and {empty} without log p",
                          do="ask for the tokens of the truth")  # fmt: skip
    if elsewhere:
        notes.append(f"{elsewhere} positions are not judged: they follow other tokens than the prompts'")
    if empty:
        notes.append(f"{empty} positions are told without any log p")
    keys, tables, best = [*rows], [log_p for log_p, _ in rows.values()], torch.tensor([b for _, b in rows.values()])
    given = [ids[b][place + 1] if place + 1 < len(ids[b]) else UNKNOWN for b, place in keys]
    few = [_few(log_p, i) for log_p, i in zip(tables, given, strict=True)]
    whole = _table(keys, tables) if max(map(len, tables)) > TOKENS_PER_POSITION else None
    return Told(*_table(keys, few), best, list(dict.fromkeys(notes)), whole)


def _few(log_p: dict[int, float], given: int) -> dict[int, float]:
    """The given token and the likeliest, TOKENS_PER_POSITION in all."""
    first = sorted(log_p, key=lambda i: (i != given, -log_p[i], i))[:TOKENS_PER_POSITION]
    return {i: log_p[i] for i in first}


def _table(keys: Sequence[tuple[int, int]], tables: Sequence[dict[int, float]]) -> tuple[Positions, Tensor]:
    R, K = len(tables), max(map(len, tables))
    token, known = torch.zeros(R, K, dtype=torch.long), torch.zeros(R, K, dtype=torch.bool)
    value = torch.zeros(R, K, dtype=torch.float64)
    for r, log_p in enumerate(tables):
        n = len(log_p)
        token[r, :n], value[r, :n] = torch.tensor([*log_p]), torch.tensor([*log_p.values()], dtype=torch.float64)
        known[r, :n] = True
    sequence, place = (torch.tensor(x) for x in zip(*keys, strict=True))
    return Positions(sequence, place, token, known), value


def _same(said: Sequence[int], known: Sequence[int], place: int) -> bool:
    """Whether both begin with the same `place` tokens."""
    return place <= min(len(known), len(said)) and list(said[:place]) == list(known[:place])


def decide(judge: Judge, found: Told, routing: Sequence[str] = ()) -> Verdict:
    """The verdict on the answers. `routing`: the evidence of the answers' experts against the engine."""
    (quantiles, explanations), nan = judge.look(found.log_p), int((found.log_p.isnan() & judge.known).any(1).sum())
    accused, worst = judge.experts(found.log_p)
    positions, sequences = len(found.log_p), len(found.at.sequence.unique())
    visible = [e for e in explanations if e.visible]
    best = max(visible, key=lambda e: e.sure, default=None)
    routing = [f"log p at {nan} of {positions} positions are NaN", *routing] if nan else routing
    finding, why = _finding(judge, quantiles, visible, best, routing, accused)
    lines = [f"{q.name} of |delta log p|: {q.ratio:.2f} x the legal one (99.9 % sure: {q.low:.2f} to "
             f"{q.high:.2f}; limit {FAR:g})" for q in quantiles]  # fmt: skip
    if best is not None:
        lines.append(f"likeliest fault: {best.name}, {best.gain:+.0f} nats over rounding, {best.sure:+.0f} without its "
                     f"strongest prompt (more than {judge.need:.0f} decide)")  # fmt: skip
    if judge.single.shown:
        lines.append(f"worst expert: {_said(worst, judge)}; {judge.single.shown} of {judge.single.count} experts have "
                     "positions enough")  # fmt: skip
    notes, evidence = list(found.notes), [*lines, *_top_k(judge, found), *routing]
    if finding != "agrees" and _stranger(judge, found):
        notes.append("log p have little to do with the truth's: this looks like another model, or another prompt")
    nearest = explanations[0] if explanations else None
    alike = list[Explanation]()
    if finding != "agrees" and nearest is not None and nearest.gain > judge.need / 2 and nearest.left <= FAR:
        alike = [e for e in explanations if e.gain > nearest.gain - ALIKE and e.left <= FAR]
    unseen = judge.power()[1] if finding != "diverges" else []
    if unseen or finding == "agrees":
        few = judge.single.count - judge.single.shown
        unseen += [f"faults of one expert, for {few} of {judge.single.count} experts"] if few else []
    return Verdict(finding, why, evidence, alike, nearest, positions, sequences, quantiles, best, notes, unseen,
                   accused)  # fmt: skip


def _finding(
    judge: Judge, quantiles: Sequence[Quantile], visible: Sequence[Explanation], best: Explanation | None,
    routing: Sequence[str], accused: Sequence[OneExpert],
) -> tuple[Outcome, str]:  # fmt: skip
    for q in quantiles:
        if q.low > FAR:
            return "diverges", f"the {q.name} of the differences is {q.ratio:.3g} x the legal one"
    if routing:
        return "diverges", routing[0]
    unsure: Outcome = "cannot tell without a dump"
    said = f"{best.name}: {best.sure:.0f} nats likelier than rounding, without its strongest prompt" if best else ""
    if best and best.sure > judge.need:
        return "diverges", said
    if accused:
        return "diverges", _said(accused[0], judge)
    if best and (best.sure > judge.need / 2 or max(e.gain for e in visible) > judge.need):
        return unsure, f"a suspicion: {said}; more than {judge.need:.0f} decide. Ask more prompts"
    if quantiles[0].high > FAR:
        return unsure, "the differences may be beyond the limit: ask more prompts"
    if blind := judge.blind():
        return unsure, blind
    return "agrees", "the differences are within legal rounding, and no fault of the catalogue explains them better"


def _said(x: OneExpert, judge: Judge) -> str:
    return (f"{x}: its {x.positions} positions differ {x.ratio:.1f} x as much as others, {x.gain:.0f} nats over chance "
            f"(more than {judge.single.need:.0f} decide)")  # fmt: skip


def _top_k(judge: Judge, found: Told) -> list[str]:
    """KL as far as K tokens tell it, and the likeliest token. With the rest as one event the sum is a lower bound of
    KL(truth | engine)."""
    told_best = found.best >= 0
    if not told_best.any():
        return []
    known = judge.known[told_best]
    p, q = judge.truth[told_best], found.log_p[told_best]
    kl = coarse_kl(p, q, known)
    legal = [float(coarse_kl(p, p + d[told_best], known).median()) for d in judge.legal]
    theirs, ours = found.best[told_best], judge.best[told_best]
    flip = theirs != ours
    at = judge.at.ids[told_best]
    value = torch.where(at == theirs[:, None], p, -torch.inf).amax(1)
    noise = judge.legal[:, told_best].abs().masked_fill(~known, 0).amax((0, 2))
    excused = flip & (judge.most[told_best] - value <= 2 * noise)
    n = len(flip)
    return [f"KL of the truth and the engine, at least: median {float(kl.median()):.2g} nat, legal {max(legal):.2g}",
            f"likeliest token: the same at {n - int(flip.sum())} of {n}; {int(excused.sum())} of {int(flip.sum())} "
            "others are near ties"]  # fmt: skip


def coarse_kl(p: Tensor, q: Tensor, known: Tensor) -> Tensor:
    """sum p (log p - log q) over known tokens and the rest as one: log p, log q [R, K] -> [R], 0 or more."""
    mass, theirs = (torch.where(known, x.exp(), 0.0).sum(1).clamp(max=1 - 1e-12) for x in (p, q))
    inner = torch.where(known, p.exp() * (p - q), 0.0).sum(1)
    return (inner + (1 - mass) * ((1 - mass) / (1 - theirs)).log()).clamp(min=0)


def _stranger(judge: Judge, found: Told) -> bool:
    ours, theirs = judge.truth[judge.known], found.log_p[judge.known]
    return len(ours) > 8 and float(torch.corrcoef(torch.stack((ours, theirs)))[0, 1]) < 0.3
