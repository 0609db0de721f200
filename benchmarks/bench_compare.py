"""How long comparing takes, beside reading the same files once.

    python -m benchmarks.bench_compare [--layers 15 30 60] [--tokens 512] [--rounds 3] [--folder DIR]

A truth (float64, as `exact` writes it, and its envelope, a thousandth of the bytes) and an engine's dump (bfloat16) of
N layers with the dimensions of Qwen3.5-35B-A3B, the taps that users dump. The dump comes in three formats: a trace,
SGLang's dumper (a file a tensor) and plain safetensors (a file a layer). Each measurement is a process of its own, with
the files in the page cache: one reads every byte into memory (256 MiB that are there already, round and round: what
stays in a cache is not in memory), one compares. They take turns; the best of the rounds counts, by the clock, and in
CPU seconds, which other programs disturb less. VmHWM is the comparing process' peak memory. Needs 160 MB a layer.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qwen35_moe.numerics.tap_table import TAPS
from qwen35_moe.numerics.taps import Site
from qwen35_moe.oracle.dumps.writers import write_sglang_dump
from qwen35_moe.oracle.judge.envelope import Norms, rounding_loss
from qwen35_moe.oracle.judge.envelope_file import ENVELOPE, as_rows
from qwen35_moe.trace.file import Trace
from qwen35_moe.trace.head import Entry
from qwen35_moe.trace.writer import TraceWriter

EVERY = {
    "layer_input": 2048, "input_layernorm": 2048, "attn_output": 2048, "pre_mlp_residual": 2048,
    "pre_mlp_layernorm_output": 2048, "moe_router_logits": 256, "moe_topk_ids": 8, "moe_topk_weights": 8,
    "moe_shared_gate": 1, "moe_routed_output": 2048, "moe_shared_output": 2048, "mlp_output": 2048,
}  # fmt: skip
MIXERS = {
    "gdn": {"gdn_qkv": 8192, "gdn_z": 4096, "gdn_b": 32, "gdn_a": 32, "gdn_core_out": 4096},
    "attn": {"attn_q": 4096, "attn_k": 512, "attn_v": 512, "attn_context": 4096, "attn_pre_o_proj": 4096},
}

RING = 1 << 28
TIMED = """
import sys, time
from pathlib import Path
{imports}
clock, cpu = time.perf_counter(), time.process_time()
{work}
print(time.perf_counter() - clock, time.process_time() - cpu, *out)
"""
READ = TIMED.format(
    imports="memory, at, out = memoryview(bytearray(RING)), 0, []".replace("RING", str(RING)),
    work="""
for path in sorted(path for folder in sys.argv[1:] for path in Path(folder).rglob("*.*")):
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(memory[at : at + (1 << 22)]):
            at = 0 if at + size + (1 << 22) > len(memory) else at + size
""",
)
COMPARE = TIMED.format(
    imports="""
from qwen35_moe.oracle.compare import compare
from qwen35_moe.oracle.readers import read_dump
from qwen35_moe.oracle.trace_file import Trace
""",
    work="""
truth = Trace.open(sys.argv[1])
result = compare(truth, read_dump(sys.argv[2]))
assert result.exit_code == 0 and result.compared == len(truth), result.verdict
out = [next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]]
""",
)


def values(layer: int, tokens: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Truth and engine of one layer's taps: the engine is off by a rounding or two, and chooses the same experts."""
    generator = torch.Generator().manual_seed(layer)
    out = {}
    for name, width in {**EVERY, **MIXERS["gdn" if (layer + 1) % 4 else "attn"]}.items():
        shape = (1, tokens, width) if TAPS[name].dims.startswith("b ") else (tokens, width)
        if name == "moe_topk_ids":
            x = y = torch.rand(tokens, EVERY["moe_router_logits"], generator=generator).topk(width).indices
        else:
            x = torch.randn(shape, dtype=torch.float64, generator=generator)
            y = (x + x * torch.randn(shape, generator=generator) * 2**-9).to(torch.bfloat16)
        out[name] = x, y
    return out


def write(folder: Path, layers: int, tokens: int) -> Callable[[str], None]:
    """Write the truth and its envelope, as wide as the engine's errors. Returns what writes the dump in a format."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1000, (1, tokens), generator=generator).tolist()
    step = {"ids": ids, "positions": [list(range(tokens))], "mask": [[1] * tokens]}
    kinds = [values(layer, tokens) for layer in range(4)]  # the layers repeat after four: writing takes long enough
    bounds, measured = {}, {}
    engine = Trace(meta={"arithmetic": "sglang-bf16", "steps": [step]})
    with TraceWriter(folder / "truth", {"arithmetic": "exact", "steps": [step]}) as truth:
        for layer in range(layers):
            for name, (x, y) in kinds[layer % 4].items():
                site, dims = Site(name, layer), TAPS[name].dims
                truth.add(Entry.of(site, x, dims), x)
                engine.add(Entry.of(site, y, dims), y)
                if x.is_floating_point():
                    if layer < 4:
                        rows = as_rows(site.key, x, tokens)
                        norms = (Norms.of(rows, minus=as_rows(site.key, y, tokens)), Norms.of(rows),
                                 rounding_loss(rows, torch.bfloat16))  # fmt: skip
                        columns = torch.stack([c for n in norms for c in (n.l2, n.max)], 1)
                        measured[name, layer] = columns.to(torch.float32)
                    bounds[site.key] = measured[name, layer % 4].clone()
    save_file(bounds, folder / "truth" / ENVELOPE)

    def write_dump(form: str) -> None:
        shutil.rmtree(folder / "dump", ignore_errors=True)
        if form == "trace":
            with TraceWriter(folder / "dump", engine.meta) as writer:
                for key, entry in engine.sites.items():
                    writer.add(entry, engine[key])
        elif form == "sglang":
            write_sglang_dump(engine, folder / "dump")
        else:
            (folder / "dump").mkdir()
            save_file({"input_ids": torch.tensor(ids)}, folder / "dump" / "core.safetensors")
            for layer in range(layers):
                mine = {k: x.clone() for k, x in engine.memory.items() if engine.sites[k].layer == layer}
                save_file(mine, folder / "dump" / f"layer_{layer:02d}.safetensors")

    return write_dump


def timed(script: str, *folders: Path) -> list[float]:
    """Seconds by the clock, CPU seconds, and what else the script printed."""
    out = subprocess.run(
        [sys.executable, "-c", script, *map(str, folders)], check=True, capture_output=True, text=True
    ).stdout
    return [float(word) for word in out.split()]


def report(folder: Path, form: str, layers: int, rounds: int) -> None:
    truth, dump = folder / "truth", folder / "dump"
    size = sum(p.stat().st_size for path in (truth, dump) for p in path.iterdir())
    reading, comparing = [], []
    for _ in range(rounds + 1):  # the first one warms the cache
        reading.append(timed(READ, truth, dump))
        comparing.append(timed(COMPARE, truth, dump))
    read, read_cpu = (min(column) for column in zip(*reading[1:], strict=True))
    clock, cpu, memory = (min(column) for column in zip(*comparing[1:], strict=True))
    print(
        f"{form:<8}{layers:>3} layers {size / 1e9:5.2f} GB  reading {read:5.2f} s, comparing {clock:5.2f} s: ratio "
        f"{clock / read:.2f}, in CPU seconds {cpu / read_cpu:.2f}; VmHWM {memory / 1024:.0f} MiB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[15, 30, 60])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to write (default: a temporary one)")
    parser.add_argument("--formats", nargs="+", default=["trace", "sglang", "plain"])
    arguments = parser.parse_args()
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            write_dump = write(Path(folder), layers, arguments.tokens)
            for form in arguments.formats:
                write_dump(form)
                report(Path(folder), form, layers, arguments.rounds)


if __name__ == "__main__":
    main()
