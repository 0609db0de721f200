"""Quantised activations: W4A4, W8A8, W4A8. These compute other functions of the weights, not other roundings of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..quant import fp8
from .aiter import HIP, QUARK
from .arithmetics import Arithmetic
from .plain import EXACT, FLOAT32

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
