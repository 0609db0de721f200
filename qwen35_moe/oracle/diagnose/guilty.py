"""The tap that is diagnosed: what a fault leaves of its error, and which experts its output could be made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from ...numerics.arithmetics import Arithmetic
from ..judge.envelope import envelope, judge
from ..judge.rerun import Rerun, Taps
from ..judge.suspects import DOUBTFUL_LIMITS, batches
from .faults import Fault, FaultSite
from .rank_shares import Blame

# Experts are solved for if so many tokens at most have a relative error of more than OFF, and solving leaves less than
# LEFT of each. A weight below so much of the largest is no expert's, but rounding.
TOKENS_SOLVED, OFF, LEFT, LEAST_SHARE = 32, 0.01, 0.05, 0.03
OTHERS = "experts other than those dumped"


class GuiltyTap:
    """A tap: what the engine had there, and what was right. A number that is not finite, in either, counts as 0 in
    both; rows without a finite one are left out. seen: the taps of the layer, one dict a table, the truth's first."""

    def __init__(self, key: str, work: Any, rerun: Rerun, layer: int | None, seen: Sequence[Taps]):
        self.key, self.work, self.rerun, self.layer, self.seen = key, work, rerun, layer, seen
        self.pair = work.alignment.pair(key)
        self.blamed: Blame | None = None
        engine, truth = self.pair.engine.to(torch.float64), self.of_all(seen[0][key]).to(torch.float64)
        finite = engine.isfinite() & truth.isfinite()
        self.used = finite.any(1)
        self.finite = finite[self.used]
        self.engine, self.truth = (torch.where(self.finite, x[self.used], 0.0) for x in (engine, truth))
        self.size = (self.engine.norm(dim=1) + self.truth.norm(dim=1)).clamp(min=torch.finfo(torch.float64).tiny)
        self.error = self.engine - self.truth
        self.energy = self.error.square().sum(1)

    def output(self, at: int | None, fault: Fault, expert: int, i: int, table: Arithmetic) -> Tensor | None:
        """The tap's values with a fault, under a table that starts where table i did; None if it is not met then."""
        taps = self.rerun.fault(at, fault, table, i, expert, self.layer is None, self.key)
        return self.rows(taps[self.key]) if self.key in taps else None

    def ids(self, at: int) -> Tensor:
        """The experts of each row: the engine's if it dumped them, else the truth's."""
        alignment, key = self.work.alignment, f"layers.{at}.moe_topk_ids"
        ids = alignment.pair(key).engine if key in alignment.keys else None
        if ids is None or len(ids) != len(self.used):
            chosen = self.seen[0].get(key, self.rerun.chosen)
            assert chosen is not None  # a layer has run
            ids = self.of_all(chosen)
        return ids[self.used].long()

    def suspects(self, at: int) -> list[int]:
        """Experts whose tokens have nearly all of the error, at most three, those with the fewest tokens first."""
        ids = self.ids(at)
        hits = {e: (ids == e).any(1) for e in ids.unique().tolist()}
        return sorted(
            (e for e, hit in hits.items() if self.energy[hit].sum() >= 0.95 * self.energy.sum()),
            key=lambda e: (int(hits[e].sum()), e),
        )[:3]

    def of_all(self, y: Tensor) -> Tensor:
        """Our values `y` of the tap, at all rows that the engine has, on the CPU."""
        return self.work.rows(y, self.pair).cpu()

    def rows(self, y: Tensor) -> Tensor:
        """The same at the rows that are not left out, in float64."""
        return torch.where(self.finite, self.of_all(y).to(torch.float64)[self.used], 0.0)

    def first_bad(self, members: Sequence[Taps]) -> dict[int, int]:
        """Sequence -> index, among its real tokens, of the first one that is beyond the limit. A state stands for the
        last token. members: the layer's taps under legal arithmetics."""
        legal = [self.rows(taps[self.key]) for taps in members if self.key in taps]
        bound = envelope(self.truth, legal, self.pair.dtype)
        bad = judge(self.engine, self.truth, bound, self.pair.dtype).ratios > self.work.limit
        index_BT = self.work.alignment.truth.mask.long().cumsum(1) - 1
        found: dict[int, int] = {}
        for b, t in sorted(self.pair.rows.long()[self.used][bad].tolist()):
            at = int(index_BT[b, t])  # t may be -1, the last
            found[b] = min(at, found.get(b, at))
        return found

    def explains(self, y_Rn: Tensor) -> float:
        before, after = ((e.norm(dim=1) / self.size).square().sum() for e in (self.error, self.engine - y_Rn))
        share = 1 - float(after / before)
        return share if share == share else float("-inf")

    def left(self, outputs: Sequence[Tensor]) -> float:
        """The ratio that a fault leaves. outputs: the tap's values with the fault, exact first, then in legal
        arithmetics."""
        good = torch.stack([y.isfinite() for y in outputs]).all(0)
        if not good.any():
            return float("inf")
        engine, y, *members = (torch.where(good, x, 0.0) for x in (self.engine, *outputs))
        return judge(engine, y, envelope(y, members, self.pair.dtype), self.pair.dtype).ratio

    def settled(self, run: Callable[[int, Arithmetic], Tensor | None]) -> float:
        """The ratio that the outputs `run(i, table)` of the rerun's tables leave; of more tables where these might
        bring it below the limit. Each table has an output."""

        def taps(i: int, table: Arithmetic) -> Taps:
            output = run(i, table)
            assert output is not None
            return {self.key: output}

        tables = self.rerun.tables
        outputs = [taps(i, table)[self.key] for i, table in enumerate(tables)]
        ratio, limit = self.left(outputs), self.work.limit
        more = batches(tables[1:], lambda some: [taps(i + 1, table) for i, table in some])
        while limit < ratio <= DOUBTFUL_LIMITS * limit and (batch := next(more, None)):
            outputs += [taps[self.key] for taps in batch]
            ratio = self.left(outputs)
        return ratio


def outputs_of_all(rerun: Rerun, layer: int, x_TD: Tensor) -> Tensor:
    """What each expert makes of each token, W_down (silu(W_gate x) * W_up x): [T, D, E]."""
    found = []
    for e in range(rerun.config.num_experts):
        gate_up, down = (part.decode(torch.float64) for part in rerun.source.slot(f"layers.{layer}.mlp", e))
        gate, up = (x_TD @ gate_up.T).chunk(2, -1)
        found.append((silu(gate) * up) @ down.T)
    return torch.stack(found, -1)


def solved(case: GuiltyTap, layer: int) -> list[Fault]:
    """The fault of computing with other experts than those dumped: at most one in the list.

    Token by token, engine - rest = sum_e c_e f_e(x) is solved for c by least squares over all experts f_e; `rest` is
    the part of the tap that no routed expert makes. The top k experts by c are taken, and their weights are solved for
    again, alone. Empty where the dumped experts come out, or fewer, or where this leaves much of the output.
    """
    at, rerun, taps, ids_TA = f"layers.{layer}.", case.rerun, case.seen[0], case.ids(layer)
    needed = [at + name for name in ("moe_routed_output", "pre_mlp_layernorm_output")]
    off = case.error.norm(dim=1) / case.size
    bad = (off > OFF).nonzero().flatten()
    if not all(key in taps for key in needed) or not len(bad) or len(bad) > TOKENS_SOLVED or len(ids_TA) != len(off):
        return []
    routed, x = (case.of_all(taps[key]).double()[case.used][bad] for key in needed)
    if routed.shape != case.truth[bad].shape or rerun.config.num_experts > x.shape[1]:
        return []
    wanted = case.engine[bad] - (case.truth[bad] - routed)
    outputs = outputs_of_all(rerun, layer, x)
    c = torch.linalg.lstsq(outputs, wanted[..., None]).solution[..., 0]
    chosen = c.topk(ids_TA.shape[1], -1).indices
    some = outputs.gather(2, chosen[:, None].expand(-1, x.shape[1], -1))
    w = torch.linalg.lstsq(some, wanted[..., None]).solution
    sum_TD = (some @ w)[..., 0]
    left = (wanted - sum_TD).norm(dim=1) / wanted.norm(dim=1)
    same = (chosen.sort(1).values == ids_TA[bad].sort(1).values).all(1)
    if bool(same.any()) or left.max() > LEFT or bool((w.amin(1) < LEAST_SHARE * w.amax(1)).any()):
        return []
    rows = case.work.index(case.pair)[case.used][bad]

    def change(y: Tensor, _: dict[str, Tensor], __: FaultSite) -> Tensor:
        flat = y.reshape(-1, y.shape[-1]).clone()
        flat[rows] = sum_TD.to(flat)
        return flat.view_as(y)

    first = f"token {int(rows[0]) % case.work.T}: {sorted(chosen[0].tolist())} for {sorted(ids_TA[bad][0].tolist())}"
    where = first if len(bad) == 1 else f"{len(bad)} tokens, {first}"
    return [Fault(OTHERS, "mlp", "its output is that of others", taps={"moe_routed_output": change}, where=where)]
