"""Arithmetics of engines whose weights and activations are not quantised, and the exact one."""

from __future__ import annotations

from dataclasses import replace

import torch

from .arithmetics import KEEP, Arithmetic

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
    switches={"gdn_padding": "fades", "gdn_step_scale": "divided", "moe_sum_order": "expert", "moe_ties": "torch.topk"},
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
    # In which order a kernel adds is its own affair: sums are exact, and rounded once.
    switches={"moe_router_sums": "exact"},
)

VLLM_BF16 = Arithmetic(
    name="vllm-bf16",
    dtype=torch.bfloat16,
    doc="vLLM 0.33, unquantised weights. Kernels that vLLM shares with SGLang round as there; positions and the shared "
    "expert's gate as in transformers.",
    rounds={
        **{name: how for name, how in SGLANG_BF16.rounds.items() if not name.startswith("moe_shared")},
        # The norm sees the fp32 sum (measured on hidden states of 0.25.1); cos and sin come from a cache in bf16.
        "rope_cos": torch.bfloat16,
        "rope_sin": torch.bfloat16,
        # The router's product is kept in fp32, and so are its weights; ties go to the lowest id.
        "moe_router_logits": torch.float32,
        # Experts: each product is stored in bf16; slots are weighted in fp32, stored in bf16 and added in fp32.
        "moe_expert_gate_up": torch.bfloat16,
    },
    weights={"*.A_log": torch.float32},
    # vLLM's packed decode kernel of DeltaNet keeps beta in fp32 (vllm 53877).
    switches={"moe_router_sums": "exact", "gdn_step_beta": "fp32"},
)
