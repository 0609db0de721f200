"""What a fault does to a value, a weight or a slot: the parts that the catalogue is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from ...numerics.choices import in_fp8
from ...quant.fp8 import FP8
from ...quant.layouts import shuffle_scales
from ...quant.mxfp4 import PackedMXFP4, quantise_dequantise
from ...quant.packed import Float, Packed, Stacked
from .faults import BrokenSource, FaultSite, SlotChange, TapChange, WeightChange

QK_NORMS, QKV = ("attn_q_norm", "attn_k_norm"), ("attn_q", "attn_k", "attn_v")


def plain(change: Callable[[Tensor], Tensor]) -> TapChange:
    """A change of a value that needs nothing else."""
    return lambda x, _, __: change(x)


def taken_from(name: str) -> TapChange:
    """The value of another tap instead."""
    return lambda x, kept, _: kept[name].view_as(x)


def bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


ones, without_one, one_more = (plain(change) for change in (torch.ones_like, lambda x: x - 1, lambda x: x + 1))
sqrt_width = plain(lambda x: x * x.shape[-1] ** 0.5)


def on_packed(change: Callable[[PackedMXFP4], PackedMXFP4]) -> SlotChange:
    """A change of the weights of routed experts in MXFP4."""
    return SlotChange(lambda w: change(w) if isinstance(w, PackedMXFP4) else w)


def codes(change: Callable[[Tensor], Tensor]) -> SlotChange:
    return on_packed(lambda w: PackedMXFP4(change(w.codes), w.scales))


def scales(change: Callable[[Tensor], Tensor]) -> SlotChange:
    return on_packed(lambda w: PackedMXFP4(w.codes, change(w.scales)))


def fp8_scales(change: Callable[[Tensor], Tensor]) -> Callable[[Packed], Packed]:
    return lambda w: FP8(w.values, change(w.scale)) if isinstance(w, FP8) else w


def on_fp8(block: str, change: Callable[[Tensor], Tensor]) -> WeightChange:
    """A change of the scales of a block's FP8 projections."""
    return lambda _, module, w: fp8_scales(change)(w) if f".{block}." in module else w


def rolled(scale: Tensor) -> Tensor:
    """Each block's scale in the place of its neighbour's: in its row, or where a row has one block, of the next row."""
    return scale.roll(1, -1 if scale.shape[-1] > 1 else -min(scale.dim(), 2)) if scale.numel() > 1 else scale


def scales_of(packed: Packed) -> Tensor:
    return torch.cat([scales_of(p) for p in packed.parts]) if isinstance(packed, Stacked) else packed.scales  # type: ignore[attr-defined]


def bf16_as_fp4(source: BrokenSource, module: str, packed: Packed) -> Packed:
    """The first bytes of each BF16 row as FP4 codes, under the scales of the slot's neighbour."""
    if ".shared_expert." not in module or not isinstance(packed, Float):
        return packed
    mlp, _, name = module.partition(".shared_expert.")
    gate_up, down = source.inner.slot(mlp, 0)
    gate, up = scales_of(gate_up).chunk(2)
    theirs = {"gate_proj": gate, "up_proj": up, "down_proj": scales_of(down)}[name]
    stored = packed.values.to(torch.bfloat16).view(torch.uint8)
    return PackedMXFP4(stored[:, : packed.shape[1] // 2].contiguous(), theirs.to(stored.device))


def zeros(_: BrokenSource, __: str, packed: Packed) -> Packed:
    return Float(torch.zeros(packed.shape, dtype=torch.bfloat16))


def no_shared_expert(source: BrokenSource, module: str, packed: Packed) -> Packed:
    return zeros(source, module, packed) if ".shared_expert." in module else packed


def swap_b_and_a(source: BrokenSource, module: str, packed: Packed) -> Packed:
    other = {"in_proj_b": "in_proj_a", "in_proj_a": "in_proj_b"}.get(module.rpartition(".")[2])
    return source.inner.weight(f"{module.rpartition('.')[0]}.{other}") if other else packed


def halves_swapped(_: BrokenSource, module: str, packed: Packed) -> Packed:
    """The draft head's `fc`, with the columns of the hidden state first."""
    values = packed.decode(torch.float64)
    return Float(values.roll(values.shape[1] // 2, 1)) if module == "mtp.fc" else packed


def scaled(factor: float) -> Mapping[str, TapChange]:
    """The shared expert's share times a factor, fused or not."""
    slots = plain(lambda x: torch.cat((x[:, :-1], x[:, -1:] * factor), 1))
    return {"moe_shared_gated": plain(lambda x: x * factor), "moe_slot_weights": slots}


def routed(factor: float) -> Mapping[str, TapChange]:
    slots = plain(lambda x: torch.cat((x[:, :-1] * factor, x[:, -1:]), 1))
    return {"moe_routed_output": plain(lambda x: x * factor), "moe_slot_weights": slots}


def rotate_with(
    norm: str, theta: float | None = None, full: bool = False, interleaved: bool = False, offset: int = 0
) -> TapChange:
    """What a norm gave, rotated anew: with another base, the whole head, in pairs (2i, 2i+1), or by other positions."""

    def change(x: Tensor, kept: dict[str, Tensor], place: FaultSite) -> Tensor:
        c, x_BTNH = place.config, kept[norm].to(x.dtype)
        R = x.shape[-1] if full else c.rotary_dim
        j = torch.arange(R // 2, dtype=torch.float64)
        at_BT = place.positions if place.positions.dim() == 2 else place.positions[0]
        angle = (at_BT[..., None].double() + offset) * (theta or c.rope_theta) ** (-2 * j / R)
        cos, sin = (f(angle)[:, :, None].to(x.dtype) for f in (torch.cos, torch.sin))
        head, rest = x_BTNH[..., :R], x_BTNH[..., R:]
        if interleaved:
            a, b = head[..., 0::2], head[..., 1::2]
            head = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = head.chunk(2, -1)
            head = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        return torch.cat((head, rest), -1)

    return change


def rotary(**ways: Any) -> Mapping[str, TapChange]:
    return {"attn_q": rotate_with("attn_q_norm", **ways), "attn_k": rotate_with("attn_k_norm", **ways)}


def gate_first(x: Tensor, kept: dict[str, Tensor], place: FaultSite) -> Tensor:
    """The norm of core_out * silu(z), where it should be norm(core_out) * silu(z)."""
    y = kept["gdn_core_out"].to(x.dtype) * silu(kept["gdn_z"].to(x.dtype)).view_as(x)
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + place.config.rms_norm_eps)


def other_head_order(x_BTJP: Tensor, _: Any, place: FaultSite) -> Tensor:
    """Value heads tiled over the key heads (0, 2, 1, 3 of 2 x 2) instead of grouped; one key head: reversed."""
    M = place.config.linear_num_key_heads
    J = x_BTJP.shape[2]
    order = torch.arange(J).view(M, -1).T.flatten() if 1 < M < J else torch.arange(J).flip(0)
    return x_BTJP[:, :, order]


def without_last(x_RA: Tensor, _: Any, place: FaultSite) -> Tensor:
    """The last of the chosen experts is dropped. If two experts have the same weight, either may be the last. The
    engine's own weights tell which, if it dumped them with one zero in a row. Logits up to 8 that are equal in bf16 are
    at most 2^-5 apart, and so are the logarithms of the weights."""
    last_R = torch.full((len(x_RA),), x_RA.shape[1] - 1, device=x_RA.device)
    if place.weights is not None and place.weights.shape == x_RA.shape:
        zero_RA = place.weights.to(x_RA.device) == 0
        at_R = zero_RA.int().argmax(1)
        alike_R = x_RA.gather(1, at_R[:, None])[:, 0] * (1 - 2**-5) <= x_RA[:, -1]
        last_R = torch.where((zero_RA.sum(1) == 1) & alike_R, at_R, last_R)
    return x_RA.scatter(1, last_R[:, None], 0)


def split_halves(x: Tensor, _: Any, place: FaultSite) -> Tensor:
    """q_proj's output read as all queries, then all gates."""
    q, gate = x.unflatten(-1, (2, place.config.num_attention_heads, -1)).unbind(-3)
    return torch.cat((q, gate), -1).flatten(-2)


def one_share(x: Tensor, rank: int, ranks: int, inside: float = 1.0, outside: float = 0.0) -> Tensor:
    """x times a factor in one rank's part of the last dimension, and times another elsewhere."""
    begin, end = (k * x.shape[-1] // ranks for k in (rank, rank + 1))
    factor = torch.full_like(x[0] if x.dim() > 1 else x, outside)
    factor[..., begin:end] = inside
    return x * factor


def activations(rule: str) -> Mapping[str, TapChange]:
    names = ("moe_a1", "moe_a2", "moe_shared_a1", "moe_shared_a2")
    return dict.fromkeys(names, plain(lambda x: quantise_dequantise(x, scale_rule=rule)))


def tiled(scale: Tensor) -> Tensor:
    if scale.dim() > 2:
        return torch.vmap(tiled)(scale)
    return shuffle_scales(scale).flatten()[: scale.numel()].view_as(scale).contiguous()


def ggml(stored: Tensor) -> Tensor:
    """What a reader of the split order takes packed bytes for: byte j of a block holds columns j and j + 16."""
    blocks = stored.unflatten(-1, (-1, 16))
    flat = torch.cat((blocks & 15, blocks >> 4), -1)
    return (flat[..., 0::2] | flat[..., 1::2] << 4).flatten(-2)


def gate_by_silu(x: Tensor, kept: dict[str, Tensor], place: FaultSite) -> Tensor:
    return kept["attn_q_gate"].unflatten(-1, (place.config.num_attention_heads, -1)).chunk(2, -1)[1].to(x.dtype) * x


def fp8_keys_and_values(own_step: bool) -> TapChange:
    """The context where keys and values of earlier steps are read from a cache in FP8 (scale 1); those of a query's own
    step are read from there, too (own_step), or as they are."""

    def change(x: Tensor, kept: dict[str, Tensor], place: FaultSite) -> Tensor:
        q, k, v = (kept[name].to(x.dtype) for name in QKV)
        v = v.unflatten(-1, (-1, q.shape[-1])) if v.dim() == 3 else v
        steps, y = place.steps(q[..., 0, 0]), torch.empty_like(x)
        for step in steps.unique().tolist():
            cached = (steps <= step if own_step else steps < step)[..., None, None]
            read_k, read_v = (torch.where(cached, in_fp8(z), z).transpose(1, 2) for z in (k, v))
            found = scaled_dot_product_attention(q.transpose(1, 2), read_k, read_v, is_causal=True, enable_gqa=True)
            y[steps == step] = found.transpose(1, 2)[steps == step]
        return y

    return change
