"""Which token each row of a draft head's steps starts from.

The first draft of row t starts from token t+1: its steps are matched as the target's are, by ids and order. A further
draft of a chain has one row a sequence, and goes on from the last right row of the first draft's step before it.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def draft_rows(dump: Dump, mask_BT: Tensor, next_BT: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor], int]:
    """next_BT: token t+1 of row t, FIRST where it is not known. Returns
    step -> [n, 4]: row in the dump, b, t, the id that it starts from;
    step -> [runs, 3]: run, and b, t of its last token, or -1;
    how many rows were left out: after a rejected draft, of more than one chain, or where the chain does not go on."""
    matching, where, ends, left_out = Matching(dump, mask_BT, next_BT), dict[int, Tensor](), dict[int, Tensor](), 0
    owner: dict[object, int | None] = {}
    for step, number in sorted(dump.drafts.items()):
        own = [(run.request if run.request is not None else i, run) for i, run in enumerate(runs(dump, [step]))]
        if number == 1:
            owner = {name: matching.place(run) for name, run in own}
            ends[step] = torch.tensor(matching.last.get(step, [])).reshape(-1, 3)
        tables = list(matching.tables.get(step, []))
        for name, run in own if number > 1 else ():
            b = owner.get(name)
            at = 0 if b is None else matching.filled[b] - 1
            if b is None or len(run) > 1 or run.start not in (None, at + number - 1):
                left_out += len(run)
            else:
                tables.append(torch.tensor([[int(run.rows[0]), b, int(matching.real[b][at])]]))
        ids = dump.tokens[step].ids if tables else None
        if ids is not None:
            table = torch.cat(tables)
            where[step] = torch.cat((table, ids[table[:, :1]]), 1)
    rest = [*matching.strange, *(run for _, _, run in matching.left)]
    return where, ends, left_out + matching.rejected + matching.beyond + sum(map(len, rest))


def drafts_of(dump: Dump, rows: Sequence[Tensor], own: int) -> list[Tensor]:
    """[B, T] for each draft of a chain: the ids that the dump's draft head started from at the tokens of the first
    `own` of these sequences, -1 where it does not say. Empty without draft steps."""
    ids_BT, mask = padded(list(rows))
    mask_BT = torch.ones_like(ids_BT) if mask is None else mask
    next_BT = torch.where(mask_BT.roll(-1, 1).bool(), ids_BT.roll(-1, 1), FIRST)
    next_BT[:, -1] = FIRST
    found = [torch.full_like(ids_BT, -1) for _ in range(max(dump.drafts.values(), default=0))]
    for step, table in draft_rows(dump, mask_BT[:own], next_BT[:own])[0].items():
        found[dump.drafts[step] - 1][table[:, 1], table[:, 2]] = table[:, 3]
    return found


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
    where, ends, left_out = draft_rows(dump, truth.mask[:own], drafts[0][:own])
    other = deeper = 0
    for step, table in where.items():
        number = dump.drafts[step]
        if number > len(drafts):
            deeper += len(table)
            continue
        same = drafts[number - 1][table[:, 1], table[:, 2]] == table[:, 3]
        other += int((~same).sum())
        matched.drafts[step] = table[same, :3]
        matched.ends |= {step: ends[step]} if step in ends else {}
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
