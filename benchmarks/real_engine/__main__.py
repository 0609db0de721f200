"""A real engine on a checkpoint of ours, judged by the oracle: one line a run.

    python -m benchmarks.real_engine sglang|vllm|transformers --out DIR [--setup NAME] [--break NAME ...]

Without --break the engine is clean. Each bug of `bugs.py` is planted in the running engine; `--break all` plants all
that the engine knows. --dump-only leaves the judging to a later call with --judge-only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.real_engine import judge, sglang_engine, sglang_images, transformers_engine, vllm_engine
from benchmarks.real_engine.bugs import BUGS, CLEAN
from benchmarks.real_engine.sglang_bugs import PLANT as SGLANG
from benchmarks.real_engine.transformers_bugs import PLANT as TRANSFORMERS
from benchmarks.real_engine.vllm_bugs import PLANT as VLLM
from qwen35_moe.oracle.dumps.dump import Dump
from weights.build import build

Runs = Iterable[tuple[str, Dump | Path]]  # name of the run, and its dump
ENGINES = {"sglang": (sglang_engine, SGLANG), "transformers": (transformers_engine, TRANSFORMERS),
           "vllm": (vllm_engine, VLLM)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--setup", default="bf16")
    parser.add_argument("--break", dest="bugs", action="append", default=[], metavar="NAME")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--dump-only", action="store_true")
    parser.add_argument("--judge-only", action="store_true")
    options = parser.parse_args()
    engine, plant = ENGINES[options.engine]
    setup = engine.SETUPS[options.setup]
    if setup.recipe == sglang_images.RECIPE:
        plant = sglang_images.PLANT
    ranks = "tp_size" in getattr(setup, "arguments", {})
    known = [bug for bug in BUGS if bug in plant and (ranks or not bug.startswith("rank-"))]
    bugs = [bug for b in options.bugs or [CLEAN] for bug in (known if b == "all" else [b])]
    if wrong := [bug for bug in bugs if bug != CLEAN and bug not in plant]:
        parser.error(f"{options.engine} has no bug {', '.join(wrong)}; it has {', '.join(plant)}")
    layout = {} if setup.layout is None else {"layout": setup.layout}
    checkpoint = (
        options.out / f"checkpoint-{setup.layout or 'bf16'}{'-image' if setup.recipe == sglang_images.RECIPE else ''}"
    )
    if not checkpoint.exists():
        build(setup.recipe, checkpoint, **layout)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    wanted: Runs = engine.run(options.setup, checkpoint, options.out, bugs, options.port)
    if options.judge_only:
        names = [f"{options.setup}.{bug}" for bug in bugs]
        wanted = ((name, options.out / f"dumps-{options.setup}" / name) for name in names)
    right = True
    for name, dump in wanted:
        if not options.dump_only:
            line = judge.line(checkpoint, dump, name, setup.declared)
            right = right and line.right
            print(line.text, flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
