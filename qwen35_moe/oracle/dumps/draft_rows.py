"""Which token each row of a draft head's steps starts from.

The first draft of row t starts from token t+1: its steps are matched as the target's are, by ids and order. A further
draft of a chain has one row a sequence, and goes on from the last right row of the first draft's step before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import Qwen35Error
from ...trace.drafts import draft_ids_of
from ...trace.file import Trace
from .dump import Dump
from .match import FIRST, Matching, match_runs, sequences_at
from .matched import DraftBranch, Matched
from .runs import runs

HIDDEN = "final_norm"
MOST_BRANCH_TOKENS = 1024  # or as many as the sequences have: so branches at most double the time of a long truth


def draft_rows(
    dump: Dump, ids: Sequence[Tensor], columns: Sequence[Tensor] | None = None
) -> tuple[dict[int, Tensor], int]:
    """step -> [n, 4]: row in the dump, b, t, the id that it starts from; and how many rows were left out: after a
    rejected draft, of more than one chain, or where the chain does not go on. ids, columns: as of `Matching`, token t+1
    for row t, FIRST where it is not known."""
    matching, deeper, left_out = Matching(dump, ids, columns), dict[int, Tensor](), 0
    owner: dict[object, int | None] = {}
    for step, number in sorted(dump.drafts.items()):
        own = [(run.request if run.request is not None else i, run) for i, run in enumerate(runs(dump, [step]))]
        if number == 1:
            owner = {name: matching.place(run) for name, run in own}
            continue
        rows = []
        for name, run in own:
            b = owner.get(name)
            at = 0 if b is None else matching.filled[b] - 1
            if b is None or len(run) > 1 or run.start not in (None, at + number - 1):
                left_out += len(run)
            else:
                rows.append([int(run.rows[0]), b, int(matching.columns[b][at])])
        deeper |= {step: torch.tensor(rows)} if rows else {}
    tables = sorted((matching.where() | deeper).items())
    where = {step: torch.cat((table, fed[table[:, :1]]), 1) for step, table in tables
             if (fed := dump.tokens[step].ids) is not None}  # fmt: skip
    return where, left_out + sum(len(run) for some in matching.rest.values() for *_, run in some)


def drafts_of(dump: Dump, sequences: Sequence[Tensor], own: int) -> list[Tensor]:
    """[B, T] for each draft of a chain: the ids that the dump's draft head started from at the tokens of the first
    `own` of these sequences, -1 where it does not say. Empty without draft steps."""
    shape = len(sequences), max(map(len, sequences))
    found = [torch.full(shape, -1) for _ in range(max(dump.drafts.values(), default=0))]
    follow = [torch.cat((row[1:], row.new_tensor([FIRST]))) for row in sequences[:own]]
    for step, table in draft_rows(dump, follow)[0].items():
        found[dump.drafts[step] - 1][table[:, 1], table[:, 2]] = table[:, 3]
    return found


def branches_of(dump: Dump, sequences: Sequence[Tensor]) -> list[DraftBranch]:
    """The rejected drafts of a dump of these sequences; of too many, a part, from all over the dump."""
    drafts = match_runs(dump, sequences).rest["drafts"]
    found = list(dict.fromkeys(DraftBranch(b, at, tuple(run.ids.tolist())) for b, at, run in drafts))
    tokens, most = sum(x.at + len(x.ids) for x in found), max(MOST_BRANCH_TOKENS, sum(map(len, sequences)))
    return found[:: -(-tokens // most)] if found else []


def hidden_of(dump: Dump, sequences: Sequence[Tensor]) -> Tensor:
    """[B, T, D] the dump's hidden states after the final norm at the tokens of these sequences, NaN where it has none.
    Error: it has none at all of these tokens."""
    where, held = match_runs(dump, sequences).where(), dump.sources.get(HIDDEN, {})
    parts = {step: (table, dump.read(HIDDEN, step)) for step, table in sorted(where.items()) if step in held}
    width = {x.shape[1] for table, x in parts.values() if len(x) > int(table[:, 0].max())}
    if len(width) != 1:
        raise Qwen35Error("no hidden states of these tokens", where=dump.path, expected=HIDDEN, found=", ".join(dump))
    found = torch.full((len(sequences), max(map(len, sequences)), *width), torch.nan, dtype=torch.float64)
    for table, x in parts.values():
        found[table[:, 1], table[:, 2]] = x[table[:, 0]].to(found)
    return found


def match_drafts(dump: Dump, truth: Trace, matched: Matched) -> None:
    """Adds the rows of the draft head's steps that start from the ids that the truth's drafts start from."""
    drafts = draft_ids_of(truth)
    if not dump.drafts or not drafts:
        return
    own = len(drafts[0]) - len(matched.branches)
    where, left_out = draft_rows(dump, *sequences_at(truth.mask[:own], drafts[0][:own]))
    other = deeper = 0
    for step, table in where.items():
        number = dump.drafts[step]
        if number > len(drafts):
            deeper += len(table)
            continue
        same = drafts[number - 1][table[:, 1], table[:, 2]] == table[:, 3]
        other += int((~same).sum())
        matched.drafts[step] = table[same, :3]
    rows = sum(map(len, matched.drafts.values()))
    matched.notes.append(f"draft head: {rows} rows of {len(matched.drafts)} steps were compared; {left_out} rows "
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
