"""Experts that stay packed: decoded when a token hits them, into two buffers that are used in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .quant.packed import Packed

Slot = tuple[Packed, Packed]  # gate_up [2F, D] (F rows of gate, then F of up), down [D, F]


@dataclass(frozen=True)
class RowsOf:
    """Packed weights one below the other: the gate and up projections of a shared expert as one slot's gate_up."""

    parts: tuple[Packed, ...]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((sum(p.shape[0] for p in self.parts), *self.parts[0].shape[1:]))

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parts)

    def decode(self, dtype: torch.dtype, out: Tensor | None = None, rows: slice | None = None) -> Tensor:
        out = torch.empty(self.shape, dtype=dtype) if out is None else out
        for part, target in zip(self.parts, out.split([p.shape[0] for p in self.parts]), strict=True):
            part.decode(dtype, target)
        return out if rows is None else out[rows]


class PackedExperts(nn.Module):
    """Hands out experts as `Experts` does. `read(e)` gives a slot, from memory or from disk.

    The next expert is read and decoded in a thread while the present one is computed with, so that reading, decoding
    and multiplying overlap. No more than two decoded experts exist at a time.
    """

    def __init__(self, count: int, intermediate: int, read: Callable[[int], Slot], dtype: torch.dtype, quantised: bool):
        super().__init__()
        self.count, self.intermediate, self.read = count, intermediate, read
        self.dtype, self.quantised = dtype, quantised
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def visit(self, hit: Iterable[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        hit = list(hit)
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self._decode, hit[0], 0) if hit else None
            for i, e in enumerate(hit):
                gate_up, down = coming.result()
                if i + 1 < len(hit):
                    coming = ahead.submit(self._decode, hit[i + 1], (i + 1) % 2)
                yield e, gate_up, down

    @torch.inference_mode()
    def _decode(self, e: int, which: int) -> tuple[Tensor, Tensor]:
        slot = self.read(e)
        if len(self._buffers) <= which:
            gate_up, down = (torch.empty(packed.shape, dtype=self.dtype) for packed in slot)
            self._buffers.append((gate_up, down))
        gate_up, down = self._buffers[which]
        return slot[0].decode(self.dtype, gate_up), slot[1].decode(self.dtype, down)
