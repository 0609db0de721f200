"""Prefill on CPU in bf16: this model beside transformers, on the same checkpoint, in one run.

    python -m weights.build slice-35b --layers 4 --layout bf16 --text-only --out build/slice-35b
    python -m benchmarks.bench_prefill build/slice-35b --tokens 128 512

Each program runs in a process of its own, the programs in turn; printed are medians and peaks over the rounds, and
their ratios. `first` is the first forward pass over so many tokens; then the median of those repeated.
Logits of all positions are computed by all. RssAnon is sampled every 5 ms: memory of the process's own, without the
files that it maps; VmHWM is with them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from threading import Event, Thread
from typing import Any

Load = Callable[[str], Callable[[Any], Any]]  # path of a checkpoint -> a function of token ids


def ours(path: str, arithmetic: str = "transformers-bf16", mode: str = "decoded") -> Callable[[Any], Any]:
    import qwen35_moe as q

    return q.load(path, arithmetic=arithmetic, shared_expert="unfused", mode=mode)


def transformers(path: str, **options: Any) -> Callable[[Any], Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, attn_implementation="eager", experts_implementation="grouped_mm", **options
    ).eval()
    return lambda ids: model(input_ids=ids, use_cache=False).logits


PROGRAMS: dict[str, Load] = {"ours": ours, "transformers": transformers}


def status_mib(name: str) -> float:
    """An entry of this process's status, in MiB."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(name))


def child(load: Load, path: str, tokens: list[int], repeat: int) -> dict[str, float]:
    anonymous, done = [0.0], Event()

    def watch() -> None:
        while not done.wait(0.005):
            anonymous[0] = max(anonymous[0], status_mib("RssAnon"))

    Thread(target=watch, daemon=True).start()
    begin = time.perf_counter()
    import torch

    run = load(path)
    result = {"load": time.perf_counter() - begin}
    with torch.inference_mode():
        for count in tokens:
            ids = (torch.arange(count) * 7919 % 1000)[None]
            times = []
            for _ in range(1 + repeat):
                begin_run = time.perf_counter()
                run(ids)
                times.append(time.perf_counter() - begin_run)
                result.setdefault("start to logits", time.perf_counter() - begin)
            result |= {f"{count} tokens, first": times[0], f"{count} tokens": statistics.median(times[1:])}
    done.set()
    return result | {"RssAnon MiB": anonymous[0], "VmHWM MiB": status_mib("VmHWM")}


def main(programs: Mapping[str, Load], peers: tuple[str, ...], description: str) -> None:
    """Runs the programs in turn; prints what they took, and that divided by what each peer took."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--programs", nargs="+", choices=programs, default=list(programs))
    parser.add_argument("--child", choices=programs, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(programs[args.child], args.path, args.tokens, args.repeat)))
        return
    rows: dict[str, dict[str, list[float]]] = {program: {} for program in args.programs}
    for _ in range(args.rounds):
        for program, columns in rows.items():
            command = [sys.executable, *sys.orig_argv[1:], "--child", program]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            for name, value in json.loads(output.splitlines()[-1]).items():
                columns.setdefault(name, []).append(value)
    names = {name: max if name.endswith("MiB") else statistics.median for name in next(iter(rows.values()))}
    found = {program: {name: pick(columns[name]) for name, pick in names.items()} for program, columns in rows.items()}
    table("", found)
    for peer in (program for program in peers if program in found):
        ratios = {p: {name: row[name] / found[peer][name] for name in names} for p, row in found.items() if p != peer}
        table(f"divided by {peer}", ratios)


def table(title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    print(f"\n{title:<28}" + "".join(f"{program:>17}" for program in rows))
    for name in next(iter(rows.values())):
        print(f"{name:>28}" + "".join(f"{row[name]:17.2f}" for row in rows.values()))


if __name__ == "__main__":
    main(PROGRAMS, ("transformers",), __doc__)
