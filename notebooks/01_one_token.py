# %% [markdown]
# # 1. One token through the model
#
# Every value of Qwen3.5 MoE that is worth naming has a name, a *tap*. This notebook sends tokens through a model with
# the structure of the real one and looks at all of them. It is the map that the other notebooks refer to.
#
# Letters, here and in the code: `B` batch, `T` tokens, `D` model width, `V` vocabulary; `N`, `G`, `H` query heads,
# key/value heads, head width; `J`, `M`, `K`, `P` DeltaNet's value heads, key heads, key width, value width; `E`
# experts, `A` active ones, `F` expert width. `x_BTD` is a tensor with three dimensions.

# %%
import matplotlib.pyplot as plt
import style
import torch
from matplotlib.patches import FancyBboxPatch

import qwen35_moe as q
from qwen35_moe.numerics.tap_table import TAPS
from weights.build import build, real_config

checkpoint = build("tiny", style.scratch() / "tiny")
model = q.load(checkpoint, arithmetic="exact", shared_expert="unfused", text_only=True)
ids = (torch.arange(24) * 7919 % 251)[None]  # [B, T], any tokens will do
trace = q.trace(model, ids)
print(f"{len(trace)} values of {model.config.num_hidden_layers} layers, all {trace['final_norm'].dtype}")
assert trace["next_token_logits"].shape == (1, 24, model.config.vocab_size)

# %% [markdown]
# ## The map
#
# A layer adds twice to the residual stream `h`, first a mixer that looks at other tokens, then a mixture of experts:
#
# $$h \leftarrow h + \mathrm{mixer}(\mathrm{norm}(h)), \qquad h \leftarrow h + \mathrm{moe}(\mathrm{norm}(h))$$
#
# Three layers of four mix by Gated DeltaNet (notebook 3), every fourth by gated attention (notebook 2). All have the
# same mixture of experts (notebook 4).


# %%
def box(ax, x, y, text, colour, width=1.9, height=0.62):
    patch = FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.04", ec=colour, fc="w")
    ax.add_patch(patch)
    ax.text(x, y, text, ha="center", va="center", fontsize=8)


def arrow(ax, x0, y0, x1, y1):
    ax.annotate("", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "->", "color": style.GREY})


fig, ax = plt.subplots(figsize=(7.4, 4.6))
box(ax, 1, 0, "embed_tokens", style.BLACK)
box(ax, 1, 1.2, "layer_input  h", style.BLACK)
box(ax, 4, 1.2, "input_layernorm", style.GREY)
box(ax, 7, 1.2, "Gated DeltaNet (3 of 4)\nor gated attention (1 of 4)", style.BLUE, 2.7, 0.8)
box(ax, 1, 2.5, "pre_mlp_residual  h", style.BLACK)
box(ax, 4, 2.5, "pre_mlp_layernorm_\noutput", style.GREY, 1.9, 0.7)
box(ax, 7, 2.5, "A of E routed experts\n+ gated shared expert", style.RED, 2.7, 0.8)
box(ax, 1, 3.8, "layer_output_sum  h", style.BLACK)
box(ax, 4, 3.8, "final_norm", style.GREY)
box(ax, 7, 3.8, "next_token_logits", style.BLACK, 2.7)
arrow(ax, 1, 0.37, 1, 0.83)
for y, name in ((1.2, "attn_output"), (2.5, "mlp_output")):
    arrow(ax, 2, y, 2.98, y)
    arrow(ax, 5, y, 5.58, y)
    arrow(ax, 1, y + 0.37, 1, y + 0.93)
    arrow(ax, 7, y + 0.45, 1.12, y + 0.68)
    ax.text(4.1, y + 0.66, name, fontsize=8, style="italic", ha="center", bbox={"fc": "w", "ec": "none", "pad": 1})
    ax.text(0.82, y + 0.66, "+", fontsize=11, ha="center", va="center")
arrow(ax, 2.05, 3.8, 2.98, 3.8)
arrow(ax, 5, 3.8, 5.58, 3.8)
ax.text(-0.36, 2.5, "one layer", rotation=90, va="center", fontsize=8, color=style.GREY)
ax.plot([-0.12, -0.12], [0.9, 4.1], color=style.GREY, linestyle="-", marker="")
ax.set(xlim=(-0.6, 8.6), ylim=(-0.5, 4.3), title="The text model, with the names of its taps")
ax.axis("off")
style.show()
assert model.config.layer_types == ("linear_attention",) * 3 + ("full_attention",)

# %% [markdown]
# ## Names and shapes
#
# `q.trace` returns an ordered mapping from a key, `layers.3.attn_q`, to a tensor. The table in
# `qwen35_moe/numerics/tap_table.py` gives the dimensions of each value, and its names in SGLang and transformers.
# Here is the layer with attention:

# %%
for key, value in trace.items():
    if key.startswith("layers.3.") and not key.endswith((".gain", "_cos", "_sin")):
        tap = TAPS[trace.sites[key].name]
        print(f"{key.removeprefix('layers.3.'):26} {tap.dims:12} {str(list(value.shape)):18} {tap.meaning}")
c = model.config
assert trace["layers.3.attn_q"].shape == (1, 24, c.num_attention_heads, c.head_dim)
assert trace["layers.3.attn_k"].shape == (1, 24, c.num_key_value_heads, c.head_dim)

# %% [markdown]
# ## The stream of one token
#
# The taps are enough to rebuild the stream: a layer's output is its input plus two contributions. In float64 the sum
# agrees to the last bit, because the model computes the same sum.

# %%
t = 23  # the last token
for i in range(c.num_hidden_layers):
    h = trace[f"layers.{i}.layer_input"][0, t]
    added = trace[f"layers.{i}.attn_output"][0, t], trace[f"layers.{i}.mlp_output"][t]
    assert torch.equal(h + added[0] + added[1], trace[f"layers.{i}.layer_output_sum"][0, t])


def rms(x):
    return x.square().mean().sqrt().item()


names = ["layer_input", "attn_output", "pre_mlp_residual", "mlp_output"]
values = {n: [rms(trace[f"layers.{i}.{n}"].reshape(24, -1)[t]) for i in range(4)] for n in names}
fig, ax = plt.subplots()
x = torch.arange(4)
stream = [values[n][i] for i in range(4) for n in ("layer_input", "pre_mlp_residual")]
ax.plot(torch.arange(8) / 2, stream, label="stream h")
ax.plot(x + 0.25, values["attn_output"], label="added by the mixer, attn_output")
ax.plot(x + 0.75, values["mlp_output"], label="added by the experts, mlp_output")
ax.set(xlabel="layer (a half: before its experts)", ylabel="root mean square of D values", xticks=range(5))
ax.set(title="One token's stream, and what is added to it", ylim=(0, None))
ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
style.show()
assert values["layer_input"][3] > values["layer_input"][0]  # blocks mostly add, so the stream grows

# %% [markdown]
# ## A norm of the stream
#
# The norm before a block scales by the root mean square, and its stored weight `w` is the deviation from 1. Without
# `1 +` the model still runs, but it writes nonsense:
#
# $$y = \frac{x}{\sqrt{\mathrm{mean}(x^2) + \varepsilon}}\,(1 + w)$$

# %%
w = model.layers[0].input_layernorm.weight
h = trace["layers.0.layer_input"]
unit = h / (h.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt()
torch.testing.assert_close(unit * (1 + w), trace["layers.0.input_layernorm"])
forgotten = (unit * w - trace["layers.0.input_layernorm"]).norm() / trace["layers.0.input_layernorm"].norm()
print(f"w lies between {w.min():.1f} and {w.max():.1f}; without '1 +' the norm is off by {forgotten:.0%}")
assert w.min() < 0 < w.max() and forgotten > 0.5

# %% [markdown]
# ## Where the 3 B of 35 B are
#
# The names of Qwen3.5-35B-A3B: 35 billion parameters, of which a token uses about 3. On the `meta` device the model
# takes no memory. We count every parameter, and the share of it that one token reads.

# %%


def count(name):
    """Parameters of the text model by part, in billions: (all, used by one token)."""
    config = q.Config.from_dict(real_config(name))
    with torch.device("meta"):
        real = q.Model(config)
    used = {"experts": config.num_experts_per_tok / config.num_experts, "embed": 1 / config.vocab_size}
    parts = {"embed_tokens": "embed", "lm_head": "head", ".experts.": "experts", "shared": "shared expert"}
    parts |= {"linear_attn": "DeltaNet", "self_attn": "attention", "mlp.gate": "router", "norm": "norms"}
    totals = {}
    for key, parameter in real.named_parameters():
        part = next(part for pattern, part in parts.items() if pattern in key)
        stored, active = totals.get(part, (0.0, 0.0))
        n = parameter.numel() / 1e9
        totals[part] = stored + n, active + n * used.get(part, 1.0)
    return totals


totals = count("qwen3.5-35b-a3b")
stored, active = (sum(column) for column in zip(*totals.values(), strict=True))
print(f"stored {stored:.2f} B, used by one token {active:.2f} B")
for part, (n, a) in sorted(totals.items(), key=lambda item: -item[1][0]):
    print(f"  {part:14} {n:8.3f} B   used {a:6.3f} B")
assert 34 < stored < 36 and 2.5 < active < 3.5

fig, axes = plt.subplots(1, 2, figsize=(7.4, 2.8), sharey=True)
order = sorted(totals, key=lambda part: totals[part][1])
for ax, column, colour, title in ((axes[0], 0, style.BLUE, "Stored"), (axes[1], 1, style.RED, "Used by one token")):
    ax.barh(order, [totals[part][column] for part in order], color=colour)
    ax.set(xlabel="parameters in billions", title=title)
    ax.grid(axis="y", visible=False)
style.show()

# %% [markdown]
# ## Try it
#
# How many billion parameters does one token of Qwen3.5-397B-A17B use, by the same count? Its configuration is
# `"qwen3.5-397b-a17b"`.

# %%
answer = None
style.attempt(
    answer,
    lambda a: abs(a - sum(used for _, used in count("qwen3.5-397b-a17b").values())) < 0.5,
    "Sum the second numbers of count(name).values().",
)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# answer = sum(used for _, used in count("qwen3.5-397b-a17b").values())
# ```
# About 17: the name counts the head, and not the embedding.
# </details>
