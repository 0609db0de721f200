# %% [markdown]
# # 3. Gated DeltaNet: a memory that corrects itself
#
# Three layers of four have no attention. They keep one matrix a head, the state `S` `[K, P]`, whatever the length of
# the text. It is an associative memory: it stores pairs of key and value, and answers queries. Per value head, with
# keys and queries of length 1:
#
# $$S_t = a_t S_{t-1} + k_t u_t^\top, \qquad u_t = \beta_t\,(v_t - (a_t S_{t-1})^\top k_t), \qquad o_t = S_t^\top q_t$$
#
# In words, for each token:
#
# 1. let the memory fade (`a = exp(g)`);
# 2. ask it what it already knows about the key (the *recall*);
# 3. write only the difference (`beta` says how much of it);
# 4. answer the query.
#
# "Gated Delta Networks" (arXiv 2412.06464); the delta rule as a fast weight programmer: arXiv 2102.11174; chunked form:
# arXiv 2406.06484.

# %%
from math import log

import matplotlib.pyplot as plt
import style
import torch
from torch.nn.functional import normalize

import qwen35_moe as q
from qwen35_moe.model.deltanet import chunked_delta_rule, recurrent_delta_rule
from weights.build import build

K, P = 32, 24
random = torch.Generator().manual_seed(1)


def draw(*shape):
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def remember(keys_TK, values_TP, beta=1.0, g=0.0, rule=recurrent_delta_rule):
    """The state [K, P] after writing T pairs into an empty memory of one head, through the model's own function."""
    T = len(keys_TK)
    k, v = keys_TK[None, :, None], values_TP[None, :, None]
    beta, g = (torch.full((1, T, 1), x, dtype=torch.float64) for x in (beta, g))
    return rule(k, k, v, g, beta, torch.zeros(1, 1, K, P, dtype=torch.float64))[1][0, 0]


key, value = normalize(draw(1, K), dim=-1), draw(1, P)
state = remember(key, value)
torch.testing.assert_close(state, key.T @ value)  # one pair: an outer product
torch.testing.assert_close(state.T @ key[0], value[0])  # and the query gives it back
print("one pair stored and recalled")

# %% [markdown]
# ## Many pairs
#
# With orthogonal keys the memory holds `K` pairs exactly. Random keys are only nearly orthogonal, so newer pairs
# disturb older ones. The last pair is always exact. Without the recall term, `u = beta v`, this is plain linear
# attention. It corrects nothing, and even the last pair comes back with noise.

# %%


def without_recall(keys_TK, values_TP):
    return keys_TK.T @ values_TP


def errors(state, keys, values):
    return (keys @ state - values).norm(dim=1) / values.norm(dim=1)


orthogonal = torch.linalg.qr(draw(K, K)).Q
assert errors(remember(orthogonal, v := draw(K, P)), orthogonal, v).max() < 1e-12
T, repeats = 28, 40
delta = plain = 0
for _ in range(repeats):
    keys, values = normalize(draw(T, K), dim=-1), draw(T, P)
    delta = delta + errors(remember(keys, values), keys, values) / repeats
    plain = plain + errors(without_recall(keys, values), keys, values) / repeats
fig, ax = plt.subplots()
age = T - 1 - torch.arange(T)
ax.plot(age, delta, label="delta rule")
ax.plot(age, plain, label="without recall (linear attention)")
ax.set(xlabel="pairs written since", ylabel="relative error of the recalled value", ylim=(-0.05, None))
ax.set(title=f"{T} pairs with random keys in a memory of K = {K}, mean of {repeats}")
ax.legend(loc="lower right")
style.show()
assert delta[-1] < 1e-12 and plain[-1] > 0.3
assert delta.mean() < plain.mean()

# %% [markdown]
# ## Writing over
#
# Write a pair, then another value under the *same* key. The delta rule recalls the old value, subtracts it, and
# writes the new one in its place. Without the recall term, the memory holds the sum of both.

# %%
old, new = draw(1, P), draw(1, P)
twice, pair = key.repeat(2, 1), torch.cat((old, new))
answers = {
    "old value": old[0],
    "new value": new[0],
    "delta rule": remember(twice, pair).T @ key[0],
    "without recall": without_recall(twice, pair).T @ key[0],
}
fig, ax = plt.subplots(figsize=(7.2, 2.2))
style.picture(
    ax, torch.stack(list(answers.values())), "The same key, written twice", "element of the value", "", "value",
    cmap=style.DIVERGING, vmin=-5, vmax=5,
)  # fmt: skip
ax.set_yticks(range(4), list(answers))
style.show()
torch.testing.assert_close(answers["delta rule"], new[0])
torch.testing.assert_close(answers["without recall"], old[0] + new[0])

# %% [markdown]
# ## Beta and decay
#
# `beta` in (0, 1) is how far the old value moves towards the new one. `a = exp(g)` in (0, 1) makes the whole memory
# fade with every token. Both depend on the token: `beta = sigmoid(b)`, `g = -exp(A_log) softplus(a + dt_bias)`.

# %%


def weights_of_both(beta):
    """With which weights `old` and `new` are in what is recalled after writing both under one key."""
    recalled = remember(twice, pair, beta).T @ key[0]
    return torch.linalg.lstsq(pair.T, recalled[:, None]).solution[:, 0].round(decimals=12)


fig, axes = plt.subplots(1, 2, figsize=(7.4, 2.9))
betas = torch.linspace(0, 1, 11, dtype=torch.float64)
both = torch.stack([weights_of_both(beta) for beta in betas.tolist()])
axes[0].plot(betas, both[:, 1], label="value written last")
axes[0].plot(betas, both[:, 0], label="value written before")
axes[0].set(xlabel="beta of both writes", ylabel="weight in what is recalled", title="Two values under one key")
axes[0].legend()
steps = torch.arange(40)
for a in (0.998, 0.95, 0.8):
    left = []
    for n in steps:  # n more tokens, that write nothing new (their value is what is there already: zero)
        keys = torch.cat((orthogonal[:1], orthogonal[1:2].repeat(n, 1)))
        state = remember(keys, torch.cat((value, torch.zeros(n, P))), g=log(a))
        left.append(state.T @ keys[0] @ value[0] / (value[0] @ value[0]))
    torch.testing.assert_close(torch.stack(left), a ** steps.double())
    axes[1].plot(steps, left, label=f"a = {a}", markevery=6)
axes[1].set(xlabel="tokens since it was written", ylabel="share that is left", title="How it fades", ylim=(0, 1.05))
axes[1].legend()
style.show()
torch.testing.assert_close(both, torch.stack((betas * (1 - betas), betas), 1))

# %% [markdown]
# ## Recurrent = chunked
#
# A loop over tokens is slow. Unrolled over 64 tokens, the rule is a triangular system for the `u_t`, and the rest is
# matrix products. `chunked_delta_rule` has the same signature and in float64 the same result, to the last digits:

# %%
T, J = 200, 4
q_, k_ = (normalize(draw(1, T, J, K), dim=-1) for _ in range(2))
inputs = q_, k_, draw(1, T, J, P), -draw(1, T, J).abs() / 5, draw(1, T, J).sigmoid(), draw(1, J, K, P)
(o1, s1), (o2, s2) = recurrent_delta_rule(*inputs), chunked_delta_rule(*inputs)
error = max(((o1 - o2).norm() / o1.norm()).item(), ((s1 - s2).norm() / s1.norm()).item())
assert error < 1e-13
print(f"{T} tokens, not a multiple of 64: relative difference below 1e-13")

# %% [markdown]
# ## In the model
#
# Here are the gates and the memory of the first layer. A convolution comes before them: a sum over the last 4 tokens,
# channel by channel, then SiLU. So a key can hold a few tokens. The rest is as above.

# %%
checkpoint = build("tiny", style.scratch() / "tiny")
model = q.load(checkpoint, arithmetic="exact", text_only=True)
ids = (torch.arange(48) * 7919 % 251)[None]
trace = q.trace(model, ids, taps="gdn_*")
fig, axes = plt.subplots(1, 3, figsize=(8.6, 2.7))
for ax, x, title in (
    (axes[0], trace["layers.0.gdn_beta"][0].T, "beta: how much is written"),
    (axes[1], trace["layers.0.gdn_g"][0].exp().T, "a: how much stays"),
):
    style.picture(ax, x, title, "token", "value head", "", vmin=0, vmax=1)
    ax.set_yticks(range(4))
    ax.figure.colorbar(ax.images[0], ax=ax, label="from 0 to 1")
memory = trace["layers.0.gdn_state"][0, 0]
style.picture(
    axes[2], memory, "S of head 0, at the end", "value width P", "key width K", "value",
    cmap=style.DIVERGING, vmin=-memory.abs().max(), vmax=memory.abs().max(),
)  # fmt: skip
style.show()
assert trace["layers.0.gdn_beta"].min() > 0 and trace["layers.0.gdn_beta"].max() < 1
assert (trace["layers.0.gdn_g"] < 0).all()

# %% [markdown]
# ## What breaks without the recall
#
# At least one public reimplementation leaves the recall out, and its model still runs and still writes plausible text
# for a while. We plant the same bug with one handler, which changes the value at a tap (stage `taps.BREAK`). Only the
# recurrent rule has the tap `gdn_recall`, so we switch the arithmetic to that rule.

# %%


class NoRecall(q.taps.Handler):
    """Makes every recall zero: u = beta v."""

    stage = q.taps.BREAK

    def __call__(self, site, x):
        return torch.zeros_like(x) if site.name == "gdn_recall" else None


recurrent = q.Arithmetic(name="exact, recurrent", dtype=torch.float64, switches={"gdn_rule": "recurrent"})
model.arithmetic = recurrent
right = q.trace(model, ids)
broken = q.trace(model, ids, replay=NoRecall())
torch.testing.assert_close(right["next_token_logits"], model(ids))


def by_token(key):
    a, b = broken[key].reshape(len(ids[0]), -1), right[key].reshape(len(ids[0]), -1)
    return (a - b).norm(dim=1) / b.norm(dim=1)


fig, ax = plt.subplots()
for i in range(4):
    ax.plot(by_token(f"layers.{i}.attn_output"), label=f"layer {i}", markevery=4)
ax.set(xlabel="token", ylabel="relative error of attn_output", title="Recall left out in the three DeltaNet layers")
ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
style.show()
first = by_token("layers.0.attn_output")
assert first[0] == 0  # an empty memory has nothing to recall: the first token is right
assert first[24:].mean() > 0.05  # and it gets worse as the memory fills
print("the first token is right, the others are not: a test of one token would pass")

# %% [markdown]
# ## Try it
#
# A pair is written with `a = 0.9` a token. After how many tokens is less than half of it left?

# %%
answer = None
style.attempt(
    answer,
    lambda n: 0.9**n < 0.5 <= 0.9 ** (n - 1),
    "What is left after n tokens is a**n.",
)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# answer = 7
# ```
# </details>
#
# Two values are written under one key, as above, both with the same `beta`. Which `beta` keeps most of the *earlier*
# value?

# %%
answer = None
style.attempt(
    answer,
    lambda beta: all(weights_of_both(beta)[0] >= weights_of_both(b)[0] for b in (beta - 0.05, beta + 0.05)),
    "The first is recalled with weight beta (1 - beta).",
)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# answer = 0.5
# ```
# A quarter of it is left, and half of the later value. The later value always weighs more.
# </details>
