"""How wrong is wrong: the error of a tensor, token by token, in units of the error that legal roundings make.

The truth is `exact`, on the same bytes. Some arithmetics that an engine may legally have (LEGAL) are run on the same
input, and the largest of their errors is the envelope; one rounding of the truth to the engine's dtype is in it too.

    ratio of a token = max( |e|_2 / envelope_2, |e|_max / envelope_max )     of a tensor: that of its worst token

A token's own legal errors are few samples of a random size, and may be small by luck. So the envelope of a token is at
least the root mean square of the tensor's relative errors times its norm, and for rows of a few numbers, whose norm may
cancel to nothing, the largest error of all rows.

LIMIT is justified by measurement (`qwen35-moe mutants` prints it; tiny-mxfp4, 48 tokens): the worst clean variant,
split-K with every value and every half sum in bf16, has 3.43 where the envelope does not know its arithmetic; the
smallest error planted, a block times 1.02, has 3.98, and the bugs of the catalogue far more. From LIMIT to twice that a
tensor is "suspicious", above "wrong"; neither is green.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..arithmetic import KEEP, Arithmetic, get
from ..tables import AITER, AITER_VARIANTS, FLOAT32, SGLANG_BF16, TRANSFORMERS_BF16

LIMIT = 3.5
NARROW = 16  # rows of fewer numbers than this

Class = Literal["bit-equal", "within rounding", "suspicious", "wrong", "not comparable", "missing"]

SGLANG_ATOMIC = replace(
    SGLANG_BF16,
    name="sglang-bf16/atomic-reversed",
    doc="sglang-bf16, but experts are added in bf16, last slot first.",
    rounds={**SGLANG_BF16.rounds, "moe_partial_sum": torch.bfloat16, "moe_router_probs": KEEP},
    switches={**SGLANG_BF16.switches, "moe_sum_order": "slot-reversed"},
)
_BY_NAME = {a.name.rpartition("/")[2]: a for a in AITER_VARIANTS}

# By the arithmetic of the truth: which roundings are legal. What is computed must be the same function, so that W4A4
# engines are measured against a truth with the same quantiser of activations.
LEGAL: dict[str, tuple[Arithmetic, ...]] = {
    "exact": (SGLANG_BF16, TRANSFORMERS_BF16, SGLANG_ATOMIC),
    "exact+a4-round-up": (AITER, _BY_NAME["atomic-reversed"], _BY_NAME["scatter"]),
    "exact+a4": (_BY_NAME["triton"], replace(_BY_NAME["triton"], name="sglang-aiter-mxfp4/triton-reversed",
                 switches={**AITER.switches, "moe_sum_order": "slot-reversed"})),
    "float32": (FLOAT32, replace(FLOAT32, name="float32/reversed", switches={"moe_sum_order": "slot-reversed"}),
                replace(FLOAT32, name="float32/recurrent", switches={"gdn_rule": "recurrent"})),
}  # fmt: skip


def legal(truth: str, engine: str | Arithmetic | None = None) -> tuple[Arithmetic, ...]:
    """The arithmetics of the envelope: those of the truth's family, and the engine's declared one first."""
    members = LEGAL["float32" if engine in ("float32", FLOAT32) else truth if truth in LEGAL else "exact"]
    if engine is None or get(engine) in members:
        return members
    return (get(engine), *members)


@dataclass
class Norms:
    """L2 and max norm of each row."""

    l2: Tensor
    max: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Norms:
        x = x.to(torch.float64).reshape(x.shape[0], -1)
        return cls(x.norm(dim=1), x.abs().amax(1) if x.shape[1] else x.new_zeros(len(x)))

    def pooled(self, size: Norms, narrow: bool) -> Norms:
        """At least the tensor's typical relative error at every row; for narrow rows, the largest of all rows."""

        def pool(e: Tensor, y: Tensor) -> Tensor:
            good = (y > 0) & e.isfinite()
            relative = (e[good] / y[good]).square().mean().sqrt() if good.any() else e.new_zeros(())
            floor = relative * y
            if narrow and good.any():
                floor = floor.clamp(min=float(e[good].max()))
            return torch.maximum(e, floor)

        return Norms(pool(self.l2, size.l2), pool(self.max, size.max))

    def largest(self, other: Norms) -> Norms:
        return Norms(torch.maximum(self.l2, other.l2), torch.maximum(self.max, other.max))


def one_rounding(truth: Tensor, dtype: torch.dtype) -> Norms:
    """What the truth loses when it is stored in `dtype`."""
    return Norms.of(truth.to(torch.float64) - truth.to(dtype).to(torch.float64))


def envelope(truth: Tensor, members: Sequence[Tensor | Norms], dtype: torch.dtype) -> Norms:
    """The largest legal error of each row. truth [rows, ...]; members: legal results of that shape, or their errors."""
    size, narrow = Norms.of(truth), truth[0].numel() < NARROW if len(truth) else False
    bound = one_rounding(truth, dtype).pooled(size, narrow)
    for member in members:
        errors = member if isinstance(member, Norms) else Norms.of(member.to(torch.float64) - truth.to(torch.float64))
        bound = bound.largest(errors.pooled(size, narrow))
    return bound


@dataclass(frozen=True)
class Verdict:
    """Of one tensor. `worst` is the row of the largest ratio; `ratios` has one entry a row."""

    cls: Class
    ratio: float
    ratio_l2: float
    ratio_max: float
    worst: int
    ratios: Tensor
    rel: float  # |e| / |truth| of the whole tensor


def judge(engine: Tensor, truth: Tensor, bound: Norms, dtype: torch.dtype, limit: float = LIMIT) -> Verdict:
    """Compare rows. NaN or infinity in the engine where the truth is finite is an infinite error."""
    x, y = (t.to(torch.float64).reshape(t.shape[0], -1) for t in (engine, truth))
    error = Norms.of(torch.where(x == y, 0.0, x - y))  # equal infinities are no error
    l2, most = (_ratio(e, b) for e, b in ((error.l2, bound.l2), (error.max, bound.max)))
    ratios = torch.maximum(l2, most)
    worst = int(ratios.argmax())
    ratio = float(ratios[worst])
    if torch.equal(x.to(dtype), y.to(dtype)):
        cls: Class = "bit-equal"
    else:
        cls = "within rounding" if ratio <= limit else "suspicious" if ratio <= 2 * limit else "wrong"
    size = float(y.norm())
    rel = float(error.l2.norm()) / size if size else float(error.l2.norm() > 0)
    return Verdict(cls, ratio, float(l2.max()), float(most.max()), worst, ratios, rel)


def _ratio(e: Tensor, bound: Tensor) -> Tensor:
    e = e.nan_to_num(nan=torch.inf, posinf=torch.inf)
    return torch.where(e == 0, 0.0, e / bound)
