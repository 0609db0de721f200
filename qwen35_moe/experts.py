"""Experts that stay packed: decoded when a token hits them, into two buffers that are used in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from .quant.packed import Packed

Slot = tuple[Packed, Packed]  # gate_up [2F, D] (F rows of gate, then F of up), down [D, F]


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
