"""The inherited error: each tap against the truth itself, in units of the envelope of a whole run (`envelope_file.py`).

Where an engine chose other experts at a token, this token and all later ones of its sequence are left out: they are
another computation. Taps are judged one after another, so memory holds one tap of each side. Torch runs in one thread
here: an operation takes a tenth of a millisecond, less than the threads of one operation would wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

import torch
from torch import Tensor

from ...errors import Qwen35Error
from ...numerics.tap_keys import base_name, per_token
from ...trace.layers import HEAD
from ..dumps.pair import Pair
from .added import ID_TAPS, ROUTED_TAPS, Judgement
from .envelope import Norms, envelope, judge
from .envelope_file import ENVELOPE, SLOT_ORDERED, row_errors
from .log_p import LOG_P, error_of_log_p, loss_in_file
from .patterns import judge_size
from .records import Record, block_of, layer_of
from .routing import compare_ids, could_flip
from .suspects import UNSAID

AFTER = ("final_norm", "head")  # blocks after the last layer


def inherited(work: Judgement, stored: Mapping[str, Tensor]) -> None:
    """Judge all taps that both sides and the envelope have, and all choices of experts."""
    if not stored and work.result.layers == ():
        raise Qwen35Error(
            "truth has no envelope, and the checkpoint is not here", where=work.alignment.truth.path,
            expected=ENVELOPE, do="write the truth with `qwen35-moe trace`, or give --checkpoint",
        )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for key, first_B in _first_others(work, stored):
            if base_name(key) not in ID_TAPS and (HEAD if key == LOG_P else key) in stored:
                with work.fenced(key, layer_of(key)):
                    work.records[key] = _judge(work, key, stored, first_B)
    finally:
        torch.set_num_threads(threads)


def _first_others(work: Judgement, stored: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each tap's key, and [B] the first token of each sequence whose value there was made with other experts than the
    truth's (T: no token is). Experts change what their own layer computes from them, and all layers after it."""
    B, T = work.alignment.truth.ids.shape
    first_B, chosen_B = torch.full((2, B), T)
    of: int | None = None  # the layer whose experts were chosen last
    for key in work.alignment.keys:
        name, layer = base_name(key), layer_of(key)
        if layer != of or name in ROUTED_TAPS:
            first_B = torch.minimum(first_B, chosen_B)
        if name in ID_TAPS:
            pair = work.alignment.pair(key)
            if layer is not None and pair.engine is not None:
                differ = (pair.truth.long().sort(1).values != pair.engine.long().sort(1).values).any(1)
                b, t = pair.rows[differ].unbind(1)
                chosen_B, of = chosen_B.scatter_reduce(0, b, t, "amin"), layer
                for branch, (whose, at) in work.alignment.tokens_of.branches.items():
                    chosen_B[branch] = min(chosen_B[branch], chosen_B[whose] if chosen_B[whose] < at else T)
            if key not in work.records:
                with work.fenced(key, layer):
                    _judge_ids(work, key, pair, layer, stored)
        yield key, first_B


def _could_differ(work: Judgement, key: str, stored: Mapping[str, Tensor]) -> Tensor:
    """[B] the first token of each sequence whose value at a tap may have been made with other legal experts, in layers
    whose ids the dump does not have (T: no token). The truth's router logits and their legal errors tell. Where these
    are not known, it is token 0."""
    truth, layer, sizes = work.alignment.truth, layer_of(key), work.alignment.truth.meta.get("config") or {}
    B, T = truth.ids.shape
    first_B = torch.full((B,), T)
    after = base_name(key) in ROUTED_TAPS and base_name(key) != "layer_input"
    stop = layer + after if layer is not None else sizes.get("num_hidden_layers", 0) * (block_of(key) in AFTER)
    for i in range(stop):
        if any(f"layers.{i}.{name}" in work.alignment.keys for name in ID_TAPS):
            continue
        logits_key = f"layers.{i}.moe_router_logits"
        if logits_key not in truth or logits_key not in stored:
            return torch.zeros_like(first_B)
        loose_T = could_flip(*_router(work, logits_key, stored), sizes["num_experts_per_tok"]).view(B, T)
        first_B = torch.minimum(first_B, torch.where(loose_T.any(1), loose_T.int().argmax(1), T))
    return first_B


def _router(work: Judgement, key: str, stored: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The truth's router logits [B*T, E], and the largest legal error of one in each row."""
    logits = work.alignment.truth[key].flatten(0, -2)
    errors = row_errors(stored[key], torch.arange(len(logits)))[0]
    return logits, envelope(logits, [errors], torch.bfloat16).max


def _judge_ids(work: Judgement, key: str, pair: Pair, layer: int | None, stored: Mapping[str, Tensor]) -> None:
    logits_key = key.removesuffix(base_name(key)) + "moe_router_logits"
    if logits_key not in work.alignment.truth or pair.engine is None or logits_key not in stored:
        return
    with suppress(Qwen35Error):  # it is counted where the logits themselves are judged
        logits, noise = (x[work.index(pair)] for x in _router(work, logits_key, stored))
        work.record_routing(key, pair, compare_ids(pair.truth, pair.engine, logits, noise, layer))


def _judge(work: Judgement, key: str, stored: Mapping[str, Tensor], first_B: Tensor) -> Record:
    """The record of one tap; where the added error has made one, that record with the inherited error in it."""
    pair = work.alignment.pair(key)
    record = work.records.get(key) or Record(key, "not comparable", block_of(key), layer_of(key), note=pair.problem)
    if pair.engine is None or pair.dtype is None:
        return record
    index, x, truth = work.index(pair), pair.engine, pair.truth
    if per_token(key):
        keep = pair.judged(pair.rows[:, 1] < first_B[pair.rows[:, 0]])
    else:
        keep = torch.full((len(index),), key.endswith(".gain") or bool((first_B == work.T).all()))
    if base_name(key) in SLOT_ORDERED:
        x, truth = x.sort(1, descending=True).values, truth.sort(1, descending=True).values
    if not keep.any():
        if record.added is None:
            record.note = "every token comes after a flip of experts"
        return record
    if not keep.all():
        index, x, truth = index[keep], x[keep], truth[keep]
    error, size, bf16 = row_errors(stored[HEAD if key == LOG_P else key], index)
    rounding = bf16 if pair.dtype == torch.bfloat16 else None
    if key == LOG_P or pair.as_log_p:
        error, size = error_of_log_p(error, truth.shape[1]), Norms.of(truth)
        rounding = loss_in_file(truth) if key == LOG_P else None
    bound = envelope(truth, [error], pair.dtype, size, rounding)
    verdict = judge(x, truth, bound, pair.dtype, work.limit, size, rounding)
    record.inherited, record.inherited_rel = verdict.ratio, verdict.rel
    if record.added is None:
        bad_rows = work.fill(record, verdict, pair, keep, x, truth)
        record.excluded = int((~keep).sum())
        if record.bad and per_token(key):
            b, t = bad_rows.unbind(1)
            if not record.nan and (t >= _could_differ(work, key, stored)[b]).all():
                record.cls, record.note = "not comparable", UNSAID
        if key == HEAD and not record.bad:
            grown = float((bound.l2 / size.l2).square().mean()) / 2  # by half the square of what is added to it
            judge_size(record, x, truth, grown, work.limit)
    return record
