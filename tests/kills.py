"""Kills of a streamed run at random moments, and where each fell: in reading, decoding, computing, writing, saving.

    PYTHONPATH=. python tests/kills.py CHECKPOINT OUT [--kills 20] [--tokens 64] [--seed 1]

The run is a trace with its envelope. Each kill falls after a number of saved states drawn at random, from none to all
but one, and a random share of the time that one takes; then the run is resumed. Where it fell is read off the traceback
that Python's fault handler writes: SIGABRT ends a process as abruptly as SIGKILL, after this. Fails at the first run
whose files are not those of the undisturbed one, byte by byte.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

from forked import Child
from safetensors import safe_open

from qwen35_moe.cli.main import main as command_line
from qwen35_moe.oracle.judge.envelope import legal
from qwen35_moe.trace.file import Trace

# What the innermost functions of the main thread say of what it was doing; the first that matches.
DOING = (
    ("saving a state", r"in save_state$|envelope_file.py.* in write$|in resumed$"),
    ("writing values", r"trace/writer.py.* in (flush|add_blocks|close|add|_begin|__init__)|trace/folder.py"),
    ("writing the envelope", r"envelope_file.py.* in _of_truth"),
    ("decoding", r"quant/|in decode"),
    ("reading", r"checkpoint/"),
    ("computing", r"model/|trace/layers.py|envelope_file.py"),
)


def arguments(checkpoint: Path, out: Path, tokens: int = 8) -> list[str]:
    ids = ",".join(str(i * 7919 % 251) for i in range(tokens))
    return ["trace", str(checkpoint), "--ids", ids, "--out", str(out), "--quiet"]


def start(checkpoint: Path, out: Path, tokens: int = 8, *options: str) -> Child:
    said = out.with_name(f"{out.name}.said")
    return Child(said, command_line, [*arguments(checkpoint, out, tokens), *options])


def wait_for(process: Child, out: Path, states: int) -> bool:
    """Waits until that many states have been seen, or the process is done. Whether it still runs."""
    seen: set[object] = set()
    while len(seen) < states and process.running:
        for name in ("partial/resume.safetensors", "envelope-state.safetensors"):
            try:
                seen.add((name, (out / name).stat().st_ino, (out / name).stat().st_mtime_ns))
            except FileNotFoundError:
                continue
        time.sleep(0.0005)
    return process.running


def abort(process: Child, out: Path) -> str | None:
    """Where the process was when it was killed; None if it was done."""
    process.kill(signal.SIGABRT)
    code, stderr = process.wait(), process.said.read_text()
    if code != -signal.SIGABRT:
        assert code == 0, stderr
        return None
    main_thread = [part for part in re.split(r"\n(?=Thread |Current thread )", stderr) if "cli/main.py" in part]
    if not main_thread:
        return "all done: leaving"
    doing = next((name for name, pattern in DOING if re.search(pattern, main_thread[0], re.MULTILINE)), main_thread[0])
    return f"{state(out)}: {doing}"


def state(out: Path) -> str:
    """What is done, by the files there."""
    for name in ("envelope-state.safetensors", "partial/resume.safetensors"):
        if (out / name).is_file():
            with safe_open(out / name, framework="pt") as file:
                known = file.metadata() or {}
            known |= json.loads(known.get("state", "{}"))
            return f"{known.get('arithmetic', 'exact')} layer {known.get('next', '-')}"
    return "exact layer 0"


def kill(checkpoint: Path, out: Path, states: int, delay: float) -> str | None:
    """Starts a run and kills it so long after it has written so many states."""
    process = start(checkpoint, out)
    wait_for(process, out, states)
    time.sleep(delay)
    return abort(process, out)


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files below it, by their paths."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def timed(process: Child, out: Path) -> float:
    """Seconds from the first sign of the run on disk to its end."""
    while not out.is_dir() and process.running:
        time.sleep(0.0005)
    begin = time.perf_counter()
    assert process.wait() == 0, process.said.read_text()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    whole = args.out / "undisturbed"
    args.out.mkdir(parents=True, exist_ok=True)
    seconds = timed(start(args.checkpoint, whole, args.tokens), whole)
    layers = 1 + max(entry.layer or 0 for entry in Trace.open(whole).sites.values())
    states = layers + len(legal("exact")) * (layers + 1)
    print(f"undisturbed: {seconds:.1f} s from the first file on, {states} states")
    generator, fell = random.Random(args.seed), Counter[str]()
    for number in range(args.kills):
        out, after = args.out / f"{number}", generator.randrange(states)
        delay = generator.uniform(0, seconds / states)
        process = start(args.checkpoint, out, args.tokens)
        while not out.is_dir() and process.running:
            time.sleep(0.0005)
        wait_for(process, out, after)
        time.sleep(delay)
        where = abort(process, out) or "done before"
        timed(start(args.checkpoint, out, args.tokens, "--resume"), out)
        assert contents(out) == contents(whole), f"kill {number}, {where}: other bytes"
        print(f"kill {number}, {after} states and {1000 * delay:.0f} ms: {where}: same bytes", flush=True)
        fell[where.rpartition(": ")[2]] += 1
    print(", ".join(f"{count} {name}" for name, count in fell.most_common()))


if __name__ == "__main__":
    main()
