"""The faults that an engine may have, those of the catalogue in all layers or in one, and how many run in one batch.

A fault that changes taps has its own share of a batch and changes only that, so many faults share a layer's products.
Inside the experts, rows of all tokens are sorted by expert: there a fault's share is the rows of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...model.moe import Experts
from ...model.ops import accumulation_dtype, apply, cast, multiply
from ...numerics.taps import BREAK, Handler, Site, tap
from ...run.gpu.grouped import add_in_order
from ...run.source import WeightSource
from ...trace.recorder import INSIDE
from ..diagnose.catalogue import FAULTS
from ..diagnose.faults import Fault, FaultSite

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

    @property
    def inside(self) -> bool:
        """Whether it changes values inside experts."""
        return not INSIDE.isdisjoint({*self.fault.taps, *self.fault.remembers})

    def strikes(self, source: WeightSource, layer: int, a4: bool) -> bool:
        """Whether it is at work on this layer."""
        kind = source.config.layer_types[layer]
        here = self.layer in (None, layer) and self.fault.block != "final_norm"
        return here and KINDS.get(self.fault.block, kind) == kind and self.fault.applies(source, layer, a4)


def placed_faults(source: WeightSource, which: str = "each", a4: bool = False) -> list[PlacedFault]:
    """The faults of the catalogue that are replayed on this checkpoint. which: `all` plants each of them in all layers
    at once, `each` also in one layer after the other, `none` no fault. A fault of one expert is planted in single
    layers only. Left out are rare faults, those of the draft head, which no log p shows, and those of the hand-over
    between steps, which no log p of a prompt shows."""
    found = list[PlacedFault]()
    for fault in () if which == "none" else FAULTS:
        if fault.block == "mtp" or fault.hand_over is not None or fault.rare:
            continue
        everywhere = PlacedFault(fault)
        layers = [i for i in range(source.config.num_hidden_layers) if everywhere.strikes(source, i, a4)]
        if fault.block == "final_norm" or (layers and not fault.single):
            found.append(everywhere)
        found += [PlacedFault(fault, i) for i in layers if which == "each"]
    return found


class SortedExperts(Experts):
    """The same experts, whose inner values are named for all rows at once, sorted by expert, on any device.

    token_N, expert_N: the token and the expert of each row.
    """

    def __init__(self, inner: Experts):
        super().__init__(inner.count, inner.intermediate, inner.quantised)
        self.inner = inner

    def combine(self, x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
        x_TD = tap("moe_a1", x_TD) if self.quantised else x_TD
        self.expert_N, pairs_N = ids_TA.flatten().sort(stable=True)
        self.token_N = pairs_N // ids_TA.shape[1]
        counts = self.expert_N.bincount(minlength=self.count).tolist()
        gate_NF, up_NF = self._linear("moe_expert_gate_up", 0, x_TD[self.token_N], counts).chunk(2, -1)
        act_NF = multiply("moe_expert_act", apply("moe_expert_silu", F.silu, gate_NF), up_NF)
        act_NF = tap("moe_a2", act_NF) if self.quantised else act_NF
        y_ND = self._linear("moe_expert_down", 1, act_NF, counts)
        return add_in_order(y_ND, ids_TA, pairs_N.argsort().view_as(ids_TA), weights_TA)

    def _linear(self, name: str, which: int, x_NI: Tensor, counts: Sequence[int]) -> Tensor:
        """gate_up (0) or down (1) of each row's expert, tapped as `name`."""
        parts = []
        for e, x_nI in enumerate(x_NI.split(list(counts))):
            if len(x_nI):
                weight_OI = self.inner.at(e)[which]
                dtype = accumulation_dtype(name, x_nI, weight_OI)
                parts.append(F.linear(cast(x_nI, dtype), cast(weight_OI, dtype)))
        return tap(name, torch.cat(parts))


class Struck(Handler):
    """Plants the faults of the runs of a batch, each in its own share. `faults`: number of the run -> its fault;
    `place`: of one run."""

    stage = BREAK
    sees_experts = False

    def __init__(self, faults: dict[int, PlacedFault], runs: int, place: FaultSite, experts: SortedExperts):
        self.faults, self.runs, self.place, self.experts = faults, runs, place, experts
        self.kept: dict[int, dict[str, Tensor]] = {k: {} for k in faults}
        self.names = {name for h in faults.values() for name in (*h.fault.taps, *h.fault.remembers)}

    def __call__(self, site: Site, x: Tensor) -> Tensor | None:
        if site.name not in self.names:
            return None
        name, old = site.name, x
        if name.endswith(".gain"):  # one for all: give each run its own
            size = [self.runs * len(self.place.positions), *[1] * (3 if name.startswith("attn") else 2)]
            x = old = x.expand(*size[:-1], -1)
        for k, h in self.faults.items():
            if name not in h.fault.taps and name not in h.fault.remembers:
                continue
            which = self._share(k, h, name, len(x))
            mine = old[which]
            if name in h.fault.remembers:
                self.kept[k][name] = mine
            if name in h.fault.taps and len(mine):
                x = x.clone() if x is old else x
                with torch.device(x.device):
                    x[which] = h.fault.taps[name](mine, self.kept[k], self.place).to(x.dtype)
        return x

    def _share(self, k: int, h: PlacedFault, name: str, size: int) -> slice | Tensor:
        """Which rows belong to run k, and to the expert of a fault of one."""
        if name not in INSIDE:
            return slice(k * size // self.runs, (k + 1) * size // self.runs)
        tokens = self.place.positions.numel()
        mine_N = self.experts.token_N // tokens == k
        return mine_N & (self.experts.expert_N == h.expert) if h.fault.single else mine_N
