"""Experts that are not one decoded tensor: packed ones, decoded when a token hits them, and views of a mapped file."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from .quant.packed import Float, Packed, Stacked, adjoined

CPU = torch.device("cpu")
READERS = 6  # experts that are read at once for a GPU, which waits for the disk otherwise
Slot = tuple[Packed, Packed]  # gate_up [2F, D] (F rows of gate, then F of up), down [D, F]


class ViewedExperts(nn.Module):
    """Experts whose bytes are what the model computes with: handed out where they lie, without a copy.

    Only where gate and up do not adjoin, they are put together when hit.
    """

    def __init__(self, slots: Sequence[Slot], dtype: torch.dtype):
        super().__init__()
        self.slots, self.dtype, self.quantised = slots, dtype, False
        self.count, self.intermediate = len(slots), slots[0][1].shape[1]

    def visit(self, hit: Iterable[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        for e in hit:
            gate_up, down = self.slots[e]
            yield e, gate_up.decode(self.dtype), down.decode(self.dtype)


def as_one(weights: Sequence[Packed]) -> Tensor | None:
    """The view [E, O, I] of matrices [O, I] that lie one after another in memory; None where they do not."""
    view = adjoined([weight.values if isinstance(weight, Float) else None for weight in weights])
    return None if view is None else view.view(len(weights), -1, view.shape[-1])


def is_plain(weight: Packed, dtype: torch.dtype) -> bool:
    """Whether a weight is stored as values of this dtype."""
    parts = weight.parts if isinstance(weight, Stacked) else (weight,)
    return all(isinstance(part, Float) and part.values.dtype == dtype for part in parts)


def moved(packed: Packed, device: torch.device) -> Packed:
    """The same on another device."""
    if isinstance(packed, Stacked):
        return Stacked(tuple(moved(part, device) for part in packed.parts))
    return type(packed)(**{name: x.to(device) for name, x in vars(packed).items()})


class PackedExperts(nn.Module):
    """Hands out experts as `Experts` does. `read(e)` gives a slot, from memory or from disk.

    A thread reads the next expert while the present one is decoded and computed with. On a CPU it leaves the decoding
    to those threads of torch that compute: they use all cores, and a second team fights with them. One decoded expert
    exists at a time, in a buffer that is used again. For a GPU several are read at once, and decoded there, on a stream
    of their own, from copies of what is stored.
    """

    def __init__(
        self,
        count: int,
        intermediate: int,
        read: Callable[[int], Slot],
        dtype: torch.dtype,
        quantised: bool,
        device: torch.device = CPU,
    ):
        super().__init__()
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead = 1 if self.side is None else READERS
        self.count, self.intermediate, self.read = count, intermediate, read
        self.dtype, self.quantised = dtype, quantised
        self._scratch: tuple[Tensor, Tensor] | None = None

    def visit(self, hit: Iterable[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        hit = list(hit)
        with ThreadPoolExecutor(self.ahead) as ahead:
            fetch: Callable[[int], Any] = self.read if self.side is None else self._decode_there
            coming = deque(ahead.submit(fetch, e) for e in hit[: self.ahead])
            for i, e in enumerate(hit):
                slot = coming.popleft().result()
                coming.extend(ahead.submit(fetch, following) for following in hit[i + self.ahead : i + self.ahead + 1])
                gate_up, down = self._decode_here(slot) if self.side is None else slot
                if self.side is not None:
                    torch.cuda.current_stream().wait_stream(self.side)
                    for weight in (gate_up, down):  # their memory is not to be reused before they are
                        weight.record_stream(torch.cuda.current_stream())
                yield e, gate_up, down

    @torch.inference_mode()
    def _decode_here(self, slot: Slot) -> tuple[Tensor, Tensor]:
        if self._scratch is None:
            gate_up, down = (torch.empty(packed.shape, dtype=self.dtype) for packed in slot)
            self._scratch = gate_up, down
        gate_up, down = (packed.decode(self.dtype, out) for packed, out in zip(slot, self._scratch, strict=True))
        return gate_up, down

    @torch.inference_mode()
    def _decode_there(self, e: int) -> tuple[Tensor, Tensor]:
        assert self.side is not None
        with torch.cuda.stream(self.side):
            gate_up, down = (moved(packed, self.side.device).decode(self.dtype) for packed in self.read(e))
        return gate_up, down
