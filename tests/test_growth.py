"""The error along the sequence, in the report of long dumps."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

import qwen35_moe as q
from qwen35_moe.oracle.compare import compare
from qwen35_moe.oracle.diagnose.faults import FaultSite
from qwen35_moe.oracle.dumps.align import align
from qwen35_moe.oracle.dumps.readers.own import from_trace
from qwen35_moe.oracle.judge.conclude import growth
from qwen35_moe.oracle.play import known_fault
from qwen35_moe.oracle.truth import open_checkpoint
from qwen35_moe.trace.file import Trace

IDS = torch.arange(300)[None] * 7919 % 251
TAPS = "layer_input,final_norm"


def test_an_error_that_grows_is_told(small: Callable[..., Path]) -> None:
    truth = q.trace(q.load(small("tiny"), text_only=True), IDS, taps=TAPS)
    off = dict(truth)
    off["final_norm"] = truth["final_norm"] * (1 + 1e-4 * torch.arange(300)[None, :, None])
    dump = from_trace(Trace(truth.sites, truth.meta, memory=off))
    (said,) = growth(align(dump, truth))
    assert said.startswith("median relative error of final_norm along the sequence: 0-49: 0.0024, 50-99: 0.0074")
    assert len(re.findall(r"\d+-\d+: ", said)) == 6 and said.endswith("250-299: 0.027")


def test_short_sequences_are_not_cut(small: Callable[..., Path]) -> None:
    truth = q.trace(q.load(small("tiny"), text_only=True), IDS[:, :100], taps=TAPS)
    assert growth(align(from_trace(truth), truth)) == []


def test_a_wrong_base_of_the_angles_grows_in_the_first_wrong_tap(small: Callable[..., Path]) -> None:
    """The stream after it shows no more than roundings: an angle is wrong by more, the further on a token stands."""
    source = open_checkpoint(small("tiny"))[1].source
    truth = q.trace(q.load(small("tiny"), text_only=True), IDS, taps=f"{TAPS},attn_q,moe_topk_ids")
    engine = q.load(small("tiny"), "sglang-bf16", text_only=True)
    handlers = known_fault("rotary theta 10000").handlers(FaultSite(source.config, truth.positions))
    run = q.trace(engine, IDS, taps=f"{TAPS},attn_q,moe_topk_ids", replay=handlers)
    notes = [note for note in compare(truth, from_trace(run), source).notes if "along the sequence" in note]
    assert len(notes) == 2 and "layers.1.attn_q" in notes[1]
    parts = [float(x) for x in re.findall(r"\d+-\d+: ([\d.e-]+)", notes[1])]
    assert parts[-1] > 3 * parts[0], notes
