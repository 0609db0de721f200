"""Our own trace directories, read as a dump: an engine-like run, or another arithmetic, compared with the truth."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from ....trace.drafts import draft_ids_of
from ....trace.file import Trace
from ..dump import Dump, Piece, StepTokens


def sniff(path: Path) -> bool:
    return path.is_dir() and ((path / "trace.json").is_file() or any(path.glob("00000.safetensors")))


def read(path: Path, *, config: Any = None, **_: Any) -> Dump:
    return from_trace(Trace.open(path), config)


def from_trace(trace: Trace, config: Any = None) -> Dump:
    """A trace, in memory or on disk, in the role of an engine's dump."""
    pieces = [
        Piece(key, partial(trace.__getitem__, key), entry.step, layer=entry.layer, path=entry.name, part=entry.part,
              key=key.removeprefix(f"step.{entry.step}."), where=str(trace.path or "memory"))
        for key, entry in trace.sites.items()
    ]  # fmt: skip
    tokens = {}
    for number, step in enumerate(trace.steps):
        ids, mask = torch.tensor(step["ids"]), torch.tensor(step["mask"], dtype=torch.bool)
        # With images in the prompt, time alone orders no tokens.
        positions = None if "axes" in step else torch.tensor(step["positions"]).flatten()
        tokens[number] = StepTokens(ids.flatten(), positions, batch=(ids.shape[0], ids.shape[1]), mask=mask.flatten())
    dump = Dump("qwen35-moe trace", trace.path or "memory", pieces, tokens, config=config or trace.meta.get("config"))
    dump.draft_ids = draft_ids_of(trace)
    return dump
