"""Rows that lie side by side in a file are read at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reader import STORED_DTYPES, Reader, Rows


def read_together(reader: Reader, wanted: Sequence[Rows]) -> list[Tensor]:
    """`Rows.read` of each. Neighbours in one file are read at once, into one piece of memory."""
    found: dict[int, Tensor] = {}
    at = [rows.stored.begin + rows.span()[0] for rows in wanted]
    run: list[int] = []
    for i in sorted(range(len(wanted)), key=lambda i: (wanted[i].stored.file, at[i])):
        if run and not _adjoins(wanted, at, run, i):
            found |= _read_run(reader, wanted, run)
            run = []
        run.append(i)
    found |= _read_run(reader, wanted, run)
    return [found[i] for i in range(len(wanted))]


def _adjoins(wanted: Sequence[Rows], at: Sequence[int], run: Sequence[int], i: int) -> bool:
    """Whether rows i lie right behind those of the run, on a multiple of their size."""
    last, rows = wanted[run[-1]], wanted[i]
    return (
        rows.stored.file == last.stored.file
        and at[i] == at[run[-1]] + last.span()[1]
        and rows.step == last.step == 1
        and (at[i] - at[run[0]]) % STORED_DTYPES[rows.stored.dtype].itemsize == 0
    )


def _read_run(reader: Reader, wanted: Sequence[Rows], run: Sequence[int]) -> dict[int, Tensor]:
    if len(run) < 2 or reader.mapped:
        return {i: wanted[i].read(reader) for i in run}
    first, sizes = wanted[run[0]], [wanted[i].span()[1] for i in run]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8)
    reader.read(first.stored, first.span()[0], buffer.numpy().data)
    found = {}
    for i, part in zip(run, buffer.split(sizes), strict=True):
        dtype = STORED_DTYPES[
            wanted[i].stored.dtype
        ]  # a view less for bytes: readers wait for each other at each operation
        found[i] = (part if dtype == torch.uint8 else part.view(dtype)).view(wanted[i].count, *wanted[i].size)
    return found
