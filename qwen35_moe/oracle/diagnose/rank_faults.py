"""Faults of ranks and views: a share that is never summed, another rank's heads, a strided view read as contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from .faults import Fault, FaultSite, TapChange


def first_share(ranks: int) -> TapChange:
    """What the first of some ranks holds of the last dimension; nothing of the others'."""

    def change(x: Tensor, _: dict[str, Tensor], __: FaultSite) -> Tensor:
        width = x.shape[-1] // ranks
        return torch.cat((x[..., :width], torch.zeros_like(x[..., width:])), -1)

    return change


def other_half(x: Tensor, _: dict[str, Tensor], __: FaultSite) -> Tensor:
    """[B, T, heads, width]: each of two ranks has the other's heads."""
    return x.roll(x.shape[2] // 2, 2)


def other_half_flat(x: Tensor, _: dict[str, Tensor], __: FaultSite) -> Tensor:
    """The same of heads that lie side by side."""
    return x.roll(x.shape[-1] // 2, -1)


def beta_of_strided_b(x: Tensor, kept: dict[str, Tensor], place: FaultSite) -> Tensor:
    """b is a view of the rows (b, a) of one product. Read as if it were contiguous: the first half of a step's rows."""
    b, a = (kept[name].to(x.dtype) for name in ("gdn_b", "gdn_a"))
    steps = torch.zeros(b.shape[:2]) if place.steps is None else place.steps
    found = torch.empty_like(b)
    for step in steps.unique():
        rows = torch.cat((b, a), -1)[steps == step]
        found[steps == step] = rows.flatten()[: rows.numel() // 2].view(len(rows), -1).sigmoid()
    return found


SHARDED = tuple(
    Fault(f"shared expert sharded on {ranks} ranks and never reduced", "mlp", "one rank's share stands for the sum",
          "vLLM 37856, 38795, 39181", {"moe_shared_act": first_share(ranks)})
    for ranks in (2, 4, 8)
)  # fmt: skip
RANK_FAULTS = (
    *SHARDED,
    Fault("output gates of another rank", "attn", "heads gated by another rank's gates", "ROLL 497",
          {"attn_gate": other_half}),
    Fault("keys of another rank", "attn", "", "", {"attn_k": other_half}, needs="kv heads"),
    Fault("values of another rank", "attn", "", "", {"attn_v": other_half_flat}, needs="kv heads"),
    Fault("gates of another rank in DeltaNet", "gdn", "heads gated by another rank's z", "",
          {"gdn_z_gate": other_half}),
    Fault("b, a strided view, read as contiguous", "gdn", "beta from rows of b and a in turn", "sglang 21836",
          {"gdn_beta": beta_of_strided_b}, ("gdn_b", "gdn_a")),
)  # fmt: skip
