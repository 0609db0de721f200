"""What a sequence leaves behind: keys and values, convolution inputs, recurrent states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import Qwen35Error


@dataclass
class LayerState:
    """State of one layer; the tensors of the other kind of layer stay None."""

    k: Tensor | None = None  # [B, S, G, H], after RoPE
    v: Tensor | None = None  # [B, S, G, H]
    conv: Tensor | None = None  # [B, C, W-1]: the last inputs of the convolution, before it
    state: Tensor | None = None  # [B, J, K, P]: the associative memory of DeltaNet

    @property
    def at(self) -> Tensor | None:
        """Where new tokens stand among those that `append` returns; None: they are the last ones."""
        return None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("k", "v", "conv", "state"):
            if (x := vars(self)[name]) is not None:
                yield name, x

    def append(self, k_BTGH: Tensor, v_BTGH: Tensor) -> tuple[Tensor, Tensor]:
        """Adds keys and values of new tokens; returns those of all tokens."""
        self.k = k_BTGH if self.k is None else torch.cat((self.k, k_BTGH), 1)
        self.v = v_BTGH if self.v is None else torch.cat((self.v, v_BTGH), 1)
        return self.k, self.v


@dataclass
class Cache:
    """State of a batch of sequences. Pass it to every call of the model; it is updated in place.

    `mask` [B, S] says which of the tokens so far were real (None: all of them), `next_position` [B] which position
    comes next (it differs from their number once an image has been seen).
    """

    layers: dict[str, LayerState] = field(default_factory=dict)
    length: int = 0  # S: tokens seen so far, padding included
    mask: Tensor | None = None
    next_position: Tensor | None = None

    def layer(self, key: str | int) -> LayerState:
        return self.layers.setdefault(str(key), LayerState())

    def clone(self) -> Cache:
        """An independent copy, to branch a sequence."""
        layers = {
            key: replace(layer, **{n: x.clone() for n, x in layer.tensors()}) for key, layer in self.layers.items()
        }
        mask, position = (None if x is None else x.clone() for x in (self.mask, self.next_position))
        return Cache(layers, self.length, mask, position)


def extend(
    cache: Cache, new: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Enters the new tokens (`new` is [B, T, ...]) into the cache, once all that was given about them fits.

    Returns which of all tokens so far are real [B, S] (None where there never was padding), and the positions of the
    new ones, [B, T] or [3, B, T].
    """
    B, T = new.shape[:2]
    if cache.next_position is not None and len(cache.next_position) != B:
        do = "a new Cache() for other sequences"
        raise Qwen35Error("cache is of another batch", expected=len(cache.next_position), found=B, do=do)
    never = attention_mask is None and cache.mask is None
    real_BS = None if never else _extended_mask(cache, new, attention_mask)
    next_B = new.new_zeros(B, dtype=torch.long) if cache.next_position is None else cache.next_position
    count_BT = next_B.new_ones(B, T) if real_BS is None else real_BS[:, -T:].long()
    if position_ids is None:
        position_ids = next_B[:, None] + (count_BT.cumsum(1) - 1).clamp_min(0)
    if position_ids.shape not in ((B, T), (3, B, T)):
        expected, found = f"[{B}, {T}] or [3, {B}, {T}]", list(position_ids.shape)
        raise Qwen35Error("position_ids have the wrong shape", expected=expected, found=found)
    last_BT = torch.where(count_BT > 0, position_ids.reshape(-1, B, T).amax(0), -1)
    cache.next_position = torch.maximum(next_B, last_BT.amax(1) + 1)
    cache.length, cache.mask = cache.length + T, real_BS
    return real_BS, position_ids


def _extended_mask(cache: Cache, new: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The cache's mask and that of the new tokens, side by side. A mask of the new tokens alone will do."""
    (B, T), past = new.shape[:2], cache.length
    seen = new.new_ones(B, past, dtype=torch.bool) if cache.mask is None else cache.mask
    mask = new.new_ones(B, T, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if mask.shape not in ((B, T), (B, past + T)):
        expected = f"[{B}, {T}] (new tokens) or [{B}, {past + T}] (all tokens)"
        raise Qwen35Error("attention_mask has the wrong shape", expected=expected, found=list(mask.shape))
    if mask.shape[1] > T and not torch.equal(mask[:, :past], seen):
        raise Qwen35Error("attention_mask contradicts the cache", expected="the mask of earlier calls, then new tokens")
    real_BT = mask[:, -T:]
    runs_B = (real_BT[:, 1:] & ~real_BT[:, :-1]).sum(1) + real_BT[:, 0]
    if (runs_B > 1).any():
        where = f"attention_mask[{int(runs_B.argmax())}]"
        raise Qwen35Error("padding between real tokens", where=where, expected="padding on one side", found="a hole")
    return torch.cat((seen, real_BT), 1)
