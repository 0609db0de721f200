"""ROCm ATOM's forward dumps (ATOM_FWD_DUMP_DIR): layerLL_Class_rankR[_callNNN][_ctxNNNNN][_fpHASH][_bsN].pt with the
key `hidden`. Calls without a number are taken in order of their context.

`hidden` is the first tensor that a module of that class returns: a contribution, of the MoE block for decoder layers.
Weight dumps (weight_rankR_layerL.pt) are listed in `.weights`. There are no token ids; rows are matched by number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ....errors import Qwen35Error
from ..dump import Dump, Piece
from .common import costs_itself, load_pt, load_tensor

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


def sniff(path: Path) -> bool:
    return path.is_dir() and any(map(known, path.glob("*.pt")))


def read(path: Path, *, config: Mapping[str, Any] | None = None, **_: Any) -> Dump:
    pieces, weights, problems = list[Piece](), dict[str, Piece](), list[Qwen35Error]()
    files = sorted(path.glob("*.pt"))
    # Which forward pass a file is of, in order of time as far as its name tells.
    named = {f: m for f in files if (m := NAME.fullmatch(f.name))}
    calls = {f: (int(m[4] or 0), int(m[6] or 0), m[5]) for f, m in named.items()}
    steps = {call: step for step, call in enumerate(sorted(set(calls.values())))}
    for file in files:
        with costs_itself(problems, file):
            if found := WEIGHT.fullmatch(file.name):
                for name in (name for name in load_pt(file) if not name.startswith("_")):
                    load = partial(load_tensor, file, name)
                    weights[f"{name}@{found[1]}"] = Piece.named(name, load, rank=int(found[1]), where=str(file))
            elif found := NAME.fullmatch(file.name):
                layer, kind, rank = int(found[1]), found[2] or "", int(found[3])
                load = partial(load_tensor, file, "hidden")
                below = next((p for pattern, p in MODULE_CLASSES if re.fullmatch(pattern, kind)), f"{kind}.output")
                load()  # a file that cannot be read is a problem of its own
                raw = f"layers.{layer}.{kind}"
                pieces.append(Piece(raw, load, steps[calls[file]], rank, layer, below, where=str(file)))
    first = pieces and not any(m[4] or m[5] for m in named.values())
    notes = ["one call a module was dumped: the first, which is the warm-up unless it was off"] if first else []
    return Dump("atom", path, pieces, problems=problems, notes=notes, config=config, weights=weights)
