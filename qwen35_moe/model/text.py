"""The text model: an embedding, layers of mixer and experts on a residual stream, a norm, a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Qwen35Error
from ..numerics import arithmetics
from ..numerics.arithmetics import Arithmetic
from ..numerics.taps import scope, tap
from .attention import Attention
from .cache import Cache, LayerState, extend
from .config import FULL, Config
from .deltanet import GatedDeltaNet
from .moe import MoE
from .norms import RMSNorm
from .ops import Linear, add
from .rope import rotary_angles


class Layer(nn.Module):
    """h += mixer(norm(h)); h += moe(norm(h)).

    The residual stream passes from layer to layer as the sum, before it is stored: SGLang's norm reads the unrounded
    sum, transformers' norm reads the stored value. The taps `layer_input` and `pre_mlp_residual` are the stored values.
    """

    def __init__(self, config: Config, kind: str, fused: bool = False):
        super().__init__()
        self.kind = kind
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, "input_layernorm")
        if kind == FULL:
            self.self_attn = Attention(config)
        else:
            self.linear_attn = GatedDeltaNet(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, "pre_mlp_layernorm_output")
        self.mlp = MoE(config, fused)

    def forward(
        self, sum_BTD: Tensor, angles: tuple[Tensor, Tensor], real_BS: Tensor | None, past: LayerState
    ) -> Tensor:
        h_BTD = tap("layer_input", sum_BTD)
        x_BTD = self.input_layernorm(sum_BTD)
        if self.kind == FULL:
            y_BTD = self.self_attn(x_BTD, *angles, real_BS, past)
        else:
            y_BTD = self.linear_attn(x_BTD, real_BS, past)
        sum_BTD = add("pre_mlp_residual_sum", h_BTD, y_BTD)
        h_BTD = tap("pre_mlp_residual", sum_BTD)
        y_BTD = self.mlp(self.post_attention_layernorm(sum_BTD))
        return add("layer_output_sum", h_BTD, y_BTD)


class Model(nn.Module):
    """Qwen3.5 MoE, text. Parameters carry the checkpoint's names, less its prefix.

    `layers` may be any sequence that yields layers in order, so that they can also come from disk one by one.
    """

    def __init__(self, config: Config, arithmetic: str | Arithmetic = "exact", fused: bool | Sequence[bool] = False):
        super().__init__()
        self.config, self.arithmetic = config, arithmetics.get(arithmetic)
        self.fused = [fused] * config.num_hidden_layers if isinstance(fused, bool) else list(fused)
        self.embed_tokens: nn.Module = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size))
        self.layers: nn.ModuleList | Sequence[Layer] = nn.ModuleList(
            Layer(config, kind, flag) for kind, flag in zip(config.layer_types, self.fused, strict=True)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, "final_norm")
        self.lm_head: nn.Module = Linear(config.hidden_size, config.vocab_size)
        # Beside the text model and not used by it: the draft head (mtp.py), the vision tower (vision.py).
        self.mtp: nn.Module | None = None
        self.visual: nn.Module | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Within `torch.compile` the model runs as it is: taps are Python, and a compiler would move roundings."""
        call = super().__call__
        return (torch.compiler.disable(call) if torch.compiler.is_compiling() else call)(*args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Leaves the model as it is, for the same reason."""

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | None = None,
    ) -> Tensor:
        """Logits of the next token after each of the new tokens.  input_ids [B, T] int -> [B, T, V].

        attention_mask [B, T] or [B, S]: 1 for real tokens, 0 for padding on either side; the result is undefined
        at padded positions. cache: carries the sequences on, and is updated in place.
        position_ids [B, T] or [3, B, T]: counted from the real tokens when absent. inputs_embeds [B, T, D] stands in
        for input_ids. logits_to_keep: only for the last so many positions.
        """
        cache = Cache() if cache is None else cache
        input_ids, attention_mask = (x if x is None else torch.as_tensor(x) for x in (input_ids, attention_mask))
        new = self.checked(input_ids, inputs_embeds)
        if logits_to_keep is not None and logits_to_keep < 1:
            raise Qwen35Error("no positions to keep", where="logits_to_keep", expected="1 or more, or None for all",
                              found=logits_to_keep)  # fmt: skip
        real_BS, position_ids = extend(cache, new, attention_mask, position_ids)
        with arithmetics.using(self.arithmetic):
            h_BTD = tap("embed_tokens", self.embed_tokens(new) if inputs_embeds is None else new)
            angles = rotary_angles(self.config, position_ids, h_BTD.dtype)
            for i, layer in enumerate(self.layers):
                with scope(layer=i):
                    h_BTD = layer(h_BTD, angles, real_BS, cache.layer(i))
            h_BTD = self.norm(h_BTD)
            return self.lm_head("next_token_logits", h_BTD[:, -(logits_to_keep or h_BTD.shape[1]) :])

    def checked(self, ids: Tensor | None, embeds: Tensor | None = None) -> Tensor:
        """The ids, or the embeddings that stand in for them. Error: neither, wrong shape or dtype, no such id."""
        new, rank = (ids, 2) if embeds is None else (embeds, 3)
        if new is None or new.dim() != rank or 0 in new.shape:
            expected = "input_ids [B, T] (or inputs_embeds [B, T, D]), B and T at least 1"
            found = "neither" if new is None else list(new.shape)
            raise Qwen35Error("nothing to compute on", where="model(input_ids)", expected=expected, found=found)
        if embeds is not None:
            if new.shape[2] != self.config.hidden_size or not new.is_floating_point():
                raise Qwen35Error("inputs_embeds do not fit the model", where="model(inputs_embeds)",
                                  expected=f"[B, T, {self.config.hidden_size}], floating",
                                  found=f"{list(new.shape)}, {new.dtype}")  # fmt: skip
            return embeds
        if new.dtype not in (torch.int64, torch.int32):
            raise Qwen35Error("ids must be integers", where="model(input_ids)", expected=torch.int64, found=new.dtype)
        if bad := ((new < 0) | (new >= self.config.vocab_size)).nonzero().tolist():
            where, expected = f"input_ids{bad[0]}", f"0 .. {self.config.vocab_size - 1}"
            raise Qwen35Error("not in the vocabulary", where=where, expected=expected, found=int(new[tuple(bad[0])]))
        return new
