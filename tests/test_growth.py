"""The error along the sequence, in the report of long dumps."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

import qwen35_moe as q
from qwen35_moe.oracle.dumps.align import align
from qwen35_moe.oracle.dumps.readers.own import from_trace
from qwen35_moe.oracle.judge.growth import growth
from qwen35_moe.trace.file import Trace

IDS = torch.arange(300)[None] * 7919 % 251
TAPS = "layer_input,final_norm"


def test_an_error_that_grows_is_told(built: Callable[[str], Path]) -> None:
    truth = q.trace(q.load(built("tiny"), text_only=True), IDS, taps=TAPS)
    off = dict(truth)
    off["final_norm"] = truth["final_norm"] * (1 + 1e-4 * torch.arange(300)[None, :, None])
    dump = from_trace(Trace(truth.sites, truth.meta, memory=off))
    (said,) = growth(align(dump, truth))
    assert said.startswith("median relative error of final_norm along the sequence: 0-49: 0.0024, 50-99: 0.0074")
    assert len(re.findall(r"\d+-\d+: ", said)) == 6 and said.endswith("250-299: 0.027")


def test_short_sequences_are_not_cut(built: Callable[[str], Path]) -> None:
    truth = q.trace(q.load(built("tiny"), text_only=True), IDS[:, :100], taps=TAPS)
    assert growth(align(from_trace(truth), truth)) == []
