"""Streaming from disk to one GPU, beside its three parts: reading, copying to the GPU, computing.

    python -m benchmarks.bench_stream_gpu [--layouts bf16 mxfp4] [--layers 4] [--tokens 512] [--readers 4] [--profile]

A slice with the dimensions of the 35B is built in a temporary folder, and stays in the page cache. Each part is
measured alone and as fast as it goes here: all bytes of the text model read by as many threads as stream them, the same
bytes copied from pinned memory, and the forward pass of the same model resident. What cannot overlap is their largest.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import qwen35_moe as q
from qwen35_moe import ahead
from qwen35_moe.checkpoint.header import Stored
from weights.build import build

PIECE = 2**22
DEVICE = torch.device("cuda")


def milliseconds(run: Callable[[], object], rounds: int = 3) -> float:
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return min(times[1:])


def pieces(stored: list[Stored]) -> list[tuple[Path, int, int]]:
    """(file, first byte, bytes), no more than PIECE of them at a time."""
    starts = ((s.file, at, min(PIECE, s.end - at)) for s in stored for at in range(s.begin, s.end, PIECE))
    return list(starts)


def read_all(found: list[tuple[Path, int, int]], threads: int) -> None:
    """Each thread reads every so many-th piece into a buffer that is used again."""
    descriptors = {file: os.open(file, os.O_RDONLY) for file in {file for file, _, _ in found}}

    def some(first: int) -> None:
        buffer = memoryview(bytearray(PIECE))
        for file, at, count in found[first::threads]:
            os.preadv(descriptors[file], [buffer[:count]], at)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(some, range(threads)))
    for descriptor in descriptors.values():
        os.close(descriptor)


def copy_all(size: int, host: Tensor, target: Tensor) -> None:
    for _ in range(size // len(host)):
        target.copy_(host, non_blocking=True)


def bench(layout: str, layers: int, tokens: int, readers: list[int], profile: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = build("slice-35b", Path(folder) / "slice", layers=layers, layout=layout)
        checkpoint = q.checkpoint.Checkpoint.open(path)
        stored = [checkpoint.stored(name) for name in checkpoint.names() if not name.startswith(("mtp.", "visual."))]
        size, found = sum(s.end - s.begin for s in stored), pieces(stored)
        print(f"{layout}: {layers} layers, {size / 2**30:.2f} GiB of text model, {tokens} tokens")
        load = partial(q.load, path, "transformers-bf16", device=DEVICE, text_only=True)
        ids = (torch.arange(tokens, device=DEVICE) * 7919 % 200_003)[None]
        resident, streamed = load(mode="packed" if layout == "mxfp4" else "decoded"), load(mode="stream")
        host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        target = torch.empty_like(host, device=DEVICE)
        parts = {
            "reading": milliseconds(lambda: read_all(found, max(readers))),
            "reading, 1 thread": milliseconds(lambda: read_all(found, 1)),
            "copying": milliseconds(lambda: copy_all(size, host, target)),
            "computing": milliseconds(lambda: resident(ids)),
        }
        for name, took in parts.items():
            print(f"  {name:<20} {took:8.1f} ms {size / took / 1e6:8.1f} GB/s")
        del parts["reading, 1 thread"]
        for ahead.READERS in readers:
            took = milliseconds(lambda: streamed(ids))
            name, ratio = f"streamed, {ahead.READERS} readers", took / max(parts.values())
            print(f"  {name:<20} {took:8.1f} ms, {ratio:.2f} of the largest part", flush=True)
        same = torch.equal(streamed(ids), resident(ids))
        print(
            f"  the same bits as resident: {same}; peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True
        )
        if profile:
            show(lambda: streamed(ids))


def show(run: Callable[[], object]) -> None:
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    profiler.runcall(run)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=["bf16", "mxfp4"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--readers", type=int, nargs="+", default=[ahead.READERS], help="threads that read")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    for layout in args.layouts:
        bench(layout, args.layers, args.tokens, args.readers, args.profile)


if __name__ == "__main__":
    main()
