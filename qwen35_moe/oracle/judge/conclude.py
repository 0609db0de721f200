"""The end of a comparison: every tap gets a record, and notes say what was not judged, and what the errors mean for the
next token and along the sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import Qwen35Error
from ...numerics.tap_keys import base_name, per_token
from ..dumps.align import Alignment
from ..dumps.checks import holes
from ..dumps.pair import Pair
from .added import Judgement
from .envelope import Class
from .envelope_file import row_errors
from .log_p import LOG_P
from .records import POSITIONS, Comparison, Record, block_of, layer_of
from .suspects import CACHED, after_cached
from .tokens import acceptance

SHORTEST, SEQUENCE_PARTS = 256, 6  # tokens of a sequence whose growth of errors is told; equal parts of it
GROWTH_TAPS = ("final_norm", "layer_input", "layer_output_sum", "next_token_logits", "mlp_output")


@contextmanager
def noted(result: Comparison, what: str, counts: bool = True) -> Iterator[None]:
    """If anything fails inside, the report says so and the verdict stands. counts: the failure makes the comparison
    incomplete."""
    try:
        yield
    except Exception as error:
        said = str(error).partition("\n")[0] if isinstance(error, Qwen35Error) else f"{type(error).__name__}: {error}"
        if counts:
            result.problems.append(Qwen35Error(what, found=said[:200]))
        else:
            result.notes.append(f"{what}: {said[:200]}")


def conclude(work: Judgement, stored: Mapping[str, Tensor], layers: Sequence[int] | None) -> None:
    """Give every tap of the truth (of these layers) its record, and say what the errors mean."""
    result, shared, names = work.result, set(work.alignment.keys), work.alignment.truth.comparable
    if layers is not None:
        last = len(result.layers) - 1
        shown = {f"layers.{i + 1}.layer_input": i for i in range(-1, last)}  # what one layer made, under another's name
        shown |= dict.fromkeys(("final_norm", "next_token_logits"), last)
        names = [k for k in names if shown.get(k, layer_of(k)) in layers]
        result.routing = [r for r in result.routing if r.layer in layers]
        work.records = {k: work.records[k] for k in (POSITIONS, *names) if k in work.records}
        result.notes.append(f"judged only in layers: {', '.join(map(str, layers))}")
    order = {key: i for i, key in enumerate([POSITIONS, *names, LOG_P])}  # of execution
    for key in dict.fromkeys([*names, *(work.alignment.keys if layers is None else ())]):
        if key in work.records or (layers is not None and key in shared):
            continue
        cls: Class = "not comparable" if key in shared else "missing"
        note = work.alignment.pair(key).problem or "no envelope for this tap" if key in shared else ""
        work.records[key] = Record(key, cls, block_of(key), layer_of(key), note=note)
    result.records = sorted(work.records.values(), key=lambda r: order[r.key])
    result.holes = list(holes(work.alignment))
    if some := [r for r in result.records if r.excluded]:
        most = max(some, key=lambda r: r.excluded)
        result.notes.append(
            f"up to {most.excluded} of {most.excluded + most.rows} rows of {len(some)} taps were not judged, "
            "since their experts may legally differ; all rows are judged if the dump has moe_topk_ids and the "
            "checkpoint is given"
        )

    with noted(result, "which drafts were accepted could not be said", counts=False):
        result.acceptance = acceptance(work.alignment)
    with noted(result, "the error along the sequence could not be said", counts=False):
        result.notes += growth(work.alignment, "" if result.first is None else result.first.key)
    with noted(result, "what a cached prefix means could not be said", counts=False):
        if result.first is not None and after_cached(result.first, work):
            result.notes.append(f"{result.first.key} is {CACHED}")
    with noted(result, "what the logits mean could not be said", counts=False):
        _judge_logits(work, stored)


def _judge_logits(work: Judgement, stored: Mapping[str, Tensor]) -> None:
    key = next((k for k in work.alignment.keys if k.startswith("next_token_log")), None)
    pair = None if key is None else work.alignment.pair(key)
    if pair is not None and pair.engine is not None and pair.chosen is None:
        known = stored.get("next_token_logits")
        noise = None if known is None else row_errors(known, work.index(pair))[0].max
        work.result.logits = compare_logits(pair, noise, work.alignment.truth.ids)


@dataclass(frozen=True)
class Logits:
    """What an error means for the next token, over `tokens` positions: KL divergence, agreement of the best tokens.

    `flips` counts positions with another best token. `legal_flips` counts those whose margin is within the noise. The
    margin is the distance of the two tokens' logits in the truth; the noise is twice the largest legal error of a logit
    there. `delta_log_p` is the engine's log p minus the truth's, of the token that follows in the input."""

    tokens: int
    kl_mean: float
    kl_max: float
    top1: float
    top5: float
    delta_log_p_rms: float
    delta_log_p_max: float
    flips: int
    legal_flips: int | None  # None: the noise is not known
    worst: tuple[int, int]  # sequence, token of kl_max


def compare_logits(pair: Pair, noise: Tensor | None, ids_BT: Tensor) -> Logits:
    """pair: logits (or log-probabilities) of truth and engine at the same rows; noise: the
    largest legal error of a logit in each row, from the embedding on."""
    assert pair.engine is not None
    p, q = (x.to(torch.float64).log_softmax(-1) for x in (pair.truth, pair.engine))
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    best, theirs = p.argmax(-1), q.argmax(-1)
    flip = best != theirs
    k = min(5, p.shape[1])
    top5 = (p.topk(k).indices[:, :, None] == q.topk(k).indices[:, None]).any(-1).double().mean()
    legal = None
    if noise is not None:
        truth = pair.truth.to(torch.float64)
        margin = (truth.gather(1, best[:, None]) - truth.gather(1, theirs[:, None])).flatten()
        legal = int((flip & (margin <= 2 * noise)).sum())
    b, t = pair.rows.long().unbind(1)
    follows = t + 1 < ids_BT.shape[1]
    token = ids_BT[b, (t + 1).clamp(max=ids_BT.shape[1] - 1)]
    token = torch.where(follows & (token < p.shape[1]), token, best)
    change = (q - p).gather(1, token[:, None]).flatten()
    worst = int(kl.nan_to_num(nan=torch.inf).argmax())
    return Logits(
        len(p), float(kl.mean()), float(kl[worst]), float((~flip).double().mean()), float(top5),
        float(change.square().mean().sqrt()), float(change[change.abs().argmax()]), int(flip.sum()), legal,
        (int(b[worst]), int(t[worst])),
    )  # fmt: skip


def growth(alignment: Alignment, first: str = "") -> list[str]:
    """How an error grows along a long sequence: the median relative error against the truth, part by part, in the last
    tap that shows the stream, and in the `first` wrong tap, where roundings do not yet hide a wrong angle or state.
    Empty for short sequences. Tokens with other experts have other values, which the median leaves out."""
    T, found = alignment.truth.ids.shape[1], alignment.keys
    keys = [k for k in found if per_token(k) and base_name(k) in GROWTH_TAPS and not k.startswith(("mtp.", "visual."))]
    if T < SHORTEST or not keys:
        return []
    shown = min(keys, key=lambda k: (GROWTH_TAPS.index(base_name(k)), -found.index(k)))
    lines = []
    for key in dict.fromkeys([shown, first] if first in found and per_token(first) else [shown]):
        pair = alignment.pair(key)
        if pair.engine is None:
            continue
        truth, engine = pair.truth.double(), pair.engine.double()
        relative = (engine - truth).norm(dim=1) / truth.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
        part = pair.rows[:, 1].long()
        bounds = [T * i // SEQUENCE_PARTS for i in range(SEQUENCE_PARTS + 1)]
        parts = ((low, high, (part >= low) & (part < high)) for low, high in zip(bounds, bounds[1:], strict=False))
        said = [f"{low}-{high - 1}: {float(relative[of].median()):.2g}" for low, high, of in parts if of.any()]
        lines.append(f"median relative error of {key} along the sequence: {', '.join(said)}")
    return lines
