"""All arithmetics by name (`arithmetics.py` says how to read such a table). Here: the kernels of Aiter's MXFP4 experts,
and quantised activations (W4A4, W8A8, W4A8), which compute another function of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..quant import fp8
from ..quant.mxfp4 import QUANTISERS, quantise_dequantise
from .arithmetics import KEEP, Arithmetic, Rounding, register
from .plain import EXACT, FLOAT32, GROUPED_MM, SGLANG_BF16, TRANSFORMERS_BF16, VLLM_BF16

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
    rounds={**SGLANG_BF16.rounds, "moe_a1": torch.bfloat16, "moe_a2": torch.bfloat16, "moe_expert_weighted": KEEP},
)


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


def _with_a4(base: Arithmetic, quantise: Callable[[Tensor], Tensor], suffix: str = "+a4") -> Arithmetic:
    """`base`, with the inputs of MXFP4 linears quantised: the function of a W4A4 engine, without its rounding noise."""
    doc = f"{base.doc} But the inputs of MXFP4 experts are quantised to MXFP4 (W4A4)."
    rounds = {**base.rounds, **dict.fromkeys(A4_INPUTS, quantise)}
    return replace(base, name=base.name + suffix, doc=doc, rounds=rounds)


EXACT_A4, EXACT_A4_HIP = _with_a4(EXACT, QUARK), _with_a4(EXACT, HIP, "+a4-round-up")
FLOAT32_A4 = _with_a4(FLOAT32, QUARK)

# How the inputs of products with FP8 weights are quantised, dense and experts, by the suffix of the arithmetic's name;
# and those of MXFP4 experts, where the engine takes MXFP8 for them (`fp8_activations` of SGLang 0.5.23).
A8: Mapping[str, tuple[str, Callable[..., Tensor]]] = {
    "+a8": ("fp8", fp8.quantise_dequantise),
    "+a8-token": ("fp8", partial(fp8.quantise_dequantise, columns=None)),
    "+w4a8": ("mxfp4", fp8.mx_quantise_dequantise),
}


def with_fp8_inputs(base: Arithmetic, suffix: str = "+a8", scaled: str = "divide") -> Arithmetic:
    """`base`, with the inputs of FP8 linears quantised to FP8 (W8A8), or of MXFP4 ones to MXFP8 (W4A8).

    Each input is quantised from the value that the kernel before it stored, and multiplied with the stored weights.
    No kernel rounds a decoded FP8 weight to bf16, so projections are held in at least float32. scaled: a key of
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
        quantised=(weights,),
    )


def function_of(name: str) -> str:
    """What an arithmetic of this name does to activations: "+a8", "+a4-round-up", ...; "" if nothing."""
    return name[name.index("+") :] if "+" in name else ""


register(
    EXACT, FLOAT32, TRANSFORMERS_BF16, GROUPED_MM, SGLANG_BF16, VLLM_BF16, AITER, AITER_SMALL_BATCH, *AITER_VARIANTS,
    EXACT_A4, EXACT_A4_HIP, FLOAT32_A4,
)  # fmt: skip
for _suffix in A8:
    register(*(with_fp8_inputs(base, _suffix) for base in (EXACT, FLOAT32, TRANSFORMERS_BF16, VLLM_BF16)))
    register(with_fp8_inputs(SGLANG_BF16, _suffix, "multiply"))
