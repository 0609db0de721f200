"""The experts of one layer in any layout: in 3-D tensors or one by one, also with mixed formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from ..errors import Qwen35Error
from ..quant.packed import Packed, concatenate
from .adjoining import read_together
from .weight import StoredWeight

GATE_AND_UP = ("gate_proj", "up_proj")
EXPERT_PROJECTIONS = (*GATE_AND_UP, "down_proj")


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

    @property
    def kind(self) -> str:
        """The format of the first expert. Others may differ; `Checkpoint.spec` tells."""
        return self.weights(0)[0].kind

    def read(self, e: int) -> tuple[Packed, Packed]:
        """(gate_up, down) of expert e, as stored."""
        weights = self.weights(e)
        found = iter(read_together(weights[0].reader, [rows for weight in weights for rows in weight.parts]))
        *first, down = (weight.assemble(*islice(found, len(weight.parts))) for weight in weights)
        return first[0] if len(first) == 1 else concatenate(*first), down
