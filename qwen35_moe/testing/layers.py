"""Norms, rotary embedding, attention with an output gate, and what comes before the delta rule."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.attention import attend
from ..model.deltanet import causal_conv
from ..model.norms import gated_rms_norm, l2_norm, rms_norm
from ..model.ops import apply, multiply, promote
from ..model.rope import rotary_angles, rotate
from ..numerics.taps import tap
from .case import Case, Inputs, Outputs, by, known, on, out
from .drawn import config_of, drawn, heads, hidden, matrix

NORM, GATED, L2, Q, CONTEXT = "input_layernorm", "gdn_norm_out", "gdn_k", "attn_q", "attn_pre_o_proj"
CONV, CONV_STATE, G, BETA = "gdn_conv_act", "gdn_conv_state", "gdn_g", "gdn_beta"


def rms_norm_case(model: str = "tiny", tokens: int = 41, seed: int = 0) -> Case:
    """y = x / sqrt(mean(x^2) + eps) * (1 + w): `x` [T, D], `weight` [D] -> `input_layernorm` [T, D]. Some rows are as
    small as sqrt(eps)."""
    config = config_of(model)

    def make() -> Inputs:
        x = hidden(seed, "x", tokens, config.hidden_size)
        x[::3] *= 2.0**-10
        return {"x": x, "weight": drawn(seed, "weight", config.hidden_size, spread=0.25)}

    def compute(i: Inputs, eps: float = config.rms_norm_eps) -> Outputs:
        return {NORM: rms_norm(NORM, i["x"], i["weight"], eps)}

    wrong = known("input norm without 1 +", "input norm with 1 + twice") | {
        "eps 1e-5 for 1e-6": by(partial(compute, eps=1e-5)),
        "eps left out": by(partial(compute, eps=0.0)),
        "mean subtracted, as in LayerNorm": on(lambda x: x - x.mean(-1, keepdim=True), "x"),
    }
    return Case(f"rms_norm-{model}-{tokens}", (NORM,), make, compute, wrong, ("x",), config=config)


def gated_norm_case(model: str = "tiny", tokens: int = 41, seed: int = 0) -> Case:
    """y = x / sqrt(mean(x^2) + eps) * w * silu(z) per head: `x`, `z` [T, J, P], `weight` [P] -> `gdn_norm_out`. One
    head is of norm 1e-3."""
    config = config_of(model)
    shape = (tokens, config.linear_num_value_heads, config.linear_value_head_dim)

    def make() -> Inputs:
        weight = drawn(seed, "weight", shape[-1], mean=1.0, spread=0.25)
        return {"x": heads(seed, "x", *shape), "z": drawn(seed, "z", *shape, spread=2.0), "weight": weight}

    def compute(i: Inputs, eps: float = config.rms_norm_eps) -> Outputs:
        x, z = tap("gdn_core_out", i["x"]), tap("gdn_z", i["z"])
        return {GATED: gated_rms_norm(x, z, i["weight"], eps, config.output_gate_type)}

    wrong = known("gate before norm", "gated norm with 1 +", "sigmoid for silu in the gated norm") | {
        "eps 1e-5 for 1e-6": by(partial(compute, eps=1e-5)),
        "eps left out": by(partial(compute, eps=0.0)),
        "gate ignored": out(GATED, lambda y, i: y / F.silu(i["z"])),
    }
    return Case(f"gated_norm-{model}-{tokens}", (GATED,), make, compute, wrong, ("x", "z"), config=config)


def l2_norm_case(model: str = "tiny", tokens: int = 41, seed: int = 0) -> Case:
    """y = x / sqrt(sum(x^2) + 1e-6) per head: `x` [T, M, K] -> `gdn_k` [T, M, K]. One head is of norm 1e-3, where the
    eps is as large as the sum."""
    config = config_of(model)

    def make() -> Inputs:
        return {"x": heads(seed, "x", tokens, config.linear_num_key_heads, config.linear_key_head_dim) * 0.125}

    def size(x: Tensor) -> Tensor:
        return x.square().sum(-1, keepdim=True).sqrt()

    wrong = {
        "eps left out, as in F.normalize": out(L2, lambda _, i: i["x"] / size(i["x"])),
        "eps outside of the root": out(L2, lambda _, i: i["x"] / (size(i["x"]) + 1e-6)),
        "mean for sum in the L2 norm": out(
            L2, lambda _, i: i["x"] * torch.rsqrt(i["x"].square().mean(-1, keepdim=True) + 1e-6)
        ),
    }
    return Case(f"l2_norm-{model}-{tokens}", (L2,), make, lambda i: {L2: tap(L2, l2_norm(i["x"]))}, wrong, ("x",),
                config=config)  # fmt: skip


def rotary_case(model: str = "qwen3.5-35b-a3b", tokens: int = 41, seed: int = 0, image: bool = True) -> Case:
    """Partial, interleaved M-RoPE: `x` [1, T, N, H] and `position_ids` [3, 1, T] (time, height, width) -> `attn_q`.

    The first R elements of a head are rotated, in pairs (j, j + R/2); the axis of frequency j is height for
    j = 1, 4, ..., width for j = 2, 5, ... as far as `mrope_section` reaches, else time. image: the axes differ in the
    middle of the sequence; else all three are 0 .. T-1.
    """
    config = config_of(model)

    def make() -> Inputs:
        t = torch.arange(tokens)
        positions = torch.stack((t, t, t))[:, None]
        if image:
            inside = (t >= tokens // 4) & (t < 3 * tokens // 4)
            grid = torch.stack((torch.full_like(t, tokens // 4), tokens // 4 + t // 4, tokens // 4 + t % 4))
            positions = torch.where(inside, grid, torch.stack((t, t, t)))[:, None]
        x = drawn(seed, "x", 1, tokens, min(4, config.num_attention_heads), config.head_dim)
        return {"x": x, "position_ids": positions}

    def compute(i: Inputs) -> Outputs:
        cos, sin = rotary_angles(config, i["position_ids"], i["x"].dtype)
        return {Q: rotate(Q, tap("attn_q_norm", i["x"]), cos, sin)}

    R, H = config.rotary_dim, config.head_dim
    pairs = torch.cat((torch.arange(0, R, 2), torch.arange(1, R, 2), torch.arange(R, H)))
    wrong = known(
        "rotary over the whole head", "rotary theta 10000", "no rotary at all", "M-RoPE height and width dropped",
        "M-RoPE height and width swapped", "M-RoPE sections in blocks",
    ) | {
        "rotary pairs interleaved": by(
            lambda i: {Q: compute(i | {"x": i["x"][..., pairs]})[Q][..., pairs.argsort()]}
        ),
        "rotated backwards": on(torch.neg, "position_ids"),
        "positions one too high": on(lambda at: at + 1, "position_ids"),
    }  # fmt: skip
    return Case(f"rotary-{model}-{tokens}", (Q,), make, compute, wrong, config=config)


def attention_case(
    model: str = "tiny", tokens: int = 41, past: int = 0, kv: str = "bf16", seed: int = 0,
) -> Case:  # fmt: skip
    """softmax(q k^T / sqrt(H)) v * sigmoid(gate), causal: `q`, `gate` [1, T, N, H], `k`, `v` [1, past + T, G, H] ->
    `attn_pre_o_proj` [1, T, N, H]. q and k are normalised and rotated already. Prefill: past 0. Decode: tokens 1.

    kv: `bf16`, or `fp8`: k and v are float8_e4m3fn, to be multiplied with `k_scale` and `v_scale` []; the truth reads
    the same bytes, so the format of the cache is no error.
    """
    config = config_of(model)
    N, G, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def make() -> Inputs:
        q, gate = heads(seed, "q", 1, tokens, N, H), drawn(seed, "gate", 1, tokens, N, H, spread=2.0)
        k, v = (drawn(seed, name, 1, past + tokens, G, H) for name in "kv")
        q[..., 0, :] *= 4  # a head whose softmax is peaked
        if kv == "bf16":
            return {"q": q, "k": k, "v": v, "gate": gate}
        scale = torch.tensor(2.0**-6)
        stored = {name: (x.float() / scale).to(torch.float8_e4m3fn) for name, x in (("k", k), ("v", v))}
        return {"q": q, **stored, "gate": gate, "k_scale": scale, "v_scale": scale.clone()}

    def compute(i: Inputs, at: Tensor | None = None) -> Outputs:
        k, v = (i[n] if kv == "bf16" else (i[n].double() * i[f"{n}_scale"].double()).to(i["q"].dtype) for n in "kv")
        y = attend(i["q"], k, v, at_T=at)
        return {CONTEXT: multiply(CONTEXT, y, apply("attn_gate", torch.sigmoid, i["gate"]))}

    t = torch.arange(past, past + tokens)
    wrong = known("output gate ignored", "scores not scaled") | {
        "silu for sigmoid in the output gate": out(CONTEXT, lambda y, i: y * i["gate"]),
        "scores scaled twice": on(lambda q: q * H**-0.5, "q"),
        "no causal mask": by(partial(compute, at=torch.full_like(t, past + tokens))),
        "the token itself is masked": by(partial(compute, at=(t - 1).clamp(min=0))),
        "key heads tiled, not grouped": on(lambda x: x.repeat(1, 1, N // G, 1), "k", "v"),
        "cached tokens not seen": on(lambda x: x[:, past:], "k", "v"),
        "scales of the FP8 cache ignored": on(torch.ones_like, "k_scale", "v_scale"),
    }
    kind = "decode" if tokens == 1 and past else "prefill"
    return Case(f"attention-{model}-{kind}-{kv}-{past}+{tokens}", (CONTEXT,), make, compute, wrong, config=config)


def conv_case(model: str = "tiny", tokens: int = 41, seed: int = 0) -> Case:
    """y_t = silu(sum_w weight_w x_{t-W+1+w}), depthwise and causal: `x` [1, T, C], `weight` [C, 1, W], `state`
    [1, C, W-1] (the inputs before the first token) -> `gdn_conv_act` [1, T, C], `gdn_conv_state` [1, C, W-1]."""
    config = config_of(model)
    C, W = config.conv_dim, config.linear_conv_kernel_dim

    def make() -> Inputs:
        state = drawn(seed, "state", 1, C, W - 1)
        return {"x": drawn(seed, "x", 1, tokens, C), "weight": matrix(seed, "weight", C, 1, W), "state": state}

    def compute(i: Inputs) -> Outputs:
        y, state = causal_conv(i["x"], i["weight"], i["state"], None)
        return {CONV: y, CONV_STATE: tap(CONV_STATE, state)}

    wrong = known("no silu after the convolution") | {
        "convolution reversed": on(lambda w: w.flip(-1), "weight"),
        "convolution's history dropped": on(torch.zeros_like, "state"),
        "history read backwards": on(lambda x: x.flip(-1), "state"),
        "silu twice": out(CONV, lambda y, _: F.silu(y)),
        "state not updated": out(CONV_STATE, lambda _, i: i["state"]),
    }
    return Case(f"conv-{model}-{tokens}", (CONV, CONV_STATE), make, compute, wrong, config=config)


def gating_case(model: str = "qwen3.5-35b-a3b", tokens: int = 41, seed: int = 0) -> Case:
    """g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b): `a`, `b` [T, J], `A_log` [J] float32, `dt_bias` [J] ->
    `gdn_g`, `gdn_beta` [T, J]."""
    config = config_of(model)
    J = config.linear_num_value_heads

    def make() -> Inputs:
        A_log = drawn(seed, "A_log", J, mean=0.25, spread=1.75, kind="flat", dtype=torch.float32)
        dt_bias = drawn(seed, "dt_bias", J, mean=-2.5, spread=1.5, kind="flat")
        a, b = drawn(seed, "a", tokens, J, spread=2.0), drawn(seed, "b", tokens, J, spread=2.0)
        return {"a": a, "b": b, "A_log": A_log, "dt_bias": dt_bias}

    def compute(i: Inputs) -> Outputs:
        decay = -promote(i["A_log"]).exp()
        g = tap(G, decay * F.softplus(promote(i["a"]) + promote(i["dt_bias"])))
        return {G: g, BETA: apply(BETA, torch.sigmoid, i["b"])}

    wrong = known("decay with the wrong sign") | {
        "b and a swapped": by(lambda i: compute(i | {"a": i["b"], "b": i["a"]})),
        "dt_bias left out": on(torch.zeros_like, "dt_bias"),
        "A_log taken for A": on(lambda x: x.abs().log(), "A_log"),
        "relu for softplus": out(G, lambda _, i: -i["A_log"].exp() * (i["a"] + i["dt_bias"]).clamp(min=0)),
        "the decay itself, exp(g)": out(G, lambda g, _: g.exp()),
        "beta without sigmoid": out(BETA, lambda _, i: i["b"]),
    }
    return Case(f"gating-{model}-{tokens}", (G, BETA), make, compute, wrong, ("a", "b"), config=config)
