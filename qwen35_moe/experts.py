"""Experts that are not one decoded tensor: packed ones, decoded when a token hits them, and views of a mapped file."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

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

    The next expert is read and decoded in a thread while the present one is computed with, so that reading, decoding
    and multiplying overlap. No more than two decoded experts exist at a time. For a GPU several
    are read at once, and decoded there, on a stream of their own, from copies of what is stored.
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
        self._scratch: list[tuple[Tensor, Tensor]] = []

    def visit(self, hit: Iterable[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        hit = list(hit)
        with ThreadPoolExecutor(self.ahead) as ahead:
            coming = deque(ahead.submit(self._decode, e, 0) for e in hit[: self.ahead])
            for i, e in enumerate(hit):
                gate_up, down = coming.popleft().result()
                if self.side is not None:
                    torch.cuda.current_stream().wait_stream(self.side)
                    for weight in (gate_up, down):  # their memory is not to be reused before they are
                        weight.record_stream(torch.cuda.current_stream())
                following = hit[i + self.ahead : i + self.ahead + 1]
                coming.extend(ahead.submit(self._decode, f, (i + 1) % 2) for f in following)
                yield e, gate_up, down

    @torch.inference_mode()
    def _decode(self, e: int, which: int) -> tuple[Tensor, Tensor]:
        slot = self.read(e)
        if self.side is not None:
            with torch.cuda.stream(self.side):
                return tuple(moved(packed, self.side.device).decode(self.dtype) for packed in slot)
        if len(self._scratch) <= which:
            gate_up, down = (torch.empty(packed.shape, dtype=self.dtype) for packed in slot)
            self._scratch.append((gate_up, down))
        gate_up, down = self._scratch[which]
        return slot[0].decode(self.dtype, gate_up), slot[1].decode(self.dtype, down)
