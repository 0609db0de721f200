"""The known faults of kernels that compute the experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .case import Compute, Inputs, WrongKernel, known_faults, on

GATE_UP = ("w13", "w13_codes", "w13_scales")
DOWN = ("w2", "w2_codes", "w2_scales")
CODE_TENSORS, SCALE_TENSORS = ("w13_codes", "w2_codes"), ("w13_scales", "w2_scales")


def wrong_experts(quantised_block: Compute, quantised: bool) -> tuple[WrongKernel, ...]:
    """quantised: whether activations are; quantised_block: the block with such activations."""
    found = [
        *known_faults("gate and up swapped", "sigmoid for silu in the experts", "half of the intermediate missing",
                      "shared gate ignored", "shared gate applied twice"),
        WrongKernel("last chosen expert dropped", _slot(lambda i: -2 if is_fused(i) else -1, 0)),
        WrongKernel("first chosen expert dropped", _slot(lambda i: 0, 0)),
        WrongKernel("shared expert dropped", _shared(0)),
        WrongKernel("shared expert counted twice", _shared(2)),
        WrongKernel("routing weights ignored", on(torch.ones_like, "weights")),
        WrongKernel("routing weights in another order", on(lambda w: w.flip(1), "weights")),
        WrongKernel("experts shifted by one", on(lambda w: w.roll(-1, 0), *GATE_UP, *DOWN)),
        WrongKernel("gate and up taken for interleaved", on(_interleaved, *GATE_UP)),
        WrongKernel("nibbles swapped", on(_nibbles, *CODE_TENSORS)),
        WrongKernel("scales one step high", on(lambda s: _step(s, 1), *SCALE_TENSORS)),
        WrongKernel("scales one step low", on(lambda s: _step(s, -1), *SCALE_TENSORS)),
        WrongKernel("scales rotated", on(lambda s: s.roll(1, -1), *SCALE_TENSORS)),
    ]  # fmt: skip
    if quantised:
        found.append(WrongKernel("activation scales rounded up", function="exact+a4-round-up"))
        found.append(WrongKernel('activation scales by the "even" rule', function="exact+a4"))
        found.append(WrongKernel("activations not quantised", function="exact"))
    else:
        found.append(WrongKernel("activations quantised to MXFP4", compute=quantised_block, function="exact+a4"))
    return tuple(found)


def is_fused(i: Inputs) -> bool:
    """Whether the last column of ids is the shared expert's slot."""
    slots = i["w2" if "w2" in i else "w2_codes"].shape[0]
    return "shared_w13" not in i and bool((i["ids"][:, -1] == slots - 1).all())


def _slot(column: Callable[[Inputs], int], factor: float) -> Callable[[Inputs], Inputs]:
    def change(i: Inputs) -> Inputs:
        weights = i["weights"].clone()
        weights[:, column(i)] *= factor
        return i | {"weights": weights}

    return change


def _shared(factor: float) -> Callable[[Inputs], Inputs]:
    def change(i: Inputs) -> Inputs:
        if is_fused(i):
            return _slot(lambda _: -1, factor)(i)
        return on(lambda w: w * factor, "shared_w2")(i)

    return change


def _interleaved(x: Tensor) -> Tensor:
    """Rows of gate and up so that a reader of g0 g1 .. u0 u1 .. gets what one of g0 u0 g1 u1 .. would."""
    return torch.cat((x[..., 0::2, :], x[..., 1::2, :]), -2)


def _nibbles(codes: Tensor) -> Tensor:
    return (codes << 4) | (codes >> 4) if codes.dtype == torch.uint8 else codes


def _step(scales: Tensor, step: int) -> Tensor:
    return (scales.int() + step).clamp(0, 254).to(torch.uint8) if scales.dtype == torch.uint8 else scales * 2.0**step
