"""Is it rounding? Checks of a kernel's outputs, as records (`check_*`) or as assertions (`assert_*`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..numerics.taps import FunctionHandler, Site
from ..oracle.judge.envelope import LIMIT, envelope, judge
from ..oracle.judge.records import BF16_GRID
from .case import Case, Outputs

# A fault is named if it explains this share of the squared error. Measured over the 62 wrong kernels of the tests: the
# right name explains at least 99.94 %; a wrong one at most 95 % ("shared gate not squashed" for a missing 1/ep_size),
# then 83 %. Names that explain more belong to faults that differ in nothing that the inputs show.
NAMED = 0.97
ROWS_TRIED = 8  # of tokens that do not see each other, so many bad ones are looked at for the cause
BF16_BITS = 8  # significant bits of bfloat16

Kernel = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


@dataclass
class Check:
    """The result for one output. `ratio` is in units of the legal error, `row` all indices but the last."""

    case: str
    output: str
    verdict: str
    ratio: float = 0.0
    limit: float = LIMIT
    row: tuple[int, ...] = ()
    column: int | None = None
    bad_rows: int = 0
    rows: int = 0
    relative: float = 0.0
    note: str = ""
    looks_like: str = ""
    explains: float = 0.0
    function: str = ""  # the one that the kernel computed, where the case knows several: exact, exact+a8, ...

    @property
    def ok(self) -> bool:
        return self.verdict in ("bit-equal", "within rounding")

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self), "row": list(self.row)}

    def __str__(self) -> str:
        text = f"{self.output}: "
        if self.note and not self.rows:
            text += self.note
        else:
            text += f"{self.ratio:.3g} x the legal error (limit {self.limit:g})"
            row = self.row[0] if len(self.row) == 1 else list(self.row)
            text += f", worst row {row}, column {self.column}"
            text += f", {self.bad_rows} of {self.rows} rows" + (f"; {self.note}" if self.note else "")
        if self.function:
            text += f"; it computes the function {self.function}"
        if self.looks_like:
            text += f'; looks like "{self.looks_like}" ({100 * self.explains:.0f} %)'
        return text


# Whoever collects the checks of a session (the pytest plugin) puts a function here.
LISTENERS: list[Callable[[Check], None]] = []


def announce(checks: list[Check]) -> list[Check]:
    """Hand checks to the listeners."""
    for check in checks:
        for listener in LISTENERS:
            listener(check)
    return checks


def require(checks: Sequence[Check]) -> None:
    """Raise AssertionError with the text of every check that is not good."""
    if bad := [check for check in checks if not check.ok]:
        raise AssertionError("\n".join([f"{bad[0].case}:", *map(str, bad)]))


def check_legal(found: Kernel, case: Case) -> list[Check]:
    """Each output against the float64 truth, row by row, in units of the largest legal error."""
    named = _named(found, case)
    checks = [_check(name, x, case) for name, x in named.items()]
    bad = [check for check in checks if not check.ok and check.rows]
    if case.rowwise and case.function != "exact":
        for check in (check for check in checks if check.rows):
            check.function = _function(named[check.output], check, case)
    if bad:
        looks_like, share = explaining_fault(named, case, bad)
        for check in bad:
            check.looks_like, check.explains = looks_like, share
        if any(check.note == BF16_GRID for check in bad) and not looks_like:
            bad[0].looks_like, bad[0].explains = "state in bf16", 1.0
    return announce(checks)


def assert_legal(found: Kernel, case: Case) -> None:
    """A kernel's outputs are within legal rounding of the float64 truth, row by row."""
    require(check_legal(found, case))


def _named(found: Kernel, case: Case) -> Outputs:
    if isinstance(found, Tensor):
        found = [found]
    if not isinstance(found, Mapping):
        found = dict(zip(case.outputs, found, strict=False)) if len(found) == len(case.outputs) else {}
    if set(found) != set(case.outputs):
        raise Qwen35Error("not the outputs of this operation", where=case.name, expected=", ".join(case.outputs),
                          found=", ".join(found) or "another number of tensors")  # fmt: skip
    return {name: found[name].detach().cpu() for name in case.outputs}


def _check(name: str, x: Tensor, case: Case) -> Check:
    truth = case.truth[name]
    if x.numel() != truth.numel():
        note = f"shape {list(x.shape)}, expected {list(truth.shape)}"
        return Check(case.name, name, "wrong", float("inf"), note=note)
    if not x.is_floating_point():
        note = f"{x.dtype}, expected a floating-point dtype"
        return Check(case.name, name, "wrong", float("inf"), note=note)
    depth = max(1, truth.dim() - (2 if name in case.matrices else 1))
    lead = truth.shape[:depth]
    members = [member[name].reshape(-1, *truth.shape[depth:]) for member in case.members]
    truth_R, x_R = truth.reshape(-1, *truth.shape[depth:]), x.reshape(-1, *truth.shape[depth:])
    verdict = judge(x_R, truth_R, envelope(truth_R, members, x.dtype), x.dtype)
    bad = verdict.ratios > LIMIT
    error = (x_R[verdict.worst].to(torch.float64) - truth_R[verdict.worst]).abs().nan_to_num(torch.inf)
    row = tuple(int(i) for i in np.unravel_index(verdict.worst, lead))
    check = Check(case.name, name, verdict.cls, verdict.ratio, LIMIT, row, int(error.flatten().argmax()),
                  int(bad.sum()), len(x_R), verdict.rel)  # fmt: skip
    if name == "gdn_state" and x.any():  # zeros are in every dtype
        digits = significant_bits(x)
        if digits <= BF16_BITS < min(significant_bits(member) for member in members):
            check.verdict, check.note = "wrong", BF16_GRID
    return check


def _function(x: Tensor, check: Check, case: Case) -> str:
    """The function of the case that is nearest to an output, by the worst row and its neighbours. A kernel that
    quantises less than it should is nearer to the true values, and may be within the limit."""
    truth = case.truth[check.output]
    rows = torch.arange(min(len(truth), ROWS_TRIED)) + max(0, min(check.row[0], len(truth) - ROWS_TRIED))
    part, x = case.part(rows), x.to(torch.float64).reshape(truth.shape)[rows]
    found = {case.function: part.truth, **{w.function: part.broken(w) for w in case.wrong if w.function}}
    return min(found, key=lambda name: float((x - found[name][check.output]).norm().nan_to_num(torch.inf)))


def significant_bits(x: Tensor) -> int:
    """How many bits the longest significand in x has: 8 if all of it is bf16, 24 if float32."""
    bits = x.to(torch.float32).contiguous().view(torch.int32) & 0x7FFFFF
    bits = bits[bits != 0]
    return 1 if not len(bits) else 24 - int((bits & -bits).min().to(torch.float64).log2())


def explaining_fault(named: Outputs, case: Case, bad: Sequence[Check]) -> tuple[str, float]:
    """The known fault that explains most of the error, and the share of the squared error that it explains."""
    rows = None
    if case.rowwise:
        first = bad[0]
        error = (named[first.output].to(torch.float64).reshape(case.truth[first.output].shape)
                 - case.truth[first.output]).flatten(1).norm(dim=1).nan_to_num(torch.inf)  # fmt: skip
        rows = error.argsort(descending=True)[:ROWS_TRIED].sort().values
        case = case.part(rows)
    names = [check.output for check in bad]
    found = {name: named[name].to(torch.float64).reshape(-1, *case.truth[name].shape[1:]) for name in names}
    found = {name: x if rows is None else x[rows] for name, x in found.items()}
    best, share = "", 0.0
    for name, outputs in broken_outputs(case):
        explained = explained_share(found, case.truth, outputs)
        if explained > share:
            best, share = name, explained
    return (best, share) if share >= NAMED else ("", 0.0)


def broken_outputs(case: Case) -> Iterator[tuple[str, Outputs]]:
    """What each known fault would return."""
    for wrong in case.wrong:
        yield wrong.name, case.broken(wrong)
    yield from one_expert_missing(case)


def one_expert_missing(case: Case) -> Iterator[tuple[str, Outputs]]:
    """The output without the share of one expert, for each that was chosen."""
    if "ids" not in case or "mlp_output" not in case.outputs:
        return
    shares: list[tuple[int, Tensor]] = []

    def keep(site: Site, x: Tensor) -> None:
        if site.name == "moe_expert_weighted" and site.index is not None:
            shares.append((site.index, x))

    case.exact(FunctionHandler(keep))
    ids = case["ids"]
    for e, share in shares:
        y = case.truth["mlp_output"].clone()
        y[(ids == e).any(1)] -= share
        yield "expert dropped", {"mlp_output": y}


def explained_share(found: Outputs, truth: Outputs, broken: Outputs) -> float:
    """1 - |found - broken|^2 / |found - truth|^2, each row in units of its size."""
    before = after = 0.0
    for name, x in found.items():
        y, z = (some[name].to(torch.float64).reshape(x.shape) for some in (truth, broken))
        finite = x.isfinite() & z.isfinite()
        x, y, z = (torch.where(finite, some, 0.0).reshape(len(x), -1) for some in (x, y, z))
        size = (x.norm(dim=1) + y.norm(dim=1)).clamp(min=torch.finfo(torch.float64).tiny)
        before += float(((x - y).norm(dim=1) / size).square().sum())
        after += float(((x - z).norm(dim=1) / size).square().sum())
    return 1 - after / before if before else 0.0
