"""Kernels as engines write them, in float32 with bf16 stores, each with faults that it can be given."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from layouts import E2M1
from torch import Tensor


def bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16)


def unpack(codes: Tensor, scales: Tensor, fault: str) -> Tensor:
    low, high = (codes & 15, codes >> 4) if fault != "nibbles swapped" else (codes >> 4, codes & 15)
    values = E2M1.float()[torch.stack((low, high), -1).flatten(-2).long()]
    if fault == "scales rotated":
        scales = scales.roll(1, -1)
    bias = {"scales one step high": 126, "scales one step low": 128}.get(fault, 127)
    return values * torch.exp2(scales.float() - bias).repeat_interleave(32, -1)


def quantise(x: Tensor, rule: str) -> Tensor:
    """MXFP4 there and back, `rule` "even" or "round-up"; or FP8."""
    if rule == "fp8":
        return quantise_fp8(x)
    blocks = x.float().unflatten(-1, (-1, 32))
    amax = blocks.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
    exponent = amax.log2().floor()
    fraction = amax / torch.exp2(exponent)
    scale = torch.exp2(exponent - 2 + (fraction >= 1.75 if rule == "even" else fraction > 1.5).float())
    y = (blocks / scale).clamp(-6, 6)
    step = torch.exp2(y.abs().clamp(min=1).log2().floor() - 1)
    return ((y / step).round() * step * scale).flatten(-2)


def quantise_fp8(x: Tensor) -> Tensor:
    """E4M3 there and back, with a scale for each token and 128 columns."""
    parts = []
    for part in x.float().split(128, -1):
        scale = part.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
        parts.append((part / scale).to(torch.float8_e4m3fn).float() * scale)
    return torch.cat(parts, -1)


def spread(scales: Tensor, shape: torch.Size) -> Tensor:
    return scales.float().repeat_interleave(128, -2).repeat_interleave(128, -1)[..., : shape[-2], : shape[-1]]


def moe(case, fault: str = "", rule: str = "") -> Tensor:
    """The experts; `rule`: how activations are quantised, "" not at all."""
    i = {name: case[name] for name in case}
    x, ids, weights = i["x"], i["ids"], i["weights"]
    if "w13_codes" in i and i["w13_codes"].dtype != torch.uint8:
        w13, w2 = (i[f"{n}_codes"].float() * spread(i[f"{n}_scales"], i[f"{n}_codes"].shape) for n in ("w13", "w2"))
    elif "w13_codes" in i:
        w13, w2 = (unpack(i[f"{n}_codes"], i[f"{n}_scales"], fault) for n in ("w13", "w2"))
    else:
        w13, w2 = i["w13"].float(), i["w2"].float()
    x = quantise(x, rule) if rule else x.float()
    out = torch.zeros(x.shape)
    for t in range(len(x)):
        for a, e in enumerate(ids[t].tolist()):
            last = ids.shape[1] - (2 if "shared_w13" not in i else 1)
            if (fault == "expert dropped" and e == 4) or (fault == "last chosen expert dropped" and a == last):
                continue
            if fault == "shared expert dropped" and a == last + 1:
                continue
            e = (e + 1) % len(w2) if fault == "experts shifted by one" else e
            y = w13[e] @ x[t]
            gate, up = (y[0::2], y[1::2]) if fault == "gate and up taken for interleaved" else y.chunk(2)
            gate, up = (up, gate) if fault == "gate and up swapped" else (gate, up)
            h = bf16((gate.sigmoid() if fault == "sigmoid for silu in the experts" else F.silu(gate)) * up).float()
            h = quantise(h, rule) if rule else h
            w = 1.0 if fault == "routing weights ignored" else weights[t, a]
            w = 2 * w if fault == "shared expert counted twice" and a == last + 1 else w
            out[t] += bf16(w * (w2[e] @ h)).float()
    if "shared_w13" in i:
        gate, up = (x @ i["shared_w13"].float().T).chunk(2, -1)
        shared = bf16(bf16(F.silu(gate) * up).float() @ i["shared_w2"].float().T).float()
        squashed = (x @ i["shared_gate"].float().T).sigmoid()
        squashed = torch.ones_like(squashed) if fault == "shared gate ignored" else squashed
        squashed = squashed**2 if fault == "shared gate applied twice" else squashed
        out = bf16(out).float() + squashed * shared
    return bf16(out)


def gdn(case, fault: str = "") -> tuple[Tensor, Tensor]:
    q, k, v, g, beta, state = (case[name].float() for name in ("q", "k", "v", "g", "beta", "state"))
    eps = 0.0 if fault == "eps left out of the L2 norm" else 1e-6
    if fault != "q and k not normalised":
        q, k = (x / (x.square().sum(-1, keepdim=True) + eps).sqrt() for x in (q, k))
    groups = v.shape[2] // q.shape[2]
    if fault == "value heads in another order":
        q, k = (x.repeat(1, 1, groups, 1) for x in (q, k))
    else:
        q, k = (x.repeat_interleave(groups, 2) for x in (q, k))
    q = q if fault == "q not scaled" else q * q.shape[-1] ** -0.5
    g = {"decay with the wrong sign": -g, "no decay": 0 * g}.get(fault, g)
    beta = torch.ones_like(beta) if fault == "beta left out" else beta
    state = torch.zeros_like(state) if fault == "state ignored" else state
    outputs = []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        recall = torch.einsum("bjkp,bjk->bjp", state, k[:, t]) if fault != "recall term missing" else 0.0
        u = beta[:, t, :, None] * (v[:, t] - recall)
        state = state + k[:, t, :, :, None] * u[:, :, None]
        outputs.append(torch.einsum("bjkp,bjk->bjp", state, q[:, t]))
        state = bf16(state).float() if fault == "state in bf16" else state
    return bf16(torch.stack(outputs, 1)), state


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rms_norm(case, fault: str = "") -> Tensor:
    x, w = case["x"].float(), case["weight"].float()
    x = x - x.mean(-1, keepdim=True) if fault == "mean subtracted, as in LayerNorm" else x
    eps = {"eps 1e-5 for 1e-6": 1e-5, "eps left out": 0.0}.get(fault, 1e-6)
    gain = {"input norm without 1 +": w, "input norm with 1 + twice": 2 + w}.get(fault, 1 + w)
    return bf16(unit(x, eps) * gain)


def gated_norm(case, fault: str = "") -> Tensor:
    x, z, w = (case[name].float() for name in ("x", "z", "weight"))
    gate = z.sigmoid() if fault == "sigmoid for silu in the gated norm" else F.silu(z)
    if fault == "gate before norm":
        x, gate = x * gate, 1.0
    w = 1 + w if fault == "gated norm with 1 +" else w
    return bf16(unit(x) * w * gate)


def l2_norm(case, fault: str = "") -> Tensor:
    x = case["x"].float()
    total = x.square().mean(-1, keepdim=True) if fault == "mean for sum in the L2 norm" else x.square().sum(-1, True)
    if fault == "eps left out, as in F.normalize":
        return bf16(F.normalize(x, dim=-1, eps=1e-6))
    return bf16(x / (total + 1e-6).sqrt())


def attention(case, fault: str = "") -> Tensor:
    q, k, v, gate = (case[name].float() for name in ("q", "k", "v", "gate"))
    if "k_scale" in case and fault != "scales of the FP8 cache ignored":
        k, v = k * case["k_scale"], v * case["v_scale"]
    groups, T, S = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    tiled = fault == "key heads tiled, not grouped"
    k, v = (x.repeat(1, 1, groups, 1) if tiled else x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("btnh,bsnh->bnts", q, k) * (1.0 if fault == "scores not scaled" else q.shape[-1] ** -0.5)
    hidden = torch.ones(T, S).tril(S - T) == 0
    scores = scores if fault == "no causal mask" else scores.masked_fill(hidden, -torch.inf)
    y = torch.einsum("bnts,bsnh->btnh", bf16(scores.softmax(-1)).float(), v)
    gate = {"output gate ignored": torch.ones_like(gate), "silu for sigmoid in the output gate": F.silu(gate)}.get(
        fault, gate.sigmoid()
    )
    return bf16(y * gate)


def conv(case, fault: str = "") -> tuple[Tensor, Tensor]:
    x, w, state = case["x"].float(), case["weight"].float()[:, 0], case["state"].float()
    w = w.flip(-1) if fault == "convolution reversed" else w
    past = torch.zeros_like(state) if fault == "convolution's history dropped" else state
    padded = torch.cat((past.mT, x), 1)
    y = sum(padded[:, j : j + x.shape[1]] * w[:, j] for j in range(w.shape[-1]))
    y = y if fault == "no silu after the convolution" else F.silu(y)
    last = torch.cat((state.mT, x), 1)[:, -state.shape[-1] :].mT
    return bf16(y), bf16(state if fault == "state not updated" else last)


def gating(case, fault: str = "") -> tuple[Tensor, Tensor]:
    a, b, A_log, bias = (case[name].float() for name in ("a", "b", "A_log", "dt_bias"))
    a, b = (b, a) if fault == "b and a swapped" else (a, b)
    bias = 0 * bias if fault == "dt_bias left out" else bias
    g = -A_log.exp() * F.softplus(a + bias)
    return (-g if fault == "decay with the wrong sign" else g), bf16(b.sigmoid())


def rotary(case, fault: str = "") -> Tensor:
    x, positions, config = case["x"].float(), case["position_ids"], case.config
    R = x.shape[-1] if fault == "rotary over the whole head" else config.rotary_dim
    theta = 1e4 if fault == "rotary theta 10000" else config.rope_theta
    frequency = theta ** (-2 * torch.arange(R // 2).double() / R)
    _, height, width = config.mrope_section
    axis = [1 if j % 3 == 1 and j < 3 * height else 2 if j % 3 == 2 and j < 3 * width else 0 for j in range(R // 2)]
    if fault in ("M-RoPE height and width dropped", "rotary over the whole head"):
        axis = [0] * (R // 2)
    if fault == "M-RoPE sections in blocks":
        axis = sum(([n] * count for n, count in enumerate(config.mrope_section)), [])
    angle = (positions[torch.tensor(axis)].movedim(0, -1) * frequency).float()[:, :, None]
    cos, sin, head = angle.cos(), angle.sin(), x[..., :R]
    if fault == "rotary pairs interleaved":
        a, b = head[..., 0::2], head[..., 1::2]
        head = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = head.chunk(2, -1)
        head = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return bf16(torch.cat((head, x[..., R:]), -1))


def router(case, fault: str = "") -> tuple[Tensor, Tensor]:
    logits = bf16(case["x"].float() @ case["router"].float().T).float()
    p = logits.sigmoid() if fault == "sigmoid for softmax" else logits.softmax(-1)
    ranked = -logits if fault == "lowest logits" else logits
    ids = ranked.sort(dim=-1, descending=True, stable=True).indices[:, : case.top_k]
    w = p.gather(1, ids)
    return ids, w if fault == "routing weights not renormalised" else w / w.sum(1, keepdim=True)


def append(case, fault: str = "") -> Tensor:
    gate = (case["x"].float() @ case["shared_gate"].float().T).sigmoid()
    gate = {"shared gate ignored": torch.ones_like(gate), "shared gate applied twice": gate**2}.get(fault, gate)
    weights = torch.cat((case["topk_weights"], gate * (1.0 if fault == "1/ep_size left out" else case["scale"])), 1)
    return weights / weights.sum(1, keepdim=True) if "renormalised" in fault else weights


def draft(case, fault: str = "") -> Tensor:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        return bf16(unit(x.float()) * (w.float() + (fault != "draft norms without 1 +"))).float()

    embeds = case["embeds"].roll(1, 0) if fault == "embedding of token t" else case["embeds"]
    halves = norm(embeds, case["embedding_norm"]), norm(case["hidden"], case["hidden_norm"])
    halves = halves[::-1] if fault == "hidden state first" else halves
    return bf16(torch.cat(halves, -1) @ case["fc"].float().T)


def log_p(case, fault: str = "") -> Tensor:
    logits = case["logits"] / (1.0 if fault == "temperature ignored" else case["temperature"])
    found = logits.log_softmax(-1).gather(-1, case["ids"][:, None])[:, 0]
    return found / torch.tensor(2.0).log() if fault == "log of base 2" else found
