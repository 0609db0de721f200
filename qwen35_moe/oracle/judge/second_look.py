"""A second look at taps just beyond the limit: more legal roundings are tried before an engine is blamed.

The envelope of a few arithmetics has few samples of a random error. If one number decides a token's error (a routing
weight, a logit), all samples may be small by chance. A Gaussian error exceeds 3 times the largest of 4 such errors once
in 70 rows, and of 20 such errors once in 60,000. So up to SAMPLES more are made, a few at a time. They are made for
ratios from LOOK on, so that a clean tap is not clean by chance, up to DOUBTFUL_LIMITS limits: no rounding makes a
larger error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from ...numerics.arithmetics import Arithmetic
from .records import Record
from .rerun import Rerun
from .split_k import samples

SAMPLES, TABLES_PER_BATCH = 24, 4
LOOK, DOUBTFUL_LIMITS = 2.0, 4.0

Taps = dict[str, Tensor]


def batches(
    tables: Sequence[Arithmetic], run: Callable[[Sequence[tuple[int, Arithmetic]]], list[Taps]]
) -> Iterator[list[Taps]]:
    """Taps under TABLES_PER_BATCH more arithmetics at a time. `run` gets (member, its table)."""
    more = [(i % len(tables), table) for i, table in enumerate(samples(tables, SAMPLES))]
    for start in range(0, SAMPLES, TABLES_PER_BATCH):
        yield run(more[start : start + TABLES_PER_BATCH])


def doubtful(record: Record, limit: float) -> bool:
    """Whether more samples could clear a tap: by the size of its error, row by row."""
    ratio = record.by_rows or record.ratio or 0.0
    return (record.bad or ratio > LOOK) and ratio <= DOUBTFUL_LIMITS * limit


def second_look(rerun: Rerun, layer: int | None, work: Any, seen: Sequence[Taps]) -> list[Taps]:
    """Judge the taps of this layer that were just beyond the limit again, with more samples. Returns all taps that were
    used."""
    found = list(seen)
    more = batches(rerun.tables[1:], lambda some: rerun.taps(layer, [(i + 1, table) for i, table in some]))
    while keys := [r.key for r in work.judged(layer, seen) if doubtful(r, work.limit)]:
        batch = next(more, None)
        if batch is None:
            break
        found += batch
        work.again(keys, layer, found)
    return found
