"""Bugs of one of several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def not_reduced(layer: int, rank: int) -> Callable[[Any], None]:
    """One rank keeps its own partial sum of a layer's MoE block, the others take the sum of all."""

    def plant(site: Any) -> None:
        from sglang.srt.models import qwen2_moe

        reduce, inside = qwen2_moe.tensor_model_parallel_all_reduce, [False]

        def all_reduce(x: Tensor) -> Tensor:
            own = x.clone()
            out = reduce(x)
            return own if inside[0] and site.rank == rank else out

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            inside[0] = True
            out = forward(*args, **kwargs)
            inside[0] = False
            return out

        site.patch(qwen2_moe, "tensor_model_parallel_all_reduce", all_reduce)
        site.wrap(site.model.layers[layer].mlp, around)

    return plant
