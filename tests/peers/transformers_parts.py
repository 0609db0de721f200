"""transformers' draft head (MTP) and vision tower, as the fixtures' results were made with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import MtpModel

from .transformers_model import quiet


def load_mtp(main_model: Any) -> Any:
    """The `mtp.*` tensors of `main_model`'s checkpoint, in its dtype; embedding and head are shared with it.

    transformers 5.23 reads Qwen's names for them; 5.17 does not, and says that they are missing.
    """
    text = main_model.config.get_text_config()
    # transformers looks for these two; Qwen's config.json says `mtp_num_hidden_layers` and leaves the type unsaid.
    text.num_mtp_layers, text.mtp_layer_types = 1, ["full_attention"]
    with quiet():
        return MtpModel.from_pretrained(main_model).eval()


@torch.no_grad()
def mtp_logits(main_model: Any, mtp_model: Any, input_ids: Tensor) -> Tensor:
    """[B, T-1, V]: row t from the main model's final-normed hidden state of token t and the embedding of token t+1, at
    RoPE position t, without a cache. It predicts token t+2.
    """
    with quiet():
        hidden_BTD = main_model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        position_ids = torch.arange(input_ids.shape[1] - 1)[None].expand(input_ids.shape[0], -1)
        draft_BTD = mtp_model.forward_layer(0, hidden_BTD[:, :-1], position_ids, None, input_ids=input_ids[:, 1:])
        return mtp_model.shared_head(draft_BTD)


@torch.no_grad()
def vision(model: Any, pixel_values: Tensor, image_grid_thw: Tensor) -> tuple[Tensor, Tensor]:
    """The tower before its merger [patches, vision width], and after: the rows that replace the image tokens."""
    with quiet():
        out = model.model.visual(pixel_values.to(model.dtype), grid_thw=image_grid_thw)
    return out.last_hidden_state, out.pooler_output


@torch.no_grad()
def image_logits(model: Any, input_ids: Tensor, pixel_values: Tensor, grid_thw: Tensor, token_types: Tensor) -> Tensor:
    """[B, T, V] of a prompt with images; positions are transformers' own (`get_rope_index`)."""
    with quiet():
        logits = model(
            input_ids=input_ids, pixel_values=pixel_values.to(model.dtype), image_grid_thw=grid_thw,
            mm_token_type_ids=token_types, use_cache=False,
        ).logits  # fmt: skip
    model.model.rope_deltas = None  # else it shifts the positions of every later call that goes on from a cache
    return logits
