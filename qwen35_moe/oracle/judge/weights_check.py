"""Weights first: the parameters in a dump against the checkpoint's bytes, slot by slot, before any activation.

Engines join projections, and Aiter shuffles experts' bytes. A parameter is equal (in bytes or in values), reordered
(equal once a known shuffle is undone), sharded (one rank's share, which is not compared), unknown, or wrong. A rank of
EP holds whole experts, in order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import Qwen35Error
from ...quant.fp8 import FP8
from ...quant.layouts import interleave_gate_up, unshuffle_scales, unshuffle_weight
from ...quant.mxfp4 import PackedMXFP4
from ...quant.packed import Float, Packed, Stacked
from ...run.source import WeightSource
from ..dumps.dump import Dump
from .diagnosis import Weight

JOINED_MODULES = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
SCALE_NAMES = ("weight_scale", "weight_scale_inv")
SHUFFLED = "Aiter's layout"
ANEW = "weights with one scale each are quantised anew where an engine joins them"
VOCABULARY = ("embed_tokens.weight", "lm_head.weight")  # engines append rows of zeros, then split them


def check_weights(dump: Dump, source: WeightSource) -> list[Weight]:
    """One record a parameter, one a slot of experts."""
    found: list[Weight] = []
    for full, piece in dump.weights.items():
        name = re.sub(r"^(?:(?:model|language_model)\.)+", "", full.rpartition("@")[0] or full)
        try:
            found += _check(name, piece.load(), source, piece.parallel)
        except Qwen35Error as error:
            found.append(Weight(name, "unknown", error.what))
    return found


def _check(name: str, x: Tensor, source: WeightSource, parallel: Mapping[str, Any]) -> Iterator[Weight]:
    if found := re.fullmatch(r"(layers\.\d+\.mlp)\.experts\.(w13|w2)_weight(_scale)?", name):
        yield from _experts(name, found[1], found[2] == "w13", bool(found[3]), x, source, parallel)
        return
    module, _, last = name.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    if module.startswith("layers.") and re.fullmatch(r"layers\.\d+\.(qkv_proj|o_proj|q_norm|k_norm)", module):
        parent += ".self_attn"  # SGLang keeps these on the layer itself
        module = f"{parent}.{leaf}"
    if leaf in JOINED_MODULES and last in ("weight", *SCALE_NAMES):
        parts = [source.weight(f"{parent}.{part}") for part in JOINED_MODULES[leaf]]
        if any(isinstance(part, FP8) and part.kind == "fp8-tensor" for part in parts):
            yield Weight(name, "unknown", ANEW)
        else:
            truth = torch.cat([_stored(part, x.dtype, last in SCALE_NAMES) for part in parts])
            yield _plain(name, x, truth, last in SCALE_NAMES)
    else:
        full = f"{module}.{last}" if module else name
        if full not in source.checkpoint:
            yield Weight(name, "unknown", "the checkpoint has no such tensor")
            return
        if last in ("weight", *SCALE_NAMES) and not re.search(r"norm|conv1d", full):
            truth = _stored(source.weight(module), x.dtype, last in SCALE_NAMES)
        else:
            truth = source.tensor(full)
        if full in VOCABULARY and x.shape[1:] == truth.shape[1:]:
            if len(x) < len(truth) <= len(x) * int(parallel.get("tp_size", 1)):
                yield Weight(name, "sharded", f"{list(x.shape)} for {list(truth.shape)}")
                return
            if not x[len(truth) :].any():
                x = x[: len(truth)]
        yield _plain(name, x, truth, last in SCALE_NAMES)


def _stored(packed: Packed, dtype: torch.dtype, scales: bool) -> Tensor:
    """What a parameter of this dtype is held against: the scales or the codes, as they are stored, or the values."""
    if isinstance(packed, Stacked):
        return torch.cat([_stored(part, dtype, scales) for part in packed.parts])
    if isinstance(packed, PackedMXFP4) and (scales or dtype == torch.uint8):
        return packed.scales if scales else packed.codes
    if isinstance(packed, FP8) and (scales or dtype == torch.uint8):
        return packed.scale if scales else packed.values.view(torch.uint8)
    return packed.values if isinstance(packed, Float) else packed.decode(torch.float32)


def _plain(name: str, x: Tensor, truth: Tensor, scales: bool) -> Weight:
    if x.dtype == truth.dtype == torch.uint8 and not torch.equal(x, truth):
        if _shuffled(x, truth, scales):
            return Weight(name, "reordered", SHUFFLED)
        if x.dim() == 2 and torch.equal(x.T, truth):
            return Weight(name, "reordered", "transposed, as kernels of FP8 read it")
    if x.numel() != truth.numel():
        share = truth.numel() / x.numel() if x.numel() else 0
        state = "sharded" if share > 1 and share == int(share) else "wrong"
        return Weight(name, state, f"{list(x.shape)} for {list(truth.shape)}")
    x, wide = x.reshape(truth.shape), truth.to(torch.float64)
    if torch.equal(x.to(torch.float64), wide):
        return Weight(name, "equal", "" if x.dtype == truth.dtype else f"as {x.dtype}".replace("torch.", ""))
    if torch.equal(x.to(torch.float64), truth.to(x.dtype).to(torch.float64)):
        return Weight(name, "wrong", f"rounded to {x.dtype} from {truth.dtype}".replace("torch.", ""))
    ways = {"reversed along its last dimension": truth.flip(-1)}
    if truth.dim() == 2:
        ways["halves swapped"] = torch.cat(tuple(reversed(truth.chunk(2))))
    return Weight(name, "wrong", _way(x, truth, ways))


def _experts(
    name: str, mlp: str, gate_up: bool, scales: bool, x: Tensor, source: WeightSource, parallel: Mapping[str, Any]
) -> Iterator[Weight]:
    """Each slot of w13 [X, 2F, Z] or w2 [X, D, Z], or of their scales, which Aiter may hand over flat."""
    E = source.config.num_experts
    if source.spec(f"{mlp}.experts").kind == "fp8-tensor":
        yield Weight(name, "unknown", ANEW)
        return
    held = E // int(parallel.get("moe_ep_size", 1))
    first = held * int(parallel.get("moe_ep_rank", 0))
    which = [*range(first, first + held), E]
    if source.spec(f"{mlp}.shared_expert.gate_proj").kind != source.spec(f"{mlp}.experts").kind:
        which.pop()
    truths = [_stored(source.slot(mlp, e)[0 if gate_up else 1], x.dtype, scales) for e in which]
    if int(parallel.get("moe_tp_size", 1)) > 1 or x.numel() < held * truths[0].numel():
        yield Weight(name, "sharded", f"{list(x.shape)} for {held} of {list(truths[0].shape)}")
        return
    rows = truths[0].shape[0]
    slots = x.reshape(-1, rows, x.shape[-1]) if x.shape[-2] % rows == 0 or x.dim() == 3 else x[None]
    for e, slot in enumerate(slots):
        if e >= len(truths):
            what = "a slot for the shared expert, whose stored format is another: see sglang 22948"
            yield Weight(f"{name}[{E}]", "wrong", what)
            continue
        truth, where = truths[e], f"{name}[{which[e]}]"
        if torch.equal(slot, truth):
            yield Weight(where, "equal")
        elif _shuffled(slot, truth, scales):
            yield Weight(where, "reordered", SHUFFLED)
        else:
            ways = {"all zero": torch.zeros_like(truth)}
            ways |= {f"holds expert {o}": t for o, t in zip(which, truths, strict=True) if o != which[e]}
            if not scales and truth.dtype == torch.uint8:
                ways["nibbles swapped"] = (truth << 4) | (truth >> 4)
            if gate_up:
                ways["gate and up swapped"] = torch.cat(tuple(reversed(truth.chunk(2))))
                ways["gate and up interleaved"] = interleave_gate_up(truth)
            if scales:
                ways |= {"one step high": truth + 1, "one step low": truth - 1, "rotated": truth.roll(1, -1)}
            yield Weight(where, "wrong", _way(slot, truth, ways))


def _shuffled(slot: Tensor, truth: Tensor, scales: bool) -> bool:
    try:
        plain = unshuffle_scales(slot, *truth.shape) if scales else unshuffle_weight(slot)
    except Qwen35Error:
        return False
    return torch.equal(plain, truth)


def _way(x: Tensor, truth: Tensor, ways: dict[str, Tensor]) -> str:
    """The known way in which x is wrong, or how much of it is."""
    for name, y in ways.items():
        if y.shape == x.shape and (torch.equal(x, y.to(x.dtype)) or torch.equal(x.to(y.dtype), y)):
            return name
    if x.shape != truth.shape:
        return "shape"
    return f"{100 * float((x.to(torch.float64) != truth.to(torch.float64)).double().mean()):.1f} % of it differs"
