"""Multi-token prediction: the draft head of the checkpoint, and chained drafts.

    h'_t = norm(layer(fc([norm_e(embedding of token t+1) ; norm_h(h_t)])))      logits of token t+2 = lm_head(h'_t)

h_t is the main model's hidden state of token t after its final norm; the layer is a full-attention MoE layer with a
cache of its own; embedding and lm_head are the main model's. Row t stands at the position of token t. Taps are under
part `mtp`: `mtp_embedding`, `mtp_hidden`, `mtp_fc`, those of a layer, `final_norm` and `next_token_logits`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Qwen35Error
from ..numerics import arithmetics
from ..numerics.taps import Site, attach, scope, tap
from .cache import Cache, LayerState, extend
from .config import FULL, Config
from .norms import RMSNorm
from .ops import Linear
from .rope import rotary_angles
from .text import Layer, Model


class MTP(nn.Module):
    """`mtp` of a checkpoint. `fused` is decided for this layer by itself: it may be quantised unlike the model."""

    def __init__(self, config: Config, fused: bool = False):
        super().__init__()
        self.config = config
        width, eps = config.hidden_size, config.rms_norm_eps
        for key, only in (("mtp_num_hidden_layers", 1), ("mtp_use_dedicated_embeddings", False)):
            text: Any = config.raw.get("text_config", config.raw)
            if text.get(key, only) != only:
                do = "no checkpoint of the family has another value"
                raise Qwen35Error("bad value", where=f"config.json: {key}", expected=only, found=text[key], do=do)
        self.pre_fc_norm_embedding = RMSNorm(width, eps, "mtp_embedding")
        self.pre_fc_norm_hidden = RMSNorm(width, eps, "mtp_hidden")
        self.fc = Linear(2 * width, width)
        self.layers = nn.ModuleList([Layer(config, FULL, fused)])
        self.norm = RMSNorm(width, eps, "final_norm")

    def forward(
        self,
        embeds_BTD: Tensor,
        hidden_BTD: Tensor,
        angles: tuple[Tensor, Tensor],
        real_BS: Tensor | None,
        past: LayerState,
    ) -> Tensor:
        """h' of the module's docstring. The embedding's half comes first in the input of fc."""
        halves = self.pre_fc_norm_embedding(embeds_BTD), self.pre_fc_norm_hidden(hidden_BTD)
        x_BTD = self.fc("mtp_fc", torch.cat(halves, -1))
        with scope(layer=0):
            x_BTD = self.layers[0](x_BTD, angles, real_BS, past)
        return self.norm(x_BTD)


def with_hidden(model: Model, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """`model(...)` and what its draft head starts from: logits [B, T, V], final-normed hidden states [B, T, D]."""
    kept: list[Tensor] = []

    def keep(site: Site, x: Tensor) -> None:
        if (site.part, site.name) == ("", "final_norm"):
            kept.append(x)

    with attach(keep):
        return model(*args, **kwargs), kept[-1]


@torch.inference_mode()
def draft_head(
    model: Model,
    mtp: nn.Module,
    next_ids: Tensor | None,
    hidden_BTD: Tensor,
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
    position_ids: Tensor | None = None,
    next_embeds: Tensor | None = None,
    logits_to_keep: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One pass of the draft head: logits [B, T, V] and hidden states [B, T, D], which the next draft starts from.

    hidden_BTD belongs to tokens t, next_ids [B, T] are tokens t+1 (next_embeds [B, T, D] stands in for them, where
    some are images). attention_mask and position_ids are those of tokens t; cache is the head's own and is updated.
    Positions as in SGLang and vLLM; transformers counts from t+1, which for text comes to the same, RoPE being
    relative. Agrees with transformers 5.23 `MtpModel` and llama.cpp. logits_to_keep: only for the last so many rows.
    """
    cache = Cache() if cache is None else cache
    given = next_ids if next_embeds is None else next_embeds
    if given is None or given.shape[:2] != hidden_BTD.shape[:2]:
        expected = f"next_ids {list(hidden_BTD.shape[:2])}: for each token t the token t+1"
        found, do = given if given is None else list(given.shape), "drop the last hidden state, or append the token "
        what, do = "hidden states and next tokens disagree", f"{do}that was sampled from it"
        raise Qwen35Error(what, expected=expected, found=found, do=do)
    real_BS, position_ids = extend(cache, hidden_BTD, attention_mask, position_ids)
    with arithmetics.using(model.arithmetic), scope(part="mtp"):
        embeds_BTD = tap("embed_tokens", model.embed_tokens(next_ids) if next_embeds is None else next_embeds)
        angles = rotary_angles(model.config, position_ids, hidden_BTD.dtype)
        hidden_BTD = mtp(embeds_BTD, hidden_BTD, angles, real_BS, cache.layer(0))
        kept_BTD = hidden_BTD[:, -(logits_to_keep or hidden_BTD.shape[1]) :]
        return model.lm_head("next_token_logits", kept_BTD), hidden_BTD


@torch.inference_mode()
def draft_chains(
    model: Model,
    mtp: nn.Module,
    ids: Sequence[Tensor],
    hidden_BTD: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Sequence[Tensor] | None = None,
    hand_on: Callable[[int, Tensor], Tensor] = lambda _, hidden_BTD: hidden_BTD,
) -> list[Tensor]:
    """At every token of whole sequences, a chain of `len(ids)` drafts. Returns the ids that they started from.

    ids[k] [B, T]: what draft k+1 of row t starts from, beside a hidden state: token t+1; then what was drafted before
    it. -1: the likeliest by the draft before. hidden_BTD are the model's, final-normed. The first drafts are those of
    `draft_head`. Draft k+1 starts from the hidden state of draft k, stands k positions on, and sees the first drafts'
    keys up to row t, and those of its own chain: what `draft` computes from row t. Its taps are under part `mtp.K`,
    K = 2, 3, ...

    position_ids: other positions, one [B, T] for each draft. hand_on(k, hidden states of draft k): what draft k+1
    starts from, where that is something else.
    """
    real_BT, first_BT = extend(Cache(), hidden_BTD, attention_mask, None)
    past, used, B, T = LayerState(), list[Tensor](), *hidden_BTD.shape[:2]
    own_BTT = torch.eye(T, dtype=torch.bool, device=hidden_BTD.device).expand(B, T, T)
    sees, likeliest_BT = real_BT, None
    if len(ids) > 1:
        sees = torch.ones_like(own_BTT).tril()
        sees = sees if real_BT is None else sees & real_BT[:, None]
    for k, given_BT in enumerate(ids):
        if likeliest_BT is not None and sees is not None:
            given_BT, sees = torch.where(given_BT < 0, likeliest_BT, given_BT), torch.cat((sees, own_BTT), 2)
            hidden_BTD = hand_on(k, hidden_BTD)
        used.append(given_BT)
        at_BT = first_BT + k if position_ids is None else position_ids[k]
        with arithmetics.using(model.arithmetic), scope(part=f"mtp.{k + 1}" if k else "mtp"):
            embeds_BTD = tap("embed_tokens", model.embed_tokens(given_BT))
            angles = rotary_angles(model.config, at_BT, hidden_BTD.dtype)
            hidden_BTD = mtp(embeds_BTD, hidden_BTD, angles, sees, past)
            likeliest_BT = greedy(model.lm_head("next_token_logits", hidden_BTD))
    return used


def greedy(logits_BV: Tensor) -> Tensor:
    """The likeliest token, of equals the one with the lowest id."""
    return (logits_BV == logits_BV.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)


def draft(
    model: Model,
    mtp: nn.Module,
    next_ids: Tensor | None,
    hidden_BTD: Tensor,
    steps: int,
    choose: Callable[[Tensor], Tensor] = greedy,
    cache: Cache | None = None,
    attention_mask: Tensor | None = None,
    **first: Any,
) -> tuple[Tensor, Tensor]:
    """A chain of `steps` drafts: ids [B, steps] and the logits they were chosen from [B, steps, V].

    The first draft comes from the last real row of `draft_head(...)`. Each further one comes from the head's own
    hidden state and the token just drafted, one position later. Only the first pass stays in `cache`: later rows
    are computed from guesses, and engines overwrite them with rows of the target's hidden states.
    """
    cache = Cache() if cache is None else cache
    keep = 1 if attention_mask is None and cache.mask is None else None  # else the last real row may be any
    logits, hidden = draft_head(model, mtp, next_ids, hidden_BTD, attention_mask, cache, logits_to_keep=keep, **first)
    chain, rows = cache.clone(), torch.arange(hidden.shape[0], device=hidden.device)
    last = torch.full_like(rows, -1)
    if cache.mask is not None:
        real_BT = cache.mask[:, -hidden.shape[1] :]
        last = (real_BT * torch.arange(1, hidden.shape[1] + 1, device=hidden.device)).argmax(-1)
    ids, seen = [], []
    for step in range(steps):
        seen.append(logits[rows, last])
        ids.append(choose(seen[-1]))
        if step + 1 < steps:
            logits, hidden = draft_head(model, mtp, ids[-1][:, None], hidden[rows, last][:, None], cache=chain)
            last = torch.zeros_like(rows)
    return torch.stack(ids, 1), torch.stack(seen, 1)
