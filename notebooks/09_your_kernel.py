# %% [markdown]
# # 9. Your kernel
#
# You wrote a kernel, and want to know whether it is right. `torch.testing.assert_close` with a tolerance that was
# found by trial says little: a bf16 kernel that drops one expert of 256 can pass it, and a right one can fail. This
# notebook builds a parity test step by step; at its end it is five lines.

# %%
import matplotlib.pyplot as plt
import style
import torch
import torch.nn.functional as F

from qwen35_moe import testing as qt

case = qt.moe_case("tiny", tokens=16)
for name in case:
    print(f"{name:12} {str(case[name].dtype).removeprefix('torch.'):9} {list(case[name].shape)}")

# %% [markdown]
# ## 1. Inputs
#
# A case is drawn from an integer hash: the same bytes on every machine. Its numbers are like the real model's: one
# channel of the hidden state is 30 times as large as the others, and blocks of 32 weights differ by powers of two.
# `tiny` has 10 experts; `"qwen3.5-35b-a3b"` has the real sizes. `w13` holds the rows of gate, then the rows of up.
# The last slot is the shared expert's, which every token visits (`ids[:, -1]`).

# %%
assert (case["ids"][:, -1] == 10).all()
print("token 0 visits experts", case["ids"][0].tolist())
print("with weights", [round(w, 3) for w in case["weights"][0].tolist()])

# %% [markdown]
# ## 2. A kernel
#
# It computes as engines do: its inputs are bf16, it sums in float32, rounds each expert's output to bf16, and adds
# these in float32.


# %%
def my_moe(x, ids, weights, w13, w2, **_):
    out = torch.zeros(x.shape)
    for slot in range(ids.shape[1]):
        for t, e in enumerate(ids[:, slot].tolist()):
            gate, up = (w13[e].float() @ x[t].float()).chunk(2)
            h = (F.silu(gate) * up).bfloat16().float()
            out[t] += (weights[t, slot] * (w2[e].float() @ h)).bfloat16().float()
    return out.bfloat16()


mine = my_moe(**case.to("cpu"))  # or "cuda"
exact = case.truth["mlp_output"]
error = (mine.double() - exact).norm(dim=1)
print(f"relative error {float(error.norm() / exact.norm()):.4f}")

# %% [markdown]
# ## 3. How much error is legal?
#
# The case knows its truth in float64. It also knows what other engines may do on the same inputs: where SGLang rounds,
# where transformers rounds, sums split in two, ... Their largest error, token by token, is the unit.

# %%
legal = torch.stack([(member["mlp_output"].double() - exact).norm(dim=1) for member in case.members])
fig, ax = plt.subplots(figsize=(7.4, 2.6))
ax.bar(range(16), legal.amax(0).tolist(), color="#c9d6e4", label="largest legal error")
ax.plot(range(16), error.tolist(), "o", color="#b3261e", label="my_moe")
ax.set(xlabel="token", ylabel="|error|", title="A kernel beside what rounding may do")
ax.legend()
style.show()
assert (error < 3.5 * legal.amax(0)).all()
qt.assert_legal(mine, case)

# %% [markdown]
# ## 4. A kernel that is wrong
#
# One expert was never loaded. Two tokens of sixteen visit it, and only one of them exceeds the limit. The relative
# error of the whole output is hardly larger than that of the right kernel, so a tolerance on the whole output does
# not see it.


# %%
def without_expert_4(x, ids, weights, w13, w2, **_):
    return my_moe(x, ids, weights * (ids != 4), w13, w2)


wrong = without_expert_4(**case.to("cpu"))
assert (case["ids"] == 4).any(dim=1).sum() == 2
print(f"relative error {float((wrong.double() - exact).norm() / exact.norm()):.4f}")
check = qt.check_legal(wrong, case)[0]
print(f"{check.bad_rows} of {check.rows} rows, looks like {check.looks_like!r}")
assert not check.ok and check.looks_like == "expert dropped"

# %% [markdown]
# ## 5. The test
#
# That is all of it. `cases` has one, two, 40, 41 and 257 tokens, each format, fused and unfused.
#
# ```python
# @pytest.mark.parametrize("case", [c for c in qt.cases("moe") if "bf16-fused" in c.name])
# def test_my_moe(case):
#     qt.assert_legal(my_moe(**case.to("cuda")), case)
# ```
#
# `pytest --qwen35-report report.html` writes what was found as a page.

# %% [markdown]
# ## Try it
#
# Write the mistake that `looks_like` names "gate and up swapped": what do you multiply in the place of
# `F.silu(gate) * up`? Give a function of gate and up.

# %%
answer = None


def named(activation):
    def kernel(x, ids, weights, w13, w2, **_):
        y = torch.einsum("taod,td->tao", w13[ids.long()].float(), x.float())
        h = activation(*y.chunk(2, -1)).bfloat16().float()
        return torch.einsum("ta,tado,tao->td", weights, w2[ids.long()].float(), h).bfloat16()

    return qt.check_legal(kernel(**case.to("cpu")), case)[0].looks_like


style.attempt(
    answer,
    lambda activation: named(activation) == "gate and up swapped",
    "The right one is lambda gate, up: F.silu(gate) * up.",
)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# answer = lambda gate, up: F.silu(up) * gate
# ```
# </details>
