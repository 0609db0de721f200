"""Runs the truth, legal arithmetics and planted faults on the same prompts, side by side in one pass over the layers.

A hypothesis is a fault of the catalogue in all layers or in one. A fault of layer i starts from the truth's stream at
layer i, so n layers cost n / 2 on average. Hypotheses run as one batch (`Struck`); a fault of weights, or of a rule of
DeltaNet, has products of its own in the layers that it strikes. Only the stream before the last norm is kept,
[B, T, D]. log p of single tokens are computed from it on demand, so a vocabulary of 250,000 is never kept. Hypotheses
are computed in float32, whose error is a hundredth of bf16's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...model.cache import LayerState
from ...model.rope import rotary_angles
from ...model.text import Layer
from ...numerics import arithmetics
from ...numerics.arithmetics import Arithmetic, using
from ...numerics.taps import FunctionHandler, Handler, attach, scope, tap
from ...run.source import WeightSource
from ...run.streamed import HEAD_ROWS, StreamedEmbedding, StreamedHead, in_steps
from ..diagnose.faults import FaultSite
from ..judge.rerun_parts import Layers
from ..judge.split_k import splitting
from ..judge.where import HERE, Where
from .ends import Ends
from .hypotheses import PlacedFault, SortedExperts, Struck

TOGETHER = 1 << 13  # tokens that one layer is run on at once on a CPU
LOGITS_HELD = 1 << 26  # logits that are held at once
BYTES = 18  # of an expert's number, decoded side by side for float64, float32 (twice, with a fault) and bf16
NUMBERS = 24  # float32 of a chosen expert's row that a GPU holds at once, for each of the row's numbers
ROUTING = "moe_router_logits", "moe_topk_ids"
SHARE_OF_MEMORY = 0.6  # that decoded experts may take: else experts are decoded when they are chosen


@dataclass
class Branch:
    """One run among others: under `table`, with a hypothesis or none, at positions of its own or the right ones.
    `stream` is what the next layer reads."""

    name: str
    table: Arithmetic
    stream: Tensor
    hypothesis: PlacedFault | None = None
    routing: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # a layer: router logits [N, E], ids [N, A]
    positions: Tensor | None = None  # [B, T]


class Replay:
    """ids, mask [B, T] (mask None: no padding). `fused`: in which layers the shared expert is a slot. One layer is held
    at a time, on the device of `where`. before: one whose last norm and head are used again."""

    def __init__(
        self, source: WeightSource, fused: Sequence[bool], ids: Tensor, mask: Tensor | None = None,
        where: Where = HERE, before: Replay | None = None,
    ):  # fmt: skip
        self.source, self.fused, self.config, self.where = source, list(fused), source.config, where
        self.device = where.of("norm", self.config.num_hidden_layers)
        self.ids, self.real = ids.to(self.device), None if mask is None else mask.bool().to(self.device)
        ones = torch.ones_like(self.ids) if self.real is None else self.real.long()
        self.positions = (ones.cumsum(1) - 1).clamp(min=0)
        c = self.config
        numbers = 3 * c.num_experts * c.moe_intermediate_size * c.hidden_size
        if self.device.type == "cuda":
            memory = torch.cuda.mem_get_info(self.device)[0]
            self.together = max(TOGETHER, memory // (8 * NUMBERS * c.num_experts_per_tok * c.hidden_size))
        else:
            memory, self.together = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), TOGETHER
        self.mode = where.mode or ("decoded" if BYTES * numbers < SHARE_OF_MEMORY * memory else "stream")
        self.layers = Layers(source, lambda _: self.device, self.mode)
        self.end: Ends = before.end if before else Ends(source, self.device)

    @torch.inference_mode()
    def run(
        self, truth: str | Arithmetic, tables: Sequence[Arithmetic], faults: Sequence[PlacedFault],
        counted: Mapping[str, Tensor] | None = None,
    ) -> list[Branch]:  # fmt: skip
        """Branches after the last layer: the truth's, one a table, one a hypothesis, in this order. counted: more
        hypotheses, wrong positions [B, T] by name."""
        base = arithmetics.get(truth)
        self.quick = arithmetics.get("float32") if base.name == "exact" else base
        branches = [self._begin(table.name, table) for table in (base, *tables)]
        clean = self._begin("quick", self.quick)
        if counted:  # as one batch
            stream = clean.stream.repeat(len(counted), 1, 1)
            branches.append(Branch("", self.quick, stream, positions=torch.cat([*counted.values()])))
        struck = [Branch(str(h), self.quick, clean.stream, h) for h in faults if h.layer is None]
        later = [h for h in faults if h.layer is not None]
        begin = said = time.monotonic()
        for i in range(self.config.num_hidden_layers):
            before = clean.stream
            for branch in branches:
                self._step(i, branch)
            busiest = int(branches[0].routing[i][1].flatten().bincount().argmax())
            here = [h for h in later if h.layer == i]
            here = [PlacedFault(h.fault, i, busiest) if h.fault.single else h for h in here]
            struck += [Branch(str(h), self.quick, before, h) for h in here]
            for group in self._groups(i, [clean, *struck] if faults else []):
                self._together(i, group)
            said = self.where.progress(i + 1, self.config.num_hidden_layers, len(branches) + len(struck), begin, said)
        if counted:
            streams = branches.pop().stream.split(len(self.ids))
            branches += [Branch(name, self.quick, x) for name, x in zip(counted, streams, strict=True)]
        return [*branches, *struck]

    def _begin(self, name: str, table: Arithmetic) -> Branch:
        with using(table):
            return Branch(name, table, tap("embed_tokens", StreamedEmbedding(self.source, table)(self.ids)))

    def _place(self, h: PlacedFault) -> FaultSite:
        layers = None if h.layer is None else frozenset({h.layer})
        return FaultSite(self.config, self.positions, layers, h.expert)

    def _step(self, i: int, b: Branch) -> None:
        """One layer of the truth or of a legal arithmetic; keeps what its router says."""
        seen = dict[str, Tensor]()
        watch = FunctionHandler(lambda site, x: seen.update({site.name: x} if site.name in ROUTING else {}),
                                sees_experts=False)  # fmt: skip
        alone = b.table.dtype == torch.float64 != self.quick.dtype  # the truth
        layer = self.layers.whole(i, b.table, self.fused[i], once=alone)
        positions = self.positions if b.positions is None else b.positions
        b.stream = self._forward(i, layer, b.table, b.stream, [watch], positions)
        logits, ids = (seen[name] for name in ROUTING)
        b.routing.append((logits.double().cpu(), ids.long().cpu()))

    def _groups(self, i: int, branches: Sequence[Branch]) -> Iterator[list[tuple[Branch, bool]]]:
        """Branches that can share the products of this layer, and whether their fault strikes there."""
        groups: dict[Any, list[tuple[Branch, bool]]] = {}
        for b in branches:
            h, a4 = b.hypothesis, self.quick.name.startswith("exact+a4")
            strikes = h is not None and h.strikes(self.source, i, a4)
            key: tuple[Any, ...] = (None, False)
            if h is not None and strikes:
                own = h.fault.source(self.source, self._place(h)) is not self.source
                key = (id(b) if own else None, h.inside, *h.fault.switches.items())
            groups.setdefault(key, []).append((b, strikes))
        for group in groups.values():
            size = max(1, self.together // self.ids.numel())
            yield from (group[k : k + size] for k in range(0, len(group), size))

    def _together(self, i: int, group: Sequence[tuple[Branch, bool]]) -> None:
        """One step of all branches of a group, as one batch."""
        runs = [b for b, _ in group]
        faults = {k: b.hypothesis for k, (b, strikes) in enumerate(group) if strikes and b.hypothesis}
        table = faults[min(faults)].fault.arithmetic(self.quick) if faults else self.quick
        layer = self.layers.whole(i, table, self.fused[i])
        if len(runs) == 1 and faults:
            layer = self.layers.broken(i, table, self.fused[i], faults[0].fault, self._place(faults[0]))
        plain = layer.mlp.experts
        experts = SortedExperts(plain)
        if any(h.inside for h in faults.values()):
            layer.mlp.experts = experts
        handlers = [Struck(faults, len(runs), self._place(faults[min(faults)]), experts)] if faults else []
        try:
            positions = self.positions.repeat(len(runs), 1)
            out = self._forward(i, layer, table, torch.cat([b.stream for b in runs]), handlers, positions)
        finally:
            layer.mlp.experts = plain
        for b, stream in zip(runs, out.split(len(self.ids)), strict=True):
            b.stream = stream

    def _forward(
        self, i: int, layer: Layer, table: Arithmetic, stream: Tensor, handlers: Sequence[Handler], positions: Tensor
    ) -> Tensor:
        real = None if self.real is None else self.real.repeat(len(positions) // len(self.real), 1)
        with using(table), splitting(table), attach(*handlers):
            angles = rotary_angles(self.config, positions, stream.dtype)
            with scope(layer=i):
                return layer(stream, angles, real, LayerState())

    @torch.inference_mode()
    def log_p(self, b: Branch, rows: tuple[Tensor, Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """log p over the vocabulary after the tokens rows = (sequence [R], place [R]), some rows at a time."""
        for some in in_steps(len(rows[0]), max(1, LOGITS_HELD // self.config.vocab_size)):
            x_RD = self._hidden(b, (rows[0][some], rows[1][some]))
            with using(b.table), splitting(b.table):
                logits = self.end.of(b.table)[1]("next_token_logits", x_RD[None])
            yield some, logits[0].double().log_softmax(-1)

    def gather(self, b: Branch, rows: tuple[Tensor, Tensor], ids_RK: Tensor) -> Tensor:
        """log p [R, K] of the tokens ids [R, K] after each row."""
        return torch.cat([x.gather(1, ids_RK[some].to(x.device)).cpu() for some, x in self.log_p(b, rows)])

    @torch.inference_mode()
    def gather_all(self, branches: Sequence[Branch], rows: tuple[Tensor, Tensor], ids_RK: Tensor) -> Tensor:
        """The same of hypotheses, which have one table: [H, R, K]. A head that is streamed is read once for many."""
        found, R = [torch.empty(0, ids_RK.shape[1], dtype=torch.float64)], len(ids_RK)
        step = max(1, LOGITS_HELD // (self.config.vocab_size if self.device.type == "cuda" else HEAD_ROWS))
        for some in in_steps(len(branches), max(1, step // R)):
            x_ND = torch.cat([self._hidden(b, rows) for b in branches[some]])
            ids_NK = ids_RK.to(x_ND.device).repeat(len(branches[some]), 1)
            found += [self._of_tokens(x_ND[part], ids_NK[part]).cpu() for part in in_steps(len(x_ND), step)]
        return torch.cat(found).view(len(branches), *ids_RK.shape)

    def _hidden(self, b: Branch, rows: tuple[Tensor, Tensor]) -> Tensor:
        """What the head reads [R, D]."""
        h = b.hypothesis
        handlers = h.fault.handlers(self._place(h)) if h and h.fault.block == "final_norm" else []
        with using(b.table), splitting(b.table), attach(*handlers):
            return self.end.of(b.table)[0](b.stream[rows][None])[0]

    def _of_tokens(self, x_ND: Tensor, ids_NK: Tensor) -> Tensor:
        """log p [N, K] of some tokens in float64: the logits of one part of the vocabulary after another."""
        head, name = self.end.of(self.quick)[1], "next_token_logits"
        value_NK = torch.zeros(ids_NK.shape, dtype=torch.float64, device=x_ND.device)
        total_N = value_NK.new_full((len(x_ND),), -torch.inf)
        with using(self.quick):
            if isinstance(head, StreamedHead):
                parts = head.blocks(name, x_ND[None])
            else:
                parts = iter([(slice(0, self.config.vocab_size), head(name, x_ND[None]))])
            for which, logits in parts:
                y_Nv, at_NK = self.quick.round(name, logits[0]).double(), ids_NK - which.start
                total_N = torch.logaddexp(total_N, y_Nv[:, 0] - y_Nv.log_softmax(1)[:, 0])
                inside_NK = (at_NK >= 0) & (at_NK < y_Nv.shape[1])
                value_NK = torch.where(inside_NK, y_Nv.gather(1, at_NK.clamp(0, y_Nv.shape[1] - 1)), value_NK)
        return value_NK - total_N[:, None]
