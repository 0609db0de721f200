"""The format of a module's tensors, decided from their names, dtypes and shapes before any of them is read.

| kind        | tensors of module m                                                     | value                      |
|-------------|-------------------------------------------------------------------------|----------------------------|
| float       | m.weight or m, of BF16, F16, F32 or F64                                 | as it stands               |
| mxfp4       | m.weight U8 [.., I/2], m.weight_scale U8 [.., I/32] (Quark)             | e2m1 * 2^(scale - 127)     |
|             | m.weight_packed, m.weight_scale (compressed-tensors)                    |                            |
|             | m_blocks U8 [.., I/32, 16], m_scales U8 [.., I/32] (gpt-oss)            |                            |
| fp8-block   | m.weight F8_E4M3 [O, I], m.weight_scale_inv or m.weight_scale per block | e4m3 * scale: a multiplier |
| fp8-channel | the same, scale [O] or [O, 1]                                           | in spite of `_inv`         |
| fp8-tensor  | the same, one scale                                                     |                            |

Formats that are not decoded here are recognised by `foreign_spec`: the gate and `check` need their names.

| kind  | tensors of module m                                                                | written by             |
| nvfp4 | m.weight or m.weight_packed U8 [.., I/2], m.weight_scale F8_E4M3 [.., I/16]        | ModelOpt, Quark,       |
|       |                                                                                    | compressed-tensors     |
| mxfp8 | m.weight F8_E4M3 [.., I], m.weight_scale U8 or F8_E8M0 [.., I/32]                  | ModelOpt               |
| intB  | m.qweight I32 [I B/32, O], m.qzeros I32 [I/g, O B/32], m.scales [I/g, O]           | GPTQ, auto-round       |
|       | m.qweight I32 [I, O B/32], m.qzeros, m.scales [I/g, O]                             | AWQ                    |
| int   | m.weight_packed I32 [O, ..], m.weight_scale; headers do not tell how many bits     | compressed-tensors     |
| int8  | m.weight I8 [O, I], m.weight_scale or m.SCB                                        | compressed-tensors,    |
|       |                                                                                    | bitsandbytes           |
| bnb4  | m.weight U8, m.weight.absmax, m.weight.quant_state.bitsandbytes__nf4 or __fp4      | bitsandbytes           |

An exclude list says what was intended. It is wrong so often (sglang issues 36158, 38870, 39064) that it has no say
here.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import Qwen35Error
from ..quant import fp8, mxfp4
from ..quant.precision import ModuleSpec
from .header import TensorEntry
from .reader import Reader, Rows
from .weight import StoredWeight

FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")
SCALE_ROLES = (
    ".weight_scale", ".weight_scale_inv", "_scales", "_scale", "_scale_inv", "_weight_scale", "_weight_scale_inv",
)  # fmt: skip
MAIN = ("", ".weight", ".weight_packed", "_packed", "_blocks")
# What may stand beside a weight without changing what it is: activations' scales, and what compressed-tensors adds.
ROLES_BESIDE = (".bias", ".input_scale", ".output_scale", ".weight_shape", "_input_scale", "_output_scale")
# Scales of an engine's FP8 key-value cache, as compressed-tensors and as ModelOpt name them: no weight's.
CACHE_SCALES = ("*.self_attn.[kqv]_scale", "*.self_attn.[kv]_proj.[kv]_scale")
FOREIGN = {
    ".weight_scale_2": "NVFP4", "_scale_2": "NVFP4", "_weight_scale_2": "NVFP4",
    ".weight_global_scale": "NVFP4", ".input_global_scale": "NVFP4",
    ".qweight": "GPTQ or AWQ", ".qzeros": "GPTQ or AWQ", ".scales": "GPTQ or AWQ", ".g_idx": "GPTQ or AWQ",
    ".weight_zero_point": "compressed-tensors' integers", ".weight_g_idx": "compressed-tensors' integers",
    ".SCB": "bitsandbytes", ".weight_format": "bitsandbytes",
}  # fmt: skip
KNOWN = "BF16, F16, F32 or F64; MXFP4 (U8 with U8 scales, block 32); FP8 (F8_E4M3 with block, channel or tensor scales)"


def recognise(module: str, found: Mapping[str, TensorEntry], reader: Reader) -> StoredWeight:
    """The weight that these tensors (role -> tensor) of one module are.

    Error: a format that is not supported, or tensors that do not fit together.
    """
    for role, stored in found.items():
        if role in FOREIGN:
            raise _unknown(stored, f"{FOREIGN[role]} (has {stored.raw_name})")
    mains = [found[role] for role in MAIN if role in found]
    scales = [found[role] for role in SCALE_ROLES if role in found]
    others = [s for role, s in found.items() if role not in (*MAIN, *SCALE_ROLES, *ROLES_BESIDE)]
    if others:
        raise _unknown(others[0], str(others[0]))
    if len(mains) != 1 or len(scales) > 1:
        what = "a weight is missing or there are two" if len(mains) != 1 else "a weight has two scales"
        where, names = next(iter(found.values())).file.name, ", ".join(stored.where for stored in found.values())
        raise Qwen35Error(what, where=f"{where}: {module}", expected="one weight with at most one scale", found=names)
    main, scale = mains[0], scales[0] if scales else None
    if main.dtype in FLOAT_DTYPES:
        if scale is not None:
            raise scale.wrong("a float weight has a scale", f"none beside {main}")
        return StoredWeight(module, "float", main.shape, Rows.of(main), None, (), reader)
    if scale is not None and main.dtype == "U8" and scale.dtype.startswith("F8_E4M3"):
        raise _unknown(scale, f"NVFP4 (U8 codes with {scale} scales)")
    if main.dtype not in ("U8", "F8_E4M3"):
        raise _unknown(main, f"{main}, scale: {scale or 'none'}")
    if scale is None:
        expected = "a weight_scale or weight_scale_inv"
        expected = expected if main.dtype == "F8_E4M3" else "a weight_scale: U8, one for 32 columns (MXFP4)"
        raise main.wrong("a quantised weight has no scale", expected, f"{main}, scale: none")
    return (_mxfp4 if main.dtype == "U8" else _fp8)(module, main, scale, reader)


def _mxfp4(module: str, codes: TensorEntry, scales: TensorEntry, reader: Reader) -> StoredWeight:
    if scales.dtype not in ("U8", "F8_E8M0"):
        raise scales.wrong("wrong dtype for an MXFP4 scale", "U8")
    shape, half = codes.shape, mxfp4.MXFP4_BLOCK // 2
    if codes.name.endswith("_blocks"):
        if len(shape) < 3 or shape[-1] != half:
            raise codes.wrong("wrong shape of MXFP4 blocks", f"[.., {half}]")
        shape = (*shape[:-2], shape[-2] * shape[-1])
    if len(shape) not in (2, 3) or shape[-1] % half:
        expected = f"[O, I / 2] or [E, O, I / 2] with I a multiple of {mxfp4.MXFP4_BLOCK}"
        raise codes.wrong("an MXFP4 row is whole blocks", expected, f"{codes}, I = {2 * shape[-1] if shape else 0}")
    if scales.shape != (expected_shape := (*shape[:-1], shape[-1] // half)):
        raise scales.wrong("MXFP4 scales of the wrong shape", f"U8 {list(expected_shape)}")
    shape = (*shape[:-1], 2 * shape[-1])
    return StoredWeight(module, "mxfp4", shape, Rows.of(codes), Rows.of(scales, 1), (mxfp4.MXFP4_BLOCK,), reader)


def _fp8(module: str, values: TensorEntry, scale: TensorEntry, reader: Reader) -> StoredWeight:
    if scale.dtype not in ("BF16", "F32"):
        raise scale.wrong("wrong dtype for an FP8 scale", "BF16 or F32")
    if len(values.shape) not in (2, 3):
        raise values.wrong("wrong shape of an FP8 weight", "[O, I] or [E, O, I]")
    *lead, O, I = values.shape  # noqa: E741
    block = (fp8.FP8_BLOCK, fp8.FP8_BLOCK)
    shapes: dict[str, list[tuple[int, ...]]] = {
        "fp8-block": [(*lead, -(-O // block[0]), -(-I // block[1]))],
        "fp8-channel": [(*lead, O), (*lead, O, 1)],
        "fp8-tensor": [(*lead,), (*lead, 1), (*lead, 1, 1)],
    }
    kind = next((kind for kind, fitting in shapes.items() if scale.shape in fitting), "")
    if not kind:
        listed = " or ".join(str(list(shape)) for fitting in shapes.values() for shape in fitting)
        raise scale.wrong("an FP8 scale of the wrong shape", f"{listed} for {values}")
    blocks = block if kind == "fp8-block" else ()
    return StoredWeight(module, kind, values.shape, Rows.of(values), Rows.of(scale), blocks, reader)


def _unknown(stored: TensorEntry, found: str) -> Qwen35Error:
    return stored.wrong("a format that is not supported", KNOWN, found)


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
