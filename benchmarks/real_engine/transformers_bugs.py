"""How each bug gets into a running transformers model: weights changed in place, forwards wrapped, states zeroed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .bugs import ATTN, GDN
from .changes import half_lost, swapped, zero_first

Plant = Callable[[Any], None]  # of the text model, which has `layers` and `norm`


def wrap(module: nn.Module, around: Callable[..., Any]) -> None:
    """`around(forward, *args, **kwargs)` in place of a module's forward; hooks see what it returns."""
    forward = module.forward
    module.forward = lambda *a, **k: around(forward, *a, **k)  # type: ignore[method-assign]


def output_times(find: Callable[[Any], nn.Module], factor: float) -> Plant:
    return lambda model: wrap(find(model), lambda forward, *a, **k: forward(*a, **k) * factor)


def weights(change: Callable[[Tensor], Tensor], *find: Callable[[Any], Tensor]) -> Plant:
    def plant(model: Any) -> None:
        for one in find:
            weight = one(model)
            weight.data.copy_(change(weight.data.clone()))

    return plant


def routing(change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Plant:
    """`change` takes router logits, weights [N, A] and ids [N, A], and gives other weights."""

    def around(forward: Callable[..., Any], x: Tensor) -> Any:
        logits, w, ids = forward(x)
        return logits, change(logits, w, ids).to(w.dtype), ids

    return lambda model: wrap(_mlp(model).gate, around)


def _mlp(model: Any) -> Any:
    return model.layers[GDN].mlp


def _gdn(model: Any) -> Any:
    return model.layers[GDN].linear_attn


def _attn(model: Any) -> Any:
    return model.layers[ATTN].self_attn


def _experts(model: Any) -> tuple[Tensor, Tensor]:
    return _mlp(model).experts.gate_up_proj, _mlp(model).experts.down_proj


def _gate_up(model: Any) -> Tensor:
    return _experts(model)[0]


def _down(model: Any) -> Tensor:
    return _experts(model)[1]


def gate_ignored(model: Any) -> None:
    wrap(_mlp(model).shared_expert_gate, lambda forward, x: forward(x) * 0 + 1e4)


def nan(model: Any) -> None:
    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs).clone()
        if len(out) > 3:
            out[3, 7] = float("nan")
        return out

    wrap(_mlp(model).experts, around)


def rotary(width: int | None = None, theta: float | None = None, angle: float = 1) -> Plant:
    """The attention gets the cosines and sines of other angles [B, T, R]."""

    def plant(model: Any) -> None:
        emb, config = model.rotary_emb, model.config
        size = config.head_dim if width is None else 2 * len(emb.inv_freq)
        base = theta or config.rope_parameters["rope_theta"]
        inverse = 1 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)

        def around(forward: Callable[..., Any], x: Tensor, positions: Tensor) -> Any:
            at = positions[0] if positions.dim() == 3 else positions
            turns = torch.cat(2 * (at[..., None].float() * inverse * angle,), -1)
            return turns.cos().to(x.dtype), turns.sin().to(x.dtype)

        wrap(emb, around)

    return plant


def cache_in(given: dict[str, Any]) -> Any:
    """The cache that a module is called with: `cache` from transformers 5.24 on."""
    return next((given[name] for name in ("cache", "cache_params", "past_key_values") if name in given), None)


def lost(name: str, when: Callable[[int, int], bool]) -> Plant:
    """A state of the cache is zero when a pass goes on from it: `when(pass number, tokens of the pass)`."""

    def plant(model: Any) -> None:
        passes = [0]

        def around(forward: Callable[..., Any], hidden_states: Tensor, **kwargs: Any) -> Any:
            if (cache := cache_in(kwargs)) is not None and when(passes[0], hidden_states.shape[1]):
                getattr(cache.layers[GDN], name)[0].zero_()
            passes[0] += 1
            return forward(hidden_states, **kwargs)

        wrap(_gdn(model), around)

    return plant


def kv_of_another(model: Any) -> None:
    """In decoding, the first 8 cached tokens of the first request are those of the second."""
    passes = [0]

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if (cache := cache_in(kwargs)) is not None and passes[0] == 1:
            layer = cache.layers[ATTN]
            for buffer in (layer.keys, layer.values):  # the requests end at the same column: padded on the left
                buffer[0, :, -8:] = buffer[1, :, -8:]
        passes[0] += 1
        return forward(*args, **kwargs)

    wrap(_attn(model), around)


def gate_of_queries_ignored(model: Any) -> None:
    """sigmoid(gate) is 1 where the gate is large."""
    layer, H = _attn(model), _attn(model).head_dim

    def around(forward: Callable[..., Any], x: Tensor) -> Tensor:
        y = forward(x).unflatten(-1, (-1, 2 * H)).clone()
        y[..., H:] = 1e4
        return y.flatten(-2)

    wrap(layer.q_proj, around)


def b_and_a_swapped(model: Any) -> None:
    layer = _gdn(model)
    b, a = layer.in_proj_b.weight.data.clone(), layer.in_proj_a.weight.data.clone()
    layer.in_proj_b.weight.data, layer.in_proj_a.weight.data = a, b


def not_renormalised(logits: Tensor, _: Tensor, ids: Tensor) -> Tensor:
    return logits.float().softmax(-1).gather(-1, ids)


def norms(by: float, *find: Callable[[Any], Any]) -> Plant:
    """w + by, not rounded to bf16."""

    def plant(model: Any) -> None:
        for one in find:
            norm = one(model)
            norm.weight = nn.Parameter(norm.weight.detach().float() + by)

    return plant


PLANT: dict[str, Plant] = {
    "shared-dropped": output_times(lambda m: _mlp(m).shared_expert, 0),
    "shared-twice": output_times(lambda m: _mlp(m).shared_expert, 2),
    "shared-times-0.4": output_times(lambda m: _mlp(m).shared_expert, 0.4),
    "shared-gate-ignored": gate_ignored,
    "no-renormalisation": routing(not_renormalised),
    "last-expert-dropped": routing(lambda _, w, __: torch.cat((w[:, :-1], w[:, -1:] * 0), -1)),
    "routed-times-2.5": output_times(lambda m: _mlp(m).experts, 2.5),
    "experts-swapped": weights(swapped, _gate_up, _down),
    "experts-shifted": weights(lambda w: w.roll(-1, 0), _gate_up, _down),
    "expert-zero": weights(zero_first, _down),
    "gate-up-swapped": weights(lambda w: w.roll(w.shape[1] // 2, 1), _gate_up),
    "half-intermediate": weights(half_lost, _down),
    "nan": nan,
    "input-norm": norms(-1, lambda m: m.layers[GDN].input_layernorm),
    "post-norm": norms(-1, lambda m: m.layers[GDN].post_attention_layernorm),
    "final-norm": norms(-1, lambda m: m.norm),
    "qk-norms": norms(-1, lambda m: _attn(m).q_norm, lambda m: _attn(m).k_norm),
    "full-rotary": rotary(),
    "no-rotary": rotary(width=1, angle=0),
    "rotary-theta": rotary(width=1, theta=10000.0),
    "output-gate-ignored": gate_of_queries_ignored,
    "scores-not-scaled": lambda model: setattr(_attn(model), "scaling", 1.0),
    "kv-of-another-request": kv_of_another,
    "b-and-a-swapped": b_and_a_swapped,
    "no-decay": weights(lambda w: w * 0 - 60, lambda m: _gdn(m).A_log),
    "convolution-reversed": weights(lambda w: w.flip(-1), lambda m: _gdn(m).conv1d.weight),
    "gated-norm": norms(1, lambda m: _gdn(m).norm),
    "conv-state-lost": lost("conv_states", lambda number, tokens: number > 0),
    "gdn-state-zeroed": lost("recurrent_states", lambda number, tokens: number == 2),
}
