"""Faults of ranks and of views: a rank's share that is taken for the sum, heads of another rank, a strided view that is
read as if it were contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from .fault_parts import one_share, plain
from .faults import Fault, FaultSite, Heads, TapChange


def strided(name: str, product: tuple[str, ...]) -> TapChange:
    """`name` is a view of some columns of a product: its parts `product` lie side by side in each row, and a row is one
    token of a step. Memory is read from the view's first number on, as if the rows were as short as the view. What lies
    behind the last row is not known: zero."""

    def change(_: Tensor, kept: dict[str, Tensor], place: FaultSite) -> Tensor:
        right = kept[name].flatten(0, 1)
        product_Rn = torch.cat([kept[other].flatten(2) for other in product], -1).flatten(0, 1)
        found, before = right.clone(), sum(kept[other].shape[-1] for other in product[: product.index(name)])
        all_rows = torch.arange(len(right))
        for step, (count, table) in (place.layout or {0: (len(right), torch.stack((all_rows, all_rows), 1))}).items():
            row, index = table.unbind(1)
            memory = product_Rn.new_zeros(count + 1, product_Rn.shape[1])
            memory[row] = product_Rn[index]
            if step in place.beside:
                others = torch.ones(count, dtype=torch.bool).index_fill(0, row, False)
                memory[:count][others] = torch.cat([place.beside[step][other] for other in product], -1).to(memory)
            read = memory.flatten()[before : before + count * right.shape[1]].view(count, right.shape[1])
            found[index] = read[row]
        return found.view_as(kept[name])

    return change


def _share(rank: int, ranks: int) -> TapChange:
    """One rank's columns (of heads: [.., heads, width] as columns); zeros in the place of the others'."""
    return plain(lambda x: one_share(x.flatten(2) if x.dim() == 4 else x, rank, ranks).view_as(x))


def _moved(ranks: int, by: int, dim: int) -> TapChange:
    """Each rank has the heads of the rank `by` after it."""
    return plain(lambda x: x.roll(-by * (x.shape[dim] // ranks), dim))


def _which(rank: int, ranks: int) -> str:
    return "" if rank == 0 else ", the last share" if rank == ranks - 1 else f", share {rank + 1}"


# A part of a block, the block, the tap that each rank has a share of, the kind of its heads, reports, (ranks, rank).
SHARES: tuple[tuple[str, str, str, Heads, str, tuple[tuple[int, int], ...]], ...] = (
    ("shared expert", "mlp", "moe_shared_act", "query", "vLLM 37856, 38795, 39181", ((2, 0), (2, 1), (4, 0), (8, 0))),
    ("routed experts", "mlp", "moe_expert_act", "query", "vLLM 44679", ((2, 1), (4, 0))),
    ("attention", "attn", "attn_pre_o_proj", "query", "", ((2, 0), (2, 1), (4, 0))),
    ("DeltaNet", "gdn", "gdn_norm_out", "value", "", ((2, 0), (2, 1), (4, 0))),
)
RARE_SHARES = ((4, 1), (4, 2), (4, 3))
SHARDED = tuple(
    Fault(f"{part} sharded on {ranks} ranks and never reduced{_which(rank, ranks)}", block,
          "one rank's share stands for the sum", seen, {tap: _share(rank, ranks)},
          heads=(kind, 1 if block == "mlp" else ranks), rare=(ranks, rank) in RARE_SHARES)
    for part, block, tap, kind, seen, of in SHARES for ranks, rank in (*of, *RARE_SHARES)
)  # fmt: skip

# What belongs to another rank, the block, the tap, the dimension of its heads (-1: they lie side by side), their kind.
HEADS: tuple[tuple[str, str, str, int, Heads], ...] = (
    ("output gates of another rank", "attn", "attn_gate", 2, "query"),
    ("queries of another rank", "attn", "attn_q", 2, "query"),
    ("keys of another rank", "attn", "attn_k", 2, "kv"),
    ("values of another rank", "attn", "attn_v", -1, "kv"),
    ("context of another rank", "attn", "attn_context", 2, "query"),
    ("gates of another rank in DeltaNet", "gdn", "gdn_z_gate", 2, "value"),
    ("values of another rank in DeltaNet", "gdn", "gdn_v", 2, "value"),
    ("keys of another rank in DeltaNet", "gdn", "gdn_k", 2, "key"),
    ("beta of another rank in DeltaNet", "gdn", "gdn_beta", 2, "value"),
    ("decay of another rank in DeltaNet", "gdn", "gdn_g", 2, "value"),
)
MOVED = tuple(
    Fault(f"{name}{more}", block, "", "ROLL 497" * name.startswith("output"), {tap: _moved(ranks, by, dim)},
          heads=(kind, ranks))
    for name, block, tap, dim, kind in HEADS
    for ranks, by, more in ((2, 1, ""), (4, 1, ", the next of 4"), (4, -1, ", the one before of 4"))
)  # fmt: skip

BA = ("gdn_b", "gdn_a")
STRIDED = (
    Fault("b, a strided view, read as contiguous", "gdn", "beta from rows of b and a in turn", "sglang 21836",
          {"gdn_beta": lambda x, *more: strided("gdn_b", BA)(x, *more).to(x.dtype).sigmoid()}, BA, rows=True),
    Fault("a, a strided view, read as contiguous", "gdn", "the decay from rows of b and a in turn", "sglang 21836",
          {"gdn_a": strided("gdn_a", BA)}, BA, late=True, rows=True),
)  # fmt: skip
RANK_FAULTS = (*SHARDED, *MOVED, *STRIDED)
