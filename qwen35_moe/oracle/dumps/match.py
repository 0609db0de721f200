"""Which row of a dump's step is which token of the truth: by ids and positions, or else by number."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...errors import Qwen35Error
from ...numerics.tap_table import base_name
from ...trace.file import Trace
from .dump import Dump, Tokens


def match(dump: Dump, truth: Trace) -> tuple[dict[int, Tensor], dict[int, Tensor], list[str], list[Qwen35Error]]:
    """Rows of each step [n, 3]: row in the dump, b, t; its last tokens [runs, 3]: run, b, t or -1; notes; problems."""
    real = [row.nonzero().flatten() for row in truth.mask.bool()]  # columns of the real tokens, in order
    ids = [row[columns] for row, columns in zip(truth.ids, real, strict=True)]
    filled = [0] * len(ids)
    owner: dict[object, int] = {}
    where, ends, strange, beyond = {}, {}, [], 0
    for step in dump.steps:
        tokens = dump.tokens.get(step)
        if tokens is None or tokens.ids is None:
            continue
        table, last = [], []
        for index, (run, start, request) in enumerate(runs(tokens)):
            last.append([index, -1, -1])
            b, at = _find_sequence(tokens.ids[run], start, request, ids, filled, owner)
            if b is None:
                strange.append((step, tokens.ids[run][:6].tolist()))
                continue
            fits = min(len(run), len(ids[b]) - at)
            beyond += len(run) - fits
            rows = [[int(row), b, int(real[b][at + i])] for i, row in enumerate(run[:fits])]
            filled[b] = max(filled[b], at + fits)
            if request is not None:
                owner[request] = b
            table += rows
            if fits == len(run):
                last[-1] = [index, *rows[-1][1:]]
        if table:
            where[step], ends[step] = torch.tensor(table), torch.tensor(last)
    if not any(t.ids is not None for t in dump.tokens.values()):
        return (*_by_count(dump, real), [])
    if not where:
        raise Qwen35Error("dump is of other tokens than the truth", where=dump.path,
                          found=f"ids {strange[0][1]} in step {strange[0][0]}" if strange else "no tokens",
                          expected=f"ids {[row[:6].tolist() for row in ids[:2]]}",
                          do="dump the same prompt (not its warm-up), or trace the ids that were dumped")  # fmt: skip
    notes = [f"{len(strange)} runs of other tokens left out (warm-up or other requests)"] if strange else []
    notes += [f"{beyond} tokens beyond the truth left out"] if beyond else []
    return where, ends, notes, []


def runs(tokens: Tokens) -> Iterator[tuple[Tensor, int | None, object]]:
    """(rows, first position, request) of each sequence's part of a step."""
    assert tokens.ids is not None
    count = tokens.ids.numel()
    if tokens.batch is not None:
        B, T = tokens.batch
        for b in range(B):
            rows = torch.arange(b * T, (b + 1) * T)
            rows = rows if tokens.mask is None else rows[tokens.mask[rows]]
            if len(rows):
                yield rows, None if tokens.positions is None else int(tokens.positions[rows[0]]), ("row", b)
        return
    positions = None if tokens.positions is None else tokens.positions.tolist()
    stops = _stops(positions, tokens.seq_lens, count)
    for index, (start, stop) in enumerate(zip([0, *stops], stops, strict=False)):
        one_each = tokens.requests is not None and len(tokens.requests) == len(stops)
        request = tokens.requests[index] if one_each and tokens.requests else None
        yield torch.arange(start, stop), None if positions is None else positions[start], request


def _stops(positions: list[int] | None, seq_lens: list[int] | None, count: int) -> list[int]:
    """Where sequences end in a flat step. A sequence's last token stands at position seq_len - 1."""
    if positions is None:
        lengths = seq_lens if seq_lens and sum(seq_lens) == count else [count]
        return [sum(lengths[: i + 1]) for i in range(len(lengths))]
    if seq_lens:
        stops, at = [], 0
        for length in seq_lens:
            at = next((i + 1 for i in range(at, count) if positions[i] == length - 1), count + 1)
            stops.append(at)
        if stops[-1] == count:
            return stops
    return [i for i in range(1, count) if positions[i] != positions[i - 1] + 1] + [count]


def _find_sequence(
    run: Tensor, start: int | None, request: object, ids: list[Tensor], filled: list[int], owner: dict[object, int]
) -> tuple[int | None, int]:
    """The truth's sequence that a run continues (or None), and the index where. Ids decide, up to the truth's end."""

    def fits(b: int, at: int) -> bool:
        n = min(len(run), len(ids[b]) - at)
        return n > 0 and torch.equal(ids[b][at : at + n], run[:n])

    # The request's own sequence first; a slot of the request pool may serve another request later on.
    candidates = sorted(range(len(ids)), key=lambda b: request is None or owner.get(request) != b)
    for exact in (True, False):  # a run may also start later than what was seen: its prefix was cached
        for b in candidates:
            at = filled[b] if start is None else start
            if (at == filled[b]) == exact and fits(b, at):
                return b, at
    return None, 0


def _by_count(dump: Dump, real: list[Tensor]) -> tuple[dict[int, Tensor], dict[int, Tensor], list[str]]:
    """Without ids: the last steps whose rows add up to the truth's tokens are taken to be those, in order."""
    places = [[b, int(t)] for b, columns in enumerate(real) for t in columns]
    counts = {step: dump.count(step) or 0 for step in dump.steps}
    if dump.format == "routed experts" and len(real) == 1 and [*counts.values()] == [len(places) - 1]:
        places.pop()  # the last token of a request has no routing
    if set(map(base_name, dump)) == {"next_token_logits"} and len(counts) == 1:  # of the last token of each sequence
        table = torch.tensor([[b, b, int(columns[-1])] for b, columns in enumerate(real)])
        step = next(iter(counts))
        if len(dump.read("next_token_logits", step)) == len(real) != len(places):
            return {step: table}, {step: table}, []
    steps: list[int] = []
    total = 0
    for step in reversed(counts):
        if total < len(places):
            steps.insert(0, step)
            total += counts[step]
    if total != len(places):
        steps = [step for step, n in counts.items() if n == len(places)][-1:]
    if not steps:
        raise Qwen35Error(
            "dump has no token ids, and its rows do not fit the truth",
            where=dump.path,
            expected=f"{len(places)} tokens",
            found=f"{list(counts.values())[:8]} rows a step",
            do="the first call is often warm-up: dump every call, and the same prompt",
        )
    if len(steps) > 1 and len(real) > 1:
        raise Qwen35Error("dump has no token ids, and several steps of several sequences", where=dump.path,
                          do="dump one sequence at a time, or the input ids with it")  # fmt: skip
    where, at = {}, 0
    for step in steps:
        where[step] = torch.tensor([[i, *place] for i, place in enumerate(places[at : at + counts[step]])])
        at += counts[step]
    notes = ["the dump has no token ids: rows were matched by their number"]
    left_out = len(counts) - len(steps)
    notes += [f"{left_out} other steps were left out (warm-up?)"] if left_out else []
    return where, {step: table[-1:] for step, table in where.items()}, notes
