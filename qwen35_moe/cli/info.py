"""`qwen35-moe info`: the contents of a checkpoint, and the memory and disk of a run."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from math import prod
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import Qwen35Error
from ..gate.decide import VARIANTS
from ..gate.records import GateModel
from ..model.config import FULL
from ..oracle.judge.envelope import legal
from ..run.validate import model_config, validate
from ..trace.estimate import estimate
from .device_options import add_ignored_keys
from .gate import lines_of, result_of


def configure(p: argparse.ArgumentParser) -> None:
    p.description = "Reads headers: sizes, formats, the gate's decision, and the memory and disk that a run needs."
    p.add_argument("checkpoint", help="checkpoint folder or .safetensors file")
    p.add_argument("--tokens", type=int, default=512, help="estimate a run of so many tokens (default: %(default)s)")
    p.add_argument("--arithmetic", default="exact", help="estimate a run in this arithmetic (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.add_argument("--verify", action="store_true", help="read everything and compare all known checksums")
    p.add_argument("--manifest", help="file of expected checksums, lines `sha256 ... name`; implies --verify")
    add_ignored_keys(p)


def run(args: argparse.Namespace) -> int:
    """Prints what is there. 0; 1 where a checksum differs. Error: a checkpoint that headers show to be broken."""
    if not 1 <= args.tokens <= 10**9:
        raise Qwen35Error("nothing to estimate", where="--tokens", expected="1 to 10^9", found=args.tokens)
    with Checkpoint.open(args.checkpoint) as checkpoint:
        found = checkpoint_facts(checkpoint, args.tokens, args.arithmetic, args.ignore_config_keys)
        failed = 0
        if args.verify or args.manifest is not None:
            sums = list(checkpoint.verify(args.manifest))
            failed = sum(not c.ok for c in sums)
            found["checksums"] = [vars(c) | {"ok": c.ok} for c in sums]
        print(json.dumps({"type": "checkpoint", **found}) if args.json else "\n".join(info_lines(found)))
    return 1 if failed else 0


def checkpoint_facts(
    checkpoint: Checkpoint, tokens: int, arithmetic: str, ignore_config_keys: Iterable[str] = ()
) -> dict[str, Any]:
    """All that `info` prints, as plain data."""
    config = model_config(checkpoint, ignore_config_keys)
    validate(checkpoint, config)
    rows = modules(checkpoint)
    return {
        "path": str(checkpoint.path),
        **checkpoint.identity(),
        "layers": config.num_hidden_layers,
        "full_attention_layers": sum(kind == FULL for kind in config.layer_types),
        "hidden_size": config.hidden_size,
        "experts": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "modules": rows,
        "gate": result_of(GateModel.from_config(checkpoint.config, stored=checkpoint.spec), VARIANTS[0], {}),
        "estimate": estimate(checkpoint, config, rows, tokens, arithmetic),
    }


def modules(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """A row for each kind of module: how many, in which format, how many parameters and bytes."""
    rows: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for module, roles in checkpoint.modules.items():
        weight = checkpoint.find(module)
        kind = re.sub(r"(layers|experts|blocks)\.\d+\.", r"\1.*.", module)
        count = rows[kind, str(weight.spec)]
        count.update(modules=1, parameters=prod(weight.shape), bytes=sum(stored.nbytes for stored in roles.values()))
    return [{"module": kind, "format": spec, **count} for (kind, spec), count in rows.items()]


def info_lines(found: dict[str, Any]) -> list[str]:
    full, layers = found["full_attention_layers"], found["layers"]
    lines = [
        found["path"],
        f"  {_size(found['bytes'])} in {found['files']} files, {found['tensors']} tensors, "
        f"headers sha256 {found['headers_sha256'][:16]}",
        f"  {layers} layers ({full} full attention, {layers - full} DeltaNet), width {found['hidden_size']}, "
        f"{found['experts']} experts, {found['experts_per_token']} a token",
        "",
        f"  {'module':<46} {'format':<26} {'count':>7} {'parameters':>15} {'size':>9}",
    ]
    for row in found["modules"]:
        said = f"  {row['module']:<46} {row['format']:<26} {row['modules']:>7} {row['parameters']:>15,}"
        lines.append(f"{said} {_size(row['bytes']):>9}")
    lines += ["", "  shared expert (rule strict, by what is stored)"]
    lines += ["  " + line for line in lines_of(found["gate"], False)]
    e = found["estimate"]
    lines += [
        "",
        f"  {e['tokens']} tokens, {e['arithmetic']}: a trace of all taps takes {_size(e['trace_bytes'])} on disk; its "
        f"envelope takes {len(legal(e['arithmetic']))} passes more",
        "  peak memory: " + ", ".join(f"{mode} {_size(size)}" for mode, size in e["memory"].items()),
    ]
    for c in found.get("checksums", []):
        verdict = ("ok" if c["expected"] else "nothing known") if c["ok"] else "DIFFERS"
        lines.append(f"  {c['name']}: {verdict}  {c['found'] or 'absent'}  ({c['source']})")
    return lines


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError("the loop returns")
