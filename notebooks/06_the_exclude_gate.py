# %% [markdown]
# # 6. The exclude gate
#
# Notebook 4 showed that the shared expert may become slot `E` of the routed experts. This one is about when it must
# not: the story of [sglang PR 22948](https://github.com/sgl-project/sglang/pull/22948). A checkpoint said in its
# configuration that the shared expert is BF16 while the routed experts are MXFP4. SGLang fused all the same, and copied
# BF16 weights into a slot that its kernel reads as packed FP4. The model loaded, and wrote garbage.

# %%
from textwrap import fill

import matplotlib.pyplot as plt
import style
import torch
from matplotlib.colors import ListedColormap

import qwen35_moe as q
from qwen35_moe.checkpoint import Checkpoint
from qwen35_moe.gate.decide import VARIANTS, decide_layers, hazards
from qwen35_moe.gate.records import GateModel
from qwen35_moe.quant.mxfp4 import decode
from weights import gate_recipes
from weights.build import build

recipe = gate_recipes.load("397b-mxfp4")
print(recipe.doc)

# %% [markdown]
# ## The configuration
#
# Quark's `quantization_config` has one default, MXFP4, and a list of what it leaves alone. We did not have the file
# itself; the list is rebuilt from what PRs report about it. It has 183 names of projections of shared experts: three
# for each of the 60 layers and for the draft head. Each entry is the name of a module.

# %%
exclude = recipe.config["quantization_config"]["exclude"]
body = [e for e in exclude if ".shared_expert." in e]
print(len(exclude), "entries,", len(body), "of them name the body of a shared expert, such as")
print(" ", body[0])
print(sum("shared_expert_gate" in e for e in exclude), "name its gate, which is another module, and always BF16")
assert len(body) == 183 == 3 * (60 + 1)

# %% [markdown]
# ## The gate
#
# `can_fuse_shared_expert` answers for a configuration, says why, and names the entry that decided:

# %%
decision = q.can_fuse_shared_expert(recipe.config, rule="strict")
print(fill(str(decision), 110))
assert not decision and decision.entry.entry in exclude

# %% [markdown]
# The PR's own rule gives the same answer here. It looks for the word `shared_expert` in every entry, except where that
# is part of `shared_expert_gate`:

# %%
print(fill(str(q.can_fuse_shared_expert(recipe.config, rule="sglang-22948")), 110))
card = gate_recipes.load("397b-moe-mxfp4")  # the sister checkpoint, whose shared expert is MXFP4 too
assert not q.can_fuse_shared_expert(recipe.config, rule="sglang-22948")
assert q.can_fuse_shared_expert(card.config, rule="sglang-22948") and q.can_fuse_shared_expert(card.config)

# %% [markdown]
# ## The bytes
#
# What had been loaded before the PR? We have a checkpoint with the same structure. Its shared expert is BF16, two
# bytes a weight, low byte first. A row of the slot takes half a byte a weight. Take the simplest case: a row is
# filled from the front. It gets a quarter of the BF16 row, and the kernel reads four weights where one was. Nothing
# fills the scales of the slot, so they may be anything. Here we take them as 1.

# %%
checkpoint = build("tiny-mxfp4", style.scratch() / "tiny-mxfp4")
stored = Checkpoint.open(checkpoint)
name = "layers.0.mlp.shared_expert.gate_proj"
print(f"{name}: {stored.spec(name)}; its neighbours, layers.0.mlp.experts: {stored.spec('layers.0.mlp.experts')}")


def misread(weight_OI):
    """A BF16 matrix as the kernel reads it that expects packed FP4 of the same shape."""
    rows, columns = weight_OI.shape
    codes_OZ = weight_OI.bfloat16().contiguous().view(torch.uint8)[:, : columns // 2].contiguous()
    return decode(codes_OZ, torch.full((rows, columns // 32), 127, dtype=torch.uint8), torch.float64)


true = stored.weight(name).read().decode(torch.float64)
garbage = misread(true)
fig, axes = plt.subplots(1, 2, figsize=(8.2, 2.9))
for ax, x, title in ((axes[0], true, "gate_proj, BF16"), (axes[1], garbage, "the same bytes, read as FP4")):
    span = x.abs().max()
    style.picture(ax, x, title, "column", "row", "value", cmap=style.DIVERGING, vmin=-span, vmax=span)
style.show()
correlation = torch.corrcoef(torch.stack((true.flatten(), garbage.flatten())))[0, 1]
assert true.shape == garbage.shape and abs(correlation) < 0.1

# %% [markdown]
# The stripes come from the format. Every fourth weight of the garbage is the upper half of a BF16 number's high byte:
# its sign and three bits of its exponent. Weights of similar size share these bits, so the values differ only in the
# sign. The column before it has exponent bits, too. The other two columns are mantissa bits, which are almost random.

# %%
fig, axes = plt.subplots(1, 4, figsize=(8.2, 2.4), sharey=True)
names = ("low byte, low half", "low byte, high half", "high byte, low half", "high byte, high half")
spreads = []
for i, ax in enumerate(axes):
    column = garbage[:, i::4].flatten()
    values, counts = column.abs().unique(return_counts=True)
    ax.bar([f"{v:g}" for v in values.tolist()], (counts / column.numel()).tolist(), color=style.BLUE)
    ax.set(title=names[i], xlabel="|value| read")
    ax.tick_params(axis="x", labelsize=7)
    spreads.append(counts.max().item() / column.numel())
axes[0].set_ylabel("share")
style.show()
assert spreads[3] > 0.9 and max(spreads[:2]) < 0.3

# %% [markdown]
# And the model? Only one expert of eleven is noise, but every token gets it, in every layer. The weights are also
# larger than they should be: with scales of 1, BF16 weights of 0.1 are read as values up to 6.

# %%
model = q.load(checkpoint, arithmetic="exact", shared_expert="unfused", text_only=True)
ids = (torch.arange(64) * 7919 % 251)[None]
right = q.trace(model, ids)
for layer in model.layers:
    for linear in (
        layer.mlp.shared_expert.gate_proj,
        layer.mlp.shared_expert.up_proj,
        layer.mlp.shared_expert.down_proj,
    ):
        linear.weight.copy_(misread(linear.weight))
wrong = q.trace(model, ids)
rows = [right["next_token_logits"].argmax(-1), wrong["next_token_logits"].argmax(-1)]
agree = (rows[0] == rows[1]).double().mean().item()
fig, ax = plt.subplots(figsize=(5.4, 2.6))
error = [
    ((wrong[key] - right[key]).norm() / right[key].norm()).item()
    for key in (f"layers.{i}.layer_output_sum" for i in range(4))
]
ax.plot(range(4), error)
ax.set(xlabel="layer", ylabel="relative error of the stream", title="The shared expert misread", xticks=range(4))
ax.set_ylim(0, None)
style.show()
print(f"the most likely token is still the same at {agree:.0%} of positions")
assert agree < 0.1 and min(error) > 1

# %% [markdown]
# ## The guard
#
# The gate decides. The loader checks the bytes as well, before it copies any. If you force the fusion, you get an
# error that names the tensor:

# %%
try:
    q.load(checkpoint, shared_expert="fused", text_only=True)
except q.Qwen35Error as error:
    print(f"{error.what}\n  where: {error.where}\n  expected: {error.expected}\n  found: {error.found}")
    refused = error
assert "shared_expert" in str(refused.where)

# %% [markdown]
# ## Every engine's rule on the same lists
#
# Here are the rules of the engines, with their defaults and with the switches that users set, on the lists of
# thirteen checkpoints and templates. The lists are rebuilt from reports, which the recipes in `weights/recipes/gate`
# name. "breaks" means: an engine that acts on this answer reads stored bytes in a wrong format.

# %%
WORDS = ("no", "fused", "fused, converted", "breaks")
recipes = [gate_recipes.load(n) for n in gate_recipes.names()]
labels = [label for label, _, _ in VARIANTS]
table = torch.zeros(len(recipes), len(VARIANTS), dtype=torch.long)
for row, r in enumerate(recipes):
    listed = GateModel.from_config(r.config)  # the list is read once, for all rules
    for column, (label, rule, switches) in enumerate(VARIANTS):
        decisions = decide_layers(listed, rule=rule, stored=r.stored, **switches)
        first = decisions[0]
        broken = first.layer in hazards(listed, None, decisions[:1], r.stored)
        table[row, column] = 3 if broken else 2 if first.online else int(bool(first))
        expected = r.expected[label].split()[0]
        assert expected == ("online" if first.online else "fused" if first else "no") + "!" * broken

fig, ax = plt.subplots(figsize=(8.4, 4.6))
palette = ListedColormap(["#F2F2F2", style.SKY, style.GREEN, style.RED])
ax.imshow(table.numpy(), cmap=palette, vmin=0, vmax=3, aspect="auto")
for row in range(len(recipes)):
    for column in range(len(labels)):
        word = WORDS[table[row, column]]
        ax.text(column, row, word.replace(", ", ",\n"), ha="center", va="center", fontsize=7)
ax.set_xticks(range(len(labels)), [label.replace(" ", "\n", 1).replace("-", "\n", 1) for label in labels], fontsize=7)
ax.set_yticks(range(len(recipes)), [r.name for r in recipes])
ax.set(xlabel="rule", ylabel="checkpoint", title="May the shared expert of the target's layers be fused?")
ax.grid(False)
style.show()
breaks = {labels[c]: [recipes[r].name for r in range(len(recipes)) if table[r, c] == 3] for c in range(len(labels))}
for label, where in breaks.items():
    print(f"{label:24} {', '.join(where) or 'never breaks'}")
assert not breaks["strict"] and breaks["sglang-0.5.23"]

# %% [markdown]
# SGLang reads the lists of Quark and ModelOpt, and no others. vLLM fuses only if it is told to. ATOM without prefixes
# takes the first entry with the word `shared_expert` for all layers, so it says no where it could fuse. The list of
# the last row has globs. Quark reads globs, other loaders do not: they take BF16 modules for MXFP4, fused or not.
#
# ## What `strict` adds
#
# The engines search for a word, but do not read the whole list. Quark writes names, globs and `re:` patterns. Engines
# read names and `re:` patterns, and search for the word in every entry. Here is the small model with lists that a
# person might write:

# %%
tiny = stored.config
lists = {
    "exact names": [
        "*shared_expert_gate",
        *(e for e in tiny["quantization_config"]["exclude"] if ".shared_expert." in e),
    ],
    "glob": ["*.shared_expert.*"],
    "regex with the word": ["re:.*shared_expert\\."],
    "regex without it": ["re:.*mlp\\.shared"],
    "the gate only": ["*shared_expert_gate"],
    "nothing": [],
}


def answers(entries, rule):
    quant = tiny["quantization_config"] | {"exclude": entries}
    return q.can_fuse_shared_expert(tiny, quant, rule, **({"vllm_opt_in": True} if rule == "vllm" else {}))


print(f"{'exclude list':22}{'strict':>10}{'22948':>10}{'0.5.23':>10}{'vllm':>10}{'atom':>10}")
for label, entries in lists.items():
    row = [answers(entries, rule).fused for rule in ("strict", "sglang-22948", "sglang-0.5.23", "vllm", "atom")]
    print(f"{label:22}" + "".join(f"{'fused' if fused else 'no':>10}" for fused in row))
assert not answers(lists["regex without it"], "strict")
assert answers(lists["regex without it"], "sglang-0.5.23")  # the failure of the PR again: BF16 bytes, FP4 slot
print()
print(fill(str(answers(lists["glob"], "strict")), 110))
assert "disagree" in answers(lists["glob"], "strict").reason

# %% [markdown]
# `strict` reads the list as each reader would, and refuses if they differ. If it has the checkpoint, it looks at what
# is stored instead. Here the list lacks the shared expert, which is BF16 in the checkpoint. The configuration says
# "fuse"; the bytes say no.

# %%
forgot = tiny["quantization_config"] | {"exclude": ["*shared_expert_gate"]}
by_list = q.can_fuse_shared_expert(tiny, forgot)
by_bytes = q.can_fuse_shared_expert(tiny, forgot, stored=stored.spec)
print(by_list.word, "/", by_bytes.word)
print(by_bytes.reason)
assert by_list and not by_bytes and by_bytes.warnings

# %% [markdown]
# ## Try it
#
# Write an exclude list of one entry, which names no module at all. `strict` must fuse, and `sglang-0.5.23` must not.
# Which word does its rule search for?

# %%
answer = None
style.attempt(
    answer,
    lambda entries: (
        len(entries) == 1
        and not answers(entries, "sglang-0.5.23")
        and answers(entries, "strict")
        and not any(".mlp.shared_expert." in e and "*" not in e for e in entries)
    ),
    "The substring shared_expert, not followed by _gate, in any entry: even one that names no module.",
)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# answer = ["shared_experts_are_quantised"]
# ```
# </details>
