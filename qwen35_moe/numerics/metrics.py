"""The distance of two tensors, and of the taps of two traces. Limits are set elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import Qwen35Error

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def ordinal(x: Tensor) -> Tensor:
    """Number the values of a float dtype: neighbours differ by 1, -0 and +0 are both 0. int64, same shape.

    The bits of an IEEE number without its sign are already in order; negative ones are counted downwards.
    """
    integer = _BITS.get(x.element_size())
    if integer is None or not x.is_floating_point():
        raise Qwen35Error("no ulp for this dtype", expected="float64, float32, bfloat16 or float16", found=x.dtype)
    bits, sign = x.contiguous().view(integer).to(torch.int64), torch.iinfo(integer).min
    return torch.where(bits < 0, sign - bits, bits)


def ulp_distance(a: Tensor, b: Tensor) -> Tensor:
    """How many representable numbers lie between `a` and `b` (0: equal; 1: neighbours), elementwise, int64.

    Both have the same dtype and shape. The distance of float64 numbers of opposite sign can exceed int64: it then
    wraps, so compare those with `rel_l2`. A NaN is one above infinity and more, whichever NaN it is.
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        raise Qwen35Error(
            "an ulp is counted within one dtype and shape", expected=f"{a.dtype} {list(a.shape)}",
            found=f"{b.dtype} {list(b.shape)}", do="round one to the other's dtype first, knowing that this rounds",
        )  # fmt: skip
    return (ordinal(a) - ordinal(b)).abs()


def rel_l2(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in float64 (b is the truth). 0 when both are zero, inf when only b is."""
    difference, truth = (a.to(torch.float64) - b.to(torch.float64)).norm().item(), b.to(torch.float64).norm().item()
    if truth == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / truth


@dataclass(frozen=True)
class TapDistance:
    """One tap of two traces. `equal_share` 1.0 means the same values everywhere (NaN equals NaN, -0 equals +0)."""

    key: str
    equal_share: float
    max_ulp: int | None  # None: integers, or two dtypes
    rel_l2: float
    note: str = ""  # why there is nothing to measure, or what had to be done first

    @property
    def equal(self) -> bool:
        return self.equal_share == 1.0


def distance(key: str, ours: Tensor, theirs: Tensor) -> TapDistance:
    """Compare one tensor. Equal numbers of elements are laid over each other in order ([B, T, D] on [B*T, D])."""
    note = ""
    if ours.numel() != theirs.numel():
        return TapDistance(key, 0.0, None, float("inf"), f"shapes {list(ours.shape)} and {list(theirs.shape)}")
    ours, theirs = ours.detach().reshape(-1), theirs.detach().reshape(-1)
    if ours.dtype != theirs.dtype and (ours.is_floating_point() or theirs.is_floating_point()):
        note = f"{ours.dtype} and {theirs.dtype}".replace("torch.", "")
    wide = torch.promote_types(ours.dtype, theirs.dtype)
    a, b = ours.to(wide), theirs.to(wide)
    same = (a == b) | (a.isnan() & b.isnan()) if wide.is_floating_point else a == b
    share = same.double().mean().item() if same.numel() else 1.0
    max_ulp = None
    if wide.is_floating_point and not note:
        max_ulp = int(ulp_distance(a, b).max()) if share < 1.0 else 0
    return TapDistance(key, share, max_ulp, 0.0 if share == 1.0 else rel_l2(a, b), note)


def compare_traces(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[TapDistance]:
    """One row per key of `theirs`, in its order. A key that `ours` lacks is a row that is not equal, never left out."""
    missing = (0.0, None, float("inf"), "missing in ours")
    return [distance(k, ours[k], x) if k in ours else TapDistance(k, *missing) for k, x in theirs.items()]
