"""Every tolerance of the tests, each with the measurement that justifies it (torch 2.13, x86-64)."""

# Two float64 evaluations of the same formulas in another order. Measured: at most 4e-14 relative L2 at any tap of the
# tiny model (333 tokens); the bound that the project promises.
FLOAT64_REORDERED = 1e-12

# Logits of tiny models in float32 on a GPU, experts multiplied one by one against all at once, relative L2. Measured on
# an H200, five recipes: 0 to 1.5e-6.
FLOAT32_PLACED = 5e-6

# `exact` against transformers made float64-clean, logits, absolute. Measured: 2.7e-14 on the fixture.
FLOAT64_CLEAN = 1e-11

# Engines in float32 against each other and against float64, max |delta log p| on the fixture. They differ among
# themselves by up to 1.8e-4 (a head with small q and k norms); measured here: 1.0e-4.
FLOAT32_LOG_P = 3e-4

# Softmax and dot products of SGLang's fp32 router kernels against the exact value rounded once, in fp32 ulp.
# Measured: routed weights 2, shared weights 1.
ROUTER_ULP = 2

# The weight of SGLang's append kernel, relative, beside what the order of its sum may do: sigmoid and two roundings in
# fp32, as the 2 ulp of the router.
APPEND_REL = 3 * 2.0**-24

# log decay g of SGLang's gating kernel, relative L2: its exp and log are the GPU's. Measured 9.3e-8.
GATING_REL = 2e-7

# Vision tower in float32, relative to the largest value of the result. Measured on the fixture: 3.8e-7 against
# transformers and 5.1e-7 against timm, both float32; the float64 tower lies as far from them, so all of it is theirs
# and float32's. The smallest planted bug (one gelu for the other) makes 1.1e-4.
VISION_FLOAT32 = 5e-6

# The same in float64. Measured: 2.1e-15 against transformers whose every operation was seen to be float64, 1.6e-15 ours
# by other paths.
VISION_FLOAT64 = 1e-13

# Vision in bf16: fraction of an operation's values that differ. Both sides compute in fp32 and round where the table
# says; the last bits of fp32 differ, and then a rounding may fall to the other side. Measured: 0 of 17280 in linear
# layers and attention, 0.5 % in the merger's gelu (29 of 5760), less elsewhere. One rounding more or less makes 9.7 %
# and more. Not counted are differences in the tail of gelu, where 1 + erf(x / sqrt 2) cancels and an fp32 erf leaves
# up to |x| 2^-23, 7e-7 at x = -6: which is the processor's choice (29 values differ, 209 with AVX512).
VISION_BF16_FLIPS, VISION_TAIL = 0.01, 7e-7

# Logits after an image in float32, relative to the largest; the figure to keep. Measured: 1.8e-6 to transformers,
# 3.0e-6 to llama.cpp.
IMAGE_LOGITS_FLOAT32 = 2e-5

# transformers in float32 on the fixture, another machine's run against this one's, max |delta log p|. Measured 4.1e-5
# (MTP 3.1e-5, image 4.0e-5): sums in another order. The fixture's own float32 error is 1.3e-4.
FLOAT32_ANOTHER_MACHINE = 1.5e-4

# `float32` may be this many times as far from the float64 truth as transformers' own float32 is in the same run.
# Measured: 0.95 to 1.11.
FLOAT32_ERROR_RATIO = 2.0

# The fixture's residual stream (relative L2 per layer), router logits and weights (absolute), which transformers
# computed in float32. Measured, worst layer: `exact` 3.4e-6, 2.8e-5, 4.8e-6; `float32` 9.7e-7, 4.5e-6, 1.4e-6.
FIXTURE_HIDDEN = 1e-5
FIXTURE_ROUTER_LOGITS = 1e-4
FIXTURE_ROUTER_WEIGHTS = 2e-5

# A dump of tests/engine_like.py against the float64 truth it is made of, relative to the tap's largest value: the order
# of additions in partial sums. Measured: 8.1e-15; the same written in float32 by SGLang's hooks: 4.8e-8.
ENGINE_LIKE = 1e-12
ENGINE_LIKE_FLOAT32 = 5e-7

# transformers against `exact` on the bf16-hub fixture, tap by tap, relative to the largest value: enough to tell that
# each tap was read as what it is (a wrong one is off by 0.5 and more). Measured: float32 1.6e-5, bfloat16 0.034.
TRANSFORMERS_TAPS_FLOAT32 = 2e-4
TRANSFORMERS_TAPS_BF16 = 0.1

# AMD Quark's runtime in float32 on its own checkpoints, max |delta log p| against `exact`. Weights only: measured
# 7.5e-5 and 1.15e-4. W4A4: measured 3.7e-5 and 2.7e-5; the fixture's ids move by up to 1.6e-4 when parameters are
# perturbed by 1e-7, since a code that flips is a jump.
QUARK_W4A16_LOG_P = 2e-4
QUARK_W4A4_LOG_P = 5e-4

# One layer's experts in bf16 on a GPU, grouped products against the loop over experts, relative L2: one rounding to
# bf16. Measured on H200 with torch 2.11: 0, as are the logits of the whole 35B (128 and 512 tokens); how a
# library's product adds up is its own affair.
BF16_GROUPED = 2**-9
LLAMA_KL_BASE = (
    3e-4  # log p that llama.cpp (F32) wrote to a KL base file against exact: 1.7e-04, half a step of it 1.2e-4
)
