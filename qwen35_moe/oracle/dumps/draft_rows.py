"""Which token each row of a draft head's steps starts from.

The first draft of row t starts from token t+1: its steps are matched as the target's are, by ids and order. A further
draft of a chain has one row a sequence, and goes on from the last right row of the first draft's step before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import Qwen35Error
from ...run.prompt import padded
from ...trace.drafts import draft_ids_of
from ...trace.file import Trace
from .dump import Dump
from .match import FIRST, Matching
from .matched import DraftBranch, Matched
from .runs import runs

HIDDEN = "final_norm"
MOST_BRANCH_TOKENS = 1024  # or as many as the sequences have: so branches at most double the time of a long truth


@dataclass
class DraftRows:
    """where   step -> [n, 4]: row in the dump, b, t, the id that it starts from
    ends       step -> [runs, 3]: run, and b, t of its last token, or -1
    left_out   rows after a rejected draft, of more than one chain, or that do not stand where the chain goes on
    """

    where: dict[int, Tensor] = field(default_factory=dict)
    ends: dict[int, Tensor] = field(default_factory=dict)
    left_out: int = 0

    def ids(self, numbers: dict[int, int], like_BT: Tensor) -> list[Tensor]:
        """[B, T] for each draft of a chain: the ids that it starts from, -1 where the dump does not hold it."""
        found = [torch.full_like(like_BT, -1) for _ in range(max(numbers.values(), default=0))]
        for step, table in self.where.items():
            found[numbers[step] - 1][table[:, 1], table[:, 2]] = table[:, 3]
        return found


def draft_rows(dump: Dump, mask_BT: Tensor, next_BT: Tensor) -> DraftRows:
    """next_BT: token t+1 of row t, FIRST where it is not known."""
    matching, found = Matching(dump, mask_BT, next_BT), DraftRows()
    owner: dict[object, int | None] = {}
    for step, number in sorted(dump.drafts.items()):
        own = [(run.request if run.request is not None else i, run) for i, run in enumerate(runs(dump, [step]))]
        if number == 1:
            owner = {name: matching.place(run) for name, run in own}
            found.ends[step] = torch.tensor(matching.last.get(step, [])).reshape(-1, 3)
        tables = list(matching.tables.get(step, []))
        for name, run in own if number > 1 else ():
            b = owner.get(name)
            at = 0 if b is None else matching.filled[b] - 1
            if b is None or len(run) > 1 or run.start not in (None, at + number - 1):
                found.left_out += len(run)
            else:
                tables.append(torch.tensor([[int(run.rows[0]), b, int(matching.real[b][at])]]))
        if tables:
            table, ids = torch.cat(tables), dump.tokens[step].ids
            assert ids is not None
            found.where[step] = torch.cat((table, ids[table[:, :1]]), 1)
    found.left_out += matching.rejected + matching.beyond + sum(map(len, matching.strange))
    found.left_out += sum(len(run) for _, _, run in matching.left)
    return found


def drafts_of(dump: Dump, rows: Sequence[Tensor], own: int) -> list[Tensor]:
    """[B, T] for each draft of a chain: the ids that the dump's draft head started from at the tokens of the first
    `own` of these sequences, -1 where it does not say. Empty without draft steps."""
    ids_BT, mask = padded(list(rows))
    mask_BT = torch.ones_like(ids_BT) if mask is None else mask
    next_BT = torch.where(mask_BT.roll(-1, 1).bool(), ids_BT.roll(-1, 1), FIRST)
    next_BT[:, -1] = FIRST
    return draft_rows(dump, mask_BT[:own], next_BT[:own]).ids(dump.drafts, ids_BT)


def branches_of(dump: Dump, rows: Sequence[Tensor]) -> list[DraftBranch]:
    """The rejected drafts of a dump of these sequences; of too many, a part, from all over the dump."""
    _, matching = _matching(dump, rows)
    found = list(dict.fromkeys(DraftBranch(b, at, tuple(run.ids.tolist())) for b, at, run in matching.left))
    tokens, most = sum(x.at + len(x.ids) for x in found), max(MOST_BRANCH_TOKENS, sum(map(len, rows)))
    return found[:: -(-tokens // most)] if found else []


def _matching(dump: Dump, rows: Sequence[Tensor]) -> tuple[Tensor, Matching]:
    """The ids of sequences [B, T], and where the target's runs have them."""
    ids_BT, mask = padded(list(rows))
    matching = Matching(dump, torch.ones_like(ids_BT) if mask is None else mask, ids_BT)
    for run in runs(dump):
        matching.place(run)
    return ids_BT, matching


def hidden_of(dump: Dump, rows: Sequence[Tensor]) -> Tensor:
    """[B, T, D] the dump's hidden states after the final norm at the tokens of these sequences, NaN where it has none.
    Error: it has none at all of these tokens."""
    ids_BT, matching = _matching(dump, rows)
    steps = matching.tables.keys() & dump.sources.get(HIDDEN, {}).keys()
    parts = {step: (torch.cat(matching.tables[step]), dump.read(HIDDEN, step)) for step in sorted(steps)}
    width = {x.shape[1] for table, x in parts.values() if len(x) > int(table[:, 0].max())}
    if len(width) != 1:
        raise Qwen35Error("no hidden states of these tokens", where=dump.path, expected=HIDDEN, found=", ".join(dump))
    found = torch.full((*ids_BT.shape, *width), torch.nan, dtype=torch.float64)
    for table, x in parts.values():
        found[table[:, 1], table[:, 2]] = x[table[:, 0]].to(found)
    return found


def match_drafts(dump: Dump, truth: Trace, matched: Matched) -> None:
    """Adds the rows of the draft head's steps that start from the ids that the truth's drafts start from."""
    drafts = draft_ids_of(truth)
    if not dump.drafts or not drafts:
        return
    own = len(drafts[0]) - len(matched.branches)
    found = draft_rows(dump, truth.mask[:own], drafts[0][:own])
    other = deeper = 0
    for step, table in found.where.items():
        number = dump.drafts[step]
        if number > len(drafts):
            deeper += len(table)
            continue
        same = drafts[number - 1][table[:, 1], table[:, 2]] == table[:, 3]
        other += int((~same).sum())
        matched.drafts[step] = table[same, :3]
        matched.ends |= {step: found.ends[step]} if step in found.ends else {}
    rows = sum(map(len, matched.drafts.values()))
    matched.notes.append(f"draft head: {rows} rows of {len(matched.drafts)} steps were compared; {found.left_out} rows "
                         "after rejected drafts were not")  # fmt: skip
    for count, why in ((other, "start from other tokens than the truth's"), (deeper, "are of later drafts than its")):
        if count:
            matched.notes.append(f"draft head: {count} rows {why}, and were not compared")


def same_drafts(theirs: Sequence[Tensor], ours: Sequence[Tensor], part: str, table: Tensor) -> Tensor:
    """Rows (row, b, t) of a draft's part where both chains [B, T] started from the same ids, up to that draft."""
    number = int(part.partition(".")[2] or 1)
    for a_BT, b_BT in zip(theirs[:number], ours[:number], strict=False):
        table = table[a_BT.flatten()[table[:, 0]] == b_BT[table[:, 1], table[:, 2]]]
    return table
