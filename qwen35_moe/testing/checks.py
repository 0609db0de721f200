"""Is it rounding? Checks of a kernel's outputs, as records (`check_*`) or as assertions (`assert_*`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from typing import Any, ParamSpec

import numpy as np
import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..numerics.arithmetics import get
from ..numerics.taps import FunctionHandler, Site
from ..oracle.judge.envelope import LIMIT, envelope, is_bf16, judge
from ..oracle.judge.records import BF16_GRID
from .case import Case, Outputs

# A fault is named if it explains this share of the squared error. Measured over the 62 wrong kernels of the tests: the
# right name explains at least 99.94 %; a wrong one at most 95 % ("shared gate not squashed" for a missing 1/ep_size),
# then 83 %. Names that explain more belong to faults that differ in nothing that the inputs show.
NAMED = 0.97
MATRICES = ("gdn_state", "gdn_conv_state")  # judged by matrices (a state per head), not by the last dimension
ROWS_TRIED = 8  # of tokens that do not see each other, so many bad ones are looked at for the cause

Kernel = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
P = ParamSpec("P")


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
            row = self.row[0] if len(self.row) == 1 else list(self.row)
            text += f"{self.ratio:.3g} x the legal error (limit {self.limit:g}), worst row {row}, column {self.column}"
            text += f", {self.bad_rows} of {self.rows} rows" + (f"; {self.note}" if self.note else "")
        text += f"; it computes the function {self.function}" if self.function else ""
        return text + (f'; looks like "{self.looks_like}" ({100 * self.explains:.0f} %)' if self.looks_like else "")


# Whoever collects the checks of a session (the pytest plugin) puts a function here.
LISTENERS: list[Callable[[Check], None]] = []


def announce(*checks: Check) -> list[Check]:
    """Hand checks to the listeners."""
    for check in checks:
        for listener in LISTENERS:
            listener(check)
    return list(checks)


def wrong_check(case: str, output: str, note: str, other: str = "", **fields: Any) -> Check:
    """A check that failed in a way that has no size; other: the name of what it would be right for."""
    return Check(
        case, output, "wrong", float("inf"), note=note, looks_like=other, explains=float(bool(other)), **fields
    )


def assertion(check: Callable[P, list[Check]]) -> Callable[P, None]:
    """The check as an assertion: it raises AssertionError with the text of every result that is not good."""

    @wraps(check)
    def asserted(*args: P.args, **kwargs: P.kwargs) -> None:
        __tracebackhide__ = True  # pytest ends its traceback at the caller
        if bad := [result for result in check(*args, **kwargs) if not result.ok]:
            raise AssertionError("\n".join([f"{bad[0].case}:", *map(str, bad)]))

    asserted.__name__ = asserted.__qualname__ = check.__name__.replace("check", "assert")
    asserted.__doc__ = f"`{check.__name__}` as an assertion.\n\n    {check.__doc__}"
    return asserted


def check_legal(found: Kernel, case: Case) -> list[Check]:
    """Each output against the float64 truth, row by row, in units of the largest legal error: a tensor, several in the
    order of `case.outputs`, or by name. Error: other outputs than the case's."""
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
    return announce(*checks)


assert_legal = assertion(check_legal)


def _named(found: Kernel, case: Case) -> Outputs:
    found = [found] if isinstance(found, Tensor) else found
    if not isinstance(found, Mapping):
        found = dict(zip(case.outputs, found, strict=False)) if len(found) == len(case.outputs) else {}
    if set(found) != set(case.outputs):
        raise Qwen35Error("not the outputs of this operation", where=case.name, expected=", ".join(case.outputs),
                          found=", ".join(found) or "another number of tensors")  # fmt: skip
    return {name: found[name].detach().cpu() for name in case.outputs}


def _check(name: str, x: Tensor, case: Case) -> Check:
    truth = case.truth[name]
    if x.numel() != truth.numel():
        return wrong_check(case.name, name, f"shape {list(x.shape)}, expected {list(truth.shape)}")
    if not x.is_floating_point():
        return wrong_check(case.name, name, f"{x.dtype}, expected a floating-point dtype")
    depth = max(1, truth.dim() - (2 if name in MATRICES else 1))
    truth_R, x_R, *members = (
        y.reshape(-1, *truth.shape[depth:]) for y in (truth, x, *(member[name] for member in case.members))
    )
    verdict = judge(x_R, truth_R, envelope(truth_R, members, x.dtype), x.dtype)
    error = (x_R[verdict.worst].to(torch.float64) - truth_R[verdict.worst]).abs().nan_to_num(torch.inf)
    row = tuple(int(i) for i in np.unravel_index(verdict.worst, truth.shape[:depth]))
    check = Check(case.name, name, verdict.cls, verdict.ratio, LIMIT, row, int(error.flatten().argmax()),
                  int((verdict.ratios > LIMIT).sum()), len(x_R), verdict.rel)  # fmt: skip
    if name == "gdn_state" and x.any() and is_bf16(x) and not any(map(is_bf16, members)):  # zeros are in every dtype
        check.verdict, check.note = "wrong", BF16_GRID
    return check


def _function(x: Tensor, check: Check, case: Case) -> str:
    """The function of the case that is nearest to an output, by the worst row and its neighbours. A kernel that
    quantises less than it should is nearer to the true values, and may be within the limit."""
    truth = case.truth[check.output]
    rows = torch.arange(min(len(truth), ROWS_TRIED)) + max(0, min(check.row[0], len(truth) - ROWS_TRIED))
    part, x = case.part(rows), x.to(torch.float64).reshape(truth.shape)[rows]
    found = {case.function: part.truth}
    found |= {wrong.function: part.broken(name) for name, wrong in case.wrong.items() if wrong.function}
    return min(found, key=lambda name: float((x - found[name][check.output]).norm().nan_to_num(torch.inf)))


def explaining_fault(named: Outputs, case: Case, bad: Sequence[Check]) -> tuple[str, float]:
    """The known fault that explains most of the error, and the share of the squared error that it explains."""
    found = {check.output: named[check.output].to(torch.float64) for check in bad}
    found = {name: x.reshape(-1, *case.truth[name].shape[1:]) for name, x in found.items()}
    if case.rowwise:
        first = bad[0].output
        error = (found[first] - case.truth[first]).flatten(1).norm(dim=1).nan_to_num(torch.inf)
        rows = error.argsort(descending=True)[:ROWS_TRIED].sort().values
        case, found = case.part(rows), {name: x[rows] for name, x in found.items()}
    best, share = "", 0.0
    for name, outputs in _broken_outputs(case):
        explained = _explained(found, case.truth, outputs)
        if explained > share:
            best, share = name, explained
    return (best, share) if share >= NAMED else ("", 0.0)


def _broken_outputs(case: Case) -> Iterator[tuple[str, Outputs]]:
    """What each known fault would return; then, for experts, the output without the share of each that was chosen."""
    for name in case.wrong:
        yield name, case.broken(name)
    if "ids" not in case or "mlp_output" not in case.outputs:
        return
    shares: list[tuple[int, Tensor]] = []

    def keep(site: Site, x: Tensor) -> None:
        if site.name == "moe_expert_weighted" and site.index is not None:
            shares.append((site.index, x))

    case.run(get(case.function), FunctionHandler(keep))
    for e, share in shares:
        y = case.truth["mlp_output"].clone()
        y[(case["ids"] == e).any(1)] -= share
        yield "expert dropped", {"mlp_output": y}


def _explained(found: Outputs, truth: Outputs, broken: Outputs) -> float:
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
