"""The same tokens in other batches: alone, n times in one batch, cut to n tokens, fed n at a time, and once more.

An engine chooses kernels by the number of tokens. A single request does not show a kernel that is wrong for a few of
these numbers. This needs no truth: an engine is compared with itself, in units of the difference of two legal orders of
addition (the root of two times the typical legal error of a position).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def buckets(asker: Asker, prompt: Sequence[int], sizes: Sequence[int], typical: float) -> list[Bucket]:
    """Asks for each size. `typical`: the legal error of a position, the median of sigma."""
    alone = _rows(asker.together([prompt], DECODE_TOKENS)[0])

    def bucket(name: str, others: Iterable[Answer], start: int = 0, stop: int = 1 << 30) -> Bucket:
        sizes = list[float]()
        for key, log_p in (item for other in others for item in _rows(other, start, stop).items()):
            off = [log_p[i] - x for i, x in alone.get(key, {}).items() if i in log_p]
            if off:
                sizes.append(float(torch.tensor(off, dtype=torch.float64).square().mean().sqrt()))
        ratio = float(torch.tensor(sizes).median()) / (2**0.5 * typical) if sizes else 0.0
        return Bucket(name, len(sizes), ratio)

    found, first = [bucket("once more, perhaps from a cache", asker.together([prompt], DECODE_TOKENS))], len(prompt) + 1
    for n in sizes:
        found.append(bucket(f"{n} tokens alone", asker.together([prompt[:n]], 1)))
        found.append(bucket(f"fed {n} at a time", asker.grown(prompt, n)))
        if n > 1:
            many = asker.together([prompt] * n, DECODE_TOKENS)
            found.append(bucket(f"batch of {n}, prompt", many, 0, first))
            found.append(bucket(f"batch of {n}, decode", many, first))
    return found


def _rows(answer: Answer, start: int = 0, stop: int = 1 << 30) -> dict[tuple[int, ...], dict[int, float]]:
    """log p by the tokens before them, of places from `start` on."""
    return {tuple(answer.ids[: r.place]): r.log_p for r in answer.rows if r.log_p and start <= r.place < stop}
