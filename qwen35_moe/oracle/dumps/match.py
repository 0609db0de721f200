"""Which row of a dump's step is which token of the truth: by ids and the order of steps, or else by number.

Positions do not decide where the ids do: a position that an engine got wrong is a value that differs, and no other
token. They tell a cached prefix (a sequence that begins late) and a roll-back (a run that begins again before the end).
A run counts up to its last right token: what comes after it was drafted and rejected, or is another text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...errors import Qwen35Error
from ...trace.drafts import branches_in
from ...trace.file import Trace
from ...trace.images import stands_for_images
from .by_count import by_count, ids_by_embeddings
from .dump import Dump
from .matched import NO_TOKENS, DraftBranch, Matched
from .runs import Run, runs, tree_size, uncertain

ANY, FIRST = -1, -2  # in the place of ids
# What tokens of a run are that are not its sequence's: rejected, after right tokens; the same, and the truth has them;
# another text; behind the sequence's end; or the whole run fits nowhere.
REASONS = ("drafts", "branch", "text", "beyond", "strange")


def match(dump: Dump, truth: Trace, only: list[int] | None = None) -> Matched:
    """only: the sequences of the truth that a dump without ids is of (default: all)."""
    told = []
    if not any(t.ids is not None for t in dump.tokens.values()):
        found = ids_by_embeddings(dump, truth)
        if not found:
            return Matched(*by_count(dump, truth, only))
        dump.tokens, told = {**dump.tokens, **found}, ["the dump has no token ids: its embeddings tell them"]
    # In the place of an image's ids SGLang has a hash, beyond the vocabulary or clamped to it.
    ids_BT, branches = truth.ids.masked_fill(stands_for_images(truth), ANY), branches_in(truth)
    own = len(ids_BT) - len(branches)
    matching = match_runs(dump, *sequences_at(truth.mask[:own], ids_BT[:own]))
    drafts = {b: tuple(ids_BT[b, at:][truth.mask[b, at:].bool()].tolist()) for b, (_, at) in branches.items()}
    result = matching.result(truth.positions, {DraftBranch(*branches[b], ids): b for b, ids in drafts.items()})
    result.branches = branches
    result.notes = [*told, *result.notes]
    if told:  # a request's last token was sampled, and never run
        result.absent = [words for words in result.absent if not words.startswith("the last 1 tokens")]
    return result


def sequences_at(mask_BT: Tensor, ids_BT: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The ids of each sequence, and the columns where they stand."""
    columns = [row.nonzero().flatten() for row in mask_BT.bool()]
    return [row[at] for row, at in zip(ids_BT, columns, strict=True)], columns


def match_runs(dump: Dump, ids: Sequence[Tensor], columns: Sequence[Tensor] | None = None) -> Matching:
    """The target's runs, placed in these sequences."""
    matching = Matching(dump, ids, columns)
    for run in runs(dump):
        matching.place(run)
    return matching


class Matching:
    """The truth's sequences, and how far each was seen."""

    def __init__(self, dump: Dump, ids: Sequence[Tensor], columns: Sequence[Tensor] | None = None):
        """ids of each sequence: ANY fits all, FIRST those that begin a run (engines fill up rejected rows). columns:
        where they stand in the truth (default: from 0 on)."""
        self.dump, self.ids = dump, ids
        self.columns = [torch.arange(len(row)) for row in ids] if columns is None else columns
        self.filled = [0] * len(self.ids)  # where the sequence goes on
        self.latest = [-1] * len(self.ids)  # the step of its last run
        self.cached = [0] * len(self.ids)  # tokens before the first run, which the engine had already
        self.drafted: set[int] = set()  # sequences whose last run ended in rejected tokens
        self.owner: dict[object, int] = {}  # request -> sequence
        self.tables: dict[int, list[Tensor]] = {}
        self.compared: list[Tensor] = [NO_TOKENS[:, :4]]
        self.firsts: dict[tuple[int, int], str] = {}
        # By reason: a sequence, how many of its tokens are known, and what is left of the run that goes on there.
        self.rest: dict[str, list[tuple[int, int, Run]]] = {why: [] for why in REASONS}

    def place(self, run: Run) -> int | None:
        """Find the sequence that a run continues, and note the rows of the run. Returns the sequence; None: there is
        none. An undivided run may hold several sequences, one after another. Then the last one is returned."""
        left, found = run, None
        while len(left):
            b, at, n = self._find(left)
            if n == 0:
                break
            if self.filled[b] == 0:
                self.cached[b] = at
            self._name_first(left, b, at)
            self._note(left, b, self.columns[b][at : at + n])
            again = self.latest[b] == run.step  # another path of a tree
            self.filled[b], self.latest[b], found = max(at + n, again * self.filled[b]), run.step, b
            self.drafted.discard(b)
            if run.request is not None:
                self.owner[run.request] = b
            left = left.after(n)
            if not run.undivided:
                break
        if len(left):
            known = self.owner.get(run.request)
            full = [self.filled[b] == len(ids) for b, ids in enumerate(self.ids)]
            beyond = full[known] if known is not None else all(full)
            why = "drafts" if n and at else "beyond" if beyond else "strange" if found is None else "text"
            self.rest[why].append((b, at + n, left))
            if n and why != "beyond":
                self.drafted.add(b)
        return found

    def _place_branches(self, branches: Mapping[DraftBranch, int]) -> None:
        for of, at, run in self.rest["drafts"]:
            b = branches.get(DraftBranch(of, at, tuple(run.ids.tolist())))
            self.rest["text" if b is None else "branch"].append((of, at, run))
            if b is not None:
                self._note(run, b, torch.arange(at, at + len(run)))
                self.firsts |= {(b, t): f"rejected draft of sequence {of}" for t in range(at, at + len(run))}

    def _name_first(self, run: Run, b: int, at: int) -> None:
        """What the first token of a run is the first of."""
        tokens, row = self.dump.tokens[run.step], int(run.rows[0])
        in_row = row % tokens.batch[1] if tokens.batch is not None else 0
        padded = in_row > 0 and tokens.mask is not None and not bool(tokens.mask[row - 1])
        words = (
            "padding" if padded else "a rejected draft" if b in self.drafted else
            "a cached prefix" if at and not self.filled[b] else ""
        )  # fmt: skip
        of = f"first after {words}" if words else "first of a step" if at else "first of its sequence"
        self.firsts.setdefault((b, int(self.columns[b][at])), of)

    def _second_chance(self) -> None:
        """What fits nowhere as a whole counts up to its last right token, where no other run has these tokens."""
        strange, self.rest["strange"] = self.rest["strange"], []
        for of, at, run in strange:
            common = [(self._common(run, b, 0), -b) for b, step in enumerate(self.latest) if step < 0]
            n, b = max(common, default=(0, 0))
            if n > 1:
                self._note(run, -b, self.columns[-b][:n])
                self.latest[-b] = run.step
                self.rest["text"].append((-b, n, run.after(n)))
            else:
                self.rest["strange"].append((of, at, run))

    def _common(self, run: Run, b: int, at: int) -> int:
        """How many tokens of a run are those of the truth from there."""
        n = min(len(run), len(self.ids[b]) - at)
        if n <= 0 or at < 0:
            return 0
        ours = self.ids[b][at : at + n]
        differ = ((ours != run.ids[:n]) & (ours != ANY)).nonzero()
        if len(differ) and not int(differ[0]) and int(ours[0]) == FIRST:
            return 1
        return int(differ[0]) if len(differ) else n

    def _find(self, run: Run) -> tuple[int, int, int]:
        """(sequence, index in it, tokens that fit); 0 tokens: none."""
        start, owned = run.start, set(self.owner.values())
        known = self.owner.get(run.request) if start != 0 else None
        # A request that begins is another sequence, though its ids may go on where an earlier one stands.
        begins = start == 0 and run.request is not None and run.request not in self.owner
        best: tuple[tuple[int, ...], tuple[int, int, int]] = ((9,), (0, 0, 0))
        for b, ids in enumerate(self.ids):
            filled, others = self.filled[b], known is None and b in owned
            for at in (0,) if begins and others else {filled, filled if start is None else start}:
                n = self._common(run, b, at)
                whole = n == len(run) or (at + n == len(ids) and not run.undivided)
                goes_on = 0 < filled == at and (known == b or (known is None and start == at))
                goes_on = goes_on or (known == b and self.latest[b] == run.step)  # another path of a tree
                if n and (whole or goes_on or run.undivided):
                    more = -n if run.undivided else 0
                    unknown, foreign = int(ids[at]) == FIRST, known is not None and b != known
                    order = (unknown, not whole, more, foreign, _how(at, filled, start), others, b)
                    best = min(best, (order, (b, at, n)))
        return best[1]

    def _note(self, run: Run, b: int, columns: Tensor) -> None:
        """The first rows of a run are these tokens."""
        n = len(columns)
        table = torch.stack((run.rows[:n], torch.full_like(columns, b), columns), 1)
        self.tables.setdefault(run.step, []).append(table)
        if run.positions is not None:
            rotary = self.dump.tokens[run.step].rotary
            both = (run.positions[:n], run.positions[:n] if rotary is None else rotary[run.rows[:n]])
            self.compared.append(torch.cat((table[:, 1:], torch.stack(both, 1).long()), 1))

    def where(self) -> dict[int, Tensor]:
        """step -> [n, 3] row, b, t."""
        return {step: torch.cat(tables) for step, tables in self.tables.items()}

    def result(self, positions_BT: Tensor, branches: Mapping[DraftBranch, int]) -> Matched:
        """branches: which sequence of the truth each is."""
        self._second_chance()
        self._place_branches(branches)
        strange = [run for *_, run in self.rest["strange"]]
        branched, rejected, beyond = (
            sum(len(run) for *_, run in self.rest[why]) for why in ("branch", "text", "beyond")
        )
        if not self.tables:
            first = strange[0] if strange else None
            found = f"ids {first.ids[:6].tolist()} in step {first.step}" if first else "no tokens"
            raise Qwen35Error("dump is of other tokens than the truth", where=self.dump.path, found=found,
                              expected=f"ids {[row[:6].tolist() for row in self.ids[:2]]}",
                              do="dump the same prompt, not its warm-up, or trace the dumped ids")  # fmt: skip
        told = (
            (len(strange), "runs of other tokens left out (warm-up or other requests)"),
            (len(self.dump.drafts), "steps are those of the draft head (speculative decoding)"),
            (branched, "rejected drafts were compared, each after the tokens that it was drafted for"),
            (rejected,
             "tokens after the last right one of their run were not compared: rejected drafts, of which the truth does "
             "not know (`diagnose` computes one), or another text"),
            (beyond, "tokens beyond the truth left out"),
            (sum(map(uncertain, self.dump.tokens.values())),
             "rows of trees of drafts were not compared: which draft they follow is not in the dump"),
        )  # fmt: skip
        notes = [f"{count} {what}" for count, what in told if count]
        notes += [f"the first {n} tokens of sequence {b} were cached" for b, n in enumerate(self.cached) if n]
        where = self.where()
        where |= {s: x.unique(dim=0) for s, x in where.items() if tree_size(self.dump.tokens[s])}  # its root once
        b, t, *theirs = torch.cat(self.compared).unbind(1)
        positions = torch.stack((b, t, positions_BT[b, t], *theirs), 1)
        absent = self._absent(where) + (self.dump.absent if strange or beyond else [])
        return Matched(where, notes, positions, absent, self.firsts)

    def _absent(self, where: Mapping[int, Tensor]) -> list[str]:
        found, places = [], torch.cat([table[:, 1:] for table in where.values()])
        for b, columns in enumerate(self.columns):
            seen, n = torch.isin(columns, places[places[:, 0] == b, 1]), len(columns)
            lost = [i for i in range(self.cached[b], n) if not seen[i]]
            if len(lost) == n:
                found.append(f"all of sequence {b} ({n} tokens)")
            elif lost:
                last = f"{len(lost)} tokens of sequence {b}"
                found.append(f"the last {last}" if lost[0] == n - len(lost) else f"{last}, from token {lost[0]} on")
        return found


def _how(at: int, filled: int, start: int | None) -> int:
    """How well a place suits a run whose ids fit: 0 is best."""
    if start is None or start == at == filled:
        return 0
    if at == start:
        return 1 if start < filled else 3 if filled == 0 else 5  # again, a cached prefix, a gap
    return 2 if filled else 4  # its positions are not the sequence's
