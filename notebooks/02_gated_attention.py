# %% [markdown]
# # 2. Gated attention
#
# Every fourth layer looks at all earlier tokens. It differs from plain attention in three ways: queries and keys are
# normalised, only a quarter of each head is rotated by position, and the result passes a gate that comes out of the
# query projection. This notebook takes a real layer apart and computes each step by hand.
#
# Gates after attention: "Gated Attention for Large Language Models" (arXiv 2505.06708). Rotary positions: RoFormer
# (arXiv 2104.09864).

# %%
import matplotlib.pyplot as plt
import style
import torch

import qwen35_moe as q
from qwen35_moe.model.attention import attend
from weights.build import build

checkpoint = build("tiny", style.scratch() / "tiny")
model = q.load(checkpoint, arithmetic="exact", text_only=True)
T = 24
ids = (torch.arange(T) * 7919 % 251)[None]
trace = q.trace(model, ids, taps="layers.3.*,rope_*")
layer = {key.removeprefix("layers.3."): value for key, value in trace.items()}
N, G, H, R = 4, 2, 32, model.config.rotary_dim
attention = model.layers[3].self_attn
print(f"{N} query heads share {G} key/value heads of width {H}, of which {R} elements are rotated")
assert (attention.heads, attention.kv_heads, attention.head_dim) == (N, G, H)

# %% [markdown]
# ## Query and gate in one projection
#
# `q_proj` has `2 N H` rows. They are interleaved *by head*: the first head's `H` query rows, its `H` gate rows, the
# next head's query rows, and so on. If you split the rows into a first and a second half, you mix up the heads.

# %%
q_gate = layer["attn_q_gate"].view(1, T, N, 2 * H)
query_BTNH, gate_BTNH = q_gate.chunk(2, -1)
torch.testing.assert_close(gate_BTNH.sigmoid(), layer["attn_gate"])
wrong_gate = layer["attn_q_gate"].chunk(2, -1)[1].view(1, T, N, H).sigmoid()
assert not torch.allclose(wrong_gate, layer["attn_gate"], atol=0.1)
assert attention.q_proj.weight.shape[0] == 2 * N * H

# %% [markdown]
# ## Norms of q and k
#
# Each head is normalised on its own, with the zero-centred RMSNorm of notebook 1. So the score of a query and a key
# cannot grow with their length. Before positions enter, every head has length $\sqrt H$, times its gains.

# %%
eps = model.config.rms_norm_eps
unit = query_BTNH / (query_BTNH.square().mean(-1, keepdim=True) + eps).sqrt()
torch.testing.assert_close(unit * (1 + attention.q_norm.weight), layer["attn_q_norm"])
assert (unit.norm(dim=-1) - H**0.5).abs().max() < 1e-4  # all but equal: eps is 1e-6

# %% [markdown]
# ## Partial rotary positions
#
# Only the first `R = H / 4` elements of each head are rotated, in pairs `(j, j + R/2)`. The angle grows with the
# position, by $\theta^{-2j/R}$ a token. The other three quarters do not depend on the position.

# %%
before, after = layer["attn_q_norm"], layer["attn_q"]
assert torch.equal(before[..., R:], after[..., R:])
torch.testing.assert_close(before.norm(dim=-1), after.norm(dim=-1))  # a rotation keeps lengths

fig, axes = plt.subplots(1, 2, figsize=(7.4, 2.9), width_ratios=(1, 1.2))
for j, cosine in enumerate(trace["rope_cos"][0].T):
    axes[0].plot(range(T), cosine, label=f"j = {j}")
axes[0].set(xlabel="position (token)", ylabel="cosine of the angle", title="Angles of the R/2 pairs")
axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=4, columnspacing=1, handlelength=1.6)
moved = (after - before)[0, :, 0].abs()
style.picture(
    axes[1], moved, "What the rotation changes, head 0", "element of the head", "position (token)", "|change|"
)
style.show()
assert (moved[1:, :R].amax(1) > 0).all() and moved[:, R:].max() == 0 and moved[0].max() == 0

# %% [markdown]
# Scores depend on the *distance* of two tokens, not on where they stand. Moving the whole prompt by 100 positions
# changes no logit:

# %%
shifted = model(ids, position_ids=torch.arange(T)[None] + 100)
torch.testing.assert_close(shifted, model(ids), rtol=1e-9, atol=1e-9)

# %% [markdown]
# ## Attention
#
# $$o_t = \sum_{s \le t} p_{ts} v_s, \qquad p_t = \mathrm{softmax}_s\!\left(\frac{q_t \cdot k_s}{\sqrt H}\right)$$
#
# Query head `n` reads key/value head `n // (N/G)`. By hand, and by the function of the package:

# %%
k, v = (x.repeat_interleave(N // G, 2) for x in (layer["attn_k"], layer["attn_v"].view(1, T, G, H)))
scores = torch.einsum("btnh,bsnh->bnts", layer["attn_q"], k) / H**0.5
mask = torch.ones(T, T, dtype=torch.bool).tril()
probs = scores.masked_fill(~mask, -torch.inf).softmax(-1)
context = torch.einsum("bnts,bsnh->btnh", probs, v)
torch.testing.assert_close(probs, layer["attn_probs"])
torch.testing.assert_close(context, attend(layer["attn_q"], layer["attn_k"], layer["attn_v"].view(1, T, G, H)))

# %% [markdown]
# ## Before and after the gate
#
# Probabilities sum to 1, so a head of plain attention cannot answer with nothing. Trained models then give most of
# the weight to the first token, the *attention sink*. The gate is one sigmoid for each element. It lets a head answer
# with less. Left: where head 0 looks. Middle: what it would return. Right: what the gate lets pass.

# %%
gated = layer["attn_pre_o_proj"].view(1, T, N, H)
torch.testing.assert_close(gated, context * gate_BTNH.sigmoid())
fig, axes = plt.subplots(1, 3, figsize=(8.4, 2.9))
style.picture(axes[0], probs[0, 0], "attn_probs, head 0", "key (token)", "query (token)", "probability", vmin=0)
span = context[0, :, 0].abs().max()
for ax, x, title in ((axes[1], context, "attn_context, head 0"), (axes[2], gated, "attn_pre_o_proj, head 0")):
    style.picture(
        ax, x[0, :, 0], title, "element of the head", "", "value", cmap=style.DIVERGING, vmin=-span, vmax=span
    )
style.show()
assert torch.allclose(probs.sum(-1), torch.ones(1, N, T, dtype=torch.float64))
assert (gated.abs() <= context.abs()).all()

# %% [markdown]
# The gate is not one scale for the head. It differs from element to element and from token to token. With one number
# for all, all points would lie on a line:

# %%
fig, ax = plt.subplots(figsize=(4.6, 3.4))
for n in range(N):
    ax.plot(context[0, :, n].flatten(), gated[0, :, n].flatten(), "osD^"[n], label=f"head {n}", alpha=0.5, linestyle="")
limit = context.abs().max()
ax.plot([-limit, limit], [-limit, limit], color=style.GREY, marker="", label="gate = 1")
ax.set(xlabel="attn_context", ylabel="attn_pre_o_proj", title="One gate for each element")
ax.legend()
style.show()
ratio = (gated / context).flatten()
assert ratio.min() < 0.2 and ratio.max() > 0.8

# %% [markdown]
# ## Try it
#
# A reimplementation splits `attn_q_gate` into a first and a second half for all heads at once. Which heads still get
# their own *query*? Give a set of head numbers. (Half of the projection holds `N/2` heads, query and gate each.)

# %%
answer = None
style.attempt(
    answer,
    lambda a: (
        a
        == {
            n
            for n in range(N)
            if torch.equal(layer["attn_q_gate"].chunk(2, -1)[0].view(1, T, N, H)[:, :, n], query_BTNH[:, :, n])
        }
    ),
    "Write down what the first N*H columns hold: q0 g0 q1 g1 ...",
)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# answer = {0}
# ```
# The first half holds q0 g0 q1 g1: head 1 gets gate 0 as its query, head 2 gets query 1, head 3 gets gate 1.
# </details>
