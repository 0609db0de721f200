"""Patterns in the error of a tap: some columns hold it all, or a factor is wrong in all rows alike.

A wrong factor errs in the same direction everywhere, and roundings do not. So all rows together show it long before one
row does: engine - truth = sum_i d_i part_i, by least squares, each row in units of the truth's norm. The standard error
of d comes from the rows themselves: each is left out in turn (the jackknife).

    ratio = |d_i| / max(standard error of d_i, 2^-8)        2^-8: a factor that an engine stores in bf16
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..diagnose.at_sight import SCALE_NOTE
from .records import Record

ERROR_SHARE = 0.99  # of the squared error, in the columns that are named
FACTOR = 2.0**-8
FEWEST_ROWS = 16  # a standard error from fewer is none


def wrong_columns(engine: Tensor, truth: Tensor, owners: Tensor | None = None) -> str:
    """Says which columns hold nearly all of the error, if no more than three quarters of them do; else nothing.

    engine, truth [rows, n]: the bad rows; owners [n]: the rank that each column came from.
    """
    error_n = (engine.to(torch.float64) - truth.to(torch.float64)).square().nan_to_num(torch.inf).sum(0)
    if error_n.isinf().any():
        error_n = error_n.isinf().to(torch.float64)
    n, share_n = len(error_n), error_n / error_n.sum()
    ranks = [] if owners is None else owners.unique().tolist()
    for rank in ranks if len(ranks) > 1 else ():
        if float(share_n[owners == rank].sum()) >= ERROR_SHARE:
            return f"in columns of rank {int(rank)} only"
    some = (share_n.cumsum(0) > (1 - ERROR_SHARE) / 2) & (share_n.flip(0).cumsum(0).flip(0) > (1 - ERROR_SHARE) / 2)
    if int(some.sum()) > 0.75 * n or not some.any():
        return ""
    first, last = some.nonzero().flatten()[[0, -1]].tolist()
    return f"in column {first} of {n}" if first == last else f"in columns {first} to {last} of {n}"


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
    """(d, standard error): d = mean over the rows of log(|x| / |truth|), of logits or log p, less the mean of each row.
    Sizes are compared and not values: rows with other experts have other values of the same size, which least squares
    would call too small. (0, 0) if there are too few rows."""
    theirs_R, ours_R = ((y.to(torch.float64) - y.to(torch.float64).mean(1, True)).norm(dim=1) for y in (x, truth))
    rows = theirs_R.isfinite() & (ours_R > 0) & (theirs_R > 0)
    if int(rows.sum()) < FEWEST_ROWS:
        return 0.0, 0.0
    log_R = (theirs_R / ours_R)[rows].log()
    return float(log_R.mean()), float(log_R.std()) / len(log_R) ** 0.5


def judge_size(record: Record, x: Tensor, truth: Tensor, legal: float, limit: float) -> None:
    """Find logits that are too large or too small in all rows, however large the rounding before them.

    ratio = |d| / max(legal, 2 standard errors of d, 2^-8). legal: the largest |d| of legal roundings.
    """
    d, error = log_sizes(x, truth)
    note = f"{100 * math.expm1(d):+.1f} % in all rows: {SCALE_NOTE}"
    record.exceed(abs(d) / max(legal, 2 * error, FACTOR), note, limit)


def judge_scale(record: Record, x: Tensor, truth: Tensor, shared: Tensor | None, limit: float) -> None:
    """Find a block's output, or a part of it, that is wrong by one factor in all rows, however little in each. shared
    [rows, n]: the shared expert's part of an mlp_output."""
    parts = [{"the block": truth}]
    parts += [] if shared is None else [{"the routed experts": truth - shared, "the shared expert": shared}]
    for some in parts:
        for part, (off, ratio) in zip(some, scale_errors(x, truth, list(some.values())), strict=False):
            record.exceed(ratio, f"{part}: {100 * off:+.1f} % in all rows", limit)
