"""Steps of a speculative engine's draft head, whose layer is called `layers.0` like the target's first."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pieces import Piece

HEAD_ONLY = re.compile(r"(mtp\.)?(pre_fc_norm_embedding|pre_fc_norm_hidden|fc)\.")
FULL_MODULES, LINEAR_MODULES = ("qkv_proj.", "self_attn.", "attn.", "o_proj."), ("linear_attn.",)


def draft_steps(pieces: Sequence[Piece], config: Mapping[str, Any] | None) -> set[int]:
    """Steps that the draft head ran in: its own norms or its `fc` ran, or layer 0 is an attention layer, which the
    target's is not."""
    paths: dict[int, set[str]] = defaultdict(set)
    heads = set()
    for p in pieces:
        if p.part == "" and p.layer is None and HEAD_ONLY.match(p.path):
            heads.add(p.step)
        elif p.part == "" and p.layer == 0:
            paths[p.step].add(p.path)
    kinds = {step: _kind(found) for step, found in paths.items()}
    text = (config or {}).get("text_config", config or {})
    first = next(iter(text.get("layer_types") or ()), "linear_attention" if "linear" in kinds.values() else "")
    if first == "linear_attention":
        heads |= {step for step, kind in kinds.items() if kind == "full"}
    return heads


def _kind(paths: set[str]) -> str:
    linear, full = (any(path.startswith(names) for path in paths) for names in (LINEAR_MODULES, FULL_MODULES))
    return "linear" if linear else "full" if full else ""


def mark(pieces: Sequence[Piece], config: Mapping[str, Any] | None) -> dict[int, int]:
    """Give the draft head's pieces its part: `mtp` after a step of the target, which it starts from, then `mtp.2`,
    `mtp.3`, ..., each from the step before. Returns its steps, with the number of the draft."""
    steps, found = draft_steps(pieces, config), dict[int, int]()
    number = 0
    for step in sorted({piece.step for piece in pieces}) if steps else ():
        number = number + 1 if step in steps else 0
        if number:
            found[step] = number
    for piece in pieces:
        if piece.step in found and not piece.key:
            piece.part = piece.part or (f"mtp.{found[piece.step]}" if found[piece.step] > 1 else "mtp")
    return found
