"""The package's own model plays an engine, right or with a known fault, and writes a dump, for demos and tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..numerics.arithmetics import get
from ..run.load import build
from ..trace.recorder import trace
from .diagnose.catalogue import FAULTS
from .diagnose.faults import Fault, FaultSite
from .dumps.writers import DUMPED, write_sglang_dump
from .truth import open_checkpoint


def known_fault(name: str) -> Fault:
    """The fault of the catalogue that has this name."""
    found = next((fault for fault in FAULTS if fault.name == name), None)
    if found is None:
        do = "see FAULTS in qwen35_moe/oracle/diagnose/catalogue.py"
        raise Qwen35Error("no such fault in the catalogue", where="fault", found=name, do=do)
    return found


def fault_names() -> list[str]:
    """The names of the catalogue's faults."""
    return [fault.name for fault in FAULTS]


def play_engine(
    checkpoint: str | Path, ids: Tensor, out: str | Path, *,
    arithmetic: str = "sglang-bf16", fault: str | None = None, layer: int = 0,
) -> Path:  # fmt: skip
    """Run a checkpoint on ids [B, T] as an engine would, and write to `out` what SGLang's dumper would write.

    fault   name of a fault of the catalogue, planted in `layer`. What stands at `out` already is replaced.
    """
    _, loaded = open_checkpoint(checkpoint)
    table, source, fused = get(arithmetic), loaded.source, list(loaded.fused)
    handlers = []
    if fault is not None:
        broken = known_fault(fault)
        place = FaultSite(source.config, torch.arange(ids.shape[1]).expand_as(ids), frozenset({layer}))
        table, handlers = broken.arithmetic(table), broken.handlers(place)
        source, fused[layer] = broken.source(source, place), broken.fused
    model = build(source, table, fused, torch.device("cpu"), "decoded")
    run = trace(model, ids, taps=DUMPED, replay=handlers)
    out = Path(out)
    if out.exists() and not any(out.glob("*.pt")):
        raise Qwen35Error("not a dump", where=out, expected="no folder, or a dump that may be replaced")
    shutil.rmtree(out, ignore_errors=True)
    write_sglang_dump(run, out)
    return out
