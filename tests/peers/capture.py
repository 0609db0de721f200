"""What transformers' Qwen3.5 MoE computes on the way, under the names of our taps.

Module inputs and outputs come from hooks; values between modules (sigmoids, the convolution before its activation,
what happens to each expert) from watching the torch functions that run inside a module; arguments and results of a few
functions of transformers' own from wrapping them. Nothing is recomputed: every tensor is one that transformers made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

from .transformers_model import quiet


class Capture(TorchFunctionMode):
    """`taps`: our key -> tensor. `places`: the modules that are running now, innermost last."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.taps: dict[str, Tensor] = {}
        self.layer = 0
        self.places: list[str] = []
        self.tokens = self.l2_norms = 0

    def put(self, name: str, x: Tensor, in_layer: bool = True) -> None:
        # A copy: transformers goes on to change some of these in place (index_add_, the conv state).
        key = f"layers.{self.layer}.{name}" if in_layer else name
        self.taps[key] = x.detach().clone(memory_format=torch.contiguous_format)

    # Values between modules.

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        place = self.places[-1] if self.places else ""
        name = getattr(func, "__name__", "")
        if place == "self_attn" and name == "sigmoid":
            self.put("attn_gate", out)
        elif place == "self_attn" and name == "matmul" and not self.seen("attn_qk"):
            self.put("attn_qk", out)
        elif place == "linear_attn" and name == "conv1d":
            self.conv = out
        elif place == "linear_attn" and func in (Tensor.mul, Tensor.div) and self.l2_norms == 2 and out.dim() == 4:
            self.l2_norms = 0
            self.put("gdn_q_scaled", self.key_heads(out))
        elif place == "linear_attn.norm" and func is Tensor.mul and isinstance(args[0], nn.Parameter):
            self.put("gdn_norm_normed", self.by_token(args[1]))
            self.put("gdn_norm_weighted", self.by_token(out))
        elif place == "linear_attn.norm" and name == "silu":
            self.put("gdn_z_gate", self.by_token(out))
        elif place == "mlp.gate" and name == "softmax":
            self.put("moe_router_probs", out)
        elif place == "mlp" and name == "sigmoid":
            self.put("moe_shared_gate", out)
        elif place == "mlp" and func is Tensor.mul:
            self.put("moe_shared_gated", out)
        elif place == "mlp.experts":
            self.watch_expert(func, name, args, out)
        return out

    def watch_expert(self, func: Any, name: str, args: Any, out: Any) -> None:
        """The eager loop, for each expert that was hit, in order of id: where, linear, silu, mul, linear, mul, add."""
        if name == "where":
            e = self.experts.pop(0)
            # Rows come by slot, then by token; ours are by token.
            self.tokens_hit, self.rows = out[1].sort()
            self.steps = [f"moe_expert_{e}_{step}" for step in ("gate_up", "silu", "act", "down")]
            self.steps += [f"moe_expert_weighted.{e}", f"moe_partial_sum.{e}"]
        elif name in ("linear", "silu") or func is Tensor.mul:
            self.put(self.steps.pop(0), out[self.rows])
        elif name == "index_add_":
            self.put(self.steps.pop(0), out[self.tokens_hit])

    def seen(self, name: str) -> bool:
        return f"layers.{self.layer}.{name}" in self.taps

    def key_heads(self, x: Tensor) -> Tensor:
        """[B, J, T, K], a copy of each key head for every value head of its group -> [B, T, M, K]"""
        return x[:, :: self.group].transpose(1, 2)

    def by_token(self, x: Tensor) -> Tensor:
        """[B*T*J, P] -> [B, T, J, P]"""
        return x.reshape(self.batch, self.tokens, -1, x.shape[-1])

    # Results of transformers' own functions, and their arguments.

    def rotated(self, out: tuple[Tensor, Tensor], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any) -> None:
        half = cos.shape[-1] // 2  # transformers repeats the angles for both elements of a pair
        self.put("rope_cos", cos[..., :half], in_layer=False)
        self.put("rope_sin", sin[..., :half], in_layer=False)
        self.put("attn_q", out[0].transpose(1, 2))
        self.put("attn_k", out[1].transpose(1, 2))

    def attended(self, out: tuple[Tensor, Tensor], *_: Any, **__: Any) -> None:
        self.put("attn_probs", out[1])
        self.put("attn_context", out[0])

    def convolved(self, out: Tensor, x: Tensor, *_: Any, **__: Any) -> None:
        self.put("gdn_conv", self.conv[..., : x.shape[-1]][..., -self.tokens :].transpose(1, 2))
        self.put("gdn_conv_act", out[..., -self.tokens :].transpose(1, 2))

    def updated(self, out: Tensor, *_: Any, **__: Any) -> None:
        self.convolved(out, self.conv)

    def normalised(self, out: Tensor, *_: Any, **__: Any) -> None:
        self.put("gdn_k" if self.l2_norms else "gdn_q", self.key_heads(out))
        self.l2_norms += 1

    def ruled(self, out: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, g: Tensor, beta: Tensor, **__: Any) -> None:
        self.l2_norms = 0
        for name, x in (("gdn_v", v), ("gdn_g", g), ("gdn_beta", beta), ("gdn_core_out", out[0])):
            self.put(name, x)
        if out[1] is not None:
            self.put("gdn_state", out[1])

    # Modules.

    def hook(self, module: nn.Module, place: str, before: Callable | None, after: Callable | None) -> Iterator[Any]:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.places.append(place)
            if before is not None:
                before(*args, **kwargs)

        def leave(_: nn.Module, args: Any, out: Any) -> None:
            self.places.pop()
            if after is not None:
                after(out)

        yield module.register_forward_pre_hook(enter, with_kwargs=True)
        yield module.register_forward_hook(leave)

    def hooks(self) -> Iterator[Any]:
        text = self.model.get_decoder()

        def out(module: nn.Module, name: str, place: str = "", shape: Callable | None = None, in_layer: bool = True):
            return self.hook(module, place, None, lambda x: self.put(name, x if shape is None else shape(x), in_layer))

        def start(hidden_states: Tensor, *_: Any, **__: Any) -> None:
            self.batch, self.tokens = hidden_states.shape[:2]
            self.put("layer_input", hidden_states)

        yield from out(self.model.get_input_embeddings(), "embed_tokens", in_layer=False)
        yield from out(text.norm, "final_norm", in_layer=False)
        for number, layer in enumerate(text.layers):

            def start_layer(*args: Any, number: int = number, **kwargs: Any) -> None:
                self.layer = number
                start(*args, **kwargs)

            yield from self.hook(layer, "layer", start_layer, lambda x: self.put("layer_output_sum", x))
            yield from out(layer.input_layernorm, "input_layernorm")
            yield from self.hook(
                layer.post_attention_layernorm, "norm",
                lambda x: self.put("pre_mlp_residual_sum", x), lambda x: self.put("pre_mlp_layernorm_output", x),
            )  # fmt: skip
            full = hasattr(layer, "self_attn")
            yield from self.attention(layer.self_attn, out) if full else self.delta(layer.linear_attn, out)
            yield from self.moe(layer.mlp, out)

    def attention(self, m: nn.Module, out: Callable) -> Iterator[Any]:
        yield from out(m, "attn_output", "self_attn", lambda x: x[0])
        yield from out(m.q_proj, "attn_q_gate")
        yield from out(m.k_proj, "attn_k_proj")
        yield from out(m.v_proj, "attn_v")
        yield from out(m.q_norm, "attn_q_norm")
        yield from out(m.k_norm, "attn_k_norm")
        yield from self.hook(m.o_proj, "o_proj", lambda x: self.put("attn_pre_o_proj", x), None)

    def delta(self, m: nn.Module, out: Callable) -> Iterator[Any]:
        def start(**_: Any) -> None:
            self.group = m.num_v_heads // m.num_k_heads

        yield from self.hook(m, "linear_attn", start, lambda x: self.put("attn_output", x))
        for name in ("qkv", "z", "b", "a"):
            yield from out(getattr(m, f"in_proj_{name}"), f"gdn_{name}")
        yield from out(m.norm, "gdn_norm_out", "linear_attn.norm", self.by_token)

    def moe(self, m: nn.Module, out: Callable) -> Iterator[Any]:
        def routed(router: tuple[Tensor, Tensor, Tensor]) -> None:
            for name, x in zip(("moe_router_logits", "moe_topk_weights", "moe_topk_ids"), router, strict=True):
                self.put(name, x)

        def start_experts(x: Tensor, ids: Tensor, *_: Any) -> None:
            self.experts = ids.unique().tolist()

        shared = m.shared_expert
        yield from out(m, "mlp_output", "mlp")
        yield from self.hook(m.gate, "mlp.gate", None, routed)
        yield from self.hook(m.experts, "mlp.experts", start_experts, lambda x: self.put("moe_routed_output", x))
        yield from out(shared, "moe_shared_output", "mlp.shared_expert")
        yield from out(shared.gate_proj, "moe_shared_gate_proj")
        yield from out(shared.up_proj, "moe_shared_up_proj")
        yield from out(shared.act_fn, "moe_shared_silu")
        yield from self.hook(shared.down_proj, "down_proj", lambda x: self.put("moe_shared_act", x), None)
        yield from out(m.shared_expert_gate, "moe_shared_gate_logit")


def watched(function: Callable, see: Callable) -> Callable:
    """The function, which shows its results to `see`, and its arguments."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        see(out, *args, **kwargs)
        return out

    return wrapped


@contextmanager
def capturing(model: nn.Module) -> Iterator[Capture]:
    capture = Capture(model)
    handles = list(capture.hooks())
    seen_by = {
        "apply_rotary_pos_emb": capture.rotated,
        "eager_attention_forward": capture.attended,
        "l2norm": capture.normalised,
        "causal_conv1d_fn": capture.convolved,
        "causal_conv1d_update": capture.updated,
        "torch_chunk_gated_delta_rule": capture.ruled,
        "torch_recurrent_gated_delta_rule": capture.ruled,
    }
    try:
        functions = {name: watched(getattr(modeling, name), see) for name, see in seen_by.items()}
        with patch.multiple(modeling, **functions), capture:
            yield capture
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def capture(model: Any, input_ids: Tensor, **arguments: Any) -> dict[str, Tensor]:
    """Run `model` (eager attention, eager experts) and return what it computed, by our keys, in order of computation.

    `arguments` go to the model: attention_mask, position_ids, a cache (see `cached`; with one, `gdn_state` is there
    too). MoE tensors are flat, [B*T, ...]; heads are last but one, [B, T, N, H]; rows of an expert by token.
    """
    with quiet(), capturing(model) as run:
        logits = model(input_ids=input_ids, **{"use_cache": False, **arguments}).logits
    run.put("next_token_logits", logits, in_layer=False)
    return run.taps
