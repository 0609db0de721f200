"""All arithmetics, made known by their names (`arithmetics.py` says how to read such a table)."""

from __future__ import annotations

from .activations import A8, EXACT_A4, EXACT_A4_HIP, FLOAT32_A4, function_of, with_activations, with_fp8_inputs
from .aiter import AITER, AITER_SMALL_BATCH, AITER_VARIANTS, HIP, QUARK, TRITON
from .arithmetics import register
from .plain import EXACT, FLOAT32, GROUPED_MM, SGLANG_BF16, TRANSFORMERS_BF16, VLLM_BF16

__all__ = [
    "A8", "AITER", "AITER_SMALL_BATCH", "AITER_VARIANTS", "EXACT", "EXACT_A4", "EXACT_A4_HIP", "FLOAT32", "FLOAT32_A4",
    "GROUPED_MM", "HIP", "QUARK", "SGLANG_BF16", "TRANSFORMERS_BF16", "TRITON", "VLLM_BF16", "function_of",
    "with_activations", "with_fp8_inputs",
]  # fmt: skip

register(
    EXACT, FLOAT32, TRANSFORMERS_BF16, GROUPED_MM, SGLANG_BF16, VLLM_BF16, AITER, AITER_SMALL_BATCH, *AITER_VARIANTS
)
register(EXACT_A4, EXACT_A4_HIP, FLOAT32_A4)
for _suffix in A8:
    register(*(with_fp8_inputs(base, _suffix) for base in (EXACT, FLOAT32, TRANSFORMERS_BF16, VLLM_BF16)))
    register(with_fp8_inputs(SGLANG_BF16, _suffix, "multiply"))
