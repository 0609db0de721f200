"""Gated DeltaNet: linear attention whose state is an associative memory, written by the delta rule.

Formulas after "Gated Delta Networks" (arXiv 2412.06464) and, for the chunked form, "Parallelizing Linear Transformers
with the Delta Rule" (arXiv 2406.06484). Per value head, with q and k of unit length and a_t = exp(g_t):

    S_t = a_t S_{t-1} + k_t u_t^T        u_t = beta_t (v_t - (a_t S_{t-1})^T k_t)        o_t = S_t^T q_t
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..numerics import arithmetics as arithmetic
from ..numerics.taps import scope, tap
from .cache import LayerState
from .config import Config
from .norms import gated_rms_norm, l2_norm
from .ops import Linear, accumulation_dtype, apply, as_read_by, promote

CHUNK_TOKENS = 64
# The chunked rule prepares this many tokens at once; more would only cost memory.
SPAN = 2048


def recurrent_delta_rule(
    q_BTJK: Tensor, k_BTJK: Tensor, v_BTJP: Tensor, g_BTJ: Tensor, beta_BTJ: Tensor, state_BJKP: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, token by token.  -> o [B, T, J, P], state [B, J, K, P]. All in at least float32.

    The recall term (a S)^T k is what the memory already answers to k; without it this is plain linear attention.
    """
    q, k, v, g, beta, state = (promote(x) for x in (q_BTJK, k_BTJK, v_BTJP, g_BTJ, beta_BTJ, state_BJKP))
    outputs = []
    for t in range(q.shape[1]):
        with scope(index=t):
            state = state * g[:, t].exp()[..., None, None]
            recall = tap("gdn_recall", (state * k[:, t, :, :, None]).sum(-2))
            u = (v[:, t] - recall) * beta[:, t, :, None]
            state = promote(tap("gdn_state", state + k[:, t, :, :, None] * u[:, :, None]))
        outputs.append((state * q[:, t, :, :, None]).sum(-2))
    return torch.stack(outputs, 1), state


def chunked_delta_rule(
    q_BTJK: Tensor, k_BTJK: Tensor, v_BTJP: Tensor, g_BTJ: Tensor, beta_BTJ: Tensor, state_BJKP: Tensor
) -> tuple[Tensor, Tensor]:
    """The same in chunks of 64 tokens, by matrix products instead of a loop. Same signature; equal in exact arithmetic.

    Within a chunk that starts with state S, let G_i = g_1 + ... + g_i and D_ij = exp(G_i - G_j) for i >= j, else 0.
    Unrolling the definition gives a unit lower triangular system for the u_i:

        u_i + sum_{j<i} beta_i D_ij (k_i . k_j) u_j = beta_i (v_i - exp(G_i) S^T k_i)
        o_i = exp(G_i) S^T q_i + sum_{j<=i} D_ij (q_i . k_j) u_j
        S'  = exp(G_C) S + sum_j exp(G_C - G_j) k_j u_j^T

    All chunks are solved at once, for both halves of the right side. Only S passes from chunk to chunk in order.
    """
    outputs = []
    for span in zip(*(x.split(SPAN, 1) for x in (q_BTJK, k_BTJK, v_BTJP, g_BTJ, beta_BTJ)), strict=True):
        o, state_BJKP = _chunked_span(state_BJKP, *span)
        outputs.append(o)
    return torch.cat(outputs, 1), state_BJKP


def _chunked_span(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    B, T, J = beta.shape
    g, beta = (_chunks(x[..., None]) for x in (g, beta))  # [B, J, n, 64, 1]; padding: g = beta = 0
    G = g.squeeze(-1).cumsum(-1)[..., None]
    causal = torch.ones(CHUNK_TOKENS, CHUNK_TOKENS, dtype=torch.bool, device=q.device).tril()
    decay = (G - G.mT).masked_fill(~causal, -torch.inf).exp()
    last = G[..., -1:, :]
    q, q_read, k, k_beta, k_write, right = chunk_operands(q, k, v, beta, G.exp(), (last - G).exp())
    # The solver reads the strict lower triangle and takes the diagonal as 1.
    u = torch.linalg.solve_triangular((k_beta @ k.mT) * decay, right, upper=False, unitriangular=True)
    attention = (q @ k.mT) * decay
    u, u_recall = u.flatten(0, 1).split((v.shape[-1], k.shape[-1]), -1)  # [B * J, n, 64, ...]
    k_write, fade = k_write.flatten(0, 1), last.exp().flatten(0, 1)
    states = u.new_empty(*u.shape[:2], *state.shape[-2:])  # what each chunk starts with
    states[:, 0] = state.flatten(0, 1)
    for n in range(u.shape[1]):  # what only this order allows; a GPU waits for each launch here
        u[:, n].baddbmm_(u_recall[:, n], states[:, n], alpha=-1)
        after = states[:, n + 1] if n + 1 < u.shape[1] else torch.empty_like(states[:, 0])
        torch.mul(states[:, n], fade[:, n], out=after).baddbmm_(k_write[:, n].mT, u[:, n])
    o = q_read @ states.unflatten(0, (B, J)) + attention @ u.unflatten(0, (B, J))
    return o.flatten(2, 3)[:, :, :T].transpose(1, 2), after.view_as(state)


def chunk_operands(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, faded: Tensor, left: Tensor) -> tuple[Tensor, ...]:
    """By chunks: q, q exp(G), k, k beta, k exp(G_C - G); and both right sides, v beta and k beta exp(G)."""
    q, k, v = (_chunks(x) for x in (q, k, v))
    k_beta = k * beta
    return q, q * faded, k, k_beta, k * left, torch.cat((v * beta, k_beta * faded), -1)


def _chunks(x_BTJH: Tensor) -> Tensor:
    """[B, T, J, H] -> [B, J, n, 64, H], promoted, zeros at the end."""
    x = promote(x_BTJH.transpose(1, 2).contiguous())
    x = F.pad(x, (0, 0, 0, -x.shape[2] % CHUNK_TOKENS)) if x.shape[2] % CHUNK_TOKENS else x
    return x.unflatten(2, (-1, CHUNK_TOKENS))


def causal_conv(x_BTC: Tensor, weight_C1W: Tensor, state_BCW: Tensor, real_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution, then SiLU.  y_t = silu(sum_w weight_w x_{t-W+1+w}); the last tap is the present.

    `state_BCW` holds the W-1 inputs before the first token. Returns y [B, T, C] and the last W-1 inputs. With padding
    (`real_BT`), the state lies right before the first real token, and the new one ends at the last real token.
    """
    T, C = x_BTC.shape[1:]
    memory = weight_C1W.shape[-1] - 1
    past_BWC = state_BCW.mT.to(x_BTC.dtype)
    if real_BT is None:
        last_BWC = x_BTC[:, max(T - memory, 0) :]
        next_BWC = torch.cat((past_BWC, last_BWC), 1)[:, last_BWC.shape[1] :]
    else:
        first, count = real_BT.int().argmax(1, keepdim=True), real_BT.sum(1, keepdim=True)
        x_BSC = F.pad(x_BTC * real_BT[..., None], (0, 0, memory, 0))
        x_BSC = x_BSC.scatter(1, _window(first, memory, C), past_BWC)
        next_BWC = x_BSC.gather(1, _window(first + count, memory, C))
        past_BWC, x_BTC = x_BSC[:, :memory], x_BSC[:, memory:]
    y_BTC = tap("gdn_conv", _depthwise(x_BTC, past_BWC, weight_C1W))
    return apply("gdn_conv_act", F.silu, y_BTC), next_BWC.mT.contiguous()


def _depthwise(x_BTC: Tensor, past_BWC: Tensor, weight_C1W: Tensor) -> Tensor:
    """y_t = sum_w weight_w x_{t-W+1+w}; `past` is x before the first token.

    SGLang's Triton kernel rounds each product to bf16 and adds in fp32 (measured).
    """
    weight_WC, T = promote(weight_C1W[:, 0].T), x_BTC.shape[1]
    product_dtype = arithmetic.current().rounding("gdn_conv_product")
    if product_dtype is arithmetic.KEEP or product_dtype == promote(x_BTC[:0]).dtype:
        return weighted_sum(x_BTC, past_BWC, weight_WC, accumulation_dtype("gdn_conv", x_BTC, weight_C1W))
    x_BSC = torch.cat((past_BWC, x_BTC), 1)
    total_BTC = promote(torch.zeros_like(x_BSC[:, :T]))
    for w, weight_C in enumerate(weight_WC):
        with scope(index=w):
            total_BTC = total_BTC + promote(tap("gdn_conv_product", promote(x_BSC[:, w : w + T]) * weight_C))
    return total_BTC


def weighted_sum(x_BTC: Tensor, past_BWC: Tensor, weight_WC: Tensor, dtype: torch.dtype) -> Tensor:
    """One product after another, in the order of a library's convolution (on a CPU in an eighth of its time)."""
    T, x_BSC = x_BTC.shape[1], promote(torch.cat((past_BWC, x_BTC), 1))
    y_BTC = x_BSC[:, :T] * weight_WC[0]
    for w in range(1, len(weight_WC)):
        y_BTC = torch.addcmul(y_BTC, x_BSC[:, w : w + T], weight_WC[w])
    return y_BTC.to(dtype)


def _window(first_B1: Tensor, size: int, channels: int) -> Tensor:
    """Indices first, first+1, ..., first+size-1 for every channel.  [B, 1] -> [B, size, C]."""
    return (first_B1 + torch.arange(size, device=first_B1.device))[..., None].expand(-1, -1, channels)


class GatedDeltaNet(nn.Module):
    """`linear_attn`. One projection for q, k, v side by side, separate ones for z (gate), b (beta), a (decay)."""

    def __init__(self, config: Config):
        super().__init__()
        D, J, M = config.hidden_size, config.linear_num_value_heads, config.linear_num_key_heads
        K, P, C = config.linear_key_head_dim, config.linear_value_head_dim, config.conv_dim
        self.sizes, self.eps, self.gate_type = (J, M, K, P), config.rms_norm_eps, config.output_gate_type
        self.in_proj_qkv = Linear(D, C)
        self.in_proj_z = Linear(D, J * P)
        self.in_proj_b = Linear(D, J)
        self.in_proj_a = Linear(D, J)
        self.conv1d = nn.ParameterDict({"weight": _parameter(C, 1, config.linear_conv_kernel_dim)})
        self.A_log = _parameter(J)
        self.dt_bias = _parameter(J)
        self.norm = nn.ParameterDict({"weight": _parameter(P)})
        self.out_proj = Linear(J * P, D)

    def forward(self, x_BTD: Tensor, real_BS: Tensor | None, past: LayerState) -> Tensor:
        J, M, K, P = self.sizes
        B, T, _ = x_BTD.shape
        real_BT = None if real_BS is None else real_BS[:, -T:]
        if real_BT is not None:
            x_BTD = x_BTD * real_BT[..., None]
        projections = (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
        qkv_in, z_in, b_in, a_in = as_read_by("gdn_a1", x_BTD, *projections)
        qkv_BTC = self.in_proj_qkv("gdn_qkv", qkv_in)
        z_BTJP = self.in_proj_z("gdn_z", z_in).view(B, T, J, P)
        b_BTJ, a_BTJ = self.in_proj_b("gdn_b", b_in), self.in_proj_a("gdn_a", a_in)

        table, conv_weight = arithmetic.current(), self.conv1d["weight"]
        one_step = T == 1 and past.state is not None
        with arithmetic.keeping("gdn_beta") if one_step and table.switch("gdn_step_beta") == "fp32" else nullcontext():
            beta_BTJ = apply("gdn_beta", torch.sigmoid, b_BTJ)
        decay_J = -promote(self.A_log).exp()
        g_BTJ = tap("gdn_g", decay_J * F.softplus(promote(a_BTJ) + promote(self.dt_bias)))
        if real_BT is not None:  # padding neither fades nor writes the memory
            beta_BTJ = beta_BTJ * real_BT[..., None]
            if arithmetic.current().switch("gdn_padding") == "still":
                g_BTJ = g_BTJ * real_BT[..., None]

        one_by_one = one_step or table.switch("gdn_rule") == "recurrent"
        if past.conv is None or past.state is None:
            past.conv = x_BTD.new_zeros(B, conv_weight.shape[0], conv_weight.shape[-1] - 1)
            past.state = promote(x_BTD.new_zeros(B, J, K, P))
        qkv_BTC, conv_BCW = causal_conv(qkv_BTC, conv_weight, past.conv, real_BT)
        past.conv = tap("gdn_conv_state", conv_BCW)

        q, k, v = qkv_BTC.split((M * K, M * K, J * P), -1)
        q_BTMK = promote(tap("gdn_q", l2_norm(q.unflatten(-1, (M, K)))))
        divide = one_by_one and table.switch("gdn_step_scale") == "divided"
        q_BTMK = tap("gdn_q_scaled", q_BTMK / K**0.5 if divide else q_BTMK * K**-0.5)
        k_BTMK = tap("gdn_k", l2_norm(k.unflatten(-1, (M, K))))
        v_BTJP = tap("gdn_v", v.unflatten(-1, (J, P)))

        # Value head j reads key head j // (J/M).
        q_BTJK, k_BTJK = (x.repeat_interleave(J // M, 2) for x in (q_BTMK, k_BTMK))
        rule = recurrent_delta_rule if one_by_one else chunked_delta_rule
        o_BTJP, state_BJKP = rule(q_BTJK, k_BTJK, v_BTJP, g_BTJ, beta_BTJ, past.state)
        past.state = tap("gdn_state", state_BJKP)
        o_BTJP = tap("gdn_core_out", o_BTJP)
        o_BTJP = gated_rms_norm(o_BTJP, z_BTJP, self.norm["weight"], self.eps, self.gate_type)
        (out_in,) = as_read_by("gdn_a2", o_BTJP.flatten(2), self.out_proj)
        return self.out_proj("attn_output", out_in)


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape), requires_grad=False)
