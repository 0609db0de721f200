"""How bugs get into a running vLLM: by weights that are changed in place and put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .bugs import GDN
from .changes import swapped, zero_first

Undo = list[tuple[Tensor, Tensor]]


def change(new: Callable[[Tensor], Tensor], *names: str) -> Callable[[Any], Undo]:
    """Weights of layer GDN whose name ends so; returns each with its old bytes."""

    def plant(model: Any) -> Undo:
        undo: Undo = []
        for name, weight in model.named_parameters():
            if f"layers.{GDN}." in name and name.endswith(names):
                undo.append((weight, weight.detach().clone()))
                weight.data.copy_(new(weight.detach().clone()))
        assert undo, f"this vLLM has no weight {names}"
        return undo

    return plant


SHARED, EXPERTS = "mlp.shared_expert.down_proj.weight", ("w13_weight", "w2_weight")
PLANT: dict[str, Callable[[Any], Undo]] = {
    "shared-dropped": change(lambda w: w * 0, SHARED),
    "shared-twice": change(lambda w: w * 2, SHARED),
    "experts-swapped": change(swapped, *EXPERTS),
    "experts-shifted": change(lambda w: w.roll(-1, 0), *EXPERTS),
    "expert-zero": change(zero_first, "w2_weight"),
    "gate-up-swapped": change(lambda w: w.roll(w.shape[1] // 2, 1), "w13_weight"),
    "no-decay": change(lambda w: w * 0 - 60, "linear_attn.A_log"),
    "convolution-reversed": change(lambda w: w.flip(-1), "linear_attn.conv1d.weight"),
}
