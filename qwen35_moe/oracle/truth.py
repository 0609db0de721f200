"""The truth that a dump is compared with: traced for given ids, or for the tokens of a dump."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..model.text import Model
from ..numerics.arithmetics import Arithmetic
from ..numerics.tap_keys import base_name, part_of
from ..numerics.tap_table import NAMES
from ..run.load import load
from ..run.origin import check_default_device, origin_of
from ..run.prompt import Images, padded
from ..run.source import WeightSource
from ..trace.file import Trace
from ..trace.layers import HEAD, trace_layers
from .dumps.align import TWO_MEANINGS
from .dumps.dump import Dump
from .dumps.matched import DraftBranch, with_branches
from .dumps.pair import INSTEAD
from .judge.envelope import legal
from .judge.envelope_file import with_ids, write_envelope
from .judge.log_p import LOG_P
from .judge.where import HERE, Where


@dataclass
class Loaded:
    source: WeightSource
    fused: list[bool]


def open_checkpoint(
    path: str | Path, shared_expert: str = "unfused", arithmetic: str = "exact", ignore_config_keys: Iterable[str] = ()
) -> tuple[Model, Loaded]:
    """A streamed model of a checkpoint, its weights, and which layers fuse the shared expert."""
    model = load(
        path, arithmetic, shared_expert, mode="stream", text_only=True, ignore_config_keys=tuple(ignore_config_keys)
    )
    return model, Loaded(origin_of(model).source, [layer.mlp.fused for layer in model.layers.empty])  # type: ignore[union-attr]


def weights_of(
    truth: Trace, checkpoint: WeightSource | str | Path | None, ignore_config_keys: Iterable[str] = ()
) -> tuple[WeightSource | None, list[bool]]:
    """The weights that a truth was computed from, if they are known or given, and which layers were fused. Error: the
    checkpoint is another one."""
    flags = list(truth.meta.get("fused") or [])
    if isinstance(checkpoint, WeightSource):
        return checkpoint, flags
    known = (truth.meta.get("checkpoint") or {}).get("path")
    path = checkpoint or known
    if not path or (checkpoint is None and not os.path.exists(path)):
        return None, flags
    model, loaded = open_checkpoint(path, ignore_config_keys=ignore_config_keys)
    if not truth.is_of(origin_of(model).identity):
        do = "trace this checkpoint, or give the other one as checkpoint"
        where = truth.path or "a truth in memory"
        raise Qwen35Error("truth is of another checkpoint", where=where, expected=known, found=path, do=do)
    return loaded.source, flags or loaded.fused


def names_in(dump: Dump) -> str:
    """Patterns of the taps at which a dump can be compared: those that it holds, and those that its values give."""
    held = {base_name(key) for key in dump.sources}
    names = {name for name, (other, _) in INSTEAD.items() if other in held} | (held & NAMES)
    for one, other, _ in TWO_MEANINGS:
        names |= {one, other} if one in held else set()
    drafts = dump.accepted or dump.draft_ids or any(map(part_of, dump.sources))
    names |= {HEAD} if drafts or LOG_P in held else set()
    return ",".join(sorted(names)) or "*"


def write_truth(
    checkpoint: str | Path, ids: Tensor | Sequence[Tensor | Sequence[int]], out: str | Path, *,
    arithmetic: str = "exact", shared_expert: str = "unfused", taps: str = "*", with_envelope: bool = True,
    where: Where = HERE, drafts: Sequence[Tensor] = (), images: Images | None = None,
    branches: Sequence[DraftBranch] = (),
) -> Trace:  # fmt: skip
    """Trace a checkpoint to the directory `out`, layer by layer, and beside it the envelope.

    ids [B, T], or a list of sequences of token ids, of any lengths. where: the device and how weights are held there.
    drafts: the draft head, too: see `trace_drafts`. images: of the prompts, whose ids have a placeholder for each of
    their merge blocks. branches: of these sequences; they are traced, too.
    """
    check_default_device()
    ids, mask = padded(with_branches([torch.as_tensor(row) for row in ids], branches))
    spread = where.device_map is not None
    device: dict[str, Any] = {"device_map": where.device_map} if spread else {"device": where.device}

    def model_in(table: str | Arithmetic) -> Model:
        mode, text_only = where.mode or ("packed" if spread else "stream"), not drafts and images is None
        return load(checkpoint, table, shared_expert, mode=mode, text_only=text_only,
                    ignore_config_keys=where.ignore_config_keys, **device)  # fmt: skip

    model = model_in(arithmetic)
    meta = {"checkpoint": {**origin_of(model).identity, "path": str(Path(checkpoint).resolve())}, "fused": model.fused}
    meta |= {"branches": [[x.of, x.at] for x in branches]} if branches else {}
    if not spread:
        ids, mask = ids.to(where.device), None if mask is None else mask.to(where.device)
    taps = with_ids(taps) if with_envelope else taps
    truth, _ = trace_layers(model, ids, out, mask=mask, taps=taps, meta=meta, quiet=where.quiet, drafts=drafts,
                            images=images)  # fmt: skip
    if with_envelope:
        write_envelope(truth, map(model_in, legal(arithmetic)))
    return truth
