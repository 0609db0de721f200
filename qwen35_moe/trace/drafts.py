"""The draft head in a trace: row t starts from the hidden state of token t and the embedding of token t+1."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..model.mtp import draft_head, greedy
from ..model.text import Model
from ..numerics.taps import Handler, attach
from .file import Trace


def trace_drafts(model: Model, ids_BT: Tensor, mask: Tensor | None, hidden_BTD: Tensor, watch: Handler) -> Tensor:
    """Run the draft head on all tokens, so that its taps are met; returns the ids [B, T] that it started from: each
    token's next one, and after the last the likeliest. hidden_BTD are final-normed; `watch` sees the draft head alone.

    Error: the model has no draft head.
    """
    if model.mtp is None:
        raise Qwen35Error("the model has no draft head", where="--drafts", do="load it with its draft head")
    real_BT = torch.ones_like(ids_BT) if mask is None else mask
    rows = torch.arange(len(ids_BT), device=ids_BT.device)
    last = (real_BT * torch.arange(1, ids_BT.shape[1] + 1, device=ids_BT.device)).argmax(1)
    with attach(instead_of=watch):
        logits_B1V = model.lm_head("next_token_logits", hidden_BTD[rows, last][:, None])
    next_BT = ids_BT.roll(-1, 1)
    next_BT[rows, last] = greedy(logits_B1V[:, 0])
    draft_head(model, model.mtp, next_BT, hidden_BTD, attention_mask=mask)
    return next_BT


def draft_ids_of(trace: Trace) -> Tensor | None:
    """[B, T] the ids that the draft head of a trace started from; None where it was not traced."""
    found = trace.meta.get("next_ids")
    return None if found is None else torch.tensor(found)
