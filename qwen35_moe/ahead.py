"""Reading ahead for a GPU: threads read and copy while it computes. On a CPU the same without streams."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

READERS = 4  # threads: with more of them, or fewer, a slice of the 35B took longer (H200, bf16)
In = TypeVar("In")
Out = TypeVar("Out")


class Ahead(Generic[Out]):
    """fetch() in a thread, its copies on a stream beside the present one. `result()` is for use on the latter.

    tensors: those of a result, whose memory is the other stream's, which must not use it again too early.
    """

    def __init__(
        self,
        fetch: Callable[[], Out],
        tensors: Callable[[Out], Iterable[Tensor]],
        device: torch.device,
        pool: ThreadPoolExecutor | None = None,
    ):
        self.tensors, self.present = tensors, None
        if device.type == "cuda":
            self.present, side = torch.cuda.current_stream(device), _side(device)
        inference = torch.is_inference_mode_enabled()

        def run() -> tuple[Out, Any]:
            with torch.inference_mode(inference), nullcontext() if self.present is None else torch.cuda.stream(side):
                return fetch(), None if self.present is None else side.record_event()

        own = ThreadPoolExecutor(1) if pool is None else pool
        self.future: Future[tuple[Out, Any]] = own.submit(run)
        if pool is None:
            own.shutdown(wait=False)

    def result(self) -> Out:
        found, arrived = self.future.result()
        if self.present is not None:
            self.present.wait_event(arrived)
            for x in self.tensors(found):
                x.record_stream(self.present)
        return found


_sides: dict[torch.device, Any] = {}


def _side(device: torch.device) -> Any:
    """The one stream of copies to a device: each stream keeps memory of its own."""
    if device not in _sides:
        _sides[device] = torch.cuda.Stream(device)
    return _sides[device]


def fetch_ahead(
    fetch: Callable[[In], Out],
    items: Iterable[In],
    tensors: Callable[[Out], Iterable[Tensor]],
    device: torch.device,
    ahead: int,
) -> Iterator[Out]:
    """fetch(item) of each item, in their order, up to `ahead` of them before they are asked for."""
    with ThreadPoolExecutor(READERS) as pool:
        rest = (Ahead(lambda item=item: fetch(item), tensors, device, pool) for item in items)  # type: ignore[misc]
        coming = deque(islice(rest, ahead))
        while coming:
            yield coming.popleft().result()
            coming.extend(islice(rest, 1))
