"""Streaming from disk to one GPU, beside its three parts: reading, copying to the GPU, computing.

    python -m benchmarks.bench_stream_gpu [--layouts bf16 mxfp4] [--size 35b] [--layers 4] [--tokens 512] [--profile]

A slice with the dimensions of a real model is built in a folder, and stays in the page cache. Each part is measured
alone and as fast as it goes here: the bytes that a streamed pass reads, read by a thread a core into pinned memory that
stays in its cache; as many bytes copied from pinned memory; and the forward pass of the same model resident. What
cannot overlap is the largest of them. Then what reading and copying take together, as they are streamed but with
nothing to compute, and the streamed pass.
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
from statistics import median

import torch
from torch import Tensor

import qwen35_moe as q
from qwen35_moe.checkpoint import Checkpoint
from qwen35_moe.checkpoint.header import TensorEntry
from qwen35_moe.checkpoint.reader import Rows
from qwen35_moe.run.gpu.prefetch import Fetch, Layout, one_ahead
from qwen35_moe.run.origin import origin_of
from weights.build import build

DEVICE = torch.device("cuda", 0)
THREADS = os.cpu_count() or 1
PIECE = 2**22  # bytes that a thread reads at a time


def rounds(run: Callable[[], object], count: int = 3) -> list[float]:
    """Milliseconds; the first round does not count."""
    times = []
    for _ in range(count + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return times[1:]


def pieces(stored: list[TensorEntry]) -> list[tuple[Path, int, int]]:
    """(file, first byte, bytes): all of them in the order of the files, as many at a time as a thread streams."""
    runs: list[list[int]] = []
    files: list[Path] = []
    for s in sorted(stored, key=lambda s: (s.file, s.begin)):
        if files and files[-1] == s.file and runs[-1][1] == s.begin:
            runs[-1][1] = s.end
        else:
            files.append(s.file)
            runs.append([s.begin, s.end])
    return [
        (file, at, min(PIECE, end - at))
        for file, (begin, end) in zip(files, runs, strict=True)
        for at in range(begin, end, PIECE)
    ]


def read_all(found: list[tuple[Path, int, int]], buffers: list[memoryview]) -> None:
    """Each thread reads every so many-th piece into its buffer."""
    descriptors = {file: os.open(file, os.O_RDONLY) for file in {file for file, _, _ in found}}

    def some(first: int) -> None:
        for file, at, count in found[first :: len(buffers)]:
            os.preadv(descriptors[file], [buffers[first][:count]], at)

    with ThreadPoolExecutor(len(buffers)) as pool:
        list(pool.map(some, range(len(buffers))))
    for descriptor in descriptors.values():
        os.close(descriptor)


def copy_all(size: int, host: Tensor, target: Tensor) -> None:
    for at in range(0, size, len(host)):
        count = min(len(host), size - at)
        target[:count].copy_(host[:count], non_blocking=True)


def read_and_copy(layouts: list[Layout]) -> None:
    for fetch in one_ahead(Fetch(layout, DEVICE) for layout in layouts):
        fetch.result()


def bench(layout: str, model: str, layers: int, tokens: int, folder: Path, profile: bool) -> None:
    path = build(f"slice-{model}", folder / f"{model}-{layout}", layers=layers, layout=layout, jobs=os.cpu_count() or 1)
    os.sync()  # what the system has still to write of it would be measured, too
    checkpoint = Checkpoint.open(path)
    names = [name for name in checkpoint.names() if not name.startswith(("mtp.", "visual.", "embed_tokens"))]
    stored = [checkpoint.stored(name) for name in names]
    size, found = sum(s.nbytes for s in stored), pieces(stored)
    print(f"{layout}: {layers} layers of the {model}, {size / 1e9:.2f} GB but for the embedding, {tokens} tokens")
    load = partial(q.load, path, "transformers-bf16", device=DEVICE, text_only=True)
    ids = (torch.arange(tokens, device=DEVICE) * 7919 % 200_003)[None]
    resident, streamed = load(mode="packed" if layout == "mxfp4" else "decoded"), load(mode="stream")
    host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device=DEVICE)
    buffers = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=True).numpy().data for _ in range(THREADS)]
    layouts = [Layout(checkpoint.reader, [[Rows.of(s) for s in some]]) for some in parcels(stored)]
    parts = {
        "reading": min(rounds(lambda: read_all(found, buffers))),
        "copying": min(rounds(lambda: copy_all(size, host, target))),
        "computing": min(rounds(lambda: resident(ids))),
    }
    both = min(rounds(lambda: read_and_copy(layouts)))
    for name, took in {**parts, "reading and copying": both}.items():
        print(f"  {name:<20} {took:8.1f} ms {size / took / 1e6:8.1f} GB/s")
    begin = time.perf_counter()
    same = torch.equal(streamed(ids), resident(ids))
    first = time.perf_counter() - begin
    reader = origin_of(streamed).checkpoint.reader
    before = reader.bytes_read
    streamed(ids)
    read = reader.bytes_read - before
    times = rounds(lambda: streamed(ids), 15)
    for which, took in (("best of 15", min(times)), ("median", median(times))):
        ratio = took / max(parts.values())
        print(f"  streamed, {which:<10} {took:8.1f} ms, {ratio:.2f} of the largest part; {read / 1e9:.2f} GB read")
    print(f"  the same bits as resident: {same}; the first pass took {first:.1f} s", flush=True)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    streamed(ids)
    print(f"  peak of the device's memory {(torch.cuda.max_memory_allocated() - held) / 2**30:.1f} GiB", flush=True)
    if profile:
        show(lambda: streamed(ids))


def parcels(stored: list[TensorEntry]) -> list[list[TensorEntry]]:
    """Some tensors at a time, of 128 MiB or more together."""
    found: list[list[TensorEntry]] = [[]]
    for s in sorted(stored, key=lambda s: (s.file, s.begin)):
        if sum(other.nbytes for other in found[-1]) >= 2**27:
            found.append([])
        found[-1].append(s)
    return found


def show(run: Callable[[], object]) -> None:
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    profiler.runcall(run)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=["bf16", "mxfp4"])
    parser.add_argument("--size", choices=("35b", "122b", "397b"), default="35b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="where the slices are built and stay; a temporary one if absent")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for layout in args.layouts:
            bench(layout, args.size, args.layers, args.tokens, args.folder or Path(temporary), args.profile)


if __name__ == "__main__":
    main()
