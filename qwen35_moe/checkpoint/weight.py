"""Weights in storage, of any format and layout, read when asked for: one matrix, or the experts of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..quant import fp8, mxfp4
from ..quant.layouts import deinterleave_gate_up
from ..quant.packed import Float, Packed, concatenate
from ..quant.precision import ModuleSpec, float_spec
from .header import TensorEntry
from .reader import Reader, Rows

EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight in storage. shape: of its values, [O, I], [E, O, I] for all experts of a layer, or any for floats."""

    module: str
    kind: str
    shape: tuple[int, ...]
    values: Rows
    scale: Rows | None
    block: tuple[int, ...]  # elements that share a scale: (32,) along a row, (128, 128) rows by columns
    reader: Reader

    @property
    def tensors(self) -> tuple[TensorEntry, ...]:
        return (self.values.stored,) if self.scale is None else (self.values.stored, self.scale.stored)

    @property
    def spec(self) -> ModuleSpec:
        """The record that the gate compares."""
        if self.scale is None:
            return float_spec(self.values.stored.dtype)
        scale = "e8m0" if self.kind == "mxfp4" else self.scale.stored.dtype.lower()
        return ModuleSpec(self.kind, self.block, scale)

    @property
    def interleaved(self) -> bool:
        """Rows of gate and up alternate (gpt-oss)."""
        return self.values.stored.name.endswith("gate_up_proj_blocks")

    @property
    def form(self) -> tuple[Any, ...]:
        """Equal for weights that are stored in the same way."""
        parts = tuple((rows.stored.dtype, rows.count, rows.size, rows.step) for rows in self.parts)
        return self.kind, self.shape, self.block, self.interleaved, parts

    def expert(self, e: int) -> StoredWeight:
        """[O, I] of expert e, of [E, O, I]."""
        count = self.shape[0]
        if len(self.shape) != 3 or not 0 <= e < count:
            raise Qwen35Error("no such expert", where=self.module, expected=f"0 to {count - 1}", found=e)

        def own(rows: Rows) -> Rows:
            return Rows.of(rows.stored, min(2, len(rows.stored.shape))).part(e, count)

        return replace(self, shape=self.shape[1:], values=own(self.values), scale=self.scale and own(self.scale))

    def half(self, i: int) -> StoredWeight:
        """Gate (0) or up (1) of a gate_up weight [2F, I]. In gpt-oss's layout their rows alternate."""
        O, I = self.shape  # noqa: E741
        cut = Rows.turn if self.interleaved else Rows.part
        scale = self.scale
        if scale is not None and self.kind != "fp8-tensor":
            if self.kind == "fp8-block" and O // 2 % self.block[0]:
                expected = f"a multiple of {self.block[0]} rows each"
                raise self.values.stored.wrong("gate and up share a block of scales", expected, O // 2)
            scale = cut(scale, i, 2)
        return replace(self, shape=(O // 2, I), values=cut(self.values, i, 2), scale=scale)

    def read(self, rows: slice | None = None) -> Packed:
        """The weight as it is stored, or some of its rows (see `some`). Error: a scale is NaN or infinite."""
        whole = self.interleaved and self.values.step == 1  # gate and up still take turns
        stored = self if whole or rows is None else self.some(rows)
        parts = [part.read(self.reader) for part in stored.parts]
        if self.scale is not None:
            _check_finite(parts[1], self.scale.stored)
        return self._packed(*parts, rows=rows if whole else None)

    def some(self, rows: slice) -> StoredWeight:
        """Rows of a matrix [O, I], as a weight. For FP8 blocks, they must start at a block boundary."""
        start, stop, _ = rows.indices(self.shape[0])
        scale = self.scale
        if scale is not None and self.kind == "fp8-block":
            if start % (high := self.block[0]):
                what, expected = "rows must begin with a block of scales", f"a multiple of {high}"
                raise Qwen35Error(what, where=self.module, expected=expected, found=start)
            scale = scale.rows(slice(start // high, -(-stop // high)))
        elif scale is not None and self.kind != "fp8-tensor":
            scale = scale.rows(rows)
        return replace(self, shape=(stop - start, *self.shape[1:]), values=self.values.rows(rows), scale=scale)

    @property
    def parts(self) -> tuple[Rows, ...]:
        """The rows to read: values, and scales if there are any."""
        return (self.values,) if self.scale is None else (self.values, self.scale)

    def of(self, parts: Iterable[Tensor], doubts: list[Tensor], count: int | None = None) -> Packed:
        """The weight from its parts, on any device, without waiting for it. Adds a check for NaN and infinite scales to
        `doubts`. The parts of float and MXFP4 weights may be stacks: then the first `count` are used."""
        values, *scales = parts
        doubts += [_not_finite(scale[:count]).any() for scale in scales]
        return self._packed(values, *scales)

    def _packed(self, values: Tensor, scale: Tensor | None = None, *, rows: slice | None = None) -> Packed:
        if scale is None:
            return Float(values)
        if self.kind == "mxfp4":
            shape = (*scale.shape[:-1], 16 * scale.shape[-1])
            codes = values if values.shape == shape else values.view(shape)
            scale = scale if scale.dtype == torch.uint8 else scale.view(torch.uint8)
            if self.interleaved and self.values.step == 1:
                codes, scale = (deinterleave_gate_up(x)[rows or slice(None)] for x in (codes, scale))
            return mxfp4.PackedMXFP4(codes, scale)
        return fp8.FP8(values, scale.view(()) if self.kind == "fp8-tensor" else scale)


def _not_finite(scale: Tensor) -> Tensor:
    """Which scales are NaN or infinite; of E8M0 bytes, 255 is NaN."""
    return scale.view(torch.uint8) == 255 if scale.element_size() == 1 else ~scale.isfinite()


def _check_finite(scale: Tensor, stored: TensorEntry) -> None:
    if scale.element_size() == 1:  # E8M0. To search bytes is much faster than to compare tensors.
        what, expected = "a scale is NaN", "scale bytes 0 to 254 (255 is NaN)"
        fine = b"\xff" not in (scale if scale.dtype == torch.uint8 else scale.view(torch.uint8)).numpy().tobytes()
    else:
        what, expected = "a scale is not finite", "finite scales"
        fine = bool(scale.isfinite().all())
    if not fine:
        bad = _not_finite(scale)
        found = f"{int(bad.sum())} such scales, the first at {bad.nonzero()[0].tolist()} of those read"
        do = "download the file again; a checkpoint that really holds this is broken"
        raise stored.wrong(what, expected, found, do)


@dataclass(frozen=True, slots=True)
class StoredExperts:
    """`count` experts of `layers.N.mlp.experts`. gate_up [2F, D] has F rows of gate, then F of up; down is [D, F].

    Found in storage as gate_up_proj and down_proj [E, ..] ("fused"), or as gate_proj, up_proj, down_proj of each.
    """

    prefix: str
    count: int
    fused: bool
    find: Callable[[str], StoredWeight]  # by module name

    def weights(self, e: int) -> tuple[StoredWeight, ...]:
        """What expert e is stored as: (gate, up, down), or (gate_up, down)."""
        if not 0 <= e < self.count:
            raise Qwen35Error("no such expert", where=self.prefix, expected=f"0 to {self.count - 1}", found=e)
        if not self.fused:
            return tuple(self.find(f"{self.prefix}.{e}.{name}") for name in EXPERT_PROJECTIONS)
        return tuple(self.find(f"{self.prefix}.{name}").expert(e) for name in ("gate_up_proj", "down_proj"))

    def read(self, e: int) -> tuple[Packed, Packed]:
        """(gate_up, down) of expert e, as stored."""
        *first, down = (weight.read() for weight in self.weights(e))
        return first[0] if len(first) == 1 else concatenate(*first), down
