# %% [markdown]
# # 4. Router and shared expert
#
# Every layer ends in a mixture of experts: `A` of `E` small networks, chosen for each token, and one that all tokens
# get. Engines like to treat the shared one as expert number `E`, so that one kernel does all. This notebook shows
# that the function is the same, and what that needs.
#
# $$y = \sum_{a} w_a\, \mathrm{expert}_{id_a}(x) + \sigma(g \cdot x)\; \mathrm{shared}(x)$$

# %%
import matplotlib.pyplot as plt
import style
import torch

import qwen35_moe as q
from qwen35_moe.model.moe import expert
from qwen35_moe.model.router import append_shared, route, shared_gate
from weights.build import build

checkpoint = build("tiny", style.scratch() / "tiny")
unfused = q.load(checkpoint, arithmetic="exact", shared_expert="unfused", text_only=True)
T, E, A = 32, unfused.config.num_experts, unfused.config.num_experts_per_tok
ids = (torch.arange(T) * 7919 % 251)[None]
trace = q.trace(unfused, ids, taps="layers.1.*")
layer = {key.removeprefix("layers.1."): value for key, value in trace.items()}
x_TD, moe = layer["pre_mlp_layernorm_output"][0], unfused.layers[1].mlp
print(f"{A} of {E} experts a token, and the shared one")
assert layer["moe_topk_ids"].shape == (T, A)

# %% [markdown]
# ## Routing as a picture
#
# `p = softmax(W x)` over all experts; the `A` largest are chosen, and their probabilities divided by their sum.
# Before this renormalisation, the sum says how sure the router is. It differs from token to token. After it, the sum
# is 1.

# %%
ids_TA, weights_TA = route(x_TD, moe.gate.weight, A)
probs_TE = (x_TD @ moe.gate.weight.T).softmax(-1)
weights_TE = torch.zeros(T, E, dtype=torch.float64).scatter(1, ids_TA, weights_TA)
kept_T = probs_TE.gather(1, ids_TA).sum(1)

fig, axes = plt.subplots(1, 3, figsize=(8.4, 3.4), sharey=True, width_ratios=(1, 1, 0.6))
style.picture(axes[0], probs_TE, "moe_router_probs", "expert", "token", "probability", vmin=0, vmax=1)
style.picture(axes[1], weights_TE, "moe_topk_weights", "expert", "", "weight (0: not chosen)", vmin=0, vmax=1)
axes[2].plot(kept_T, range(T), linestyle="", label="before")
axes[2].plot(weights_TA.sum(1), range(T), linestyle="", label="after")
axes[2].set(xlabel="sum of the chosen", title="Renormalisation", xlim=(0, 1.09))
axes[2].legend(loc="center left", fontsize=8, handletextpad=0.1, borderaxespad=0)
style.show()
assert torch.equal(ids_TA, layer["moe_topk_ids"]) and torch.equal(weights_TA, layer["moe_topk_weights"])
torch.testing.assert_close(weights_TA, probs_TE.gather(1, ids_TA) / kept_T[:, None])

# %% [markdown]
# Renormalising after the softmax over all experts is the same as a softmax over the chosen logits alone. That is how
# several kernels compute it:

# %%
logits_TA = (x_TD @ moe.gate.weight.T).gather(1, ids_TA)
torch.testing.assert_close(logits_TA.softmax(-1), weights_TA)

# %% [markdown]
# ## The shared expert has a gate of its own
#
# Its weight is `sigmoid(g . x)`, one number a token. It takes no part in the renormalisation. The weights of the
# routed experts sum to 1. The weight of the shared expert, between 0 and 1, comes on top.

# %%
gate_T1 = shared_gate(x_TD, moe.shared_expert_gate.weight)
shared_TD = moe.shared_expert(x_TD)
routed_TD = moe.experts.combine(x_TD, ids_TA, weights_TA)
torch.testing.assert_close(routed_TD + gate_T1 * shared_TD, layer["mlp_output"])
fig, ax = plt.subplots(figsize=(7.2, 2.6))
ax.plot(routed_TD.norm(dim=1), label="routed experts")
ax.plot((gate_T1 * shared_TD).norm(dim=1), label="shared expert, gated")
ax.set(xlabel="token", ylabel="length of what is added", title="What both add to the stream, layer 1", ylim=(0, None))
ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
style.show()
assert gate_T1.min() > 0 and gate_T1.max() < 1

# %% [markdown]
# ## Fused
#
# Now the shared expert becomes slot `E` of `E + 1`. Its rows are appended to the experts' tensors. That copies bits
# and computes nothing. `append_shared` gives every token one more column, the last one: id `E`, weight `sigmoid(g .
# x)`. SGLang does this since PR 20736.

# %%
fused = q.load(checkpoint, arithmetic="exact", shared_expert="fused", text_only=True)
shared, (gate_up, down) = moe.shared_expert, fused.layers[1].mlp.experts.at(E)
print(f"slots {moe.experts.count} -> {fused.layers[1].mlp.experts.count}, the last one {list(gate_up.shape)}")
assert torch.equal(gate_up, torch.cat((shared.gate_proj.weight, shared.up_proj.weight)))  # bit for bit
assert torch.equal(down, shared.down_proj.weight)

fused_trace = q.trace(fused, ids, taps="layers.1.*")
slot_ids, slot_weights = (fused_trace[f"layers.1.moe_slot_{name}"] for name in ("ids", "weights"))
weights_TX = torch.zeros(T, E + 1, dtype=torch.float64).scatter(1, slot_ids, slot_weights)
fig, axes = plt.subplots(1, 3, figsize=(8.4, 3.2), width_ratios=(1, 1, 1))
style.picture(axes[0], weights_TX, "moe_slot_weights", "slot (10: shared)", "token", "weight", vmin=0, vmax=1)
outputs = layer["mlp_output"], fused_trace["layers.1.mlp_output"]
for ax, y, title in zip(axes[1:], outputs, ("mlp_output, unfused", "mlp_output, fused"), strict=True):
    style.picture(ax, y, title, "element of D", "", "value", cmap=style.DIVERGING, vmin=-4, vmax=4)
style.show()
assert (slot_ids[:, -1] == E).all()
error = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
assert error < 1e-14
torch.testing.assert_close(fused(ids), unfused(ids), rtol=1e-11, atol=1e-11)
print("unfused and fused: one function, to the last digits of float64")

# %% [markdown]
# The function is the same. In bf16 the two differ in where they round (notebook 7). In MXFP4 the slot must hold what
# the kernel reads (notebook 6).
#
# ## What `ep_scale` is for
#
# With expert parallelism, each of `ep_size` ranks holds some of the experts and computes their outputs. The outputs
# of all ranks are summed. A routed expert lives on one rank. The shared slot lives on *every* rank, so its output is
# summed `ep_size` times, unless each rank gives it the weight `gate * ep_scale` with `ep_scale = 1/ep_size`.
#
# sglang 23084 and 26845 are about the missing factor. They report that GSM8K, in FP8, fell from 94.2 % to 10.8 % with
# two ranks. With four ranks it fell to 0.9 %.

# %%


def expert_parallel(ep_size, ep_scale):
    """mlp_output [T, D] as `ep_size` ranks compute it."""
    slots, weights = append_shared(ids_TA, weights_TA, gate_T1, E, ep_scale)
    total = torch.zeros_like(x_TD)
    for rank in range(ep_size):
        mine = (slots % ep_size == rank) | (slots == E)
        total += fused.layers[1].mlp.experts.combine(x_TD, slots, weights * mine)
    return total


sizes, truth = [1, 2, 4, 8], layer["mlp_output"]
curves = {
    "ep_scale = 1/ep_size": [(expert_parallel(n, 1 / n) - truth).norm() / truth.norm() for n in sizes],
    "ep_scale = 1 (the bug)": [(expert_parallel(n, 1.0) - truth).norm() / truth.norm() for n in sizes],
}
fig, ax = plt.subplots(figsize=(5.6, 2.8))
for label, errors in curves.items():
    ax.plot(sizes, errors, label=label)
ax.set(
    xlabel="ep_size (ranks)", ylabel="relative error of mlp_output", xticks=sizes, title="The shared slot on n ranks"
)
ax.legend()
style.show()
assert max(curves["ep_scale = 1/ep_size"]) < 1e-14
assert curves["ep_scale = 1 (the bug)"][0] < 1e-14 < 0.1 < curves["ep_scale = 1 (the bug)"][1]

# %% [markdown]
# On one rank the bug does not show. The rule that finds it needs no reference at all: over all ranks the weights of
# the shared slot must add up to `sigmoid(g . x)`.
#
# ## Try it
#
# An engine runs on 4 ranks and forgot the factor. Its `mlp_output` is wrong by a multiple of `gate_T1 * shared_TD`.
# Which multiple?

# %%
answer = None
style.attempt(
    answer,
    lambda n: torch.allclose(expert_parallel(4, 1.0) - truth, n * gate_T1 * shared_TD, atol=1e-12),
    "It should be in the sum once.",
)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# answer = 3
# ```
# </details>
#
# Another engine forgot to renormalise: its weights are the probabilities. By which factor `[T]` are its routed
# outputs too small? Give a tensor that is defined above.

# %%
answer = None


def unnormalised():
    return moe.experts.combine(x_TD, ids_TA, probs_TE.gather(1, ids_TA))


style.attempt(
    answer,
    lambda factor_T: torch.allclose(unnormalised(), routed_TD * factor_T[:, None], atol=1e-12),
    "The output is linear in the weights; look at the third panel of the first figure.",
)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# answer = kept_T
# ```
# </details>
#
# One more check, by hand: the first token's routed output from the definition.

# %%
by_hand = sum(
    w * expert(x_TD[:1], moe.experts.gate_up_proj[e], moe.experts.down_proj[e])[0]
    for e, w in zip(ids_TA[0], weights_TA[0], strict=True)
)
torch.testing.assert_close(by_hand, routed_TD[0])
