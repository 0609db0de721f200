"""Whether an engine ran the shared expert as one more slot of its experts: found in what its files hold.

list of slots     k wide (k experts a token): unfused; k + 1 wide: fused, the shared gate in the last column
experts' output   equal to the block's output bit by bit: it has the shared expert in it, fused or added inside
names             a module of the shared expert ran: unfused
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...errors import Qwen35Error
from .pieces import Piece, once

CHOSEN_LISTS = tuple(f"mlp.experts.inputs.{name}.{i}" for name in ("1", "topk_output") for i in (1, 0))
CHOSEN = ("mlp.topk.output.1", "mlp.topk.output.0")
EXPERTS_OUTPUT, BLOCK_OUTPUTS = "mlp.experts.output", ("mlp.output", "output.0", "output")
NUMBERS_COMPARED = 1 << 14  # numbers that are not equal by chance
ROUTING_NAMES = {"mlp.experts.inputs.0", "mlp.gate.output", "mlp.topk.output.1", "mlp.gate.output.0"}


PartLayer = tuple[str, int | None]  # part ("" or "mtp") and number


def fused_layers(pieces: Sequence[Piece], sizes: Mapping[str, int], named: bool) -> dict[PartLayer, bool | None]:
    """(part, layer) -> whether `mlp.experts.output` is the block's output; None: the files do not say. Layers without
    it are left out. named: the dump has every module, so a shared expert that did not run alone has no names."""
    by_layer: dict[PartLayer, dict[str, list[Piece]]] = defaultdict(lambda: defaultdict(list))
    for piece in pieces:
        by_layer[piece.part, piece.layer][piece.path.removeprefix("self_attn.")].append(piece)
    return {layer: _fused(found, sizes, named) for layer, found in by_layer.items() if EXPERTS_OUTPUT in found}


def _fused(found: Mapping[str, list[Piece]], sizes: Mapping[str, int], named: bool) -> bool | None:
    widths = (_width(found, CHOSEN_LISTS), sizes.get("a") or _width(found, CHOSEN))
    if widths[0] is not None and widths[1] is not None:
        return widths[0] > widths[1]
    equal = _same(found)
    if equal is not None:
        return equal
    if any(path.startswith("mlp.shared_expert.") for path in found):
        return False
    return True if named and ROUTING_NAMES & set(found) else None


def _width(found: Mapping[str, list[Piece]], paths: Sequence[str]) -> int | None:
    for piece in (p for path in paths for p in found.get(path, [])[:1]):
        try:
            return _peek(piece).shape[-1]
        except (Qwen35Error, IndexError):
            continue
    return None


def _peek(piece: Piece) -> Tensor:
    """What a piece holds, and for its next use too: its file is opened once."""
    x = piece.load()
    piece.load = once(x, piece.load)
    return x


def _same(found: Mapping[str, list[Piece]]) -> bool | None:
    """Whether the experts' output is the block's; None where that was not dumped, or ranks hold parts of it."""
    one = {(p.step, p.rank): p for p in found[EXPERTS_OUTPUT]}
    other = {(p.step, p.rank): p for path in reversed(BLOCK_OUTPUTS) for p in found.get(path, [])}
    for at in sorted(set(one) & set(other)):
        try:
            x, y = _peek(one[at]), _peek(other[at])
        except Qwen35Error:
            continue
        x, y = x.flatten(), y.flatten()
        if len(x) == len(y) and x[:NUMBERS_COMPARED].any():
            equal = torch.equal(x[:NUMBERS_COMPARED], y[:NUMBERS_COMPARED])
            return equal if equal or len({rank for _, rank in one}) == 1 else None
    return None
