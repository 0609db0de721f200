"""Two dumps and no truth: the same tokens cold and warm, at TP 1 and TP 2, in a batch and alone.

Without a checkpoint, two dumps are bit-equal or not, and the first difference says where to look. With a checkpoint,
each dump is compared with the truth on its own inputs. A difference is legal if both dumps are within rounding.
Otherwise it shows which of the two is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..numerics.tap_keys import base_name, per_token
from ..numerics.tap_table import TAPS
from ..run.prompt import padded
from ..trace.file import Trace
from ..trace.head import Entry
from .compare import compare, diagnose
from .dumps.align import Alignment, align
from .dumps.dump import Dump
from .dumps.match import match
from .dumps.sequences import sequences_of
from .judge.envelope import LIMIT
from .judge.records import Comparison, layer_of

FIRST_OF_MODEL = ("embed_tokens", "rope_cos", "rope_sin")
ORDER = {name: i for i, name in enumerate(TAPS)}
STAGES = ("layer_input|input_layernorm", "(attn|gdn)_(?!output)", "attn_output", "pre_mlp_", "moe_", "mlp_output", "")


class DumpTrace(Trace):
    """A dump as a trace of its own tokens [B, T]. Taps are read on demand.

    `rows(key)` [B, T] says which of the tokens a tap holds.
    """

    def __init__(self, dump: Dump):
        ids, mask = padded(sequences_of(dump))
        mask = torch.ones_like(ids) if mask is None else mask
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        step = {"ids": ids.tolist(), "positions": positions.tolist(), "mask": mask.tolist()}
        super().__init__(meta={"steps": [step]})
        self.dump, self.shape = dump, tuple(ids.shape)
        self.alignment = Alignment(dump, self, [], [], [], match(dump, self))
        for key in sorted(dump.sources, key=order_of):
            if base_name(key) in TAPS and TAPS[base_name(key)].dims[:8] != "b n t s":
                self.sites[key] = Entry(key, base_name(key), "", "", (), layer_of(key))

    def rows(self, key: str) -> Tensor:
        held = torch.zeros(self.shape, dtype=torch.bool)
        for step in self._steps(key):
            table = self.alignment.table(self.dump.read(key, step), key, step)
            held[table[:, 1], table[:, 2]] = True
        return held

    def _steps(self, key: str) -> list[int]:
        return sorted(set(self.dump.sources[key]) & set(self.alignment.tokens_of.where))

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.sites:
            raise KeyError(key)
        steps = self._steps(key)
        if not per_token(key):
            return self.dump.read(key, max(steps, default=max(self.dump.sources[key])))
        found: Tensor | None = None
        for step in steps:
            x = self.dump.read(key, step)
            found = x.new_zeros(*self.shape, x.shape[1]) if found is None else found
            table = self.alignment.table(x, key, step)
            found[table[:, 1], table[:, 2]] = x[table[:, 0]].to(found.dtype)
        if found is None:
            raise Qwen35Error("none of its steps belongs to the dump's tokens", where=key)
        return found if TAPS[base_name(key)].dims.startswith("b ") else found.flatten(0, 1)


def order_of(key: str) -> tuple[int, int, int, int]:
    """The place of a tap in the order of execution."""
    layer, name = layer_of(key), base_name(key)
    part = 0 if layer is None and name in FIRST_OF_MODEL else 2 if layer is None else 1
    stage = next(i for i, pattern in enumerate(STAGES) if re.match(pattern, name))
    return part, layer or 0, stage, ORDER.get(name, len(ORDER))


@dataclass
class Difference:
    """One tap of two dumps. rows: those that both have; differ: of these, how many differ; first: (sequence, token) of
    the first; rel: the norm of the difference over that of the tap; error_a, error_b: with a checkpoint, each dump's
    error in units of the legal one."""

    key: str
    rows: int
    differ: int
    first: tuple[int, int] | None
    rel: float
    error_a: float | None = None
    error_b: float | None = None
    problem: str = ""


@dataclass
class TwoDumps:
    """The comparison of two dumps. a, b: their comparisons with the truth, if there is a checkpoint."""

    taps: list[Difference]
    tokens: tuple[int, int]  # of the first dump, and how many of them both have
    only: tuple[list[str], list[str]]
    a: Comparison | None = None
    b: Comparison | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def differing(self) -> list[Difference]:
        return [tap for tap in self.taps if tap.differ]

    @property
    def first(self) -> Difference | None:
        """The first difference in order of execution, at its earliest token."""
        return next(iter(self.differing), None)

    @property
    def legal(self) -> bool | None:
        """Whether both are within rounding of the checkpoint; None: unknown."""
        return None if self.a is None or self.b is None else not (self.a.diverges or self.b.diverges)

    @property
    def exit_code(self) -> int:
        """0: bit-equal, or all differences are legal; 1: they differ; 2: in part not comparable."""
        if self.differing:
            return 0 if self.legal else 1
        return 2 if not self.taps or any(tap.problem for tap in self.taps) else 0

    @property
    def verdict(self) -> str:
        first, count = self.first, sum(not tap.problem for tap in self.taps)
        if first is None:
            some = f"{self.tokens[1]} of {self.tokens[0]}" if self.tokens[1] < self.tokens[0] else self.tokens[1]
            return f"BIT-EQUAL: {count} taps on {some} tokens" if self.exit_code == 0 else "NOT COMPARED"
        where = "" if first.first is None else f", sequence {first.first[0]}, token {first.first[1]}"
        said = f"first at {first.key}{where}: {first.differ} of {first.rows} rows, relative difference {first.rel:.2g}"
        equal = f"{count - len(self.differing)} of {count} taps are bit-equal"
        if self.legal is None:
            return f"DIFFER: {said}; {equal}"
        if self.legal:
            return f"LEGAL: both are within rounding of the checkpoint; {said}; {equal}"
        off = " and ".join(name for name, one in (("A", self.a), ("B", self.b)) if one is not None and one.diverges)
        return f"DIFFER: {off} {'are' if ' ' in off else 'is'} off the checkpoint; {said}; {equal}"

    def rows(self) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = [{"type": "difference", **asdict(tap)} for tap in self.taps]
        for name, keys in zip("ab", self.only, strict=True):
            lines += [{"type": f"only in {name}", "key": key} for key in keys]
        lines += [{"type": "note", "text": note} for note in self.notes]
        return [*lines, {"type": "summary", "verdict": self.verdict, "exit_code": self.exit_code}]


def compare_dumps(
    a: Dump, b: Dump, checkpoint: str | Path | None = None, limit: float = LIMIT, **options: Any
) -> TwoDumps:
    """Compare two dumps of the same tokens, tap by tap.

    Partial sums of ranks are added first, exactly. Values are compared in the narrower of their two dtypes. options:
    those of `diagnose`. Errors: a dump without ids; no token or tap in common.
    """
    for dump in (a, b):
        dump.keep_fused()
    truth = DumpTrace(a)
    alignment = align(b, truth)
    taps = list(_differences(truth, alignment))
    result = TwoDumps(taps, (int(truth.mask.sum()), alignment.matched), (alignment.missing, alignment.extra))
    result.notes = [*alignment.tokens_of.notes, *(f"not in B: {part}" for part in alignment.tokens_of.absent)]
    if checkpoint is not None:
        with TemporaryDirectory() as folder:
            result.a = diagnose(checkpoint, a, folder, limit=limit, diagnoses=1, partial=True, **options)
            more = {key: options[key] for key in ("engine",) if key in options}
            result.b = compare(folder, b, checkpoint, limit=limit, diagnoses=1, partial=True, **more)
        a_errors, b_errors = ({r.key: r.ratio for r in one.records} for one in (result.a, result.b))
        result.taps = [replace(t, error_a=a_errors.get(t.key), error_b=b_errors.get(t.key)) for t in taps]
    return result


def _differences(truth: DumpTrace, alignment: Alignment) -> Iterator[Difference]:
    for key in alignment.keys:
        pair = alignment.pair(key)
        if pair.engine is None or pair.dtype is None:
            yield Difference(key, 0, 0, None, 0.0, problem=pair.problem)
            continue
        x, y, rows = pair.truth, pair.engine, pair.rows.long()
        if per_token(key):
            held = truth.rows(key)[rows[:, 0], rows[:, 1]]
            x, y, rows = x[held], y[held], rows[held]
        if base_name(key).endswith("_ids"):
            x, y = (ids.sort(1).values for ids in (x, y))
        elif x.is_floating_point():
            dtype = min(pair.dtype, truth.dump.dtype(key), key=lambda d: torch.finfo(d).bits)
            x, y = (z.to(dtype).double() for z in (x, y))
        differ = ((x != y) & ~(x.isnan() & y.isnan())).any(1)
        first = min(((b, t) for b, t in rows[differ].tolist()), key=lambda bt: (bt[1], bt[0]), default=None)
        size = float(x.double().norm()) or 1.0
        yield Difference(key, len(x), int(differ.sum()), first, float((x.double() - y.double()).norm()) / size)
