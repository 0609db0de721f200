"""Faults: known bugs of engines, as data. `catalogue.py` lists them.

A fault says what to break and how: handlers of stage BREAK on taps (they may remember one tap's value to recompute
another from it), a change of the weights as they are read, or a switch of the arithmetic. The same entry is planted in
a run that plays the engine (benchmarks/oracle_score, where it must be found), and tried on the input of a block that
went wrong (diagnose.py, where it must explain the error).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from ...model.config import Config
from ...model.vision.config import VisionConfig
from ...model.vision.position_table import Grid
from ...model.vision.positions import check_grids
from ...numerics.arithmetics import Arithmetic
from ...numerics.taps import BREAK, OBSERVE, Handler, Site
from ...quant.packed import Packed, Stacked
from ...run.experts import PackedExpert
from ...run.prompt import Images
from ...run.source import WeightSource
from ...trace.recorder import INSIDE
from ..dumps.step_rows import StepLayout
from ..judge.hand_over import RIGHT, DraftFault, HandOver


@dataclass(frozen=True)
class Seen:
    """What the vision tower was given. table [s * s, D]: its positions; types [B, T]: which tokens are placeholders.

    images and videos: grids (t, h, w) in patches. m x m patches become one token.
    """

    images: list[Grid]
    videos: list[Grid]
    types: Tensor
    table: Tensor
    config: VisionConfig

    @classmethod
    def of(cls, images: Images, types: Tensor, table: Tensor, config: VisionConfig) -> Seen:
        some = [[] if g is None else check_grids(g, config.spatial_merge_size, "image")
                for g in (images.image_grid_thw, images.video_grid_thw)]  # fmt: skip
        return cls(some[0], some[1], types, table, config)

    @property
    def grids(self) -> list[Grid]:
        return [*self.images, *self.videos]


@dataclass(frozen=True)
class FaultSite:
    """Where a fault is at work: on these layers (None: all), and on this expert, where it is a fault of one."""

    config: Config
    positions: Tensor  # [B, T], or [3, B, T] with images
    layers: frozenset[int] | None = None
    expert: int = 0
    layout: StepLayout = field(default_factory=dict)  # of `StepRows`
    seen: Seen | None = None  # what the vision tower was given
    weights: Tensor | None = None  # [tokens, A] the engine's own weights of the experts of the layer, NaN where unknown
    beside: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)  # by step, by tap: values in other rows

    def covers(self, layer: int | None) -> bool:
        return self.layers is None or layer in self.layers

    def on_cpu(self) -> FaultSite:
        weights = None if self.weights is None else self.weights.cpu()
        return replace(self, positions=self.positions.cpu(), weights=weights)

    def steps(self, like_BT: Tensor) -> Tensor:
        """[B, T] the engine's step of each token; without a layout all are of one."""
        found = torch.zeros(like_BT.shape, dtype=torch.long).flatten()
        for step, (_, table) in self.layout.items():
            found[table[:, 1]] = step
        return found.view(like_BT.shape)


Heads = Literal["query", "kv", "value", "key"]
TapChange = Callable[[Tensor, dict[str, Tensor], FaultSite], Tensor]
ExpertChange = Callable[["BrokenSource", str, int, PackedExpert], PackedExpert]
WeightChange = Callable[["BrokenSource", str, Packed], Packed]


@dataclass(frozen=True)
class SlotChange:
    """Routed expert e computes with the weights of expert e + shift, each changed by `change`: a packed weight [O, I],
    or a stack of them [n, O, I]."""

    change: Callable[[Packed], Packed] = field(default=lambda packed: packed)
    shift: int = 0

    def __call__(self, source: BrokenSource, mlp: str, e: int, slot: PackedExpert) -> PackedExpert:
        count = source.config.num_experts
        if e >= count:
            return slot
        gate_up, down = source.inner.slot(mlp, (e + self.shift) % count) if self.shift else slot
        return self.on(gate_up), self.on(down)

    def on(self, packed: Packed) -> Packed:
        """One weight, changed."""
        return Stacked(tuple(map(self.on, packed.parts))) if isinstance(packed, Stacked) else self.change(packed)


@dataclass(frozen=True)
class Fault:
    """One bug. `block` is where it strikes: mlp, gdn, attn, input_layernorm, post_attention_layernorm, final_norm, mtp,
    vision.

    taps      tap name -> change(x, remembered, place): BREAK handlers; the last value of each name in `remembers` is
              in `remembered`
    slot      change of an expert's packed weights;  weight, of a linear module's;  tensor, of a plain tensor (by name)
    switches  of the arithmetic, where the fault can be expressed in one form of a rule only
    needs     "mxfp4" or "fp8" (packed experts), "a4" (quantised activations) or "a16" (not quantised), "images" in the
              prompt, a "scaled" rotary embedding, "drafts" in the dump
    heads     of which kind there must be how many
    rows      a token gets what belongs to other rows of its step
    rare      tried where no other explains the error
    fused     the shared expert is a slot when this happens
    single    the fault of one expert (`FaultSite.expert`)
    weights   found by comparing weights: activations differ by no more than roundings
    rounds    it is a coarser format, and changes no more than roundings do
    hand_over what a step gets from the one before, where that is the fault (`steps.py`);  where: its first token
    late      the value itself is right, and what comes after it reads it wrongly
    draft     what the draft head starts from, where that is the fault (`hand_over.py`)
    """

    name: str
    block: str
    doc: str = ""
    seen: str = ""
    taps: Mapping[str, TapChange] = field(default_factory=dict)
    remembers: tuple[str, ...] = ()
    slot: ExpertChange | None = None
    weight: WeightChange | None = None
    tensor: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    switches: Mapping[str, str] = field(default_factory=dict)
    needs: str = ""
    heads: tuple[Heads, int] = ("query", 1)
    rows: bool = False
    rare: bool = False
    fused: bool = False
    single: bool = False
    weights: bool = False
    rounds: bool = False
    hand_over: HandOver | None = None
    where: str = ""
    draft: DraftFault = RIGHT
    late: bool = False

    def handlers(self, place: FaultSite) -> list[Handler]:
        """Fresh handlers; each run needs its own, since they remember."""
        return [Break(self, place)] if self.taps else []

    def source(self, source: WeightSource, place: FaultSite) -> WeightSource:
        broken = self.slot or self.weight or self.tensor or self.fused
        return BrokenSource(source, self, place) if broken else source

    def arithmetic(self, table: Arithmetic) -> Arithmetic:
        return replace(table, switches={**table.switches, **self.switches}) if self.switches else table

    def applies(self, source: WeightSource, layer: int, a4: bool, images: bool = False) -> bool:
        """Whether this layer can have it. A slot that holds what does not belong there takes a shared expert of the
        routed ones' width, stored in another format."""
        c, mlp = source.config, f"layers.{layer}.mlp"
        routed, shared = (source.spec(f"{mlp}.{n}").kind for n in ("experts", "shared_expert.gate_proj"))
        fits = c.shared_expert_intermediate_size == c.moe_intermediate_size and routed != shared
        mxfp4, fp8 = routed == "mxfp4", routed.startswith("fp8")
        needs = {"": True, "mxfp4": mxfp4, "a4": a4, "a16": mxfp4 and not a4, "fp8": fp8,
                 "images": images, "drafts": False, "scaled": c.rope_scaling is not None}  # fmt: skip
        heads: dict[Heads, int] = {"query": c.num_attention_heads, "kv": c.num_key_value_heads,
                                   "value": c.linear_num_value_heads, "key": c.linear_num_key_heads}  # fmt: skip
        kind, least = self.heads
        return heads[kind] >= least and needs[self.needs] and (fits or not self.fused)


class Break(Handler):
    """The handler of a fault's taps. Changes are made on the CPU, wherever the model runs."""

    @property
    def stage(self) -> int:
        return OBSERVE + 2 if self.fault.late else BREAK

    @property
    def sees_experts(self) -> bool:
        return self.fault.single or not INSIDE.isdisjoint({*self.fault.taps, *self.fault.remembers})

    def __init__(self, fault: Fault, place: FaultSite):
        self.fault, self.place = fault, place.on_cpu()
        self.remembered: dict[str, Tensor] = {}

    def __call__(self, site: Site, x: Tensor) -> Tensor | None:
        whole_model = self.fault.block == "vision" or (site.layer is None and self.fault.block == "final_norm")
        whole_model = whole_model or site.name in ("rope_cos", "rope_sin")
        elsewhere = not whole_model and (site.layer is None or not self.place.covers(site.layer))
        if elsewhere or site.part.startswith("mtp") != (self.fault.block == "mtp"):
            return None
        if site.name in self.fault.remembers:
            self.remembered[site.name] = x.cpu()
        if site.name not in self.fault.taps or (self.fault.single and site.expert != self.place.expert):
            return None
        return self.fault.taps[site.name](x.cpu(), self.remembered, self.place).to(x)


class BrokenSource(WeightSource):
    """Weights as an engine with this fault reads them. No guard keeps a foreign format out of a slot."""

    as_stored = False

    def __init__(self, inner: WeightSource, fault: Fault, place: FaultSite):
        super().__init__(inner.checkpoint, inner.config, inner.online)
        self.inner, self.fault, self.place = inner, fault, place

    def _covers(self, name: str) -> bool:
        parts = name.split(".")
        if self.fault.block == "mtp":
            return parts[0] == "mtp"
        return parts[0] == "layers" and self.place.covers(int(parts[1]))

    def tensor(self, name: str) -> Tensor:
        x = self.inner.tensor(name)
        change = self.fault.tensor.get(name.split(".", 2)[-1])
        return change(x) if change and self._covers(name) else x

    def weight(self, module: str, rows: slice | None = None) -> Packed:
        packed = self.inner.weight(module, rows)
        return self.fault.weight(self, module, packed) if self.fault.weight and self._covers(module) else packed

    def slot(self, mlp: str, e: int) -> PackedExpert:
        shared = e == self.config.num_experts  # made of its three weights, which may be broken
        slot = super().slot(mlp, e) if shared else self.inner.slot(mlp, e)
        single = self.fault.single and e != self.place.expert
        change = self.fault.slot
        return slot if change is None or single or not self._covers(mlp) else change(self, mlp, e, slot)

    def guard_slot(self, mlp: str) -> None:
        return None
