"""Weights of one layer, held on the device that they are needed on."""

from __future__ import annotations

import os

import torch

from ...run.experts import PackedExpert, moved
from ...run.source import WeightSource

BYTES = 18  # of an expert's number, decoded side by side for float64, float32 (twice, with a fault) and bf16
SHARE_OF_MEMORY = 0.6  # that they may take: else experts are decoded when they are chosen


class Held(WeightSource):
    """A source whose experts are fetched to the device once a layer, as they are stored, and decoded there."""

    as_stored = False

    def __init__(self, inner: WeightSource, device: torch.device):
        super().__init__(inner.checkpoint, inner.config, inner.online)
        self.inner, self.device = inner, device
        self.mlp, self.kept = "", dict[int, PackedExpert]()

    def slot(self, mlp: str, e: int) -> PackedExpert:
        if mlp != self.mlp:
            self.mlp, self.kept = mlp, {}
        if e not in self.kept:
            gate_up, down = self.inner.slot(mlp, e)
            self.kept[e] = moved(gate_up, self.device), moved(down, self.device)
        return self.kept[e]


def has_room(size: int, device: torch.device) -> bool:
    if device.type == "cuda":
        return size < SHARE_OF_MEMORY * torch.cuda.mem_get_info(device)[0]
    return size < SHARE_OF_MEMORY * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
