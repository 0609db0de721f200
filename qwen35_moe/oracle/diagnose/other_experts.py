"""Experts other than those that were dumped: solved for, from the outputs of all experts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..judge.rerun import Rerun
from .faults import Fault, FaultSite
from .guilty import GuiltyTap

TOKENS_SOLVED, OFF, LEFT = (
    32,
    0.01,
    0.05,
)  # tokens that it is solved for; relative errors: of those; what solving may leave
LEAST_SHARE = 0.03  # of the largest weight: what is less is no expert, but rounding
OTHERS = "experts other than those dumped"


def outputs_of_all(rerun: Rerun, layer: int, x_TD: Tensor) -> Tensor:
    """What each expert makes of each token, W_down (silu(W_gate x) * W_up x): [T, D, E]."""
    found = []
    for e in range(rerun.config.num_experts):
        gate_up, down = (part.decode(torch.float64) for part in rerun.source.slot(f"layers.{layer}.mlp", e))
        gate, up = (x_TD @ gate_up.T).chunk(2, -1)
        found.append((torch.nn.functional.silu(gate) * up) @ down.T)
    return torch.stack(found, -1)


def solved(case: GuiltyTap, rerun: Rerun, layer: int, taps: Mapping[str, Tensor], ids_TA: Tensor) -> list[Fault]:
    """The fault whose routed output is sum_a w_a f_{e_a}(x). The experts e are those of the largest coefficients c in
    the least-squares solution of (engine - rest) = sum_e c_e f_e(x), token by token; w is solved for these alone. None
    where the dumped experts come out, or fewer, or where this leaves much of the output. `rest` is what the experts do
    not make.
    """
    at, config = f"layers.{layer}.", rerun.config
    needed = [at + name for name in ("moe_routed_output", "pre_mlp_layernorm_output")]
    off = case.error.norm(dim=1) / case.size
    bad = (off > OFF).nonzero().flatten()
    if not all(key in taps for key in needed) or not len(bad) or len(bad) > TOKENS_SOLVED or len(ids_TA) != len(off):
        return []
    routed, x = (case.of_all(taps[key]).double()[case.used][bad] for key in needed)
    if routed.shape != case.truth[bad].shape or config.num_experts > x.shape[1]:
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
