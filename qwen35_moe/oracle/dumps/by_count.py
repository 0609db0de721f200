"""Rows of a dump without token ids: by what its embeddings are of, or by their number and order."""

from __future__ import annotations

from itertools import islice

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


Tables = dict[int, Tensor]  # step -> [n, 3] row, b, t
Places = list[tuple[int, int]]  # (b, t) of each row


def by_count(dump: Dump, truth: Trace, only: list[int] | None) -> tuple[Tables, list[str]]:
    """Rows of each step, and notes. The first layout that has as many rows counts: logits of the last tokens; a prefill
    and decodes; [B, T]; the last steps that together have the truth's tokens."""
    chosen = range(len(truth.ids) - len(branches_in(truth))) if only is None else only
    real = {b: truth.mask[b].bool().nonzero().flatten().tolist() for b in chosen}
    places = [(b, t) for b, columns in real.items() for t in columns]
    counts = {step: dump.count(step) or 0 for step in dump.target_steps}
    if dump.format == "routed experts" and len(real) == 1 and [*counts.values()] == [len(places) - 1]:
        places.pop()  # the last token of a request has no routing
    told = "the dump has no token ids: its rows were "
    logits = set(map(base_name, dump)) == {"next_token_logits"} and [*counts.values()] == [len(real)]
    if logits and len(real) != len(places):
        found, notes = {next(iter(counts)): _table([(b, columns[-1]) for b, columns in real.items()])}, []
    elif (decoded := _decoded(counts, real)) is not None:
        found, notes = decoded, [f"{told}matched by their number, as one prefill and decodes"]
    elif (padded := _padded(dump, counts, real)) is not None:
        found, notes = padded, [f"{told}taken for [B, T], padded on the right"]
    else:
        found, notes = _in_order(dump, counts, places, len(real)), [f"{told}matched by their number"]
        left_out = len(counts) - len(found)
        notes += [f"{left_out} other steps were left out (warm-up?)"] if left_out else []
    return found, notes


def _table(places: Places) -> Tensor:
    return torch.tensor([[row, *place] for row, place in enumerate(places)])


def _in_order(dump: Dump, counts: dict[int, int], places: Places, sequences: int) -> Tables:
    """The last steps whose rows add up to the truth's tokens. Error: there are none."""
    steps: list[int] = []
    for step in reversed(counts):
        if sum(counts[s] for s in steps) < len(places):
            steps.insert(0, step)
    if sum(counts[s] for s in steps) != len(places):
        steps = [step for step, n in counts.items() if n == len(places)][-1:]
    if not steps:
        do = "give --ids; the first call is often warm-up: dump every call, and the same prompt"
        raise Qwen35Error("dump has no token ids, and its rows do not fit the truth", where=dump.path, do=do,
                          expected=f"{len(places)} tokens", found=f"rows: {list(counts.values())[:8]}")  # fmt: skip
    if len(steps) > 1 and sequences > 1:
        raise Qwen35Error("dump has no token ids, and several steps of several sequences", where=dump.path,
                          do="dump one sequence at a time, or the input ids with it")  # fmt: skip
    rest = iter(places)
    return {step: _table(list(islice(rest, counts[step]))) for step in steps}


def _padded(dump: Dump, counts: dict[int, int], real: dict[int, list[int]]) -> Tables | None:
    """One step of [B, T] tensors, of sequences of which the shorter ones are padded."""
    lengths = [len(columns) for columns in real.values()]
    if len(counts) != 1 or len(real) < 2 or next(iter(counts.values())) == sum(lengths):
        return None
    step = next(iter(counts))
    shape = next(s[step].pieces[0].load().shape for s in dump.sources.values() if step in s)
    if len(shape) != 3 or shape[0] != len(real) or shape[1] < max(lengths):
        return None
    rows = [[i * shape[1] + k, b, t] for i, (b, columns) in enumerate(real.items()) for k, t in enumerate(columns)]
    return {step: torch.tensor(rows)}


def _decoded(counts: dict[int, int], real: dict[int, list[int]]) -> Tables | None:
    """Several sequences: a prefill of all, then steps of one token each. The token after the last step may be among
    the truth's, though it was never run."""
    first, *decodes = counts or [0]
    if len(real) < 2 or not decodes or any(counts[step] != len(real) for step in decodes):
        return None
    for more in (0, 1):
        prompts = {b: len(columns) - len(decodes) - more for b, columns in real.items()}
        if min(prompts.values()) > 0 and sum(prompts.values()) == counts[first]:
            each = {step: [(b, real[b][n + k]) for b, n in prompts.items()] for k, step in enumerate(decodes)}
            each |= {first: [(b, t) for b, n in prompts.items() for t in real[b][:n]]}
            return {step: _table(each[step]) for step in counts}
    return None
