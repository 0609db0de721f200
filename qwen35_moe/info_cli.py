"""`qwen35-moe info`: what a checkpoint holds, and what a run of it will take."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from math import prod
from typing import Any

import psutil
import torch

from .arithmetic import get
from .checkpoint import Checkpoint
from .config import FULL, Config
from .errors import Qwen35Error
from .gate_cli import _lines, _result
from .load import HEAD_ROWS
from .oracle.envelope import legal
from .oracle.trace_file import CHUNK_BYTES
from .tap_names import TAPS

SLACK = 64 << 20  # what the libraries take once they compute more than the rates


def add_parser(subparsers: Any) -> None:
    p = subparsers.add_parser(
        "info",
        help="sizes, formats, the gate's decision, and memory and time that a run will need",
        description="Reads headers only, and measures this machine for a second.",
    )
    p.add_argument("checkpoint", help="checkpoint folder or .safetensors file")
    p.add_argument("--tokens", type=int, default=512, help="of the run to estimate (default: %(default)s)")
    p.add_argument("--arithmetic", default="exact", help="default: %(default)s")
    p.add_argument("--json", action="store_true", help="the same as JSON")
    p.add_argument("--verify", action="store_true", help="read everything and compare checksums, where any are known")
    p.add_argument("--manifest", help="for --verify: a file of lines `sha256 ... name`")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints what is there. 0; 1 where a checksum differs. Error: a checkpoint that headers show to be broken."""
    if args.tokens < 1:
        raise Qwen35Error("nothing to estimate", where="--tokens", expected="at least 1", found=args.tokens)
    with Checkpoint.open(args.checkpoint) as checkpoint:
        found = describe(checkpoint, args.tokens, args.arithmetic)
        failed = 0
        if args.verify:
            sums = list(checkpoint.verify(args.manifest))
            failed = sum(not c.ok for c in sums)
            found["checksums"] = [vars(c) | {"ok": c.ok} for c in sums]
        print(json.dumps(found, indent=1) if args.json else "\n".join(text(found)))
    return 1 if failed else 0


def describe(checkpoint: Checkpoint, tokens: int, arithmetic: str) -> dict[str, Any]:
    """All that `info` prints, as plain data."""
    config = Config.from_dict(checkpoint.config)
    checkpoint.validate(config)
    return {
        "path": str(checkpoint.path),
        **checkpoint.identity(),
        "layers": config.num_hidden_layers,
        "full_attention_layers": sum(kind == FULL for kind in config.layer_types),
        "hidden_size": config.hidden_size,
        "experts": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "modules": modules(checkpoint),
        "gate": _result(dict(checkpoint.config), checkpoint.spec, ("strict", "strict", {}), {}),
        "estimate": estimate(checkpoint, config, tokens, arithmetic),
    }


def modules(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """A row for each kind of module: how many, in which format, how many parameters and bytes."""
    rows: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for module, roles in checkpoint.modules.items():
        weight = checkpoint.find(module)
        kind = re.sub(r"(layers|experts|blocks)\.\d+\.", r"\1.*.", module)
        count = rows[kind, str(weight.spec)]
        values = 1
        for size in weight.shape:
            values *= size
        count.update(modules=1, parameters=values, bytes=sum(stored.nbytes for stored in roles.values()))
    return [{"module": kind, "format": spec, **count} for (kind, spec), count in rows.items()]


def estimate(checkpoint: Checkpoint, config: Config, tokens: int, arithmetic: str) -> dict[str, Any]:
    """Peak memory, time and disk of a run over so many tokens.

    Time of one forward pass: operations / this machine's matmul rate in the dtype, and values to decode / its decoding
    rate, one after the other; reading from a disk slower than that, and writing a trace, come on top. Measured on four
    layers of the 35B, two cores: 0.8 to 2.1 times this; where others use the cores, its rates mean little.

    Memory, an upper bound for `qwen35-moe trace` with all taps when it streams: the process; the weights of one layer;
    an expert a thread; what taps hold until they are written, and once more while they are (measured there: 2 to 13 %
    less). For the other modes: one
    forward pass, whose logits are held.
    """
    table = get(arithmetic)
    width, D, F = table.dtype.itemsize, config.hidden_size, config.moe_intermediate_size
    V, E, A, L = config.vocab_size, config.num_experts, config.num_experts_per_tok, config.num_hidden_layers
    text = [row for row in modules(checkpoint) if not row["module"].startswith(("mtp.", "visual."))]
    all_values = sum(row["parameters"] for row in text)
    experts = [row for row in text if ".mlp.experts" in row["module"]]
    packed, expert_values = sum(row["bytes"] for row in experts), sum(row["parameters"] for row in experts)
    ends = V * D * (1 if config.tie_word_embeddings else 2)
    plain = all_values - expert_values - ends
    layers, largest = _layers(checkpoint)
    rates = measure(table.dtype, D, F)
    process = psutil.Process().memory_info().rss + SLACK  # as much as this one, which has just multiplied and decoded
    hit = E * (1 - (1 - A / E) ** tokens)
    operations = 2 * tokens * (plain + L * A * 3 * D * F + V * D)
    decoded = plain + L * hit * 3 * D * F + V * D
    seconds = operations / rates["matmul_flops"] + decoded * width / rates["decode_bytes"]
    taps = [tap_bytes(config, kind, tokens, width) for kind in config.layer_types]
    held = max(min(sum(sizes), CHUNK_BYTES + max(sizes)) for sizes in taps)
    logits, stream = tokens * V * width, tokens * D * width * 8
    some = torch.get_num_threads() * 3 * D * F * width
    head = min(HEAD_ROWS, V) * (D * (width + 2) + 2 * tokens * width)
    mapped = all(row["format"] == str(table.dtype).removeprefix("torch.").replace("float", "f") for row in text)
    return {
        "tokens": tokens,
        "arithmetic": arithmetic,
        **rates,
        "seconds": seconds,
        "trace_bytes": sum(map(sum, taps)) + logits,
        "memory": {
            "stream": int(process + max(layers * width + largest + some + 2 * held, head) + stream),
            "packed": int(process + packed + (plain + ends) * width + some + logits + stream),
            "decoded": int(process + (0 if mapped else all_values * width) + logits + stream),
        },
    }


def _layers(checkpoint: Checkpoint) -> tuple[int, int]:
    """Values of the largest layer without its experts, and stored bytes of the largest weight in one."""
    values, largest = Counter[str](), 0
    for module, roles in checkpoint.modules.items():
        if module.startswith("layers.") and ".mlp.experts" not in module:
            values[module.split(".")[1]] += prod(checkpoint.find(module).shape)
            largest = max(largest, *(stored.nbytes for stored in roles.values()))
    return max(values.values()), largest


def tap_bytes(config: Config, kind: str, tokens: int, width: int) -> list[int]:
    """Bytes of each tap of a layer: the product of its dims (tap_names.py), for one sequence of so many tokens."""
    c, elsewhere = config, "gdn_" if kind == FULL else "attn_"
    J, K, P, M = c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim, c.linear_num_key_heads
    sizes = {
        "t": tokens, "s": tokens, "d": c.hidden_size, "n": c.num_attention_heads, "g": c.num_key_value_heads,
        "h": c.head_dim, "r": c.head_dim, "j": J, "m": M, "k": K, "p": P, "c": 2 * M * K + J * P,
        "w": c.linear_conv_kernel_dim - 1, "e": c.num_experts, "a": c.num_experts_per_tok + 1,
        "f": c.shared_expert_intermediate_size,
    }  # fmt: skip
    found = []
    for name, tap in TAPS.items():
        in_layer = re.match(r"(layer_|input_layernorm|pre_mlp_|mlp_output|moe_|attn_|gdn_)", name)
        in_loop = re.match(r"(moe_expert_|moe_a2|moe_partial_sum|gdn_recall|gdn_conv_product)", name)
        if in_layer and not in_loop and (not name.startswith(elsewhere) or name == "attn_output"):
            words = re.findall(r"\d+|[a-z]", tap.dims)
            found.append(width * prod(int(word) if word.isdigit() else sizes.get(word, 1) for word in words))
    return found


def measure(dtype: torch.dtype, D: int, F: int) -> dict[str, float]:
    """This machine: operations a second of a product [16, D] x [D, 2F], bytes a second of decoding MXFP4 to `dtype`."""
    from .quant.mxfp4 import decode

    x, weight = torch.ones(16, D, dtype=dtype), torch.ones(2 * F, D, dtype=dtype)
    codes, scales = torch.zeros(2 * F, D // 2, dtype=torch.uint8), torch.full((2 * F, D // 32), 127, dtype=torch.uint8)
    out = torch.empty_like(weight)
    product = _best(lambda: torch.nn.functional.linear(x, weight))
    decoding = _best(lambda: decode(codes, scales, dtype, out)) if dtype.itemsize > 1 else float("inf")
    return {"matmul_flops": 2 * x.numel() * 2 * F / product, "decode_bytes": out.nbytes / decoding}


def _best(step: Callable[[], object], seconds: float = 0.3) -> float:
    """Of at least five; the first, which sets things up, does not count."""
    step()
    best, end, times = float("inf"), time.perf_counter() + seconds, 0
    while (start := time.perf_counter()) < end or times < 5:
        step()
        best, times = min(best, time.perf_counter() - start), times + 1
    return best


def text(found: dict[str, Any]) -> list[str]:
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
        lines.append(
            f"  {row['module']:<46} {row['format']:<26} {row['modules']:>7} {row['parameters']:>15,} "
            f"{_size(row['bytes']):>9}"
        )
    lines += [
        "",
        "  shared expert (rule strict, by what is stored)",
        *("  " + line for line in _lines(found["gate"], False)),
    ]
    e = found["estimate"]
    lines += [
        "",
        f"  one forward pass over {e['tokens']} tokens, {e['arithmetic']}: about {_time(e['seconds'])} on this machine "
        f"({e['matmul_flops'] / 1e9:.0f} GFLOP/s, decodes {e['decode_bytes'] / 1e9:.1f} GB/s)",
        f"  a trace of all taps takes {_size(e['trace_bytes'])} on disk; its envelope takes "
        f"{len(legal(e['arithmetic']))} passes more",
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


def _time(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
