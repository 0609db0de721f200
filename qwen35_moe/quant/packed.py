"""What every stored weight offers, packed or plain: `shape`, `nbytes` and `decode(dtype, out=None)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Packed(Protocol):
    """A weight as it is stored. `MXFP4`, `FP8` and `Float` are such."""

    @property
    def shape(self) -> torch.Size:
        """The shape of what `decode` returns."""
        ...

    def decode(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The values in `dtype`; into `out` if given."""
        ...


@dataclass(frozen=True, eq=False)
class Float:
    """A plain tensor under the same interface; `decode` rounds only where `dtype` is narrower than `values`."""

    values: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def decode(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The tensor itself (no copy) where it has that dtype already and no `out` is given."""
        return self.values.to(dtype) if out is None else out.copy_(self.values)


@dataclass(frozen=True, eq=False)
class Stacked:
    """Weights one below the other, each packed in its own way: gate and up as one expert's gate_up."""

    parts: tuple[Packed, ...]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:]))

    def decode(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        if out is None:
            return torch.cat([part.decode(dtype) for part in self.parts])
        for part, target in zip(self.parts, out.split([part.shape[0] for part in self.parts]), strict=True):
            part.decode(dtype, target)
        return out


def concatenate(*parts: Packed) -> Packed:
    """One weight of the rows of several, in order. Floats that adjoin in memory (a mapped file) become one view."""
    view = adjoined([part.values if isinstance(part, Float) else None for part in parts])
    return Stacked(parts) if view is None else Float(view)


def adjoined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The view of all rows [n, I] that lie one part after another in one storage; None where they do not."""
    tensors = [part for part in parts if part is not None]
    first, rows = tensors[0] if tensors else None, 0
    if first is None or first.dim() < 2 or len(tensors) < len(parts):
        return None
    storage, at = first.untyped_storage().data_ptr(), first.data_ptr()
    for part in tensors:
        alike = part.dtype == first.dtype and part.shape[1:] == first.shape[1:] and part.is_contiguous()
        if not alike or part.data_ptr() != at or part.untyped_storage().data_ptr() != storage:
            return None
        at, rows = at + part.nbytes, rows + part.shape[0]
    return first.as_strided((rows, *first.shape[1:]), first.stride())
