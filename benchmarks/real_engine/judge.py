"""What the oracle says of a run, and whether that is right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from qwen35_moe.checkpoint import Checkpoint
from qwen35_moe.oracle.compare import diagnose
from qwen35_moe.oracle.dumps.dump import Dump
from qwen35_moe.oracle.dumps.readers import read_dump
from qwen35_moe.oracle.judge.records import Comparison
from qwen35_moe.oracle.servers.probe import Prepared, prepare
from qwen35_moe.oracle.servers.readers import from_json
from qwen35_moe.oracle.truth import open_checkpoint
from qwen35_moe.trace.images import read_images

from .bugs import BUGS, CLEAN


@dataclass(frozen=True)
class Line:
    text: str
    right: bool


def line(checkpoint: Path, dump: Dump | Path, name: str, declared: Mapping[str, Any]) -> Line:
    """`name` is setup.bug; `declared` are options of `diagnose`, such as in what the engine keeps its caches, and
    `layer_ids` those of vLLM's hidden states."""
    if name.startswith("probe.") and isinstance(dump, Path):
        return probed(checkpoint, dump.parent / f"{name}.json", name)
    config, declared = Checkpoint.open(checkpoint).config, dict(declared)
    layers = declared.pop("layer_ids", None)
    if isinstance(dump, Path) and (pixels := dump.parent / f"{name}.safetensors").exists():
        declared["images"] = read_images(pixels)
    read = dump if isinstance(dump, Dump) else read_dump(dump, config=config, layers=layers)
    if isinstance(dump, Path) and not read.tokens:
        declared = {**declared, "ids": ids_of((dump.parent if dump.is_file() else dump).parent / f"{name}.json")}
    result = diagnose(checkpoint, read, **declared)
    if read.absent and isinstance(dump, Path):  # of a cached prefix the ids must be given
        result = diagnose(
            checkpoint, read_dump(dump, config=config), ids=ids_of(dump.parent / f"{name}.json"), **declared
        )
    return said(result, name)


def probed(checkpoint: Path, file: Path, name: str) -> Line:
    """The verdict on log p alone. right: a clean engine agrees, and no bug does."""
    run = json.loads(file.read_text())
    answers = from_json(run["answers"], str(file), {"input_ids": run["ids"], "sampling_params": {"temperature": 0}})
    verdict = _prepared(checkpoint, tuple(map(tuple, run["ids"]))).judge(answers)
    named = f"  [{'; '.join(e.name for e in verdict.alike)}]" if verdict.alike else ""
    right = (verdict.finding == "agrees") == name.endswith(f".{CLEAN}")
    return Line(f"{name:32} exit {verdict.exit_code}  {verdict.finding}: {verdict.why}{named}", right)


@lru_cache(1)
def _prepared(checkpoint: Path, ids: tuple[tuple[int, ...], ...]) -> Prepared:
    """Every run is asked the same prompts."""
    loaded = open_checkpoint(checkpoint)[1]
    return prepare(loaded.source, loaded.fused, ids)


def ids_of(file: Path) -> list[list[int]]:
    """Prompts and what was generated, of which the last token went into no pass."""
    run = json.loads(file.read_text())
    return [row + answer["output_ids"][:-1] for row, answer in zip(run["ids"], run["answers"], strict=True)]


def said(result: Comparison, name: str) -> Line:
    """right: a clean engine agrees; of a bug the layer, the block and, where the catalogue has one, the name."""
    bug = name.partition(".")[2]
    first, named = result.first, [d.name for d in result.diagnoses]
    verdict = f"{name:32} exit {result.exit_code}  {result.verdict}" + (f"  [{'; '.join(named)}]" if named else "")
    if bug == CLEAN:
        return Line(verdict, result.exit_code == 0)
    expected = BUGS[bug]
    place, called = (expected.layer, expected.block), expected.called or "unknown"
    places = (first.suspects or [(first.layer, first.block)]) if first is not None else [(None, "positions")]
    found = [d for d in result.diagnoses if (d.layer, d.block) == place or place in places or place[0] is None]
    right = any(fnmatchcase(d.name, f"{called}*") for d in found[:1]) or (called == "unknown" and place in places)
    return Line(verdict, result.exit_code == 1 and right)
