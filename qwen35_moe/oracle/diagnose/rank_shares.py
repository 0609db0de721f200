"""Which rank is it? What each rank holds of a sum over ranks is compared with that rank's share of the truth.

Tensor parallelism gives a rank some columns of each expert's intermediate, expert parallelism gives it some of the
experts. Its share of the truth is what the block gives with nothing but these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...numerics.tap_keys import base_name
from ...quant.packed import Float
from ...run.experts import PackedExpert
from ..dumps.align import Alignment, Pair
from ..dumps.dump import Dump
from ..dumps.engine_names import TapRule
from ..dumps.pieces import Source
from ..judge.envelope import envelope, judge
from ..judge.rerun import Rerun
from .fault_parts import one_share, plain
from .faults import BrokenSource, Fault, FaultSite

SUMS = ("moe_routed_output", "mlp_output")


@dataclass(frozen=True)
class Share:
    """What a rank has, each as (which part, of how many): of the shared expert's columns (tp), of the routed experts
    (ep), and of their columns (moe_tp)."""

    rank: int
    tp: tuple[int, int]
    ep: tuple[int, int]
    moe_tp: tuple[int, int]

    @property
    def alone(self) -> Fault:
        """As a fault: the block as this rank alone computes it, a partial sum."""

        def weights(x_TA: Tensor, kept: dict[str, Tensor], place: FaultSite) -> Tensor:
            i, n = self.ep
            return x_TA * (kept["moe_topk_ids"] * n // place.config.num_experts == i).to(x_TA)

        return Fault("", "mlp", taps={
            "moe_shared_act": plain(lambda x: one_share(x, *self.tp)),
            "moe_expert_act": plain(lambda x: one_share(x, *self.moe_tp)),
            "moe_topk_weights": weights,
        }, remembers=("moe_topk_ids",))  # fmt: skip


def shares_of(source: Source) -> list[Share]:
    """The share of each rank that a tensor has a piece of; none if there is one rank, or not one group of ranks."""
    found, count = [], len(source.pieces)
    for i, piece in enumerate(source.pieces if count > 1 else ()):
        tp, size, ep, groups = (int(piece.parallel.get(name, default)) for name, default in (
            ("tp_rank", i), ("tp_size", count), ("moe_ep_rank", 0), ("moe_ep_size", 1)))  # fmt: skip
        moe_tp = int(piece.parallel.get("moe_tp_rank", tp % (size // groups)))
        found.append(Share(piece.rank, (tp, size), (ep, groups), (moe_tp, size // groups)))
    return found if all(share.tp[1] == count for share in found) else []


def swapped(a: int, b: int, share: Share | None) -> Fault:
    """The weights of two experts, one for the other: on all ranks, or on one that holds them."""

    def change(source: BrokenSource, mlp: str, e: int, slot: PackedExpert) -> PackedExpert:
        if e not in (a, b):
            return slot
        other = source.inner.slot(mlp, a + b - e)
        if share is None or share.moe_tp[1] == 1:
            return other
        (gate_up, down), (gate_up_2, down_2) = ([w.decode(torch.float64) for w in some] for some in (slot, other))
        gate_up, gate_up_2 = (w.unflatten(0, (2, -1)).mT for w in (gate_up, gate_up_2))
        gate_up, down = (one_share(x, *share.moe_tp, 0.0, 1.0) + one_share(y, *share.moe_tp)
                         for x, y in ((gate_up, gate_up_2), (down, down_2)))  # fmt: skip
        return Float(gate_up.mT.flatten(0, 1).contiguous()), Float(down)

    where = "" if share is None else f" on rank {share.rank}"
    return Fault(f"experts {a} and {b} swapped{where}", "mlp", "each computes with the other's weights", slot=change)


def swaps(error_T: Tensor, ids_TA: Tensor, E: int) -> list[tuple[int, int]]:
    """At most three pairs of experts whose tokens have nearly all of the squared error, fewest tokens first."""
    hit_TE = torch.zeros(len(ids_TA), E, dtype=torch.float64).scatter(1, ids_TA.long(), 1.0)
    both_EE = hit_TE.T @ (error_T[:, None] * hit_TE)
    own_E, tokens_E = both_EE.diagonal(), hit_TE.sum(0)
    either_EE = own_E[:, None] + own_E - both_EE
    cost_EE = tokens_E[:, None] + tokens_E
    good = (either_EE >= 0.98 * error_T.sum()).triu(1) & (own_E > 0)[:, None] & (own_E > 0)
    return sorted(((a, b) for a, b in good.nonzero().tolist()), key=lambda ab: float(cost_EE[ab]))[:3]


@dataclass
class Blame:
    """The ranks that hold a wrong value of a sum, where others hold a right one. error_T: the squared error of each
    row. reduced: each rank should hold the whole sum, and these hold their own share of it instead."""

    ranks: list[Share]
    reduced: bool
    error_T: Tensor

    def __str__(self) -> str:
        which = ", ".join(str(share.rank) for share in self.ranks)
        return f"not reduced on rank {which}" if self.reduced else f"in the share of rank {which} only"


def blame(key: str, work: Any, rerun: Rerun, layer: int | None, seen: Sequence[Mapping[str, Tensor]]) -> Blame | None:
    """Which ranks hold a wrong value of a sum; None where that cannot be said, or is true of all of them.

    A rank is compared with the whole sum if all ranks hold the same in another layer, as after a reduction; otherwise
    with its own share.
    """
    sources = work.alignment.dump.sources
    if layer is None or base_name(key) not in SUMS or key not in sources:
        return None
    shares, bad, own, error = shares_of(next(iter(sources[key].values()))), [], [], torch.empty(0)
    reduced = _reduced(work.alignment.dump, key)
    for i, share in enumerate(shares):
        pair = _of_rank(work.alignment, key, i)
        if pair.engine is None:
            return None
        runs = (rerun.fault(layer, share.alone, table, j)[key] for j, table in enumerate(rerun.tables))
        part = [work.rows(y, pair).cpu() for y in runs]
        right = [work.rows(taps[key], pair).cpu() for taps in seen] if reduced else part
        if _ratio(pair, right) > work.limit:
            bad.append(share)
            own.append(_ratio(pair, part) <= work.limit)
            error = (pair.engine.double() - right[0]).square().sum(1)
    if not bad or len(bad) == len(shares):
        return None
    return Blame(bad, reduced and all(own), error)


def _ratio(pair: Pair, right: Sequence[Tensor]) -> float:
    assert pair.engine is not None and pair.dtype is not None
    return judge(pair.engine, right[0], envelope(right[0], right[1:], pair.dtype), pair.dtype).ratio


def _of_rank(alignment: Alignment, key: str, i: int) -> Pair:
    """A tap as one rank holds it."""
    dump = copy(alignment.dump)
    alone = {step: Source([source.pieces[i]], TapRule("same", source.rule.blocks), source.preference)
             for step, source in dump.sources[key].items()}  # fmt: skip
    dump.sources = {**dump.sources, key: alone}
    return replace(alignment, dump=dump).pair(key)


def _reduced(dump: Dump, key: str) -> bool:
    """Whether the ranks hold the same values of this sum in another layer."""
    for other in dump.sources:
        if other != key and base_name(other) == base_name(key) and "mtp." not in other:
            first, *rest = (piece.load() for piece in next(iter(dump.sources[other].values())).pieces)
            return all(torch.equal(first, x) for x in rest)
    return False


def faults_of_sums(
    sources: Mapping[int, Source], blamed: Blame | None, error_T: Tensor, ids_TA: Tensor, E: int
) -> list[Fault]:
    """Faults that name a rank or a pair of experts, which the catalogue cannot list. sources: the pieces of the block's
    output; error_T, ids_TA: of each token the squared error, and its experts; E: how many experts there are."""
    shares = shares_of(next(iter(sources.values()))) if sources else []
    error_T = error_T if blamed is None else blamed.error_T
    some = [None, *shares] if blamed is None else blamed.ranks
    pairs = swaps(error_T, ids_TA, E) if len(error_T) == len(ids_TA) else []
    lost_or_twice = [
        Fault(f"shared expert {what} on rank {share.rank}", "mlp", "its share of the sum", "sglang 23084",
              {"moe_shared_act": plain(partial(one_share, rank=rank, ranks=ranks, inside=factor, outside=1.0))})
        for share in shares for rank, ranks in [share.tp] for factor, what in ((2.0, "counted twice"), (0.0, "lost"))
    ]  # fmt: skip
    return [*lost_or_twice, *(swapped(a, b, share) for a, b in pairs for share in some)]
