"""Many small pieces of work in parallel, each on few threads: the experts of a layer on a CPU.

A product with a few rows does not occupy two threads of torch, and between operations they wait for each other. So each
piece has threads of its own, the same number whether one runs at a time or several do: in float32 a product's last bit
may depend on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from typing import TypeVar

import torch
from torch.overrides import _get_current_function_mode_stack

WORKERS = 4  # each holds one decoded expert
In = TypeVar("In")
Out = TypeVar("Out")


def fix_threads() -> None:
    """Sets torch's number of threads to its present value. After that MKL never chooses fewer threads, and so
    other last bits, for small products. `side_by_side` also sets the number, so this must come before the first
    product."""
    torch.set_num_threads(torch.get_num_threads())


def side_by_side(function: Callable[[In], Out], items: Iterable[In], one_by_one: bool = False) -> Iterator[Out]:
    """function(item) of each item, in their order. The calls overlap, unless `one_by_one`.

    Each runs in the context (`contextvars`) that was current when it was handed out, under the caller's function modes
    of torch, which a thread does not have by itself, and with torch's threads divided among at most `WORKERS`.
    """
    total, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    workers, modes = min(total, WORKERS), _get_current_function_mode_stack()

    def run(item: In) -> Out:
        with ExitStack() as entered:
            entered.enter_context(torch.inference_mode(inference))
            for mode in modes:
                entered.enter_context(mode)
            return function(item)

    if workers == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(total // workers,)) as pool:
        coming: deque[Future[Out]] = deque()
        torch.set_num_threads(total // workers)  # a team of threads that waits for its next turn takes a core
        try:
            for item in items:
                coming.append(pool.submit(copy_context().run, run, item))
                if one_by_one or len(coming) > 2 * workers:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()
            torch.set_num_threads(total)
