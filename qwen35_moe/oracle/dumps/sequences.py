"""The sequences of token ids that a dump is of, joined over its steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import Qwen35Error
from ...model.config import Config
from ...numerics.tap_keys import is_vision
from ...run.prompt import Images, placeholders
from ...trace.file import Trace
from ...trace.images import images_meta
from .dump import Dump
from .runs import Run, runs, uncertain

LOGITS = "next_token_logits"
GIVE_IDS = "give --ids: the ids of its requests, with those that were generated"


def sequences_of(dump: Dump) -> list[Tensor]:
    """One tensor of ids a sequence. A run that begins before the end takes back what was drafted and rejected; one that
    begins behind it has wrong positions; a sequence whose beginning was cached elsewhere is left out (`dump.absent`).

    Raises Qwen35Error if the dump holds no ids.
    """
    sequences: list[Tensor] = []
    owner: dict[object, int] = {}
    last: dict[int, Run] = {}
    cached, taken_back = dict[object, int](), False
    for run in runs(dump):
        b, start = _owner(run, sequences, owner), run.start
        if b is None and start:
            cached.setdefault(start if run.request is None else run.request, start)
            continue
        if b is None:
            b, sequences = len(sequences), [*sequences, run.ids[:0]]
        if start is not None and start > len(sequences[b]) and any(map(uncertain, dump.tokens.values())):
            raise Qwen35Error("which drafts of a tree were accepted is not in the dump", where=dump.path, do=GIVE_IDS)
        before = len(sequences[b]) if start is None else min(start, len(sequences[b]))
        taken_back = taken_back or before < len(sequences[b])
        sequences[b] = torch.cat((sequences[b][:before], run.ids))
        last[b] = run
        if run.request is not None:
            owner[run.request] = b
    if not sequences:
        raise Qwen35Error("the dump does not say which tokens it is of", where=dump.path, do=GIVE_IDS)
    words = "a sequence from token {} on, whose first were cached: give --ids"
    dump.absent = [words.format(start) for start in cached.values()]
    if dump.drafts or taken_back:
        sequences = [x[: len(x) - _drafted(dump, last[b])] for b, x in enumerate(sequences)]
    return sequences


def placed(sequences: list[Tensor], dump: Dump, config: Config, images: Images | None) -> list[Tensor]:
    """The sequences with the ids that images have in the vocabulary. SGLang puts a hash beyond it there instead.

    Error: a prompt with images, and no pixels; with images and videos, and no word which hash is which.
    """
    size = config.vocab_size
    outside = any(bool(((x < 0) | (x >= size)).any()) for x in sequences)
    begins = config.raw.get("vision_start_token_id")  # a placeholder that a text model happens to say is no image
    held = (placeholders(config, x)[1:] & ((x[:-1] == begins) | (begins is None)) for x in sequences)
    seen = any(map(is_vision, dump)) or any(bool(x.any()) for x in held)
    if images is None and (seen or outside):
        do = "give the images: --image, or --pixel-values"
        raise Qwen35Error("the dump is of a prompt with images, and there are no pixels", where=dump.path, do=do)
    if images is None or not outside:
        return sequences
    kinds = list(images_meta(config, images)["placeholders"])
    if len(kinds) > 1:
        what = "the ids do not say which placeholders are images and which are videos"
        raise Qwen35Error(what, where=dump.path, do="give --ids")
    return [torch.where((x < 0) | (x >= size), kinds[0], x) for x in sequences]


def _owner(run: Run, sequences: list[Tensor], owner: dict[object, int]) -> int | None:
    """The sequence that a run goes on with: its request's, or the one that ends where it begins, or the only one, if
    the position of a single token fits nowhere. None: it begins a sequence."""
    known = owner.get(run.request)
    if run.start == 0 or (run.start is None and len(run) > 1):
        return None
    if run.start is None or known is not None:
        return known
    ends_there = next((b for b, x in enumerate(sequences) if len(x) == run.start and b not in owner.values()), None)
    return 0 if ends_there is None and len(sequences) == len(run) == 1 and run.request is None else ends_there


def _drafted(dump: Dump, run: Run) -> int:
    """How many of the last tokens of a sequence's last run were drafted, and not what the target's logits say."""
    if len(run) < 2 or run.start == 0:
        return 0
    try:
        logits = dump.read(LOGITS, run.step) if run.step in dump.sources.get(LOGITS, {}) else None
    except Qwen35Error:
        logits = None
    if logits is None or len(logits) != dump.count(run.step):
        return len(run) - 1
    best = logits[run.rows].argmax(1)
    right = (best[:-1] == run.ids[1:]).int().cumprod(0)
    return len(run) - 1 - int(right.sum())


def sequences_in(truth: Trace, rows: Sequence[Sequence[int]]) -> list[int]:
    """Which sequences of the truth these are: one begins with the other. Raises Qwen35Error for others."""
    real = [row[mask.bool()].tolist() for row, mask in zip(truth.ids, truth.mask, strict=True)]
    found = []
    for row in rows:
        some = [b for b, ids in enumerate(real) if b not in found and ids[: len(row)] == list(row)[: len(ids)]]
        if not some:
            raise Qwen35Error("ids are of another sequence than the truth's", where="--ids", found=list(row)[:6],
                              expected=f"ids {[ids[:6] for ids in real[:2]]}", do="trace these ids")  # fmt: skip
        found.append(some[0])
    return found
