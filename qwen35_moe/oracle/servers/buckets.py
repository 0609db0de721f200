"""The same tokens in other batches: alone, n times in one batch, cut to n tokens, fed n at a time, and once more.

An engine chooses kernels by the number of tokens. A single request does not show a kernel that is wrong for a few of
these numbers. This needs no truth: an engine is compared with itself, in units of the difference of two legal orders of
addition (the root of two times the typical legal error of a position).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .answer import FAR, Answer
from .dialects import Asker

DECODE_TOKENS = 4  # tokens generated after each prompt: decode steps with as many rows as there are prompts


@dataclass(frozen=True)
class Bucket:
    """`ratio`: the median over `rows` positions of rms(delta log p) against the lone request, in legal units."""

    name: str
    rows: int
    ratio: float

    @property
    def bad(self) -> bool:
        return self.rows > 0 and not self.ratio <= FAR

    def __str__(self) -> str:
        said = "nothing to compare" if not self.rows else f"{self.ratio:.2f} x the legal difference, {self.rows} rows"
        return f"{self.name}: {said}{'  <-- differs' if self.bad else ''}"


Known = dict[tuple[int, ...], dict[int, float]]


def buckets(asker: Asker, prompt: Sequence[int], sizes: Sequence[int], typical: float) -> list[Bucket]:
    """Asks for each size. `typical`: the legal error of a position, the median of sigma."""
    alone = _rows(asker.together([prompt], DECODE_TOKENS), 0)
    found = [
        _bucket("once more, perhaps from a cache", alone, [_rows(asker.together([prompt], DECODE_TOKENS), 0)], typical)
    ]
    for n in sizes:
        cut = asker.together([prompt[:n]], 1)
        found.append(_bucket(f"{n} tokens alone", alone, [_rows(cut, 0)], typical))
        fed = [_rows([a], 0) for a in asker.grown(prompt, n)]
        found.append(_bucket(f"fed {n} at a time", alone, fed, typical))
        if n == 1:
            continue
        many = asker.together([prompt] * n, DECODE_TOKENS)
        first = len(prompt)
        found.append(_bucket(f"batch of {n}, prompt", alone, [_rows([a], 0, first + 1) for a in many], typical))
        found.append(_bucket(f"batch of {n}, decode", alone, [_rows([a], first + 1) for a in many], typical))
    return found


def _rows(answers: Sequence[Answer], start: int, stop: int = 1 << 30) -> Known:
    """log p by the tokens before them, of places from `start` on."""
    return {tuple(a.ids[: r.place]): r.log_p for a in answers for r in a.rows if r.log_p and start <= r.place < stop}


def _bucket(name: str, alone: Known, others: Sequence[Known], typical: float) -> Bucket:
    sizes = list[float]()
    for other in others:
        for key, log_p in other.items():
            off = [log_p[i] - x for i, x in alone.get(key, {}).items() if i in log_p]
            if off:
                sizes.append(float(torch.tensor(off, dtype=torch.float64).square().mean().sqrt()))
    if not sizes:
        return Bucket(name, 0, 0.0)
    return Bucket(name, len(sizes), float(torch.tensor(sizes).median()) / (2**0.5 * typical))
