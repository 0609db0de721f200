"""Prefill on CPU in bf16: this model beside transformers, on the same checkpoint, in one run.

    python -m weights.build slice-35b --layers 4 --layout bf16 --text-only --out build/slice-35b
    python -m benchmarks.bench_prefill build/slice-35b --tokens 128 512

Each program runs in a process of its own, the two in turn; printed are medians, their ratio, and the peak of anonymous
memory. Logits of all positions are computed by both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time


def ours(path: str):
    import qwen35_moe as q

    model = q.load(path, arithmetic="transformers-bf16", shared_expert="unfused")
    return lambda ids: model(ids)


def transformers(path: str, experts: str = "grouped_mm"):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, attn_implementation="eager", experts_implementation=experts
    ).eval()
    return lambda ids: model(input_ids=ids, use_cache=False).logits


def anonymous_mib() -> float:
    """Anonymous memory of this process at its peak so far, as far as the kernel tells: RssAnon now, in MiB."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon"))


def child(program: str, path: str, tokens: list[int], repeat: int) -> None:
    begin = time.perf_counter()
    import torch

    run = {"ours": ours, "transformers": transformers}[program](path)
    result = {"load": time.perf_counter() - begin}
    with torch.inference_mode():
        for count in tokens:
            ids = (torch.arange(count) * 7919 % 1000)[None]
            run(ids)
            result.setdefault("first logits", time.perf_counter() - begin)
            times = []
            for _ in range(repeat):
                begin_run = time.perf_counter()
                run(ids)
                times.append(time.perf_counter() - begin_run)
            result[f"{count} tokens"] = statistics.median(times)
    result["RssAnon MiB"] = anonymous_mib()
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--child", choices=("ours", "transformers"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.path, args.tokens, args.repeat)
        return
    rows: dict[str, dict[str, list[float]]] = {"ours": {}, "transformers": {}}
    for _ in range(args.rounds):
        for program, columns in rows.items():
            tokens = [str(t) for t in args.tokens]
            command = [
                sys.executable,
                __file__,
                args.path,
                "--child",
                program,
                "--repeat",
                str(args.repeat),
                "--tokens",
                *tokens,
            ]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for name, value in json.loads(output.splitlines()[-1]).items():
                columns.setdefault(name, []).append(value)
    print(f"{'':>16} {'ours':>10} {'transformers':>13} {'ratio':>7}")
    for name in rows["ours"]:
        a, b = (statistics.median(rows[program][name]) for program in rows)
        print(f"{name:>16} {a:10.2f} {b:13.2f} {a / b:7.2f}")


if __name__ == "__main__":
    main()
