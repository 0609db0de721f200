"""What matching finds: which row of a dump is which token of the truth, and rejected drafts as sequences of their own.

Rejected drafts are tokens that a pass of the target verified, and that its sequence did not go on with. A branch is the
sequence up to there, and then the drafts: a sequence like any other. A truth has its branches behind its sequences;
`meta["branches"]` is [sequence, how many of its tokens] of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .runs import runs

if TYPE_CHECKING:
    from .dump import Dump

NO_TOKENS = torch.empty(0, 5, dtype=torch.long, device="cpu")


@dataclass
class Matched:
    """where      step -> [n, 3]: row in the dump, b, t
    drafts     step of a draft head -> [n, 3]: row in the dump, b, t
    branches   sequence that is a branch -> sequence that it leaves, and how many of its tokens it has
    positions  [n, 5]: b, t, the truth's position, the dump's, and the one that its rotary embedding took
    absent     parts of the truth that the dump does not hold, in words
    firsts     (b, t) of the first token of each run -> what it is the first of, in words
    """

    where: dict[int, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    positions: Tensor = field(default_factory=lambda: NO_TOKENS)
    absent: list[str] = field(default_factory=list)
    firsts: dict[tuple[int, int], str] = field(default_factory=dict)
    drafts: dict[int, Tensor] = field(default_factory=dict)
    branches: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    def beginnings(self, bt: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens among bt [n, 2] that branches begin with: which of the n, and their (b, t) in the branch."""
        which, places = [torch.empty(0, dtype=torch.long)], [torch.empty(0, 2, dtype=torch.long)]
        for branch, (of, at) in self.branches.items():
            which.append(((bt[:, 0] == of) & (bt[:, 1] < at)).nonzero().flatten())
            places.append(torch.stack((torch.full_like(which[-1], branch), bt[which[-1], 1].long()), 1))
        return torch.cat(which), torch.cat(places)

    @property
    def read(self) -> dict[int, Tensor]:
        """`where`, with the tokens that branches begin with: what a rerun of all sequences reads."""
        found = {}
        for step, table in self.where.items():
            which, places = self.beginnings(table[:, 1:])
            found[step] = torch.cat((table, torch.cat((table[which, :1], places), 1)))
        return found

    def table(self, step: int) -> Tensor:
        """Rows of a step, the target's or a draft head's."""
        return self.where[step] if step in self.where else self.drafts[step]

    def ends(self, dump: Dump, step: int) -> Tensor:
        """[runs, 3] run, and b, t of its last token, or -1 if the truth does not have this token. In a step that is not
        divided into runs, one ends where the next row is of another sequence."""
        tokens = {row: (b, t) for row, b, t in self.table(step).tolist() if b not in self.branches}
        told = [(run.rows.tolist(), run.undivided) for run in runs(dump, [step]) if len(run)]
        found: list[tuple[int, int]] = []
        for rows, undivided in told or [([*tokens], True)]:
            found += [tokens[row] for row, after in pairwise(rows) if undivided and row in tokens
                      and tokens[row][0] != tokens.get(after, (-1, -1))[0]]  # fmt: skip
            found.append(tokens.get(rows[-1], (-1, -1)))
        return torch.tensor([[i, *place] for i, place in enumerate(found)])

    def starts(self, rows: Tensor) -> list[tuple[int, int, str]]:
        """(b, t, what that token is the first of) where each sequence of rows [n, 2] begins."""
        first: dict[int, int] = {}
        for b, t in rows.long().tolist():
            first[b] = min(t, first.get(b, t))
        return [(b, t, self.firsts.get((b, t), "")) for b, t in sorted(first.items()) if t >= 0]


@dataclass(frozen=True)
class DraftBranch:
    """`ids` after the first `at` tokens of sequence `of`."""

    of: int
    at: int
    ids: tuple[int, ...]


def with_branches(sequences: Sequence[Tensor], branches: Sequence[DraftBranch]) -> list[Tensor]:
    """The sequences, and behind them the branches."""
    return [*sequences, *(torch.cat((sequences[x.of][: x.at], torch.tensor(x.ids))) for x in branches)]
