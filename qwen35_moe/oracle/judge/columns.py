"""Which columns of a tensor are wrong: a range of them, or those of one rank."""

from __future__ import annotations

import torch
from torch import Tensor

ERROR_SHARE = 0.99  # of the squared error


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
