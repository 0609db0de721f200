"""How each bug gets into a running SGLang 0.5.17: weights changed in place, methods replaced, state lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .bugs import ATTN, GDN
from .changes import half_lost, swapped, zero_first
from .sglang_ranks import not_reduced

Plant = Callable[[Any], None]


def _mlp(site: Any) -> Any:
    return site.model.layers[GDN].mlp


def _gdn(site: Any) -> Any:
    return site.model.layers[GDN].linear_attn


def _attn(site: Any) -> Any:
    return site.model.layers[ATTN]


def shared(factor: float, rank: int | None = None) -> Plant:
    def plant(site: Any) -> None:
        mlp = _mlp(site)
        run = mlp._forward_shared_experts
        if rank in (None, site.rank):
            site.patch(mlp, "_forward_shared_experts", lambda *a, **k: run(*a, **k) * factor)

    return plant


def shared_gate_ignored(site: Any) -> None:
    from sglang.srt.models import qwen2_moe

    weight, fused = _mlp(site).shared_expert_gate.weight.data_ptr(), qwen2_moe.fused_gate_sigmoid_mul_add

    def add(x: Tensor, gate: Tensor, shared_output: Tensor, out: Tensor) -> None:
        if gate.data_ptr() == weight:
            out.add_(shared_output)
        else:
            fused(x, gate, shared_output, out)

    site.patch(qwen2_moe, "fused_gate_sigmoid_mul_add", add)


def topk_weights(change: Callable[[Tensor], Tensor]) -> Plant:
    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        return out._replace(topk_weights=change(out.topk_weights))

    return lambda site: site.wrap(_mlp(site).topk, around)


def without_last(weights: Tensor) -> Tensor:
    last = weights.argmin(-1, keepdim=True)
    return weights.scatter(-1, last, torch.zeros_like(last, dtype=weights.dtype))


Change = Callable[[Tensor], Tensor]


def experts(change: Change, names: tuple[str, ...] = ("w13", "w2"), rank: int | None = None) -> Plant:
    """`change` takes all experts' weights [E, out, in]."""

    def plant(site: Any) -> None:
        for name in names if rank in (None, site.rank) else ():
            weight = getattr(_mlp(site).experts, f"{name}_weight")
            site.set(weight, change(weight.data.clone()))
            scale = getattr(_mlp(site).experts, f"{name}_weight_scale_inv", None)
            if scale is not None:
                site.set(scale, change(scale.data.clone()))

    return plant


def nan(site: Any) -> None:
    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        if site.passes == 0:
            out[3, 7] = float("nan")
        return out

    site.wrap(_mlp(site).experts, around)


def norms(find: Callable[[Any], Any]) -> Plant:
    """w for 1 + w, in the arithmetic of SGLang's kernel: float32 inside, the residual stored as bf16."""

    def plant(site: Any) -> None:
        norm = find(site)

        def plain(x: Tensor, residual: Tensor | None = None, _: Any = None) -> Any:
            y = x.float() if residual is None else x.float() + residual.float()
            scale = (y.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
            out = (y * scale * norm.weight.float()).to(x.dtype)
            return out if residual is None else (out, y.to(x.dtype))

        site.patch(norm, "_forward_impl", plain)

    return plant


def in_float32(find: Callable[[Any], list[Any]], by: float) -> Plant:
    """Weights of norms that a kernel reads in any type: w + by, not rounded to bf16."""

    def plant(site: Any) -> None:
        for norm in find(site):
            old = norm.weight
            norm.weight = torch.nn.Parameter(old.detach().float() + by, requires_grad=False)
            site.undo.append(lambda norm=norm, old=old: setattr(norm, "weight", old))

    return plant


def rotary(width: Callable[[Any], int], theta: float | None = None, angle: float = 1) -> Plant:
    def plant(site: Any) -> None:
        layer = _attn(site)
        emb, size = layer.rotary_emb, width(layer)
        cache = emb.cos_sin_cache
        base = float(theta or emb.base)
        inverse = 1 / base ** (torch.arange(0, size, 2, device=cache.device, dtype=torch.float32) / size)
        turns = torch.arange(len(cache), device=cache.device, dtype=torch.float32)[:, None] * inverse * angle
        site.patch(emb, "rotary_dim", size)
        buffers = emb._buffers
        buffers["cos_sin_cache"] = torch.cat((turns.cos(), turns.sin()), -1).to(cache.dtype)
        site.undo.append(lambda: buffers.__setitem__("cos_sin_cache", cache))

    return plant


def output_gate_ignored(site: Any) -> None:
    from sglang.srt.models import qwen3_5

    site.patch(qwen3_5, "fused_sigmoid_mul", lambda x, gate, **_: x)


def kv_of_another(site: Any) -> None:
    """In decoding, the first 8 cached tokens of the first request are those of the second."""

    def around(forward: Callable[..., Any], q: Any, k: Any, v: Any, batch: Any, **kwargs: Any) -> Any:
        if site.passes == 1:
            mine, other = batch.req_pool_indices[:2].tolist()
            slots, pool = site.runner.req_to_token_pool.req_to_token, site.runner.token_to_kv_pool
            for buffer in (pool.get_key_buffer(ATTN), pool.get_value_buffer(ATTN)):
                buffer[slots[mine, :8].long()] = buffer[slots[other, :8].long()]
        return forward(q, k, v, batch, **kwargs)

    site.wrap(_attn(site).attn, around)


def wrong_positions(site: Any) -> None:
    """Every decode step one position too far."""

    def later(batch: Any) -> None:
        for positions in (batch.positions, batch.mrope_positions) if batch.forward_mode.is_decode() else ():
            if positions is not None:
                positions.add_(1)

    site.before.append(later)


def lost(part: str, when: Callable[[Any, Any], bool]) -> Plant:
    """A state of the recurrence is zero when a pass goes on from it."""

    def plant(site: Any) -> None:
        def around(forward: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
            if when(site, batch):
                cache = site.runner.req_to_token_pool.mamba2_layer_cache(GDN)
                (cache.conv[0] if part == "conv" else cache.temporal).zero_()
            return forward(batch, *args, **kwargs)

        site.wrap(_gdn(site).attn, around)

    return plant


def goes_on(site: Any, batch: Any) -> bool:
    return batch.forward_mode.is_decode() or bool(sum(batch.extend_prefix_lens_cpu or [0]))


def second_decode(site: Any, batch: Any) -> bool:
    return batch.forward_mode.is_decode() and site.passes == 2


def set_to(find: Callable[[Any], Tensor], change: Callable[[Tensor], Tensor]) -> Plant:
    return lambda site: site.set(find(site), change(find(site).detach().clone()))


PLANT: dict[str, Plant] = {
    "shared-dropped": shared(0),
    "shared-twice": shared(2),
    "shared-times-0.4": shared(0.4),
    "shared-gate-ignored": shared_gate_ignored,
    "no-renormalisation": lambda site: site.patch(_mlp(site).topk.topk_config, "renormalize", False),
    "last-expert-dropped": topk_weights(without_last),
    "routed-times-2.5": topk_weights(lambda w: w * 2.5),
    "experts-swapped": experts(swapped),
    "experts-shifted": experts(lambda w: w.roll(-1, 0)),
    "expert-zero": experts(zero_first),
    "gate-up-swapped": experts(lambda w: w.roll(w.shape[1] // 2, 1), ("w13",)),
    "half-intermediate": experts(half_lost, ("w2",)),
    "nan": nan,
    "input-norm": norms(lambda site: site.model.layers[GDN].input_layernorm),
    "post-norm": norms(lambda site: site.model.layers[GDN].post_attention_layernorm),
    "final-norm": norms(lambda site: site.model.norm),
    "qk-norms": in_float32(lambda site: [_attn(site).q_norm, _attn(site).k_norm], -1),
    "full-rotary": rotary(lambda layer: layer.head_dim),
    "no-rotary": rotary(lambda layer: layer.rotary_emb.rotary_dim, angle=0),
    "rotary-theta": rotary(lambda layer: layer.rotary_emb.rotary_dim, theta=10000.0),
    "output-gate-ignored": output_gate_ignored,
    "scores-not-scaled": lambda site: site.patch(_attn(site).attn, "scaling", 1.0),
    "kv-of-another-request": kv_of_another,
    "wrong-positions": wrong_positions,
    "b-and-a-swapped": set_to(lambda site: _gdn(site).in_proj_ba.weight, lambda w: w.roll(w.shape[0] // 2, 0)),
    "no-decay": set_to(lambda site: _gdn(site).A_log, lambda w: w * 0 - 60),
    "convolution-reversed": set_to(lambda site: _gdn(site).conv1d.weight, lambda w: w.flip(-1)),
    "gated-norm": in_float32(lambda site: [_gdn(site).norm], 1),
    "conv-state-lost": lost("conv", goes_on),
    "gdn-state-zeroed": lost("state", second_decode),
    "gdn-state-lost": lost("state", goes_on),
    "rank-1-shared-twice": shared(2, rank=1),
    "rank-1-experts-swapped": experts(swapped, rank=1),
    "rank-1-not-reduced": not_reduced(GDN, 1),
}
