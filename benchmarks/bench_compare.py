"""How long comparing takes, beside reading the same files once.

    python -m benchmarks.bench_compare [--layers 15 60] [--tokens 512] [--folder DIR] [--rounds 3]

A truth (float64, with its envelope) and an engine's dump (bfloat16) of N layers with the dimensions of Qwen3.5-35B-A3B,
as `trace` and an engine write them, made of random numbers. Each measurement is a process of its own, with the files in
the page cache: one that reads every tensor of every file, one that compares. The best of the rounds, taken in turns;
VmHWM is the peak memory of the comparing process. Needs 110 MB of disk a layer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from qwen35_moe.oracle.envelope import Norms, one_rounding
from qwen35_moe.oracle.envelope_file import ENVELOPE, as_rows
from qwen35_moe.oracle.trace_file import Entry, TraceWriter
from qwen35_moe.tap_names import TAPS
from qwen35_moe.taps import Site

WIDTHS = {
    "layer_input": 2048, "attn_output": 2048, "pre_mlp_residual_sum": 2048, "pre_mlp_layernorm_output": 2048,
    "moe_router_logits": 256, "moe_topk_weights": 8, "moe_shared_gate": 1, "moe_routed_output": 2048,
    "moe_shared_output": 2048, "mlp_output": 2048, "layer_output_sum": 2048,
}  # fmt: skip
MIXERS = {
    "gdn": {"gdn_qkv": 8192, "gdn_z": 4096, "gdn_beta": 32, "gdn_g": 32, "gdn_core_out": 4096, "gdn_norm_out": 4096},
    "attn": {"attn_q": 4096, "attn_k": 512, "attn_v": 512, "attn_context": 4096, "attn_pre_o_proj": 4096},
}

READ = """
import sys
from pathlib import Path
from safetensors import safe_open
total = 0
for path in sorted(Path(p) for folder in sys.argv[1:] for p in Path(folder).glob("*.safetensors")):
    with safe_open(path, framework="pt") as file:
        for key in file.keys():
            total += file.get_tensor(key).clone().nbytes
"""
COMPARE = """
import sys
from qwen35_moe.oracle.compare import compare
from qwen35_moe.oracle.readers import read_dump
from qwen35_moe.oracle.trace_file import Trace
result = compare(Trace.open(sys.argv[1]), read_dump(sys.argv[2]))
judged = [r for r in result.records if r.inherited is not None]
assert len(judged) > 10 and not any(r.bad for r in judged), [r for r in judged if r.bad][:3]
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def write(folder: Path, layers: int, tokens: int) -> None:
    """A truth, an engine that is off by some roundings, and an envelope as wide as that."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1000, (1, tokens), generator=generator).tolist()
    step = {"ids": ids, "positions": [list(range(tokens))], "mask": [[1] * tokens]}
    bounds = {}
    with (
        TraceWriter(folder / "truth", {"arithmetic": "exact", "steps": [step]}) as truth,
        TraceWriter(folder / "engine", {"arithmetic": "sglang-bf16", "steps": [step]}) as engine,
    ):
        for layer in range(layers):
            for name, width in {**WIDTHS, **MIXERS["gdn" if (layer + 1) % 4 else "attn"]}.items():
                dims = TAPS[name].dims
                shape = (1, tokens, width) if dims.startswith("b ") else (tokens, width)
                x = torch.randn(shape, dtype=torch.float64, generator=generator)
                site = Site(name, layer)
                y = (x + x * torch.randn(shape, generator=generator) * 2**-9).to(torch.bfloat16)
                truth.add(Entry.of(site, x, dims), x)
                engine.add(Entry.of(site, y, dims), y)
                rows = as_rows(site.key, x, tokens)
                errors = Norms.of(rows, minus=as_rows(site.key, y, tokens))
                norms = (errors, Norms.of(rows), one_rounding(rows, torch.bfloat16))
                bounds[site.key] = torch.stack([c for n in norms for c in (n.l2, n.max)], 1).to(torch.float32)
    save_file(bounds, folder / "truth" / ENVELOPE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[15, 60])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to write (default: a temporary one)")
    arguments = parser.parse_args()
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            report(Path(folder), layers, arguments.tokens, arguments.rounds)


def timed(script: str, *folders: Path) -> tuple[float, str]:
    """Seconds of the script's own work, without the start of Python and its imports, and what it printed last."""
    head, _, body = script.partition("\nresult = " if "result = " in script else "\ntotal = 0")
    lead = "result = " if "result = " in script else "total = 0"
    timing = f"{head}\nimport time\nstart = time.perf_counter()\n{lead}{body}\nprint(time.perf_counter() - start)"
    out = subprocess.run([sys.executable, "-c", timing, *map(str, folders)], check=True, capture_output=True, text=True)
    *before, seconds = out.stdout.split()
    return float(seconds), before[-1] if before else ""


def report(folder: Path, layers: int, tokens: int, rounds: int) -> None:
    write(folder, layers, tokens)
    size = sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
    both = (folder / "truth", folder / "engine")
    reading, comparing = [], []
    for _ in range(rounds):
        reading.append(timed(READ, *both)[0])
        comparing.append(timed(COMPARE, *both))
    read, (seconds, memory) = min(reading), min(comparing)
    print(
        f"{layers} layers, {size / 1e9:.2f} GB: reading {read:.2f} s ({size / read / 1e9:.1f} GB/s), comparing "
        f"{seconds:.2f} s, ratio {seconds / read:.2f}, peak memory {int(memory) / 1024:.0f} MiB",
        flush=True,
    )


if __name__ == "__main__":
    main()
