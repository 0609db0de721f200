"""Token ids of the requests: the same for all engines."""

from __future__ import annotations

from collections.abc import Sequence

VOCABULARY = 2048  # of `engine-size`
UNEQUAL = (20, 11, 7, 30, 1, 16, 9, 25)


def prompts(lengths: Sequence[int], seed: int = 1) -> list[list[int]]:
    """A sequence of ids for each length; none begins as another does."""
    out, x = [], seed
    for length in lengths:
        row = []
        for _ in range(length):
            x = (x * 1103515245 + 12345) % 2**31
            row.append((x >> 12) % VOCABULARY)
        out.append(row)
    return out
