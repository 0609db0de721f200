"""Dumps in an engine's own shape: SGLang's names, merged projections, and the lists of slots that its experts take."""

from __future__ import annotations

from pathlib import Path

import torch

from qwen35_moe.oracle.dumps.dump import Dump
from qwen35_moe.oracle.dumps.readers import read_dump
from qwen35_moe.oracle.dumps.writers import write_sglang_dump
from qwen35_moe.trace.file import Trace

# An unfused engine gives its experts lists of k; a fused one of k + 1, the shared gate last, which our own taps are.
LISTS = {"mlp.topk.output.1": "mlp.experts.inputs.1.1", "mlp.topk.output.0": "mlp.experts.inputs.1.0"}


def as_files(run: Trace, path: Path, fused: bool) -> Dump:
    """What SGLang's dumper would have written of this run, in a new folder, to be read from there."""
    write_sglang_dump(run, path, names="hooks")
    for file in [] if fused else sorted(path.iterdir()):
        for name, other in LISTS.items():
            if f".{name}___" in file.name:
                content = torch.load(file, weights_only=True)
                content["meta"]["name"] = content["meta"]["name"].replace(name, other)
                torch.save(content, path / file.name.replace(name, other))
    return read_dump(path, config=run.meta["config"])
