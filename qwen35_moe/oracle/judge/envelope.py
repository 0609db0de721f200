"""The ratio of a tensor: its error, token by token, in units of the error that legal roundings make (docs/judge.md).

    l2 = |e|_2 / envelope_2      max = |e|_max / envelope_max      rms^2 = mean over the rows of min(l2, LIMIT)^2
    ratio of a row = max( l2, max / NUMBER, min(l2, rms) min(rms, TENSOR) )      of a tensor: that of its worst row

A row is a token's values. The third term needs ENOUGH rows. One number scatters more than the norm of a row, and the
norm of a row scatters more than the rms of all rows. NUMBER and TENSOR bring the three to one scale: clean engines,
whose own arithmetic is left out of the envelope, reach l2 = 2.1, max = 3.0 and rms = 1.6. LIMIT is near the geometric
mean of the worst clean engine (2.15) and the least fault (4.38), on checkpoints by which nothing was tuned
(docs/margin.md). A right kernel reaches 2.88. From LIMIT to twice LIMIT a tensor is "suspicious", above that "wrong".
Neither passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ...numerics.arithmetics import ARITHMETICS, KEEP, Arithmetic, get
from ...numerics.choices import with_choices
from ...numerics.tables import (
    A8,
    AITER,
    AITER_VARIANTS,
    FLOAT32,
    SGLANG_BF16,
    TRANSFORMERS_BF16,
    function_of,
    with_fp8_inputs,
)
from .split_k import split_products

LIMIT = 3.0
NUMBER, TENSOR = 1.44, 1.6
ENOUGH = 16  # rows: fewer have no rms
NUMBERS_PER_BLOCK, ON_GPU = 1 << 18, 1 << 24  # numbers that a CPU, or a GPU, works on at once
NARROW = 16  # a row of fewer numbers may be near zero

Class = Literal["bit-equal", "within rounding", "suspicious", "wrong", "not comparable", "missing"]

ALL_BF16 = Arithmetic(
    name="all-bf16", dtype=torch.bfloat16, doc="Every value with a name is stored in bf16; experts last slot first.",
    rounds={"gdn_state": KEEP, "gdn_recall": KEEP},
    switches={"moe_sum_order": "slot-reversed", "vis_places": "stored"},
)  # fmt: skip
_BY_NAME = {a.name.rpartition("/")[2]: a for a in AITER_VARIANTS}

# The truth's arithmetic -> the legal ones. All of them compute the same function: the truth of a W4A4 engine quantises
# activations, too.
LEGAL: dict[str, tuple[Arithmetic, ...]] = {
    "exact": (SGLANG_BF16, TRANSFORMERS_BF16, ALL_BF16, split_products(SGLANG_BF16, 2)),
    "exact+a4-round-up": (AITER, _BY_NAME["atomic-reversed"], _BY_NAME["scatter"]),
    "exact+a4": (_BY_NAME["triton"], replace(_BY_NAME["triton"], name="sglang-aiter-mxfp4/triton-reversed",
                 switches={**AITER.switches, "moe_sum_order": "slot-reversed"})),
    "float32": (
        FLOAT32,
        replace(FLOAT32, name="float32/reversed",
                switches={"moe_sum_order": "slot-reversed", "vis_places": "fp32", "vis_norm": "scaled"}),
        replace(FLOAT32, name="float32/recurrent",
                switches={"gdn_rule": "recurrent", "vis_places": "spaced", "vis_norm": "moments"}),
    ),
}  # fmt: skip
# Engines round ties of FP8 codes in different ways, and so do these.
LEGAL |= {
    f"exact{suffix}": (ARITHMETICS[f"sglang-bf16{suffix}"], ARITHMETICS[f"transformers-bf16{suffix}"],
                       with_fp8_inputs(ALL_BF16, suffix, "multiply-up"),
                       split_products(with_fp8_inputs(SGLANG_BF16, suffix, "multiply-down"), 2))
    for suffix in A8
}  # fmt: skip
_FLOAT32 = {suffix: tuple(with_fp8_inputs(a, suffix) for a in LEGAL["float32"]) for suffix in A8}


def legal(truth: str, engine: str | Arithmetic | None = None) -> tuple[Arithmetic, ...]:
    """The arithmetics of the envelope: the engine's declared one first, then those that are legal for the truth's. The
    declared one quantises activations as the truth does: `--engine sglang-bf16` means SGLang's W8A8 if the truth is
    `exact+a8`."""
    engine, function = None if engine is None else get(engine), function_of(truth)
    if engine is not None and function in A8 and not function_of(engine.name):
        engine = ARITHMETICS.get(engine.name + function) or with_fp8_inputs(engine, function)
    if engine is not None and engine.dtype == torch.float32:
        members = _FLOAT32.get(function, LEGAL["float32"])
    else:
        members = LEGAL[truth if truth in LEGAL else "exact"]
    return members if engine is None or engine in members else (engine, *members)


def with_declared_caches(members: Sequence[Arithmetic], kv_cache: str | None, state: str | None) -> list[Arithmetic]:
    """The first two members again, with the caches that were declared for the engine."""
    if kv_cache is None and state is None:
        return []
    return [with_choices(table, kv_cache, state) for table in members[:2]]


@dataclass
class Norms:
    """L2 and max norm of each row."""

    l2: Tensor
    max: Tensor

    @classmethod
    def of(cls, x: Tensor, minus: Tensor | None = None) -> Norms:
        """Norms of x, or of a difference, in float64, on x's device. A CPU works on a few rows at a time, which stay in
        its cache."""
        x = x.reshape(x.shape[0], -1)
        minus = None if minus is None else minus.reshape(x.shape)
        step = min(len(x), max(1, (ON_GPU if x.is_cuda else NUMBERS_PER_BLOCK) // max(1, x.shape[1])))
        l2, most = x.new_zeros(len(x), dtype=torch.float64), x.new_zeros(len(x), dtype=torch.float64)
        block = x.new_empty(step, x.shape[1], dtype=torch.float64)
        for rows in (slice(i, i + step) for i in range(0, len(x) if x.shape[1] else 0, step)):
            a = block[: len(l2[rows])].copy_(x[rows])
            if minus is not None:
                a -= minus[rows]
            torch.linalg.vector_norm(a, 2, 1, out=l2[rows])
            torch.amax(a.abs_(), 1, out=most[rows])  # six times as fast as the norm of that name
        return cls(l2, most)

    def pooled(self, size: Norms, narrow: bool) -> Norms:
        """These errors, each at least the tensor's typical relative error times the row's size, and in narrow rows at
        least the largest error of all rows."""

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


def rounding_loss(truth: Tensor, dtype: torch.dtype) -> Norms:
    """The error of the truth when it is stored in `dtype`."""
    return Norms.of(truth, minus=truth.to(dtype))


def envelope(
    truth: Tensor, members: Sequence[Tensor | Norms], dtype: torch.dtype,
    size: Norms | None = None, rounding: Norms | None = None,
) -> Norms:  # fmt: skip
    """The largest legal error of each row. truth [rows, ...]; members: legal results of that shape, or their errors.
    size and rounding (to `dtype`) are those of the truth, if they are known already."""
    narrow = truth[0].numel() < NARROW if len(truth) else False
    size = Norms.of(truth) if size is None else size
    bound = (rounding_loss(truth, dtype) if rounding is None else rounding).pooled(size, narrow)
    for member in members:
        errors = member if isinstance(member, Norms) else Norms.of(member, minus=truth)
        bound = bound.largest(errors.pooled(size, narrow))
    return bound


@dataclass(frozen=True)
class TensorVerdict:
    """The verdict on one tensor. `worst` is the row of the largest ratio; `ratios`, on the CPU, has one entry a row."""

    cls: Class
    ratio: float
    worst: int
    ratios: Tensor
    rel: float  # |e| / |truth| of the whole tensor


def class_of(ratio: float, limit: float) -> Class:
    """From the limit to twice the limit "suspicious", above that (or NaN) "wrong"."""
    return "within rounding" if ratio <= limit else "suspicious" if ratio <= 2 * limit else "wrong"


def judge(
    engine: Tensor, truth: Tensor, bound: Norms, dtype: torch.dtype, limit: float = LIMIT,
    size: Norms | None = None, rounding: Norms | None = None,
) -> TensorVerdict:  # fmt: skip
    """Compare rows. A NaN or infinity of the engine is an infinite error if the truth is finite."""
    error = Norms.of(engine, minus=truth)
    if not error.l2.isfinite().all():  # equal infinities are no error
        error = Norms.of(torch.where(engine == truth, 0.0, engine.to(torch.float64) - truth.to(torch.float64)))
    l2, most = (_ratio(e, b) for e, b in ((error.l2, bound.l2), (error.max, bound.max)))
    ratios = torch.maximum(l2, most / NUMBER)
    if len(l2) >= ENOUGH:  # a row beyond the limit says that of itself, and no more of the others
        rms = float(l2.clamp(max=limit).square().mean().sqrt())
        ratios = torch.maximum(ratios, min(rms, TENSOR) * l2.clamp(max=rms))
    ratios = ratios.cpu()
    worst = int(ratios.argmax())
    could_be_equal = rounding is None or torch.allclose(error.l2, rounding.l2, rtol=1e-5, atol=0)
    if could_be_equal and torch.equal(engine.to(dtype), truth.to(dtype).reshape(engine.shape)):
        cls: Class = "bit-equal"
    else:
        cls = class_of(float(ratios[worst]), limit)
    whole, off = float((Norms.of(truth) if size is None else size).l2.norm()), float(error.l2.norm())
    return TensorVerdict(cls, float(ratios[worst]), worst, ratios, off / whole if whole else float(off > 0))


def _ratio(e: Tensor, bound: Tensor) -> Tensor:
    e = e.nan_to_num(nan=torch.inf, posinf=torch.inf)
    return torch.where(e == 0, 0.0, e / bound)


def is_bf16(x: Tensor) -> bool:
    """Whether all numbers of x are bf16 numbers, whatever its dtype."""
    return torch.equal(x.to(torch.bfloat16).to(x.dtype), x)
