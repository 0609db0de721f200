"""The faults that an engine may have: those of the catalogue, in all layers or in one."""

from __future__ import annotations

from dataclasses import dataclass

from ...run.source import WeightSource
from ..diagnose.catalogue import FAULTS
from ..diagnose.faults import Fault

KINDS = {"attn": "full_attention", "gdn": "linear_attention"}


@dataclass(frozen=True)
class PlacedFault:
    """A fault at work on one layer, or on all that can have it (None); `expert` is that of a fault of one expert."""

    fault: Fault
    layer: int | None = None
    expert: int = 0

    def __str__(self) -> str:
        if self.fault.block == "final_norm":
            return self.fault.name
        one = f" (expert {self.expert})" if self.fault.single else ""
        return f"{self.fault.name}{one}, {'all layers' if self.layer is None else f'layer {self.layer}'}"

    def __hash__(self) -> int:
        return hash((self.fault.name, self.layer))


def placed_faults(source: WeightSource, which: str = "each", a4: bool = False) -> list[PlacedFault]:
    """The faults that an engine can have on this checkpoint: `all` (layers at once), `each` (also layer by layer), or
    `none`, without rare ones. A fault of the draft head shows in no log p, one of the hand-over between steps in none
    of a prompt; one of one expert is in one layer only."""
    kinds, found = source.config.layer_types, list[PlacedFault]()
    for fault in () if which == "none" else FAULTS:
        if fault.block == "mtp" or fault.hand_over is not None or fault.rare:
            continue
        layers = [i for i, kind in enumerate(kinds) if KINDS.get(fault.block, kind) == kind]
        layers = [i for i in layers if fault.applies(source, i, a4)]
        if not layers:
            continue
        if not fault.single:
            found.append(PlacedFault(fault))
        if which == "each" and fault.block != "final_norm":
            found += [PlacedFault(fault, i) for i in layers]
    return found
