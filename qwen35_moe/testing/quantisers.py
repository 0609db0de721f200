"""Checks quantisers and layouts bit for bit. A failure names the block, the element, and the rule that fits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..quant.fp8 import LARGEST_E4M3, LEAST_AMAX
from ..quant.layouts import interleave_gate_up, shuffle_scales, shuffle_weight
from ..quant.mxfp4 import MXFP4_BLOCK, QUANTISERS, SCALE_RULES, encode
from .checks import Check, announce, assertion, wrong_check

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "aiter-weight": shuffle_weight,
    "aiter-scales": lambda x: shuffle_scales(x),
    "gate-up-interleaved": lambda x: interleave_gate_up(x),
}
Encoded = tuple[Tensor, Tensor]


def _on_cuda(x: Tensor) -> Encoded:
    """Aiter's Triton kernel on an NVIDIA GPU: a negative exponent does not survive its cast to uint8, so that no scale
    byte is below 127 (measured; on AMD the cast wraps around, and the byte is right)."""
    codes, scales = encode(x, **QUANTISERS["aiter-triton"])
    return codes, scales.clamp_min(127)


def _rules() -> dict[str, Callable[[Tensor], Encoded]]:
    """Every quantiser to MXFP4 that is known: engines by name, then scale rules, then both with ties half up."""
    options: dict[str, dict[str, Any]] = {**QUANTISERS, **{rule: {"scale_rule": rule} for rule in SCALE_RULES}}
    found: dict[str, Callable[[Tensor], Encoded]] = {name: partial(encode, **some) for name, some in options.items()}
    half_up = {f"{name}, ties half up": partial(encode, **some, ties="half-up") for name, some in options.items()}
    return {**found, "aiter-triton-on-cuda": _on_cuda, **half_up}


def check_mxfp4(codes: Tensor, scales: Tensor, x: Tensor, rule: str = "even") -> list[Check]:
    """Codes [..., I/2] and scales [..., I/32] (uint8) of x [..., I], bit for bit, under a rule:
    a quantiser (`aiter-hip`, `aiter-triton`, `aiter-triton-on-cuda`, `quark`) or a
    scale rule (`even`, `round-up`, `threshold-1.5`, `floor`, `ceil`)."""
    known = _rules()
    if rule not in known:
        raise Qwen35Error("unknown rule", where="mxfp4", expected=", ".join(known), found=rule)
    codes, scales, x = (y.detach().cpu() for y in (codes, scales, x))
    right = known[rule](x)
    for name, mine, theirs in zip(("codes", "scales"), (codes, scales), right, strict=True):
        if mine.numel() != theirs.numel() or mine.element_size() != 1:
            note = f"{name} are {mine.dtype} {list(mine.shape)}, expected uint8 {list(theirs.shape)}"
            return announce(wrong_check("mxfp4", "mxfp4", note))
    found = codes.view(torch.uint8).reshape(right[0].shape), scales.view(torch.uint8).reshape(right[1].shape)
    if _equal(found, right):
        return announce(Check("mxfp4", "mxfp4", "bit-equal", note=f'as "{rule}", bit for bit'))
    other = next((name for name, quantise in known.items() if _equal(found, quantise(x))), "")
    step = found[1].int() - right[1].int()
    if other:
        note = f'; all of it is as "{other}" has it'
    elif torch.equal((found[0] << 4) | (found[0] >> 4), right[0]):
        note = "; nibbles swapped"
    else:
        note = "; all scales one step off" if (step == 1).all() or (step == -1).all() else "; no known rule does this"
    return announce(wrong_check("mxfp4", "mxfp4", _first_difference(found, right, x) + note, other))


assert_mxfp4 = assertion(check_mxfp4)


def _equal(mine: Encoded, right: Encoded) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, right, strict=True))


def _first_difference(mine: Encoded, right: Encoded, x: Tensor) -> str:
    codes, expected = (torch.stack((c & 15, c >> 4), -1).flatten(-2).unflatten(-1, (-1, MXFP4_BLOCK))
                       for c in (mine[0], right[0]))  # fmt: skip
    wrong_scale, blocks = mine[1] != right[1], x.unflatten(-1, (-1, MXFP4_BLOCK))
    bad = wrong_scale | (codes != expected).any(-1)
    first = tuple(bad.nonzero()[0].tolist())
    text = (
        f"{int(bad.sum())} of {bad.numel()} blocks differ, in {int(wrong_scale.sum())} the scale; first: row "
        f"{', '.join(map(str, first[:-1]))}, block {first[-1]}, amax {float(blocks[first].abs().max()):.8g}, "
        f"scale {int(mine[1][first])}, expected {int(right[1][first])}"
    )
    for at in (codes[first] != expected[first]).nonzero().flatten()[:1].tolist():
        text += f", element {at} ({float(blocks[first][at]):.8g}): code {int(codes[first][at])}"
        text += f", expected {int(expected[first][at])}"
    return text


def check_fp8(codes: Tensor, scales: Tensor, x: Tensor, columns: int = 128) -> list[Check]:
    """E4M3 codes [..., I] and multipliers [..., I / columns] of activations: scale = amax / 448 of each token's
    `columns` neighbours, in float32, codes to nearest, ties to even. A product with 448 / amax may move ties, so that
    a code may be one step off where x / scale is within 2^-21 of a midpoint."""
    codes, scales, x = (y.detach().cpu() for y in (codes, scales, x))
    blocks = x.float().unflatten(-1, (-1, columns))
    right = blocks.abs().amax(-1).clamp(min=LEAST_AMAX) / LARGEST_E4M3
    off = (scales.float().reshape(right.shape) / right - 1).abs().max().item()
    if off > 2.0**-22:
        note = f"scales off by up to {off:.2g}, relative; expected amax / 448 in float32"
        return announce(wrong_check("fp8", "fp8", note))
    ratio = (blocks.double() / right.double()[..., None]).flatten(-2)
    found = codes.view(torch.float8_e4m3fn).double().reshape(ratio.shape)
    nearest = ratio.float().to(torch.float8_e4m3fn).double()
    tie = (found - ratio).abs() <= (nearest - ratio).abs() * (1 + 2.0**-20)
    bad = (found != nearest) & ~tie
    if not bad.any():
        return announce(Check("fp8", "fp8", "bit-equal"))
    first = tuple(bad.nonzero()[0].tolist())
    note = f"{int(bad.sum())} of {bad.numel()} codes differ; first at {list(first)}: {float(found[first]):g} for "
    return announce(
        wrong_check("fp8", "fp8", f"{note}{float(nearest[first]):g} (x / scale = {float(ratio[first]):.6g})")
    )


assert_fp8 = assertion(check_fp8)


def check_layout(mine: Tensor, plain: Tensor, layout: str) -> list[Check]:
    """A rearranged tensor against the plain one, byte for byte: a key of LAYOUTS."""
    if layout not in LAYOUTS:
        raise Qwen35Error("unknown layout", expected=", ".join(LAYOUTS), found=layout)
    mine, plain = mine.detach().cpu(), plain.detach().cpu()

    def fits(name: str) -> bool:
        try:
            right = LAYOUTS[name](plain)
        except Qwen35Error:
            return False
        return right.numel() == mine.numel() and torch.equal(right.flatten(), mine.flatten())

    if fits(layout):
        return announce(Check(layout, "layout", "bit-equal"))
    other = next((name for name in LAYOUTS if fits(name)), "")
    note = f"not {layout}" + ("" if other else ", nor any other layout that is known")
    return announce(wrong_check(layout, "layout", note, other))


assert_layout = assertion(check_layout)
