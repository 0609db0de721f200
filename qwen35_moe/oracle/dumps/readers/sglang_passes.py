"""SGLang's --debug-tensor-dump-output-folder (0.5.23): Pass00000.pt, ..., one file a forward pass and rank.

A file holds {module path: tensor or list}, leaf modules only. It is flushed by a hook on `model`, before the outputs of
`model` itself and of the logits processor are known: those of pass k lie in file k+1, and the last pass has none. They
are put back here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from itertools import chain, starmap
from pathlib import Path
from typing import Any

from torch import Tensor

from ....errors import Qwen35Error
from ..dump import Dump, Piece, StepTokens
from ..pieces import itself
from .common import costs_itself, load_pt, outputs, step_tokens

BATCH_INFO = ".forward_batch_info."


def sniff(path: Path) -> bool:
    return path.is_dir() and bool(_folders(path))


def read(path: Path, *, config: Mapping[str, Any] | None = None, **_: Any) -> Dump:
    """The folder that was given to SGLang, or one of its TP*_PP*_Rank*_pid* folders."""
    pieces, problems, tokens = list[Piece](), list[Qwen35Error](), dict[int, StepTokens]()
    folders = _folders(path)
    seen: dict[int, list[str]] = {}
    for folder in folders:
        found = re.match(r"TP(\d+)_PP(\d+)_Rank(\d+)_pid", folder.name)
        rank = int(found[3]) if found else 0
        seen.setdefault(rank, []).append(folder.name)
        for file in sorted(folder.glob("Pass*.pt")):
            with costs_itself(problems, file):
                number, loaded = int(re.sub(r"\D", "", file.stem)), load_pt(file)
                if not isinstance(loaded, dict):
                    raise Qwen35Error("not a pass of SGLang's", where=file, expected="a dict of tensors by module",
                                      found=type(loaded).__name__, do="keep other files out of the dump")  # fmt: skip
                core = {name.partition(BATCH_INFO)[2]: x for name, x in loaded.items() if BATCH_INFO in name}
                if rank == 0 and isinstance(core.get("input_ids"), Tensor):
                    tokens[number] = step_tokens(core)
                for raw, x in chain.from_iterable(starmap(outputs, loaded.items())):
                    late = "." not in raw.rpartition(".output")[0]  # `model` and what comes after it
                    if isinstance(x, Tensor) and BATCH_INFO not in raw and not (late and number == 0):
                        load, world = partial(itself, x), {"world_size": len(folders)}  # mapped, not read
                        pieces.append(Piece.named(raw, load, step=number - late, rank=rank, parallel=world,
                                                  where=str(file)))  # fmt: skip
    if twice := next((names for names in seen.values() if len(names) > 1), None):
        raise Qwen35Error("dumps of several runs lie here", where=path, found=", ".join(twice[:3]), do="keep one run")
    notes = ["outputs of `model` and the logits were moved back by one pass; those of the last pass were not written"]
    return Dump("sglang passes", path, pieces, tokens, problems, notes, config=config)


def known(file: Path) -> bool:
    return re.fullmatch(r"Pass\d+\.pt", file.name) is not None


def _folders(path: Path) -> list[Path]:
    if any(path.glob("Pass*.pt")):
        return [path]
    return sorted(p for p in path.glob("TP*_PP*_Rank*_pid*") if any(p.glob("Pass*.pt")))
