"""The end of `make demo`: an engine's known failure is planted, dumped, read back, found and named."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from ..arithmetic import get
from ..load import build
from ..trace import trace
from . import report, report_html
from .catalogue import FAULTS
from .compare import compare
from .faults import Place
from .mutants import DUMPED
from .oracle_cli import open_checkpoint, write_truth
from .readers import read_dump
from .rerun import CPU
from .writers import write_sglang_dump


def planted_failure(checkpoint: Path, out: Path, layer: int = 1) -> bool:
    """SGLang PR 22948 in one layer: the BF16 shared expert copied into the fused slot of MXFP4 experts.

    The engine is our model in SGLang's bf16 arithmetic; its dump has the form of SGLang's dumper. True if the oracle
    names layer, block and cause.
    """
    ids = (torch.arange(32) * 7919 % 251)[None]
    truth = write_truth(checkpoint, ids, None, out / "truth")
    _, loaded = open_checkpoint(checkpoint)
    fault = next(f for f in FAULTS if f.name == "BF16 shared expert read as FP4")
    place = Place(loaded.source.config, truth.positions, frozenset({layer}))
    fused = [i == layer for i in range(len(loaded.fused))]
    engine = build(fault.source(loaded.source, place), get("sglang-bf16"), fused, CPU, "decoded")
    run = trace(engine, ids, taps=DUMPED)
    shutil.rmtree(out / "engine_dump", ignore_errors=True)  # of an earlier demo
    write_sglang_dump(run, out / "engine_dump")
    result = compare(truth, read_dump(out / "engine_dump", config=truth.meta["config"]), loaded.source)
    print(f"\nAn engine with the failure of SGLang PR 22948 in layer {layer}, its dump compared with the truth:\n")
    print(report.text(result))
    page = out / "report.html"
    report.write(page, report_html.html(result, "An engine with the failure of SGLang PR 22948"))
    print(f"\nThe same as a page: {page.resolve()}")
    said = result.diagnoses[0] if result.diagnoses else None
    return said is not None and (said.layer, said.block, said.name) == (layer, "mlp", fault.name)
