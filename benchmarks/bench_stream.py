"""A streamed layer beside what this machine can do: its products, and reading and decoding its bytes.

    python -m benchmarks.bench_stream [CHECKPOINT] [--tokens 128 512] [--arithmetic float32 exact]

Without CHECKPOINT, two layers with the dimensions of the 35B model and MXFP4 experts are built in build/ (3 GB). Limits
are measured in the same rounds as the layers, at the layer's own shapes and dtype: each product of the layer at its
number of rows, and reading and decoding of its weights into a reused buffer. Printed are the best of the rounds, the
layer beside the larger of the two and beside their sum, peak memory (VmHWM) at the end, and the extrapolation to all
layers and the head. Files are in the page cache: the first round, which reads them, does not count.

Which of the two is the limit? The larger, where one hides behind the other: a slow disk, or cores that products leave
idle. With the files in the page cache decoding and products want the same cores, each takes all of them when it is
measured alone, and what is left to win is what exceeds the sum.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import qwen35_moe as q
from benchmarks.bench_prefill import status_mib
from qwen35_moe.model.cache import LayerState
from qwen35_moe.model.ops import Linear
from qwen35_moe.model.rope import rotary_angles
from qwen35_moe.numerics import arithmetics
from qwen35_moe.numerics.taps import Handler, Site, attach
from qwen35_moe.run.origin import origin_of
from qwen35_moe.run.streamed import HEAD_ROWS


def seconds(step: Callable[[], object]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


class Hits(Handler):
    """A tap handler that notes how many rows each hit expert gets."""

    sees_experts = False

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, site: Site, x: Tensor) -> None:
        if site.name == "moe_topk_ids":
            self.rows = [n for n in x.flatten().bincount().tolist() if n]


class Products(TorchDispatchMode):
    """Notes the matrix products of this thread: all of a layer but those of its experts."""

    KINDS = "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "baddbmm_", "linalg_solve_triangular"

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.KINDS:
            self.found.append((func, tree_map_only(Tensor, lambda x: x.to("meta"), args), kwargs or {}))
        return func(*args, **(kwargs or {}))


class Bench:
    def __init__(self, path: Path, arithmetic: str, tokens: int):
        self.model = q.load(path, arithmetic, shared_expert="unfused", mode="stream", text_only=True)
        self.source, self.config, self.dtype = (
            origin_of(self.model).source,
            self.model.config,
            self.model.arithmetic.dtype,
        )
        self.tokens, self.hits = tokens, Hits()
        self.noted = Products()
        ids = (torch.arange(tokens) * 7919 % self.config.vocab_size)[None]
        with torch.inference_mode(), arithmetics.using(self.model.arithmetic):
            self.x = self.model.embed_tokens(ids)
            self.angles = rotary_angles(self.config, torch.arange(tokens)[None], self.dtype)

    def layer(self, i: int) -> None:
        with torch.inference_mode(), arithmetics.using(self.model.arithmetic), attach(self.hits):
            self.model.layers[i](self.x, self.angles, None, LayerState())

    def head(self) -> None:
        with torch.inference_mode(), arithmetics.using(self.model.arithmetic):
            for _ in self.model.lm_head.blocks("next_token_logits", self.x):
                pass

    def dense(self, i: int) -> dict[str, torch.Size]:
        empty: nn.Module = self.model.layers.empty[i]
        return {name: m.weight.shape for name, m in empty.named_modules() if isinstance(m, Linear)}

    def products(self, i: int) -> float:
        """All matrix products of the layer, on weights that are there."""
        D, width = self.config.hidden_size, self.config.moe_intermediate_size
        total = 0.0
        for product, empty, options in self.noted.found:
            args = tree_map_only(
                Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).fill_(1), empty
            )
            total += seconds(lambda product=product, args=args, options=options: product(*args, **options))
        up, down = torch.ones(2 * width, D, dtype=self.dtype), torch.ones(D, width, dtype=self.dtype)
        for n in self.hits.rows:
            x, h = torch.ones(n, D, dtype=self.dtype), torch.ones(n, width, dtype=self.dtype)
            total += seconds(lambda x=x, h=h: (F.linear(x, up), F.linear(h, down)))
        return total

    def bytes(self, i: int) -> float:
        """All weights of the layer that it needs, read and decoded into buffers that are used again."""
        mlp, total = f"layers.{i}.mlp", 0.0
        first = self.source.slot(mlp, 0)
        buffers = [torch.empty(packed.shape, dtype=self.dtype) for packed in first]

        def expert(e: int) -> None:
            for packed, out in zip(self.source.slot(mlp, e), buffers, strict=True):
                packed.decode(self.dtype, out)

        for e in range(len(self.hits.rows)):
            total += seconds(lambda e=e: expert(e))
        for name, shape in self.dense(i).items():
            out = torch.ones(shape, dtype=self.dtype)
            total += seconds(
                lambda name=name, out=out: self.source.weight(f"layers.{i}.{name}").decode(self.dtype, out)
            )
        return total

    def run(self, rounds: int) -> dict[str, float]:
        i = 0
        with self.noted:
            self.layer(i)
        best = dict.fromkeys(("layer", "products", "bytes", "head"), float("inf"))
        for _ in range(rounds):
            for name, step in (("products", self.products), ("bytes", self.bytes)):
                best[name] = min(best[name], step(i))
            best["layer"] = min(best["layer"], seconds(lambda: self.layer(i)))
        best["head"] = seconds(self.head)
        return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--arithmetic", nargs="+", default=["float32", "exact"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=40, help="of the model to extrapolate to (default: %(default)s)")
    args = parser.parse_args()
    if args.checkpoint is None:
        from weights.build import build

        changes = {"layers": 2, "layout": "mxfp4", "mtp": False}
        args.checkpoint = build("slice-35b", Path("build/slice-35b-mxfp4"), **changes)
    print(
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {HEAD_ROWS} head rows a block"
    )
    titles = {"": 20, "layer": 7, "products": 10, "bytes": 8, "/ larger": 10, "/ sum": 8, "head": 8}
    print("".join(f"{title:>{width}}" for title, width in {**titles, "layers": 11, "VmHWM": 11}.items()))
    for arithmetic in args.arithmetic:
        for tokens in args.tokens:
            t = Bench(args.checkpoint, arithmetic, tokens).run(args.rounds)
            parts = t["products"], t["bytes"]
            whole = args.layers * t["layer"] + t["head"]
            ratios = f"{t['layer'] / max(parts):10.2f}{t['layer'] / sum(parts):8.2f}"
            print(
                f"{arithmetic:>14} {tokens:>5}{t['layer']:7.2f}{t['products']:10.2f}{t['bytes']:8.2f}{ratios}"
                f"{t['head']:8.2f}{whole:9.0f} s{status_mib('VmHWM'):7.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
