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


@dataclass(frozen=True)
class Drafting:
    """What a draft head starts from: ids [B, T] of the tokens, and of what each draft of a chain started from, mask
    [B, T] or None, the engine's values, and where the weights come from and go."""

    ids: Tensor
    drafts: Sequence[Tensor]
    mask: Tensor | None
    captured: Captured
    source: WeightSource
    device: torch.device


def drafted(
    given: Drafting, model: Model, stream_BTD: Tensor, table: Arithmetic, handlers: Sequence[Handler] = (),
    how: str = "",
) -> dict[str, Tensor]:  # fmt: skip
    """What the draft head's taps held. stream_BTD: what the final norm reads. how: "pre-norm", from hidden states
    before that norm; "same token", with the embedding of token t, not t+1."""
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
    before, model.arithmetic = model.arithmetic, table
    try:
        with splitting(table), attach(*handlers, restart):
            draft_chains(model, part, [first, *more], hidden_BTD, None if given.mask is None else given.mask.to(device))
    finally:
        model.arithmetic = before
    return restart.seen
