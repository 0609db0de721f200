"""Choices that an engine's operator declares: the dtypes of its caches. They combine with any arithmetic."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..quant.fp8 import round_to_e4m3
from .arithmetics import Arithmetic

KV, STATE_DTYPES = "fp8_e4m3", ("bf16",)


def in_fp8(x: Tensor, scale: float = 1.0) -> Tensor:
    """E4M3(x / scale) * scale, in x's dtype: one scale for all, as caches of keys and values have it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (round_to_e4m3(wide / scale) * scale).to(x.dtype)


def scale_of(text: str) -> float:
    """ "fp8_e4m3" or "fp8_e4m3:0.5" -> the scale."""
    kind, _, scale = text.partition(":")
    try:
        if kind == KV and 0 < (number := float(scale or 1)) < float("inf"):
            return number
    except ValueError:
        pass
    raise Qwen35Error("unknown cache of keys and values", expected=f"{KV} or {KV}:SCALE", found=repr(text))


def with_choices(table: Arithmetic, kv_cache: str | None = None, state: str | None = None) -> Arithmetic:
    """`table`, with keys and values kept in FP8 (`fp8_e4m3[:scale]`), or DeltaNet's state in bf16 after each token."""
    if state not in (None, *STATE_DTYPES):
        raise Qwen35Error("unknown dtype of DeltaNet's state", expected=", ".join(STATE_DTYPES), found=repr(state))
    rounds, switches, name = dict(table.rounds), dict(table.switches), table.name
    if kv_cache is not None:
        quantise = partial(in_fp8, scale=scale_of(kv_cache))
        rounds |= {"attn_k_cache": quantise, "attn_v_cache": quantise}
        name += f"/kv-{kv_cache}"
    if state is not None:
        rounds["gdn_state"], switches["gdn_rule"] = torch.bfloat16, "recurrent"
        name += f"/state-{state}"
    return table if name == table.name else replace(table, name=name, rounds=rounds, switches=switches)
