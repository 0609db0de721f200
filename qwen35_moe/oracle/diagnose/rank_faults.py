"""Faults of ranks and views: a share that is never summed, another rank's heads, a strided view read as contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from .faults import Fault, FaultSite, TapChange


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
    step."""

    def change(_: Tensor, kept: dict[str, Tensor], place: FaultSite) -> Tensor:
        parts, found = [kept[other].flatten(2) for other in product], torch.empty_like(kept[name])
        before = sum(x.shape[-1] for x in parts[: product.index(name)])
        steps_BT = torch.zeros(found.shape[:2]) if place.steps is None else place.steps
        for step in steps_BT.unique():
            flat, right = torch.cat([x[steps_BT == step] for x in parts], -1).flatten(), found[steps_BT == step]
            flat = torch.cat((flat, flat.new_zeros(before)))  # what lies behind the last row is not known
            found[steps_BT == step] = flat[before : before + right.numel()].view_as(right)
        return found

    return change


def beta_of(change: TapChange) -> TapChange:
    return lambda x, kept, place: change(x, kept, place).to(x.dtype).sigmoid()


# The block's part, its block, the tap that each rank has a share of, and the dimension; of so many ranks, which.
SHARES = (
    ("shared expert", "mlp", "moe_shared_act", -1, "vLLM 37856, 38795, 39181", ((2, 0), (2, 1), (4, 0), (8, 0))),
    ("routed experts", "mlp", "moe_expert_act", -1, "vLLM 44679", ((2, 1), (4, 0))),
    ("attention", "attn", "attn_pre_o_proj", 2, "", ((2, 0), (2, 1), (4, 0))),
    ("DeltaNet", "gdn", "gdn_norm_out", 2, "", ((2, 0), (2, 1), (4, 0))),
)
SHARDED = tuple(
    Fault(f"{part} sharded on {ranks} ranks and never reduced{', the last share' * (rank > 0)}", block,
          "one rank's share stands for the sum", seen, {tap: one_share(rank, ranks, dim)},
          needs="" if block == "mlp" else f"{ranks} heads")
    for part, block, tap, dim, seen, of in SHARES for ranks, rank in of
)  # fmt: skip

# What belongs to another rank, the tap, whether their heads lie side by side, and what there must be several of.
HEADS = (
    ("output gates of another rank", "attn", "attn_gate", "head", "heads"),
    ("queries of another rank", "attn", "attn_q", "head", "heads"),
    ("keys of another rank", "attn", "attn_k", "head", "kv heads"),
    ("values of another rank", "attn", "attn_v", "flat", "kv heads"),
    ("gates of another rank in DeltaNet", "gdn", "gdn_z_gate", "head", "value heads"),
    ("values of another rank in DeltaNet", "gdn", "gdn_v", "head", "value heads"),
    ("keys of another rank in DeltaNet", "gdn", "gdn_k", "head", "key heads"),
    ("beta of another rank in DeltaNet", "gdn", "gdn_beta", "head", "value heads"),
    ("decay of another rank in DeltaNet", "gdn", "gdn_g", "head", "value heads"),
)
MOVED = tuple(
    Fault(f"{name}{more}", block, "", "ROLL 497" * name.startswith("output"), {tap: rank_on(ranks, by, width)},
          needs=f"{ranks} {several}")
    for name, block, tap, width, several in HEADS
    for ranks, by, more in ((2, 1, ""), (4, 1, ", the next of 4"), (4, -1, ", the one before of 4"))
)  # fmt: skip

BA = ("gdn_b", "gdn_a")
STRIDED = (
    Fault("b, a strided view, read as contiguous", "gdn", "beta from rows of b and a in turn", "sglang 21836",
          {"gdn_beta": beta_of(strided("gdn_b", BA))}, BA),
    Fault("a, a strided view, read as contiguous", "gdn", "the decay from rows of b and a in turn", "sglang 21836",
          {"gdn_a": strided("gdn_a", BA)}, BA, late=True),
)  # fmt: skip
RANK_FAULTS = (*SHARDED, *MOVED, *STRIDED)
