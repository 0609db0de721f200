"""What every stored weight offers, packed or plain: `shape`, `nbytes` and `decode(dtype, out=None, rows=None)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Packed(Protocol):
    """A weight as it is stored. `MXFP4`, `FP8` and `Float` are such."""

    @property
    def shape(self) -> torch.Size:
        """The shape of what `decode` returns (with all rows)."""
        ...

    @property
    def nbytes(self) -> int:
        """The bytes it takes as stored, scales included."""
        ...

    def decode(self, dtype: torch.dtype, out: Tensor | None = None, rows: slice | None = None) -> Tensor:
        """The values in `dtype`; `rows` slices dimension 0."""
        ...


@dataclass(frozen=True, eq=False)
class Float:
    """A plain tensor under the interface of the packed ones; `decode` rounds only if `dtype` is narrower than `values`."""

    values: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def decode(self, dtype: torch.dtype, out: Tensor | None = None, rows: slice | None = None) -> Tensor:
        """The tensor itself (no copy) where it has that dtype already and no `out` is given."""
        values = self.values if rows is None else self.values[rows]
        return values.to(dtype) if out is None else out.copy_(values)
