# %% [markdown]
# # 5. MXFP4 by hand
#
# Four bits a weight: sixteen values, and one scale for every 32 of them. This notebook draws the values, and packs
# and unpacks bytes by hand. It also shows why engines that agree on the format write different bytes: the standard
# leaves open how a scale is chosen.
#
# OCP Microscaling Formats (MX) v1.0, sections 5.2 to 6.3. Letters: `O` rows, `I` columns, `Q = I/32` blocks,
# `Z = I/2` bytes of codes.

# %%
import matplotlib.pyplot as plt
import style
import torch

import qwen35_moe as q
from qwen35_moe.checkpoint import Checkpoint
from qwen35_moe.quant.mxfp4 import E2M1, SCALE_RULES, decode, encode, quantise_dequantise
from weights.build import build

assert q.quant.mxfp4.MXFP4_BLOCK == 32 and len(E2M1) == 16 and len(SCALE_RULES) == 5

# %% [markdown]
# ## Sixteen values
#
# A code is `s ee m`: sign, two bits of exponent, one of mantissa (E2M1). Exponent 0 is subnormal: 0 and 0.5. There is
# no infinity and no NaN. Neighbours are 0.5 apart below 2, 1 up to 4, and 2 up to 6.
#
# A scale is one byte `s`, worth $2^{s-127}$ (E8M0); 255 is NaN. It multiplies all values of its block:
#
# $$x_i = \mathrm{E2M1}[c_i] \cdot 2^{\,s_{\lfloor i/32 \rfloor} - 127}$$

# %%
fig, ax = plt.subplots(figsize=(7.4, 2.5))
for row, byte in enumerate((126, 127, 128)):
    values = [v * 2.0 ** (byte - 127) for v in E2M1]
    ax.plot(values, [row] * 16, linestyle="", marker="|", markersize=14, markeredgewidth=2)
for code, value in enumerate(E2M1[:8]):
    ax.annotate(f"{code}", (value, 1), (0, 10), textcoords="offset points", ha="center", fontsize=7)
ax.set_yticks(range(3), ["126: x 1/2", "127: x 1", "128: x 2"])
ax.set(
    xlabel="value",
    ylabel="scale byte",
    ylim=(-0.5, 2.7),
    xticks=range(-12, 13, 2),
    title="E2M1 under three scales (numbers: codes)",
)
style.show()


def e2m1(code):
    """The value of a code, from its bits."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if sign else size


assert [e2m1(code) for code in range(16)] == list(E2M1)

# %% [markdown]
# ## Packing
#
# Byte `b` of a row holds column `2b` in its low half and column `2b + 1` in its high half. Swapping the halves is a
# classic bug that keeps all statistics of a matrix, and all of its norms.

# %%
x = torch.tensor([1.0, -2.0, 0.5, 6.0] + 28 * [0.0])[None]
codes, scales = encode(x)
print("bytes", [f"{byte:#04x}" for byte in codes[0, :2]], "scale", scales[0].tolist())
low, high = codes & 15, codes >> 4
by_hand = torch.stack((low, high), -1).flatten(-2)
values = torch.tensor([e2m1(int(c)) for c in by_hand[0]]) * 2.0 ** (int(scales[0, 0]) - 127)
assert torch.equal(values[None], x) and torch.equal(decode(codes, scales, torch.float32), x)
swapped = decode(low << 4 | high, scales, torch.float32)
assert swapped.norm() == x.norm() and not torch.equal(swapped, x)

# %% [markdown]
# ## Five ways to choose a scale
#
# Let `amax` be the largest magnitude of a block, `amax = fraction * 2^k` with `fraction` in [1, 2). With the scale
# $2^{k-2}$, `amax` divided by the scale lies in [4, 8). E2M1 ends at 6, so the rest is cut off. With twice that
# scale, it lies in [2, 4). Nothing is cut off, but the steps are coarser. From which fraction on is the scale
# doubled? Five rules are in use:
#
# | rule | doubled | who |
# |---|---|---|
# | `floor` | never | OCP MX v1.0, section 6.3 |
# | `even` | from 1.75 on | AMD Quark, Aiter's Triton kernels, compressed-tensors |
# | `threshold-1.5` | from 1.5 on | Aiter's HIP kernels before June 2026, FlyDSL epilogue |
# | `round-up` | above 1.5 | Aiter's HIP kernels since (aiter 3212); cuts nothing off |
# | `ceil` | above 1 | (kept for comparison) `amax` is at most 4 times the scale |

# %%
fraction = torch.arange(1, 2, 1 / 256, dtype=torch.float64)
block = torch.zeros(len(fraction), 32, dtype=torch.float64)
block[:, 0] = 4 * fraction  # amax between 4 and 8, k = 2
fig, axes = plt.subplots(1, 2, figsize=(8.2, 3.0))
for row, rule in enumerate(SCALE_RULES):
    doubled = encode(block, rule)[1][:, 0] == 128
    axes[0].fill_between(fraction, row - 0.3, row + 0.3, where=doubled, color=style.BLUE, step="post", linewidth=0)
    left = quantise_dequantise(block, rule)[:, 0] / block[:, 0]
    axes[1].plot(fraction, left, label=rule, markevery=(5 * row, 32))
axes[0].set_yticks(range(5), list(SCALE_RULES))
axes[0].set(xlabel="fraction of amax", title="Where the scale is doubled", xlim=(1, 2))
axes[1].set(xlabel="fraction of amax", ylabel="amax after / before", title="The largest value: only floor differs")
axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
style.show()
starts = {
    rule: fraction[encode(block, rule)[1][:, 0] == 128].min().item() for rule in list(SCALE_RULES) if rule != "floor"
}
print("first fraction that is doubled:", starts)
assert starts == {"even": 1.75, "round-up": 1.5 + 1 / 256, "threshold-1.5": 1.5, "ceil": 1 + 1 / 256}

# %% [markdown]
# Here is one block. Its largest value is 7.2, so its fraction is 1.8. `floor` keeps the finer steps and cuts 7.2 to
# 6. The other four, `even` among them, turn 7.2 into 8 and round small values more coarsely.

# %%
block = torch.tensor([7.2, 5.1, 3.4, 2.6, 1.9, 1.3, 0.9, 0.6, 0.4, 0.2] + 22 * [0.0], dtype=torch.float64)[None]
fig, ax = plt.subplots(figsize=(7.2, 3.0))
ax.plot(block[0, :10], color=style.BLACK, linestyle="-", marker="", label="before")
for rule in ("floor", "even"):
    ax.plot(quantise_dequantise(block, rule)[0, :10], linestyle="", markersize=7, label=rule, fillstyle="none")
ax.set(xlabel="element of the block", ylabel="value", title="One block, two scales")
ax.legend()
style.show()
assert quantise_dequantise(block, "floor").max() == 6 and quantise_dequantise(block, "even").max() == 8

# %% [markdown]
# ## What each rule costs
#
# Neither scale is better for every block. Here are blocks of normal values, sorted by the fraction of their `amax`.
# The errors of the doubled and of the undoubled scale cross. `even` doubles closer to the crossing than the other
# rules.

# %%
random = torch.Generator().manual_seed(3)
blocks = torch.randn(60_000, 32, generator=random, dtype=torch.float64)
fractions = 2 * torch.frexp(blocks.abs().amax(1)).mantissa
bins = torch.bucketize(fractions, torch.linspace(1, 2, 17, dtype=torch.float64), right=True) - 1


def squared_error(rule):
    return (quantise_dequantise(blocks, rule) - blocks).square().sum(1)


fig, ax = plt.subplots(figsize=(7.2, 3.0))
power = torch.bincount(bins, blocks.square().sum(1))
total = {}
for row, rule in enumerate(SCALE_RULES):
    error = squared_error(rule)
    total[rule] = (error.sum() / blocks.square().sum()).sqrt().item()
    ax.plot(
        1 + (torch.arange(16) + 0.5) / 16, (torch.bincount(bins, error) / power).sqrt(), label=rule, markevery=(row, 3)
    )
ax.set(xlabel="fraction of amax", ylabel="relative error of the block", title="Error of normal values, by block")
ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
style.show()
for rule, error in total.items():
    print(f"{rule:14} {error:.3f}")
assert min(total, key=total.get) == "even" and max(total, key=total.get) == "ceil"

# %% [markdown]
# ## An expert's matrix
#
# The recipe `tiny-mxfp4` stores the experts of `tiny` as MXFP4, encoded by the rule `even`, as Quark does. Encoding
# the BF16 matrix must give the same bytes. The lines below the figure show the error of all experts of the layer, by
# rule: about an eighth of the matrices' size. With `ceil`, three of four scales would differ.

# %%
folder = style.scratch()
bf16, mxfp4 = (Checkpoint.open(build(name, folder / name)) for name in ("tiny", "tiny-mxfp4"))
name = "layers.0.mlp.experts.3.gate_proj"
matrix = bf16.weight(name).read().decode(torch.float64)
stored = mxfp4.weight(name).read()
codes, scales = encode(matrix, "even")
assert torch.equal(codes, stored.codes) and torch.equal(scales, stored.scales)
packed = stored.codes.nbytes + stored.scales.nbytes
print(f"{name}: {list(matrix.shape)}, {2 * matrix.numel()} bytes in BF16, {packed} in MXFP4")

fig, axes = plt.subplots(1, 3, figsize=(8.4, 2.6))
size = matrix.abs().max()
style.picture(axes[0], matrix, "BF16", "column", "row", "value", cmap=style.DIVERGING, vmin=-size, vmax=size)
style.picture(axes[1], scales.double() - 127, "Scales, log2", "block of 32", "", "exponent")
axes[1].set_xticks(range(scales.shape[1]))
error = stored.decode(torch.float64) - matrix
span = error.abs().max()
style.picture(axes[2], error, "Error of MXFP4", "column", "", "value", cmap=style.DIVERGING, vmin=-span, vmax=span)
style.show()

experts = [bf16.weight(f"layers.0.mlp.experts.{e}.{p}_proj").read() for e in range(10) for p in ("gate", "up")]
weights = torch.cat([w.decode(torch.float64) for w in experts])
reference = encode(weights, "even")[1]
for rule in SCALE_RULES:
    left = quantise_dequantise(weights, rule)
    relative = ((left - weights).norm() / weights.norm()).item()
    other = (encode(weights, rule)[1] != reference).double().mean().item()
    zero = (left == 0).double().mean().item()
    print(f"{rule:14} relative error {relative:.3f}, scales unlike even's {other:5.1%}, rounded to zero {zero:.1%}")
    assert 0.1 < relative < 0.2

# %% [markdown]
# ## Two ends of the range
#
# A block of zeros has `amax` 0, and its scale byte is 0. Aiter's HIP kernel takes an `amax` of 1e-10 at least, and
# writes 92. Both decode to zeros, so compare values first, then bytes. Scale byte 255 makes the whole block NaN.

# %%
zeros = torch.zeros(1, 32)
plain, floored = encode(zeros, "even"), encode(zeros, "round-up", absmax_floor=1e-10)
print("scale byte of zeros:", plain[1].item(), "or", floored[1].item())
assert torch.equal(decode(*plain, torch.float32), decode(*floored, torch.float32))
assert decode(plain[0], torch.full_like(plain[1], 255), torch.float32).isnan().all()

# %% [markdown]
# ## Try it
#
# Which byte holds column 0 = -3 and column 1 = 1.5, when the scale is 1?

# %%
answer = None


def first_two(byte):
    codes, scale = (torch.tensor([row], dtype=torch.uint8) for row in ([byte] + 15 * [0], [127]))
    return decode(codes, scale, torch.float32)[0, :2].tolist()


style.attempt(
    answer,
    lambda byte: first_two(byte) == [-3, 1.5],
    "Column 0 is the low half. -3 is 1 10 1, 1.5 is 0 01 1.",
)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# answer = 0x3D
# ```
# </details>
#
# Give an `amax` for which `round-up` and `threshold-1.5` choose different scales.

# %%
answer = None


def scale_byte(amax, rule):
    return encode(torch.full((1, 32), float(amax), dtype=torch.float64), rule)[1].item()


style.attempt(
    answer,
    lambda amax: scale_byte(amax, "round-up") != scale_byte(amax, "threshold-1.5"),
    "One doubles from 1.5 on, the other above it.",
)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# answer = 6.0
# ```
# Any 1.5 * 2^k. Without doubling, this `amax` becomes 6, the largest value, and nothing is lost.
# </details>
