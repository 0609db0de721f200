"""The draft head in a trace: row t starts from the hidden state of token t and the embedding of token t+1."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..model.mtp import draft_chains, greedy
from ..model.text import Model
from ..numerics.tap_table import TAPS
from ..numerics.taps import Handler, attach
from .file import Trace


def trace_drafts(
    model: Model, ids_BT: Tensor, mask: Tensor | None, hidden_BTD: Tensor, watch: Handler, drafts: Sequence[Tensor],
    theirs_BTD: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Runs the draft head on all tokens, so that its taps are met. Returns the ids [B, T] that each draft started from.

    hidden_BTD: the text model's output after its last norm. `watch` sees the taps of the draft head alone.
    drafts: for each draft of a chain, the ids [B, T] that an engine started it from. Where an id is -1 (not known), the
    first draft starts from the token that follows (after the last token: from the likeliest), and a later draft from
    the likeliest token of the draft before it.
    theirs_BTD: an engine's hidden states, which take the place of hidden_BTD where they are finite.
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
    first, *more = (x.to(ids_BT.device) for x in drafts)
    first = torch.where(first < 0, next_BT, first)
    if theirs_BTD is not None:
        hidden_BTD = torch.where(theirs_BTD.isfinite(), theirs_BTD.to(hidden_BTD), hidden_BTD)
    return draft_chains(model, model.mtp, [first, *more], hidden_BTD, mask)


def unknown_drafts(ids_BT: Tensor, count: int) -> list[Tensor]:
    """The `drafts` of `trace_drafts` for a chain of `count` drafts, where no engine's ids are known."""
    return [torch.full_like(ids_BT, -1) for _ in range(count)]


def draft_ids_of(trace: Trace) -> list[Tensor]:
    """[B, T] the ids that each draft of a chain started from; empty where the draft head was not traced."""
    return [torch.tensor(ids) for ids in trace.meta.get("draft_ids") or []]


def branches_in(truth: Trace) -> dict[int, tuple[int, int]]:
    """Branches are sequences that share the first tokens of another one, and stand behind all others in the truth.

    Number of a branch -> (number of the sequence that it leaves, how many tokens they share). Error: impossible ones.
    """
    told = truth.meta.get("branches") or []
    B, T = truth.ids.shape if told else (0, 0)
    own = B - len(told)
    if not all(0 <= of < own and 0 < at < T for of, at in told):
        raise Qwen35Error("branches that the truth cannot have", where=truth.path or "memory", found=told[:4],
                          expected=f"sequence 0 to {own - 1}, and 1 to {T - 1} tokens")  # fmt: skip
    return {own + i: (of, at) for i, (of, at) in enumerate(told)}


def check_parts(patterns: Sequence[str], drafts: bool, images: bool) -> None:
    """Error: a pattern that names only taps of the draft head, or only those of the vision tower, if that part does not
    run."""
    runs = (("mtp", drafts, "add --drafts N"), ("vis", images, "add --image, or --pixel-values"))
    for part, there, do in () if drafts and images else runs:
        for pattern in patterns:
            names = [name for name in TAPS if fnmatchcase(name, pattern)]
            theirs = pattern.startswith(f"{part}.") or pattern.startswith("visual.") and part == "vis"
            if not there and (theirs or (names and all(name.startswith(f"{part}_") for name in names))):
                raise Qwen35Error("no tap that was asked for would be met", where=f"--taps {pattern}", do=do)
