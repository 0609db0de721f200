"""The vision tower's table of positions, resampled to the grid of an image."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor

from ...numerics.arithmetics import current
from ..ops import promote

Grid = tuple[int, int, int]


def patch_places(grids: Sequence[Grid], m: int) -> Tensor:
    """For each patch, in merge-block order: its row, its column, and the rows and columns of its frame: [4, L]."""
    places = []
    for t, h, w in grids:
        row = torch.arange(h).view(h // m, 1, m, 1).expand(-1, w // m, -1, m).flatten()
        column = torch.arange(w).view(1, w // m, 1, m).expand(h // m, -1, m, -1).flatten()
        places.append(torch.stack((row, column, torch.full_like(row, h), torch.full_like(row, w))).repeat(1, t))
    return torch.cat(places, dim=1)


def interpolate(table: Tensor, row: Tensor, column: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The position table [s * s, D], a square grid of side s, resampled where the patches are: [L, D].

    Bilinear with aligned corners: patch i of n stands at y = i (s-1) / (n-1) of the table (at 0 when n = 1), between
    its rows floor(y) and floor(y) + 1. The switch `vis_places` says how y is rounded. With "exact" the floor is taken
    in integers, so that it is right where y is an integer.
    """
    table, side = promote(table), isqrt(table.shape[0])
    how, dtype = current().switch("vis_places"), current().dtype

    def neighbours(i: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        last, steps = side - 1, (n - 1).clamp(min=1)
        if how == "exact":
            low, part = i * last // steps, (i * last % steps).to(table.dtype) / steps
        else:
            y = (i * last).float() / steps if how == "fp32" else evenly_spaced(i, n, last)
            low, part = y.long(), (y - y.floor()).to(table.dtype)
        return low, (low + 1).clamp(max=last), part[:, None]

    def stored(x: Tensor) -> Tensor:
        return x.to(dtype).to(x.dtype) if how == "stored" else x

    (top, bottom, y), (left, right, x) = neighbours(row, rows), neighbours(column, columns)
    total = table.new_zeros(())
    for at_row, y_share in ((top, 1 - y), (bottom, y)):
        for at_column, x_share in ((left, 1 - x), (right, x)):
            total = total + stored(table[at_row * side + at_column] * stored(y_share * x_share))
    return total


def evenly_spaced(i: Tensor, n: Tensor, last: int) -> Tensor:
    """Place i of n places from 0 to `last`, in fp32 as torch.linspace rounds: whole steps from the nearer end."""
    step = last / (n - 1).clamp(min=1).float()
    return torch.where(i < n // 2, step * i, last - step * (n - 1 - i)) * (n > 1)
