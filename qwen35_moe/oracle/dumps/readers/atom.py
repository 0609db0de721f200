"""ROCm ATOM's forward dumps (ATOM_FWD_DUMP_DIR): layerLL_Class_rankR[_callNNN][_ctxNNNNN][_fpHASH][_bsN].pt with the
key `hidden`. Calls without a number are taken in order of their context.

`hidden` is the first tensor that a module of that class returns: a contribution, of the MoE block for decoder layers.
Weight dumps (weight_rankR_layerL.pt) are listed in `.weights`. There are no token ids: align.py goes by counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ....errors import Qwen35Error
from ..dump import Dump, Piece
from .common import load_pt, load_tensor

NAME = re.compile(r"layer(\d+)(?:_(\w+?))?_rank(\d+)(?:_call(\d+))?((?:_ctx(\d+))?(?:_fp\w+?)?(?:_bs\d+)?)\.pt")
WEIGHT = re.compile(r"weight_rank(\d+)_layer(\d+)\.pt")
# Class names (beginning or end) -> the path whose rule applies. The first that fits counts.
MODULE_CLASSES = (
    (r".*GatedDeltaNet|.*LinearAttention|.*GDN.*", "linear_attn.output"),
    (r".*Attention", "o_proj.output"),
    (r"FusedMoE|.*Experts", "mlp.experts.output"),
    (r".*(SparseMoeBlock|MoE|MLP)", "mlp.output"),
    (r".*Router|.*Gate|MergedReplicatedLinear", "mlp.gate.output"),
    (r"Block|.*DecoderLayer|", "output"),
)


def known(file: Path) -> bool:
    return bool(NAME.fullmatch(file.name) or WEIGHT.fullmatch(file.name))


def _call(name: re.Match[str]) -> tuple[int, int, str]:
    """Which forward pass a file is of, in order of time as far as its name tells."""
    return int(name[4] or 0), int(name[6] or 0), name[5]


def sniff(path: Path) -> bool:
    return path.is_dir() and any(map(known, path.glob("*.pt")))


def read(path: Path, *, config: Mapping[str, Any] | None = None, **_: Any) -> Dump:
    pieces: list[Piece] = []
    weights: dict[str, Piece] = {}
    problems: list[Qwen35Error] = []
    files = [found for file in path.glob("*.pt") if (found := NAME.fullmatch(file.name))]
    steps = {call: step for step, call in enumerate(sorted({_call(found) for found in files}))}
    for file in sorted(path.glob("*.pt")):
        if found := WEIGHT.fullmatch(file.name):
            try:
                for name in load_pt(file):
                    if not name.startswith("_"):
                        load = partial(load_tensor, file, name)
                        weights[f"{name}@{found[1]}"] = Piece.named(name, load, rank=int(found[1]), where=str(file))
            except Qwen35Error as error:
                problems.append(error)
        elif found := NAME.fullmatch(file.name):
            layer, kind, rank = int(found[1]), found[2] or "", int(found[3])
            path_below = next((p for pattern, p in MODULE_CLASSES if re.fullmatch(pattern, kind)), f"{kind}.output")
            try:
                load_tensor(file, "hidden")
            except Qwen35Error as error:
                problems.append(error)
                continue
            load = partial(load_tensor, file, "hidden")
            raw = f"layers.{layer}.{kind}"
            pieces.append(Piece(raw, load, steps[_call(found)], rank, layer, path_below, where=str(file)))
    notes = (
        []
        if any(found[4] or found[5] for found in files) or not pieces
        else ["one call a module was dumped: the first, which is the warm-up unless it was off"]
    )
    return Dump("atom", path, pieces, problems=problems, notes=notes, config=config, weights=weights)
