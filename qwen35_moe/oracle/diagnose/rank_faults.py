"""Faults of ranks and views: a share that is never summed, another rank's heads, a strided view read as contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from .faults import Fault, FaultSite, Heads, TapChange


def one_share(rank: int, ranks: int, dim: int = -1) -> TapChange:
    """The share of one rank along a dimension; zeros in the place of the others'."""

    def change(x: Tensor, _: dict[str, Tensor], __: FaultSite) -> Tensor:
        width, y = x.shape[dim] // ranks, torch.zeros_like(x)
        y.narrow(dim, rank * width, width).copy_(x.narrow(dim, rank * width, width))
        return y

    return change


def rank_on(ranks: int, by: int, width: str = "head") -> TapChange:
    """Each rank has the heads of the one `by` after it: [B, T, heads, width], or heads side by side ("flat")."""

    def change(x: Tensor, _: dict[str, Tensor], __: FaultSite) -> Tensor:
        dim = 2 if width == "head" else -1
        return x.roll(-by * (x.shape[dim] // ranks), dim)

    return change


def strided(name: str, product: tuple[str, ...]) -> TapChange:
    """A view of some columns of a product, read as if it were contiguous: from its first number on, row after row of a
    step, those of other tokens among them. What lies behind the last row is not known: zero."""

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


def beta_of(change: TapChange) -> TapChange:
    return lambda x, kept, place: change(x, kept, place).to(x.dtype).sigmoid()


# The block's part, its block, the tap that each rank has a share of, its dimension and heads; of so many ranks, which.
SHARES: tuple[tuple[str, str, str, int, Heads, str, tuple[tuple[int, int], ...]], ...] = (
    ("shared expert", "mlp", "moe_shared_act", -1, "query", "vLLM 37856, 38795, 39181",
     ((2, 0), (2, 1), (4, 0), (8, 0))),
    ("routed experts", "mlp", "moe_expert_act", -1, "query", "vLLM 44679", ((2, 1), (4, 0))),
    ("attention", "attn", "attn_pre_o_proj", 2, "query", "", ((2, 0), (2, 1), (4, 0))),
    ("DeltaNet", "gdn", "gdn_norm_out", 2, "value", "", ((2, 0), (2, 1), (4, 0))),
)  # fmt: skip
RARE_SHARES = ((4, 1), (4, 2), (4, 3))


def _which(rank: int, ranks: int) -> str:
    return "" if rank == 0 else ", the last share" if rank == ranks - 1 else f", share {rank + 1}"


SHARDED = tuple(
    Fault(f"{part} sharded on {ranks} ranks and never reduced{_which(rank, ranks)}", block,
          "one rank's share stands for the sum", seen, {tap: one_share(rank, ranks, dim)},
          heads=(kind, 1 if block == "mlp" else ranks), rare=(ranks, rank) in RARE_SHARES)
    for part, block, tap, dim, kind, seen, of in SHARES for ranks, rank in (*of, *RARE_SHARES)
)  # fmt: skip

# What belongs to another rank, the tap, whether their heads lie side by side, and what there must be several of.
HEADS: tuple[tuple[str, str, str, str, Heads], ...] = (
    ("output gates of another rank", "attn", "attn_gate", "head", "query"),
    ("queries of another rank", "attn", "attn_q", "head", "query"),
    ("keys of another rank", "attn", "attn_k", "head", "kv"),
    ("values of another rank", "attn", "attn_v", "flat", "kv"),
    ("context of another rank", "attn", "attn_context", "head", "query"),
    ("gates of another rank in DeltaNet", "gdn", "gdn_z_gate", "head", "value"),
    ("values of another rank in DeltaNet", "gdn", "gdn_v", "head", "value"),
    ("keys of another rank in DeltaNet", "gdn", "gdn_k", "head", "key"),
    ("beta of another rank in DeltaNet", "gdn", "gdn_beta", "head", "value"),
    ("decay of another rank in DeltaNet", "gdn", "gdn_g", "head", "value"),
)
MOVED = tuple(
    Fault(f"{name}{more}", block, "", "ROLL 497" * name.startswith("output"), {tap: rank_on(ranks, by, width)},
          heads=(several, ranks))
    for name, block, tap, width, several in HEADS
    for ranks, by, more in ((2, 1, ""), (4, 1, ", the next of 4"), (4, -1, ", the one before of 4"))
)  # fmt: skip

BA = ("gdn_b", "gdn_a")
STRIDED = (
    Fault("b, a strided view, read as contiguous", "gdn", "beta from rows of b and a in turn", "sglang 21836",
          {"gdn_beta": beta_of(strided("gdn_b", BA))}, BA, rows=True),
    Fault("a, a strided view, read as contiguous", "gdn", "the decay from rows of b and a in turn", "sglang 21836",
          {"gdn_a": strided("gdn_a", BA)}, BA, late=True, rows=True),
)  # fmt: skip
RANK_FAULTS = (*SHARDED, *MOVED, *STRIDED)
