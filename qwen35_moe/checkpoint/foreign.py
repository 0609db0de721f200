"""Formats that are not decoded here, recognised by their headers: the gate and `check` need their names.

| kind  | tensors of module m                                                                | written by             |
|-------|------------------------------------------------------------------------------------|------------------------|
| nvfp4 | m.weight or m.weight_packed U8 [.., I/2], m.weight_scale F8_E4M3 [.., I/16]        | ModelOpt, Quark,       |
|       |                                                                                    | compressed-tensors     |
| mxfp8 | m.weight F8_E4M3 [.., I], m.weight_scale U8 or F8_E8M0 [.., I/32]                  | ModelOpt               |
| intB  | m.qweight I32 [I B/32, O], m.qzeros I32 [I/g, O B/32], m.scales [I/g, O]           | GPTQ, auto-round       |
|       | m.qweight I32 [I, O B/32], m.qzeros, m.scales [I/g, O]                             | AWQ                    |
| int   | m.weight_packed I32 [O, ..], m.weight_scale; headers do not tell how many bits     | compressed-tensors     |
| int8  | m.weight I8 [O, I], m.weight_scale or m.SCB                                        | compressed-tensors,    |
|       |                                                                                    | bitsandbytes           |
| bnb4  | m.weight U8, m.weight.absmax, m.weight.quant_state.bitsandbytes__nf4 or __fp4      | bitsandbytes           |
"""

from __future__ import annotations

from collections.abc import Mapping

from ..quant.precision import ModuleSpec
from .header import TensorEntry


def foreign_spec(found: Mapping[str, TensorEntry]) -> ModuleSpec | None:
    """The spec of a module in a format that is not decoded; None for every other one. found: role -> tensor."""
    if "qweight" in {role.rpartition(".")[2] for role in found}:
        return _gptq_or_awq(found[".qweight"], found.get(".scales"), found.get(".qzeros"))
    main = next((found[role] for role in (".weight", ".weight_packed", "", "_packed") if role in found), None)
    if main is None or not main.shape:
        return None
    if any(role.startswith(".weight.absmax") for role in found):
        return ModuleSpec("bnb4")
    if main.dtype == "I8":
        return ModuleSpec("int8")
    if main.dtype == "I32":
        return ModuleSpec("int")
    scales = (".weight_scale", "_scale", "_weight_scale", "_scales")
    scale = next((found[role] for role in scales if role in found), None)
    if scale is None or not scale.shape or not scale.shape[-1]:
        return None
    if main.dtype in ("U8", "F4") and scale.dtype.startswith("F8_E4M3"):
        values = main.shape[-1] * (2 if main.dtype == "U8" else 1)
        return ModuleSpec("nvfp4", (values // scale.shape[-1],), "e4m3")
    if main.dtype == "F8_E4M3" and scale.dtype in ("U8", "F8_E8M0"):
        return ModuleSpec("mxfp8", (main.shape[-1] // scale.shape[-1],), "e8m0")
    return None


def _gptq_or_awq(codes: TensorEntry, scales: TensorEntry | None, zeros: TensorEntry | None) -> ModuleSpec:
    """GPTQ packs along the input, AWQ along the output: `qweight` then has O columns, or fewer.

    GPTQ: qweight [I B / 32, O], scales [groups, O], qzeros [groups, O B / 32]. Zeros tell the width B.
    """
    if len(codes.shape) != 2 or scales is None or len(scales.shape) != 2 or not all(scales.shape):
        return ModuleSpec("int")
    (rows, columns), (groups, outputs) = codes.shape, scales.shape
    if columns != outputs:
        return ModuleSpec(f"int{32 * columns // outputs}", (rows // groups,))
    bits = 32 * zeros.shape[1] // outputs if zeros is not None and len(zeros.shape) == 2 else 0
    return ModuleSpec(f"int{bits}", (32 * rows // bits // groups,)) if bits else ModuleSpec("int")
