"""Rotary embedding and attention with an output gate."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.attention import attend
from ..model.ops import apply, multiply
from ..model.rope import rotary_angles, rotate
from .case import Case, Compute, Inputs, Outputs, WrongKernel, on
from .drawn import config_of, drawn, heads

Q, CONTEXT = "attn_q", "attn_pre_o_proj"


def rotary_case(model: str = "qwen3.5-35b-a3b", tokens: int = 41, seed: int = 0, image: bool = True) -> Case:
    """Partial, interleaved M-RoPE: `x` [1, T, N, H] and `position_ids` [3, 1, T] (time, height, width) -> `attn_q`.

    The first R elements of a head are rotated, in pairs (j, j + R/2); the axis of frequency j is height for
    j = 1, 4, ..., width for j = 2, 5, ... as far as `mrope_section` reaches, else time. image: the axes differ in the
    middle of the sequence; else all three are 0 .. T-1.
    """
    config = config_of(model)
    R, theta = config.rotary_dim, config.rope_theta

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
        return {Q: rotate(Q, i["x"], *rotary_angles(config, i["position_ids"], i["x"].dtype))}

    def by_angles(i: Inputs, angle: Tensor, interleaved: bool = False) -> Outputs:
        cos, sin, n = angle.cos()[:, :, None], angle.sin()[:, :, None], 2 * angle.shape[-1]
        head, rest = i["x"][..., :n], i["x"][..., n:]
        a, b = (head[..., 0::2], head[..., 1::2]) if interleaved else head.chunk(2, -1)
        pair = (a * cos - b * sin, b * cos + a * sin)
        head = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
        return {Q: torch.cat((head, rest), -1)}

    def angles(i: Inputs, width: int, base: float, axes: Tensor | None = None) -> Tensor:
        frequency = base ** (-2 * torch.arange(width // 2, dtype=torch.float64) / width)
        axes = torch.zeros(width // 2, dtype=torch.long) if axes is None else axes
        return i["position_ids"][axes].movedim(0, -1) * frequency

    axis = rotary_axes(config.mrope_section)
    sections = torch.arange(3).repeat_interleave(torch.tensor(config.mrope_section))
    wrong = (
        WrongKernel("rotary over the whole head", compute=lambda i: by_angles(i, angles(i, config.head_dim, theta))),
        WrongKernel("rotary pairs interleaved", compute=lambda i: by_angles(i, angles(i, R, theta, axis), True)),
        WrongKernel("rotary theta 10000", compute=lambda i: by_angles(i, angles(i, R, 1e4, axis))),
        WrongKernel("no rotary at all", outputs=lambda o, i: {Q: i["x"]}),
        WrongKernel("rotated backwards", compute=lambda i: by_angles(i, -angles(i, R, theta, axis))),
        WrongKernel("positions one too high", lambda i: i | {"position_ids": i["position_ids"] + 1}),
        WrongKernel("axes in sections, not interleaved",
                    compute=lambda i: by_angles(i, angles(i, R, theta, sections))),
        WrongKernel("height and width dropped", compute=lambda i: by_angles(i, angles(i, R, theta))),
    )  # fmt: skip
    return Case(f"rotary-{model}-{tokens}", (Q,), make, compute, wrong=wrong, config=config)


def rotary_axes(section: tuple[int, ...]) -> Tensor:
    """[R/2] the axis of each frequency: 0 time, 1 height, 2 width."""
    j = torch.arange(sum(section))
    height, width = (j % 3 == 1) & (j < 3 * section[1]), (j % 3 == 2) & (j < 3 * section[2])
    return height.long() + 2 * width.long()


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

    def cached(i: Inputs, name: str) -> Tensor:
        x = i[name]
        return x if kv == "bf16" else (x.double() * i[f"{name}_scale"].double()).to(i["q"].dtype)

    def compute(i: Inputs) -> Outputs:
        y = attend(i["q"], cached(i, "k"), cached(i, "v"))
        return {CONTEXT: multiply(CONTEXT, y, apply("attn_gate", torch.sigmoid, i["gate"]))}

    def at(positions: Tensor) -> Compute:
        return lambda i: {CONTEXT: attend(i["q"], cached(i, "k"), cached(i, "v"), at_T=positions) * i["gate"].sigmoid()}

    def tiled(x: Tensor) -> Tensor:  # head n reads n % G
        return x.repeat(1, 1, N // G, 1)

    t = torch.arange(past, past + tokens)
    wrong = [
        WrongKernel("output gate ignored", outputs=lambda o, i: {CONTEXT: o[CONTEXT] / i["gate"].sigmoid()}),
        WrongKernel("silu for sigmoid in the output gate", outputs=lambda o, i: {CONTEXT: o[CONTEXT] * i["gate"]}),
        WrongKernel("scores not scaled", lambda i: i | {"q": i["q"].double() * H**0.5}),
        WrongKernel("scores scaled twice", lambda i: i | {"q": i["q"].double() * H**-0.5}),
        WrongKernel("no causal mask", compute=at(torch.full_like(t, past + tokens))),
        WrongKernel("the token itself is masked", compute=at((t - 1).clamp(min=0))),
        WrongKernel("key heads tiled, not grouped", on(tiled, "k", "v")),
        WrongKernel("cached tokens not seen", on(lambda x: x[:, past:], "k", "v")),
    ]  # fmt: skip
    if kv == "fp8":
        one = torch.ones(())
        wrong.append(WrongKernel("scales of the FP8 cache ignored", lambda i: i | {"k_scale": one, "v_scale": one}))
    kind = "decode" if tokens == 1 and past else "prefill"
    return Case(f"attention-{model}-{kind}-{kv}-{past}+{tokens}", (CONTEXT,), make, compute, wrong=tuple(wrong),
                config=config)  # fmt: skip
