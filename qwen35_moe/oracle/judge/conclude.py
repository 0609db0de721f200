"""The end of a comparison: every tap has a record, and notes say what was not judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from ...errors import Qwen35Error
from ..dumps.holes import holes
from .acceptance import acceptance
from .added import Judgement
from .envelope import Class
from .envelope_file import RowErrors
from .growth import growth
from .log_p import LOG_P
from .logits import compare_logits
from .positions import POSITIONS
from .records import Comparison, Record, block_of, layer_of
from .suspects import after_cached


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
    """Give every tap of the truth (of these layers) its record. Find holes, and compare logits."""
    truth, shared = work.alignment.truth, set(work.alignment.keys)
    names = truth.comparable
    if layers is not None:
        last = len(work.result.layers) - 1
        shown = {f"layers.{i + 1}.layer_input": i for i in range(-1, last)}  # what one layer made, under another's name
        shown |= dict.fromkeys(("final_norm", "next_token_logits"), last)
        names = [k for k in names if shown.get(k, layer_of(k)) in layers]
        work.result.routing = [r for r in work.result.routing if r.layer in layers]
        work.records = {k: work.records[k] for k in (POSITIONS, *names) if k in work.records}
        work.result.notes.append(f"judged only in layers: {', '.join(map(str, layers))}")
    order = {key: i for i, key in enumerate([POSITIONS, *names, LOG_P])}  # of execution
    for key in dict.fromkeys([*names, *(work.alignment.keys if layers is None else ())]):
        if key in work.records or (layers is not None and key in shared):
            continue
        cls: Class = "not comparable" if key in shared else "missing"
        note = work.alignment.pair(key).problem or "no envelope for this tap" if key in shared else ""
        work.records[key] = Record(key, cls, block_of(key), layer_of(key), note=note)
    work.result.records = sorted(work.records.values(), key=lambda r: order[r.key])
    work.result.holes = list(holes(work.alignment))
    if some := [r for r in work.result.records if r.excluded]:
        most = max(some, key=lambda r: r.excluded)
        work.result.notes.append(
            f"up to {most.excluded} of {most.excluded + most.rows} rows of {len(some)} taps were not judged, "
            "since their experts may legally differ; all rows are judged if the dump has moe_topk_ids and the "
            "checkpoint is given"
        )
    with noted(work.result, "which drafts were accepted could not be said", counts=False):
        work.result.acceptance = acceptance(work.alignment)
    with noted(work.result, "the error along the sequence could not be said", counts=False):
        first = work.result.first
        work.result.notes += growth(work.alignment, "" if first is None else first.key)
    with noted(work.result, "what a cached prefix means could not be said", counts=False):
        work.result.notes += _after_cached_tokens(work)
    logits = next((k for k in work.alignment.keys if k.startswith("next_token_log")), None)
    with noted(work.result, "what the logits mean could not be said", counts=False):
        _judge_logits(work, stored, logits)


def _after_cached_tokens(work: Judgement) -> list[str]:
    first = work.result.first
    if first is None or not after_cached(first, work):
        return []
    return [
        f"all bad rows of {first.key} come after cached tokens, which the dump does not hold. If the engine chose "
        "other experts there, as rounding allows, it can be right: dump the prompt without a prefix cache to decide"
    ]


def _judge_logits(work: Judgement, stored: Mapping[str, Tensor], logits: str | None) -> None:
    if logits is not None:
        pair = work.alignment.pair(logits)
        if pair.engine is not None and pair.chosen is None:
            known = stored.get("next_token_logits")
            noise = None if known is None else RowErrors.of(known, work.index(pair)).error.max
            work.result.logits = compare_logits(pair, noise, work.alignment.truth.ids)
