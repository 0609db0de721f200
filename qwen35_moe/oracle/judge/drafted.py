"""The draft head again, on the engine's own hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...model.mtp import MTP, draft_chains
from ...model.text import Model
from ...numerics.arithmetics import Arithmetic, using
from ...numerics.taps import Handler, attach
from ...run.load import build_part
from ...run.source import WeightSource
from .hand_over import HandOver, stepped
from .replay import Captured, Restart
from .rerun_parts import TruthTokens
from .split_k import splitting


@dataclass(frozen=True)
class Drafting:
    """The inputs of a draft head: the tokens of the truth, the engine's values, the source of the weights and their
    device."""

    tokens: TruthTokens
    captured: Captured
    source: WeightSource
    device: torch.device


@dataclass(frozen=True)
class DraftFault:
    """What the draft head starts from, where that is wrong.

    first    "pre-norm": the hidden states before the final norm;  "same token": the embedding of token t, not t + 1
    chained  of the further drafts of a chain. "in place": the position of the first;  "target's": the hidden states
             that the first draft started from;  "row before": the hidden states of the row before;
             "pre-norm": those before the head's own norm;  "first token": the token of the first draft
    """

    first: str = ""
    chained: str = ""


RIGHT = DraftFault()


def drafted(
    given: Drafting, model: Model, stream_BTD: Tensor, table: Arithmetic, handlers: Sequence[Handler] = (),
    fault: DraftFault = RIGHT, hand_over: HandOver | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The values at the draft head's taps. stream_BTD: the input of the final norm. hand_over: a fault between the
    steps of the first drafts."""
    device, count = given.device, given.tokens.count
    tokens, restart = given.tokens.on(device), Restart(given.captured, count)
    mode = "stream" if hand_over is None else "packed"  # a streamed part has no layers until it is called
    part = build_part("mtp", given.source, table, False, device, mode)
    stream_BTD = stream_BTD.to(device)
    with using(table), splitting(table):
        hidden_BTD = model.norm(stream_BTD)
    if "final_norm" in given.captured:
        hidden_BTD = given.captured.put("final_norm", hidden_BTD, count)
    hidden_BTD = stream_BTD.to(hidden_BTD.dtype) if fault.first == "pre-norm" else hidden_BTD
    first, *more = (x.to(device) for x in given.tokens.drafts)
    first = tokens.ids if fault.first == "same token" else first
    more = [first] * len(more) if fault.chained == "first token" else more
    at_BT = (tokens.mask.long().cumsum(1) - 1).clamp_min(0)
    positions = [at_BT + (0 if fault.chained == "in place" else k) for k in range(len(more) + 1)]

    def hand_on(k: int, right_BTD: Tensor) -> Tensor:
        before = f"mtp.{k}" if k > 1 else "mtp"
        stream = restart.seen.get(f"{before}.layers.0.layer_output_sum", right_BTD)
        return {
            "target's": hidden_BTD,
            "row before": right_BTD.roll(1, 1),
            "pre-norm": stream.to(right_BTD),
        }.get(fault.chained, right_BTD)

    before, model.arithmetic = model.arithmetic, table
    layer = part.layers[0] if isinstance(part, MTP) else None
    steps = stepped(layer, hand_over, restart, replace(tokens, positions=at_BT), model.config)
    try:
        with splitting(table), attach(*handlers, restart), steps:
            draft_chains(model, part, [first, *more], hidden_BTD, tokens.mask, positions, hand_on)
    finally:
        model.arithmetic = before
    return restart.seen
