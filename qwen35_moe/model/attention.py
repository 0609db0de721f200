"""Gated full attention: grouped heads, normalised q and k, partial rotary positions, a sigmoid gate on the output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..numerics.arithmetics import stored
from ..numerics.taps import scope, tap
from .cache import LayerState
from .config import Config
from .norms import RMSNorm
from .ops import Linear, accumulation_dtype, apply, as_read_by, matmul, multiply
from .rope import rotate

# Queries are processed in blocks of at most this many rows, and of fewer if there are more than LONG keys. So the
# scores in memory do not grow with the sequence.
QUERY_BLOCK, LONG = 1024, 4096


def attend(
    q_BTNH: Tensor, k_BSGH: Tensor, v_BSGH: Tensor, real_BS: Tensor | None = None, at_T: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(H)) v with a causal mask.  -> [B, T, N, H].

    The T queries are the last of the S tokens, or stand at `at_T` among them. Query head n reads key head n // (N/G).
    `real_BS` is False for padding. A padded query sees itself, so that its row is defined. Where it is [B, T, S], it
    says of each query which tokens it may see. transformers rounds q k^T, then the scaled scores, then the
    probabilities; flash attention keeps all but those in fp32.
    """
    T, N, H = q_BTNH.shape[1:]
    S, G = k_BSGH.shape[1:3]
    # Heads before tokens in memory too: how a batched product adds up depends on its operands' strides.
    q_BNTH = q_BTNH.transpose(1, 2).contiguous()
    k_BNSH, v_BNSH = (x.transpose(1, 2).repeat_interleave(N // G, 1) for x in (k_BSGH, v_BSGH))
    s = torch.arange(S, device=q_BTNH.device)
    at_T = s[S - T :] if at_T is None else at_T
    rows = max(1, QUERY_BLOCK * LONG // max(S, LONG))
    blocks_BtNH = []
    for block, q_BNtH in enumerate(q_BNTH.split(rows, 2)):
        t = at_T[block * rows :][: q_BNtH.shape[2], None]
        visible_Bts = (s <= t)[None]
        if real_BS is not None:
            may = real_BS[:, None] if real_BS.dim() == 2 else real_BS[:, block * rows :][:, : q_BNtH.shape[2]]
            visible_Bts = (visible_Bts & may) | (s == t)
        with scope(index=block if rows < T else None):
            scores_BNts = apply("attn_scores", lambda x: x * H**-0.5, matmul("attn_qk", q_BNtH, k_BNSH.mT))
            scores_BNts = scores_BNts.masked_fill(~visible_Bts[:, None], -torch.inf)
            wide = torch.promote_types(scores_BNts.dtype, torch.float32)
            probs_BNts = tap("attn_probs", scores_BNts.softmax(-1, dtype=wide))
            dtype = accumulation_dtype("attn_context", probs_BNts, v_BNSH)
            y_BNtH = probs_BNts.to(dtype) @ v_BNSH.to(dtype)
            blocks_BtNH.append(y_BNtH.transpose(1, 2))
    return tap("attn_context", torch.cat(blocks_BtNH, 1))


class Attention(nn.Module):
    """`self_attn`. q_proj is twice as wide as usual: it yields, head by head, the query and the output gate."""

    def __init__(self, config: Config):
        super().__init__()
        D, N, G, H = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.heads, self.kv_heads, self.head_dim = N, G, H
        self.q_proj = Linear(D, 2 * N * H)
        self.k_proj = Linear(D, G * H)
        self.v_proj = Linear(D, G * H)
        self.o_proj = Linear(N * H, D)
        self.q_norm = RMSNorm(H, config.rms_norm_eps, "attn_q_norm")
        self.k_norm = RMSNorm(H, config.rms_norm_eps, "attn_k_norm")

    def forward(
        self, x_BTD: Tensor, cos_BTj: Tensor, sin_BTj: Tensor, real_BS: Tensor | None, past: LayerState
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        q_in, k_in, v_in = as_read_by("attn_a1", x_BTD, self.q_proj, self.k_proj, self.v_proj)
        q_gate = self.q_proj("attn_q_gate", q_in).view(B, T, self.heads, 2 * self.head_dim)
        q_BTNH, gate_BTNH = q_gate.chunk(2, -1)
        k_BTGH = self.k_proj("attn_k_proj", k_in).view(B, T, self.kv_heads, self.head_dim)
        v_BTGH = self.v_proj("attn_v", v_in).view(B, T, self.kv_heads, self.head_dim)
        q_BTNH = rotate("attn_q", self.q_norm(q_BTNH), cos_BTj, sin_BTj)
        k_BTGH = rotate("attn_k", self.k_norm(k_BTGH), cos_BTj, sin_BTj)
        y_BTNH = attend(
            q_BTNH, *past.append(stored("attn_k_cache", k_BTGH), stored("attn_v_cache", v_BTGH)), real_BS, past.at
        )
        gate_BTNH = apply("attn_gate", torch.sigmoid, gate_BTNH)
        y_BTNH = multiply("attn_pre_o_proj", y_BTNH, gate_BTNH)
        (out_in,) = as_read_by("attn_a2", y_BTNH.flatten(2), self.o_proj)
        return self.o_proj("attn_output", out_in)
