"""What a rerun takes, and what it watches beside the taps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...numerics.arithmetics import Arithmetic
from ...numerics.taps import Handler, Site
from ...run.prompt import Images


@dataclass
class TruthTokens:
    """The tokens of the truth. ids, positions, mask [B, T], with images positions [3, B, T]; steps [B, T]: in which of
    its steps an engine ran each."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    steps: Tensor | None = None
    images: Images | None = None
    drafts: Sequence[Tensor] = ()  # [B, T] what each draft started from, where the draft head was traced

    def on(self, device: torch.device) -> TruthTokens:
        """The same on a device."""
        if device.type == "cpu":
            return self
        steps = None if self.steps is None else self.steps.to(device)
        ids, positions, mask = (x.to(device) for x in (self.ids, self.positions, self.mask))
        return replace(self, ids=ids, positions=positions, mask=mask, steps=steps)

    @property
    def count(self) -> int:
        return self.ids.numel()

    @property
    def real(self) -> Tensor | None:
        return None if bool(self.mask.all()) else self.mask.bool()


class SharedPart(Handler):
    """Sees what the shared expert adds to mlp_output, where it stands beside the others and where it is a slot."""

    def __init__(self, experts: int, table: Arithmetic):
        self.slot = experts if table.switch("moe_sum_order") == "expert" else None
        self.value: Tensor | None = None

    def __call__(self, site: Site, x: Tensor) -> None:
        if site.name == "moe_shared_gated" or (site.name == "moe_expert_weighted" and site.index == self.slot):
            self.value = x
