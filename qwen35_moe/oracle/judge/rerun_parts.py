"""The inputs of a rerun, and the handlers that watch more than the taps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...model.text import Layer
from ...numerics.arithmetics import Arithmetic
from ...numerics.taps import Handler, Site
from ...quant.packed import Packed
from ...run.experts import moved
from ...run.gpu.passing import PassingExperts
from ...run.prompt import Images
from ...run.source import WeightSource


@dataclass
class TruthTokens:
    """The tokens of the truth. ids, positions, mask [B, T], with images positions [3, B, T]; steps [B, T]: the engine's
    step of each token."""

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


class LayerSource(WeightSource):
    """The weights of one layer for all arithmetics: they are read once, and kept in their stored format on its
    device."""

    def __init__(self, inner: WeightSource, device: torch.device):
        super().__init__(inner.checkpoint, inner.config, inner.online)
        self.inner, self.device, self.as_stored, self.conversion = inner, device, inner.as_stored, inner.conversion
        self.tensors: dict[str, Tensor] = {}
        self.weights: dict[str, Packed] = {}
        self.experts: PassingExperts | None = None

    def tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            self.tensors[name] = self.inner.tensor(name).to(self.device)
        return self.tensors[name]

    def weight(self, module: str, rows: slice | None = None) -> Packed:
        if rows is not None:
            return self.inner.weight(module, rows)
        if module not in self.weights:
            self.weights[module] = moved(self.inner.weight(module), self.device)
        return self.weights[module]

    def share(self, layer: Layer) -> None:
        """Experts that pass through a GPU are read by the first layer that is filled. The other layers share them."""
        experts = layer.mlp.experts
        if not isinstance(experts, PassingExperts):
            return
        if self.experts is None or self.experts.count != experts.count:
            self.experts = experts
        experts.stay_with(self.experts)


class SharedPart(Handler):
    """Records what the shared expert adds to mlp_output, whether it is unfused or a slot."""

    def __init__(self, experts: int, table: Arithmetic, fused: bool):
        self.slot = experts if fused and table.switch("moe_sum_order") == "expert" else None
        self.value: Tensor | None = None

    @property
    def sees_experts(self) -> bool:
        return self.slot is not None

    def __call__(self, site: Site, x: Tensor) -> None:
        if site.name == "moe_shared_gated" or (site.name == "moe_expert_weighted" and site.index == self.slot):
            self.value = x
