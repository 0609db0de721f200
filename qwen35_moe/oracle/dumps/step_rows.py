"""The rows of an engine's steps: tokens of the truth, and beside them rejected drafts, padding, other requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ...errors import Qwen35Error
from .dump import Dump
from .matched import Matched

StepLayout = dict[int, tuple[int, Tensor]]


@dataclass(frozen=True)
class Foreign:
    """Rows of none of the truth's tokens. x [n, D]."""

    x: Tensor
    normed: bool  # whether x is what the mixer reads, or the stream before its norm


@dataclass
class StepRows:
    """mask [B, T] of the truth's tokens."""

    dump: Dump
    matched: Matched
    mask: Tensor

    @cached_property
    def layout(self) -> StepLayout:
        """step -> how many rows it has, and [n, 2] row, index in [B*T]. Step -1 has the tokens that the dump has not:
        the engine ran them before, or never."""
        left, found = self.mask.bool().clone(), StepLayout()
        for step, table in sorted(self.matched.read.items()):
            row, b, t = table.unbind(1)
            left[b, t] = False
            rows = max(self.dump.count(step) or 0, int(row.max()) + 1) if len(row) else 0
            found[step] = (rows, torch.stack((row, b * left.shape[1] + t), 1))
        unseen = left.flatten().nonzero().flatten()
        return {-1: (len(unseen), torch.stack((torch.arange(len(unseen)), unseen), 1)), **found}

    def mixer_input(self, layer: int | None, step: int, rows: Sequence[int]) -> Foreign | None:
        """What the mixer of a layer read in some rows of a step; None where the dump does not say."""
        for name, normed in (("input_layernorm", True), ("layer_input", False)):
            key = f"layers.{layer}.{name}"
            if rows and step in self.dump.sources.get(key, {}):
                try:
                    return Foreign(self.dump.read(key, step)[torch.tensor(rows)], normed)
                except (Qwen35Error, IndexError):
                    continue
        return None

    def beside(self, layer: int) -> dict[int, Foreign]:
        """By step, the same in the rows that `layout` leaves out; padding is zero."""
        found = {}
        for step, (count, table) in self.layout.items():
            rows = sorted(set(range(count)).difference(table[:, 0].tolist()))
            read, tokens = self.mixer_input(layer, step, rows), self.dump.tokens.get(step)
            if read is not None:
                real = None if tokens is None or tokens.mask is None else tokens.mask[rows, None]
                found[step] = read if real is None else replace(read, x=read.x * real.to(read.x))
        return found
