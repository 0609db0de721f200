"""Who rounds where: the arithmetics, as tables from tap names to roundings (`arithmetic.py` says how to read them)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..quant import fp8
from ..quant.mxfp4 import QUANTISERS, quantise_dequantise
from .arithmetics import KEEP, Arithmetic, Rounding, register

EXACT = Arithmetic(
    name="exact",
    dtype=torch.float64,
    doc="float64 from the embedding to the logits. Nothing is narrowed anywhere.",
    switches={"moe_sum_order": "expert"},  # needs no buffer of slots; in float64 the order is worth 1e-16
)

FLOAT32 = Arithmetic(
    name="float32",
    dtype=torch.float32,
    doc="float32 from the embedding to the logits; what transformers and llama.cpp compute with F32 weights.",
)

TRANSFORMERS_BF16 = Arithmetic(
    name="transformers-bf16",
    dtype=torch.bfloat16,
    doc="transformers 5.23, eager attention and eager experts, model in bfloat16. Every operation rounds to bf16, "
    "but for the rows here. Parameters are all bf16, A_log too.",
    rounds={
        # Norms square, scale and gain in fp32 and round once, at the end; the gated norm rounds in the middle too.
        "*.gain": KEEP,
        "gdn_norm_weighted": torch.bfloat16,
        # cos and sin are computed in fp32 and rounded before use; so are both products and their sum.
        "rope_cos": torch.bfloat16,
        "rope_sin": torch.bfloat16,
        # The vision tower rotates in fp32 and rounds the result alone.
        "vis_rope_*": KEEP,
        # Softmax in fp32, rounded once. The raw product q k^T is rounded, and again after the scale.
        "attn_probs": torch.bfloat16,
        "moe_router_probs": KEEP,
        "moe_topk_probs": KEEP,
        "gdn_conv_product": KEEP,
        # The delta rule itself runs in fp32 on bf16 inputs; only its output is rounded.
        "gdn_g": KEEP,
        "gdn_q": KEEP,
        "gdn_q_scaled": KEEP,
        "gdn_k": KEEP,
        "gdn_state": KEEP,
        "gdn_recall": KEEP,
        "gdn_z_gate": KEEP,
    },
    switches={
        "gdn_padding": "fades",
        "gdn_step_scale": "divided",
        "moe_sum_order": "expert",
        "moe_ties": "torch.topk",
    },
    fuses=False,
)

# What transformers takes unless it is told otherwise: a token's slots are rounded one by one, added in fp32 by
# torch.sum (on a CPU in their order, on a GPU not), and the sum is rounded once.
GROUPED_MM = replace(
    TRANSFORMERS_BF16,
    name="transformers-bf16/grouped_mm",
    doc="transformers 5.23 with experts_implementation grouped_mm; all else as transformers-bf16.",
    rounds={**TRANSFORMERS_BF16.rounds, "moe_partial_sum": KEEP},
    switches={**TRANSFORMERS_BF16.switches, "moe_sum_order": "torch.sum"},
)

SGLANG_BF16 = Arithmetic(
    name="sglang-bf16",
    dtype=torch.bfloat16,
    doc="SGLang 0.5.23 on ROCm, unquantised weights, 2-D M-RoPE positions, prefill. Fused kernels keep fp32 where "
    "transformers rounds in the middle.",
    rounds={
        # Residual add and norm are one kernel: the norm sees the fp32 sum, the stored stream is bf16.
        "pre_mlp_residual_sum": KEEP,
        "layer_output_sum": KEEP,
        "*.gain": KEEP,
        # RoPE: q and k in fp32, cos and sin from an fp32 cache, one rounding on store.
        "rope_cos": KEEP,
        "rope_sin": KEEP,
        "*.x_cos": KEEP,
        "*.x_sin": KEEP,
        # Flash attention: scores and softmax stay in fp32 registers; the probabilities are rounded for the MFMA.
        "attn_qk": KEEP,
        "attn_scores": KEEP,
        "attn_gate": KEEP,
        # Convolution: each bf16 x bf16 product is rounded, the sum and the SiLU stay in fp32.
        "gdn_conv_product": torch.bfloat16,
        # GDN gating kernel: g in fp32, beta rounded to bf16. q and k are stored in bf16 after the L2 norm in prefill;
        # the scale K^-0.5 is applied later, in fp32.
        "gdn_conv": KEEP,
        "gdn_g": KEEP,
        "gdn_q_scaled": KEEP,
        "gdn_state": KEEP,
        "gdn_recall": KEEP,
        # Gated norm: all in fp32 until the store.
        "gdn_norm_normed": KEEP,
        "gdn_norm_weighted": KEEP,
        "gdn_z_gate": KEEP,
        # Router: ranks bf16 logits, weights are fp32.
        "moe_router_probs": KEEP,
        "moe_topk_probs": KEEP,
        "moe_topk_weights": torch.float32,
        # Shared-expert gate: fp32 dot product, fp32 sigmoid, fp32 product and sum, one bf16 store.
        "moe_shared_gate_logit": KEEP,
        "moe_shared_gate": torch.float32,
        "moe_shared_gated": KEEP,
        "moe_slot_weights": torch.float32,
        # Experts: gate and up stay fp32 until h is stored; each slot's weighted output is bf16, their sum is fp32.
        "moe_expert_gate_up": KEEP,
        "moe_expert_silu": KEEP,
        "moe_expert_down": KEEP,
        "moe_partial_sum": KEEP,
    },
    weights={"*.A_log": torch.float32},
    # The kernel that appends the shared expert adds its gate with 8 warps (sglang 28666): bit for bit, or next to it,
    # where a warp has 32 lanes. ROCm's have 64; no outputs of one are at hand.
    switches={"moe_router_sums": "exact", "moe_shared_gate_sum": "triton"},
)


# Aiter quantises the inputs of both products of an MXFP4 expert to MXFP4, each tensor by the rule of its kernel.
HIP = partial(quantise_dequantise, **QUANTISERS["aiter-hip"])  # since 2026-06-02 (aiter 3212)
TRITON = partial(quantise_dequantise, **QUANTISERS["aiter-triton"])
QUARK = partial(quantise_dequantise, **QUANTISERS["quark"])  # what a checkpoint's quantization_config declares


def _from_bf16(quantise: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The kernel that quantises reads what another one stored in bf16."""
    return lambda x: quantise(x.to(torch.bfloat16))


# Aiter's small-batch kernel on gfx950: bf16 activations (W4A16), and one fp32 sum over the slots that is rounded once.
AITER_SMALL_BATCH = replace(
    SGLANG_BF16,
    name="sglang-aiter-small-batch",
    doc="The experts' kernel that SGLang 0.5.23 takes on gfx950 for up to 40 tokens at H = 4096, I = 256 a rank.",
    rounds={
        **SGLANG_BF16.rounds,
        "moe_a1": torch.bfloat16,
        "moe_a2": torch.bfloat16,
        "moe_expert_weighted": KEEP,
    },
)


def small_batch_kernel(tokens: int, hidden: int, intermediate: int) -> Arithmetic | None:
    """SGLang 0.5.23 on gfx950 (397B at TP 4): the small-batch kernel, by shape; None: the usual one."""
    return AITER_SMALL_BATCH if tokens <= 40 and hidden == 4096 and intermediate == 256 else None


# The ten switches of the fused engine, each as data.
AITER = replace(
    SGLANG_BF16,
    name="sglang-aiter-mxfp4",
    doc="SGLang 0.5.23 with Aiter's two-stage MXFP4 experts (W4A4) on gfx950; all else as sglang-bf16.",
    rounds={
        **SGLANG_BF16.rounds,
        # 1. Scale rule of each role. Weights are as stored (Quark: even), an online-quantised shared expert is even
        #    (source.py); activations a1 and a2 are quantised by HIP kernels, which round the scale up.
        "moe_a1": _from_bf16(HIP),
        # 2. and 3. a2 is quantised from h as stage 1 stored it, in bf16. Gate, up and SiLU were fp32 until then.
        "moe_expert_gate_up": KEEP,
        "moe_expert_silu": KEEP,
        "moe_expert_act": torch.bfloat16,
        "moe_a2": _from_bf16(HIP),
        # A standalone MXFP4 shared expert is a dense layer, whose activations the Triton kernel quantises.
        "moe_shared_a1": _from_bf16(TRITON),
        "moe_shared_a2": _from_bf16(TRITON),
        # 4. Stage 2: the routing weight (fp32) is applied to the fp32 accumulator, each slot's result is stored in
        #    bf16, and the slots are added in fp32, in their order (FlyDSL "reduce"). Variants below.
        "moe_expert_down": KEEP,
        "moe_expert_weighted": torch.bfloat16,
        "moe_partial_sum": KEEP,
        # 5. Shared gate in fp32, times 1/ep_size where ranks are summed (`MoE.ep_scale`), never renormalised.
        # 6. Fused or unfused is the gate's decision (`load(shared_expert=...)`): fused, the shared expert is a slot
        #    like the others, quantised inputs included.
        # 7. The router ranks bf16 logits, lowest id first; its weights are fp32.
        # 8. Which checkpoints fuse: `can_fuse_shared_expert(rule="sglang-0.5.23")`.
        # 9. Elements round to nearest, ties to even; a zero block has scale byte 92 (absmax floor 1e-10).
        # 10. Everything outside of the MoE block: the rows of sglang-bf16.
    },
    switches={**SGLANG_BF16.switches, "moe_sum_order": "slot"},
    for_experts=small_batch_kernel,
)


def _variant(
    name: str, doc: str, rounds: Mapping[str, Rounding], switches: Mapping[str, str] | None = None
) -> Arithmetic:
    return replace(
        AITER,
        name=f"{AITER.name}/{name}",
        doc=doc,
        rounds={**AITER.rounds, **rounds},
        switches={**AITER.switches, **(switches or {})},
        for_experts=None,
    )


AITER_VARIANTS = (
    _variant(
        "atomic",
        "Stage 2 adds bf16 atomically: the running sum is bf16 and its order is not defined; here, slot order.",
        {"moe_partial_sum": torch.bfloat16},
    ),
    _variant(
        "atomic-reversed",
        "The same in reverse order. The spread between the two is what atomics may do.",
        {"moe_partial_sum": torch.bfloat16},
        {"moe_sum_order": "slot-reversed"},
    ),
    _variant(
        "scatter",
        "mxmoe without atomics: a2 from fp32 h; outputs stored in bf16 before the weight, which enters by fp32 fma.",
        {"moe_expert_act": KEEP, "moe_a2": HIP, "moe_expert_down": torch.bfloat16},
        {"moe_weight": "fma"},
    ),
    _variant(
        "threshold",
        "FlyDSL's fused epilogue: a2 quantised from fp32 h, its scale rounded up from 1.5 on.",
        {"moe_expert_act": KEEP, "moe_a2": partial(quantise_dequantise, scale_rule="threshold-1.5")},
    ),
    _variant(
        "triton",
        "Aiter's Triton kernels: even scales, gate and up stored in bf16 before SiLU.",
        {"moe_a1": _from_bf16(TRITON), "moe_expert_gate_up": torch.bfloat16, "moe_a2": _from_bf16(TRITON)},
    ),
)


A4_INPUTS = ("moe_a1", "moe_a2", "moe_shared_a1", "moe_shared_a2")
A8_INPUTS = ("attn_a1", "attn_a2", "gdn_a1", "gdn_a2", *A4_INPUTS)


def with_activations(base: Arithmetic, quantise: Callable[[Tensor], Tensor], name: str) -> Arithmetic:
    """`base`, with the inputs of MXFP4 linears quantised: the function of a W4A4 engine, without its rounding noise."""
    return replace(
        base,
        name=name,
        doc=f"{base.doc} But the inputs of MXFP4 experts are quantised to MXFP4 (W4A4).",
        rounds={**base.rounds, **dict.fromkeys(A4_INPUTS, quantise)},
    )


EXACT_A4 = with_activations(EXACT, QUARK, "exact+a4")
EXACT_A4_HIP = with_activations(EXACT, HIP, "exact+a4-round-up")
FLOAT32_A4 = with_activations(FLOAT32, QUARK, "float32+a4")

# How the inputs of products with FP8 weights are quantised, dense and experts, by the suffix of the arithmetic's name;
# and those of MXFP4 experts, where the engine takes MXFP8 for them (`fp8_activations` of SGLang 0.5.23).
A8: Mapping[str, tuple[str, Callable[..., Tensor]]] = {
    "+a8": ("fp8", fp8.quantise_dequantise),
    "+a8-token": ("fp8", partial(fp8.quantise_dequantise, columns=None)),
    "+w4a8": ("mxfp4", fp8.mx_quantise_dequantise),
}


def with_fp8_inputs(base: Arithmetic, suffix: str = "+a8", scaled: str = "divide") -> Arithmetic:
    """`base`, with the inputs of FP8 linears quantised to FP8 (W8A8), or of MXFP4 ones to MXFP8 (W4A8).

    Each is quantised from what the kernel before it stored, and multiplied with the weights as they are stored: no
    kernel rounds a decoded FP8 weight to bf16, so that projections are held in at least float32. scaled: a key of
    `fp8.SCALED`.
    """
    weights, quantise = A8[suffix]
    quantise = quantise if suffix == "+w4a8" or scaled == "divide" else partial(quantise, scaled=scaled)
    wide = torch.promote_types(base.dtype, torch.float32)
    return replace(
        base,
        name=base.name + suffix,
        doc=f"{base.doc} But the inputs of {weights.upper()} linears are quantised to FP8.",
        rounds={**base.rounds, **dict.fromkeys(A8_INPUTS, quantise)},
        weights={**base.weights, **dict.fromkeys(("*_proj.weight", "*.in_proj_*.weight", "*.experts"), wide)},
        for_experts=None,
        quantised=(weights,),
    )


def function_of(name: str) -> str:
    """What an arithmetic of this name does to activations: "+a8", "+a4-round-up", ...; "" if nothing."""
    return name[name.index("+") :] if "+" in name else ""


register(EXACT, FLOAT32, TRANSFORMERS_BF16, GROUPED_MM, SGLANG_BF16, AITER, AITER_SMALL_BATCH, *AITER_VARIANTS)
register(EXACT_A4, EXACT_A4_HIP, FLOAT32_A4)
for _suffix in A8:
    register(*(with_fp8_inputs(base, _suffix) for base in (EXACT, FLOAT32, TRANSFORMERS_BF16)))
    register(with_fp8_inputs(SGLANG_BF16, _suffix, "multiply"))
