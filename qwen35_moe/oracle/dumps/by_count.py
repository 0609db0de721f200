"""Rows of a dump without token ids: by what its embeddings are of, or by their number and order."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import Qwen35Error
from ...numerics.tap_keys import base_name
from ...trace.drafts import branches_in
from ...trace.file import Trace
from .dump import Dump, StepTokens

EMBEDDINGS = ("embed_tokens", "layers.0.layer_input")  # the first layer reads them


def ids_by_embeddings(dump: Dump, truth: Trace) -> dict[int, StepTokens]:
    """Tokens of each step whose embeddings are the truth's, bit by bit; -1 for those that are not of the truth. Empty
    where the dump has no embeddings, or none that the truth has."""
    key = next((k for k in EMBEDDINGS if k in dump.sources and k in truth), None)
    if key is None or len(truth.steps) != 1:
        return {}
    real, dtype = truth.mask.bool(), dump.dtype(key)
    rows = truth[key][real].to(dtype)
    known = dict(zip(map(_bits, rows), truth.ids[real].tolist(), strict=True))
    found = {}
    for step, source in dump.sources[key].items():
        try:
            x, shape = dump.read(key, step), source.pieces[0].load().shape
        except Qwen35Error:
            continue
        ids = torch.tensor([known.get(_bits(row), -1) for row in x.to(dtype)])
        one_each = [1] * len(x) if len(x) == len(truth.ids) else None
        batch = (shape[0], shape[1]) if len(shape) == 3 and shape[0] * shape[1] == len(x) else None
        found[step] = StepTokens(ids, seq_lens=one_each, batch=batch, mask=ids >= 0 if batch else None)
    return found if any((t.ids >= 0).any() for t in found.values() if t.ids is not None) else {}


def _bits(row: Tensor) -> bytes:
    return row.contiguous().view(torch.uint8).numpy().tobytes()


Tables = dict[int, Tensor]


def by_count(dump: Dump, truth: Trace, only: list[int] | None) -> tuple[Tables, Tables, list[str]]:
    """Rows of each step [n, 3] (row, b, t), the last tokens, and notes. The last steps whose rows add up to the truth's
    tokens are taken to be those, in order."""
    chosen = range(len(truth.ids) - len(branches_in(truth))) if only is None else only
    real = {b: truth.mask[b].bool().nonzero().flatten() for b in chosen}
    places = [[b, int(t)] for b, columns in real.items() for t in columns]
    counts = {step: dump.count(step) or 0 for step in dump.target_steps}
    if dump.format == "routed experts" and len(real) == 1 and [*counts.values()] == [len(places) - 1]:
        places.pop()  # the last token of a request has no routing
    if set(map(base_name, dump)) == {"next_token_logits"} and len(counts) == 1:  # of the last token of each sequence
        table = torch.tensor([[i, b, int(columns[-1])] for i, (b, columns) in enumerate(real.items())])
        step = next(iter(counts))
        if len(dump.read("next_token_logits", step)) == len(real) != len(places):
            return {step: table}, {step: table}, []
    if (batch := _decoded(counts, real)) is not None:
        return *batch, ["the dump has no token ids: its rows were matched by their number, as one prefill and decodes"]
    if (batch := _padded(dump, counts, real)) is not None:
        return *batch, ["the dump has no token ids: its rows were taken for [B, T], padded on the right"]
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
            do="give --ids; the first call is often warm-up: dump every call, and the same prompt",
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


def _padded(dump: Dump, counts: dict[int, int], real: dict[int, Tensor]) -> tuple[Tables, Tables] | None:
    """One step of [B, T] tensors, of sequences of which the shorter ones are padded."""
    lengths = [len(columns) for columns in real.values()]
    if len(counts) != 1 or len(real) < 2 or next(iter(counts.values())) == sum(lengths):
        return None
    step = next(iter(counts))
    shape = next(s[step].pieces[0].load().shape for s in dump.sources.values() if step in s)
    if len(shape) != 3 or shape[0] != len(real) or shape[1] < max(lengths):
        return None
    T = shape[1]
    rows = [[i * T + k, b, int(t)] for i, (b, columns) in enumerate(real.items()) for k, t in enumerate(columns)]
    last = [[i, b, int(columns[-1])] for i, (b, columns) in enumerate(real.items())]
    return {step: torch.tensor(rows)}, {step: torch.tensor(last)}


def _decoded(counts: dict[int, int], real: dict[int, Tensor]) -> tuple[Tables, Tables] | None:
    """Several sequences: a prefill of all, then steps of one token each. The token after the last step may be among
    the truth's, though it was never run."""
    steps, B = list(counts), len(real)
    decodes = len(steps) - 1
    if B < 2 or decodes < 1 or any(counts[step] != B for step in steps[1:]):
        return None
    for more in (0, 1):
        prompts = {b: len(columns) - decodes - more for b, columns in real.items()}
        if min(prompts.values()) > 0 and sum(prompts.values()) == counts[steps[0]]:
            break
    else:
        return None
    first = [[b, int(real[b][i])] for b, n in prompts.items() for i in range(n)]
    where = {steps[0]: torch.tensor([[i, *place] for i, place in enumerate(first)])}
    last = [[i, b, int(real[b][n - 1])] for i, (b, n) in enumerate(prompts.items())]
    ends = {steps[0]: torch.tensor(last)}
    for k, step in enumerate(steps[1:]):
        rows = [[i, b, int(real[b][n + k])] for i, (b, n) in enumerate(prompts.items())]
        where[step] = ends[step] = torch.tensor(rows)
    return where, ends
