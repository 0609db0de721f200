"""What the files of a dump tell of the engine: whether the shared expert is one more slot of its experts, and in which
steps a draft head ran, whose layer is called `layers.0` like the target's first.

list of slots     k wide (k experts a token): unfused; k + 1 wide: fused, the shared gate in the last column
experts' output   equal to the block's output bit by bit: it has the shared expert in it, fused or added inside
names             a module of the shared expert ran: unfused
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import Qwen35Error
from .engine_names import text_config
from .pieces import Piece, once

CHOSEN_LISTS = tuple(f"mlp.experts.inputs.{name}.{i}" for name in ("1", "topk_output") for i in (1, 0))
CHOSEN = ("mlp.topk.output.1", "mlp.topk.output.0")
EXPERTS_OUTPUT, BLOCK_OUTPUTS = "mlp.experts.output", ("mlp.output", "output.0", "output")
NUMBERS_COMPARED = 1 << 14  # so many are not equal by chance
ROUTING_NAMES = {"mlp.experts.inputs.0", "mlp.gate.output", "mlp.topk.output.1", "mlp.gate.output.0"}
PartLayer = tuple[str, int | None]  # part ("" or "mtp") and number


def fused_layers(pieces: Sequence[Piece], sizes: Mapping[str, int], named: bool) -> dict[PartLayer, bool | None]:
    """(part, layer) -> whether `mlp.experts.output` is the block's output; None: the files do not say. Layers without
    it are left out. named: the dump names every module that ran; without a name the shared expert ran as a slot."""
    by_layer: dict[PartLayer, dict[str, list[Piece]]] = defaultdict(lambda: defaultdict(list))
    for piece in pieces:
        by_layer[piece.part, piece.layer][piece.path.removeprefix("self_attn.")].append(piece)
    return {layer: _fused(found, sizes, named) for layer, found in by_layer.items() if EXPERTS_OUTPUT in found}


def _fused(found: Mapping[str, list[Piece]], sizes: Mapping[str, int], named: bool) -> bool | None:
    widths = (_width(found, CHOSEN_LISTS), sizes.get("a") or _width(found, CHOSEN))
    if widths[0] is not None and widths[1] is not None:
        return widths[0] > widths[1]
    if (equal := _same(found)) is not None:
        return equal
    if any(path.startswith("mlp.shared_expert.") for path in found):
        return False
    return True if named and ROUTING_NAMES & set(found) else None


def _width(found: Mapping[str, list[Piece]], paths: Sequence[str]) -> int | None:
    known = (_peek(found[path][0]) for path in paths if path in found)
    return next((x.shape[-1] for x in known if x is not None and x.dim()), None)


def _peek(piece: Piece) -> Tensor | None:
    """What a piece holds, and for its next use too: its file is opened once. None: it cannot be read."""
    try:
        x = piece.load()
    except Qwen35Error:
        return None
    piece.load = once(x, piece.load)
    return x


def _same(found: Mapping[str, list[Piece]]) -> bool | None:
    """Whether the experts' output is the block's; None where that was not dumped, or ranks hold parts of it."""
    one = {(p.step, p.rank): p for p in found[EXPERTS_OUTPUT]}
    other = {(p.step, p.rank): p for path in reversed(BLOCK_OUTPUTS) for p in found.get(path, [])}
    for at in sorted(set(one) & set(other)):
        x, y = _peek(one[at]), _peek(other[at])
        if x is None or y is None or x.numel() != y.numel() or not x.flatten()[:NUMBERS_COMPARED].any():
            continue
        equal = torch.equal(x.flatten()[:NUMBERS_COMPARED], y.flatten()[:NUMBERS_COMPARED])
        return equal if equal or len({rank for _, rank in one}) == 1 else None
    return None


HEAD_ONLY = re.compile(r"(mtp\.)?(pre_fc_norm_embedding|pre_fc_norm_hidden|fc)\.")
FULL_MODULES, LINEAR_MODULES = ("qkv_proj.", "self_attn.", "attn.", "o_proj."), ("linear_attn.",)


def draft_steps(pieces: Sequence[Piece], config: Mapping[str, Any] | None) -> set[int]:
    """Steps that the draft head ran in: its own norms or its `fc` ran, or layer 0 is an attention layer, which the
    target's is not."""
    own = [p for p in pieces if p.part == ""]
    heads = {p.step for p in own if p.layer is None and HEAD_ONLY.match(p.path)}
    first = [p for p in own if p.layer == 0]
    linear, full = ({p.step for p in first if p.path.startswith(some)} for some in (LINEAR_MODULES, FULL_MODULES))
    kinds = text_config(config).get("layer_types")
    return heads | (full - linear if (kinds[0] == "linear_attention" if kinds else linear) else set())


def mark_drafts(pieces: Sequence[Piece], config: Mapping[str, Any] | None) -> dict[int, int]:
    """Give the draft head's pieces its part: `mtp` after a step of the target, which it starts from, then `mtp.2`,
    `mtp.3`, ..., each from the step before. Returns its steps, with the number of the draft."""
    steps, found = draft_steps(pieces, config), dict[int, int]()
    number = 0
    for step in sorted({piece.step for piece in pieces}) if steps else ():
        number = number + 1 if step in steps else 0
        found |= {step: number} if number else {}
    for piece in pieces:
        if piece.step in found and not piece.key:
            piece.part = piece.part or (f"mtp.{found[piece.step]}" if found[piece.step] > 1 else "mtp")
    return found
