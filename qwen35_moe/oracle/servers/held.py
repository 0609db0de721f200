"""Weights of one layer, held on the device that they are needed on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ...quant.packed import Packed
from ...run.experts import PackedExpert, moved
from ...run.source import WeightSource

FETCHERS = 4  # threads that bring the next layer's experts to the device


class Held(WeightSource):
    """The weights of a layer, fetched to the device once, as they are stored, and of the experts of the next layer."""

    as_stored = False

    def __init__(self, inner: WeightSource, device: torch.device):
        super().__init__(inner.checkpoint, inner.config, inner.online)
        self.inner, self.device = inner, device
        self.pool, self.kept = ThreadPoolExecutor(FETCHERS), dict[str, Future[Any]]()

    def begin(self, layer: int) -> None:
        """Forgets the layers before; has the experts of this layer and of the next one fetched."""
        self.kept = {key: value for key, value in self.kept.items() if key.startswith(f"layers.{layer}.")}
        for i in range(layer, min(layer + 2, self.config.num_hidden_layers)):
            for e in range(self.config.num_experts):
                self._fetch(f"layers.{i}.mlp", e)

    def _once(self, key: str, read: Callable[[], Any]) -> Future[Any]:
        if key not in self.kept:
            self.kept[key] = self.pool.submit(read)
        return self.kept[key]

    def _fetch(self, mlp: str, e: int) -> Future[PackedExpert]:
        def read() -> PackedExpert:
            gate_up, down = self.inner.slot(mlp, e)
            return moved(gate_up, self.device), moved(down, self.device)

        return self._once(f"{mlp}.{e}", read)

    def slot(self, mlp: str, e: int) -> PackedExpert:
        return self._fetch(mlp, e).result()

    def tensor(self, name: str) -> Tensor:
        return self._once(name, lambda: self.inner.tensor(name).to(self.device)).result()

    def weight(self, module: str, rows: slice | None = None) -> Packed:
        if rows is not None:
            return self.inner.weight(module, rows)
        return self._once(f"{module}.weight", lambda: moved(self.inner.weight(module), self.device)).result()
