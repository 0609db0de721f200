"""Is a part of a block's output too large or too small by a constant factor?

Rounding errors of different tokens are independent, but a wrong factor errs in the same direction everywhere. So all
rows together show it long before one row does: engine - truth = sum_i d_i part_i, by least squares, each row in units
of the truth's norm. The standard error of d comes from the rows themselves: each is left out in turn (the jackknife).
It is large if one row alone decides.

    ratio = |d_i| / max(standard error of d_i, 2^-8)        2^-8: a factor that an engine stores in bf16
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..diagnose.at_sight import SCALE_NOTE
from .envelope import class_of
from .records import Record

FACTOR = 2.0**-8
FEWEST_ROWS = 16  # rows; a standard error from fewer is none


def scale_errors(engine: Tensor, truth: Tensor, parts: Sequence[Tensor]) -> list[tuple[float, float]]:
    """(d, ratio) of each part. All [rows, n]; rows that are not finite are left out. Empty if there are too few rows,
    or if parts are alike."""
    size_R1 = truth.to(torch.float64).norm(dim=1, keepdim=True)
    rows = engine.isfinite().all(1) & (size_R1 > 0).flatten()
    if int(rows.sum()) < FEWEST_ROWS:
        return []
    x_RIn = torch.stack([part.to(torch.float64) / size_R1 for part in parts], 1)[rows]
    error_Rn = ((engine.to(torch.float64) - truth.to(torch.float64)) / size_R1)[rows]
    gram_RIJ = torch.einsum("rin,rjn->rij", x_RIn, x_RIn)
    right_RI = torch.einsum("rin,rn->ri", x_RIn, error_Rn)
    gram_IJ, right_I = gram_RIJ.sum(0), right_RI.sum(0)
    d_I, failed = torch.linalg.solve_ex(gram_IJ, right_I)
    without_RI, fails_R = torch.linalg.solve_ex(gram_IJ - gram_RIJ, right_I - right_RI)
    if failed or fails_R.any() or not without_RI.isfinite().all():
        return []
    ratio_I = d_I.abs() / (without_RI - d_I).square().sum(0).sqrt().clamp(min=FACTOR)
    return list(zip(d_I.tolist(), ratio_I.tolist(), strict=True))


def log_sizes(x: Tensor, truth: Tensor) -> tuple[float, float]:
    """(d, standard error) of the size of all rows of logits, or of log p, each without its mean: d = mean log |x| /
    |truth|. Rows with other experts have other values of the same size, which least squares would call too small. (0,
    0) if there are too few rows."""
    theirs_R, ours_R = ((y.to(torch.float64) - y.to(torch.float64).mean(1, True)).norm(dim=1) for y in (x, truth))
    rows = theirs_R.isfinite() & (ours_R > 0) & (theirs_R > 0)
    if int(rows.sum()) < FEWEST_ROWS:
        return 0.0, 0.0
    log_R = (theirs_R / ours_R)[rows].log()
    return float(log_R.mean()), float(log_R.std()) / len(log_R) ** 0.5


def size_error(x: Tensor, truth: Tensor, legal: float) -> tuple[float, float]:
    """(d, ratio): ratio = |d| / max(legal, 2 standard errors of d, 2^-8). legal: the largest |d| of legal roundings."""
    d, error = log_sizes(x, truth)
    return d, abs(d) / max(legal, 2 * error, FACTOR)


def judge_size(record: Record, x: Tensor, truth: Tensor, legal: float, limit: float) -> None:
    """Find logits that are too large or too small in all rows, however large the rounding before them."""
    off, ratio = size_error(x, truth, legal)
    if ratio > max(limit, record.ratio or 0.0):
        record.note = f"{100 * math.expm1(off):+.1f} % in all rows: {SCALE_NOTE}"
        record.cls = class_of(ratio, limit)
        if record.added is None:
            record.inherited = ratio
        else:
            record.added = ratio
