"""The draft head again, on the engine's own hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...model.mtp import draft_chains
from ...model.text import Model
from ...numerics.arithmetics import Arithmetic, using
from ...numerics.taps import Handler, attach
from ...run.load import build_part
from ...run.source import WeightSource
from .replay import Captured, Restart
from .split_k import splitting

HOW = {
    "pre-norm": "from hidden states before the final norm",
    "same token": "with the embedding of token t, not t + 1",
    "positions high": "positions one too high after the first step",
    "positions low": "positions one too low after the first step",
    "chain in place": "further drafts of a chain at the position of the first",
    "cache lost": "keys and values of the steps before missing",
}


@dataclass(frozen=True)
class Drafting:
    """The inputs of a draft head: ids [B, T] of the tokens, ids that each draft of a chain started from, mask [B, T],
    the step of each token [B, T], the engine's values, the source of the weights and their device."""

    ids: Tensor
    drafts: Sequence[Tensor]
    mask: Tensor
    steps: Tensor
    captured: Captured
    source: WeightSource
    device: torch.device


def drafted(
    given: Drafting, model: Model, stream_BTD: Tensor, table: Arithmetic, handlers: Sequence[Handler] = (),
    how: str = "",
) -> dict[str, Tensor]:  # fmt: skip
    """The values at the draft head's taps. stream_BTD: the input of the final norm. how: a key of `HOW`, or nothing."""
    count, device = given.ids.numel(), given.device
    restart = Restart(given.captured, count)
    part = build_part("mtp", given.source, table, False, device, "stream")
    stream_BTD = stream_BTD.to(device)
    with using(table), splitting(table):
        hidden_BTD = model.norm(stream_BTD)
    if "final_norm" in given.captured:
        hidden_BTD = given.captured.put("final_norm", hidden_BTD, count)
    hidden_BTD = stream_BTD.to(hidden_BTD.dtype) if how == "pre-norm" else hidden_BTD
    first, *more = (x.to(device) for x in given.drafts)
    first = given.ids.to(device) if how == "same token" else first
    mask_BT, steps_BT = given.mask.to(device), given.steps.to(device)
    at_BT, later_BT = (mask_BT.long().cumsum(1) - 1).clamp_min(0), (steps_BT != steps_BT[:, :1]).long()
    off_BT = {"positions high": later_BT, "positions low": -later_BT}.get(how, torch.zeros_like(at_BT))
    position_ids = [at_BT + off_BT + (0 if how == "chain in place" else k) for k in range(len(given.drafts))]
    may_BTT = steps_BT[:, :, None] == steps_BT[:, None] if how == "cache lost" else None
    before, model.arithmetic = model.arithmetic, table
    try:
        with splitting(table), attach(*handlers, restart):
            draft_chains(model, part, [first, *more], hidden_BTD, mask_BT, position_ids, may_BTT)
    finally:
        model.arithmetic = before
    return restart.seen
