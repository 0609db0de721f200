"""How fast MXFP4 is decoded, beside a plain copy of the result and beside other libraries, all in one run.

    python -m benchmarks.mxfp4_decode [--experts 64] [--rows 1024] [--columns 2048] [--threads 2] [--rounds 7]

Expert matrices are decoded one at a time into one buffer, as the oracle reads a checkpoint. Rates are bytes of output
per second, the best of the rounds, in which all contenders take turns (so that a busy moment of the machine meets all).
Two copies of the decoded result are the measure: into the same one buffer (the source comes from memory, the
destination stays in cache), and all of it to another place in memory. Other libraries are left out if not installed;
before the clock starts, each must agree with ours in every value.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable

import torch
from torch import Tensor

from qwen35_moe.quant.mxfp4 import decode

Decoder = Callable[[Tensor, Tensor, torch.dtype], Tensor]


def torchao_decoder() -> Decoder:
    to_dtype = importlib.import_module("torchao.prototype.mx_formats.mx_tensor").to_dtype
    return lambda codes, scales, dtype: to_dtype(
        codes, scales.view(torch.float8_e8m0fnu), torch.float4_e2m1fn_x2, 32, dtype
    )


def compressed_tensors_decoder() -> Decoder:
    unpack = importlib.import_module("compressed_tensors.compressors.nvfp4.helpers").unpack_fp4_from_uint8
    scale = importlib.import_module("compressed_tensors.compressors.mxfp4").MXFP4PackedCompressor._decompress_scale

    def run(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        values = unpack(codes, codes.shape[0], 2 * codes.shape[1], dtype)
        return (values.unflatten(-1, (-1, 32)) * scale(scales, dtype).unsqueeze(-1)).flatten(-2)

    return run


def quark_decoder() -> Decoder:
    unpack = importlib.import_module("quark.torch.utils.pack").create_pack_method(None, "fp4").unpack

    def run(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        values = unpack(codes, reorder=False).unflatten(-1, (-1, 32))
        return (values * torch.exp2(scales.to(torch.float32) - 127).unsqueeze(-1)).flatten(-2).to(dtype)

    return run


def transformers_decoder() -> Decoder:
    convert = importlib.import_module("transformers.integrations.mxfp4")._convert_moe_packed_tensors
    return lambda codes, scales, dtype: (
        convert(codes.view(1, len(codes), -1, 16), scales[None], dtype=dtype, rows_per_chunk=2**25)[0].T
    )


PEERS = {
    "torchao": torchao_decoder,
    "compressed-tensors": compressed_tensors_decoder,
    "quark": quark_decoder,
    "transformers": transformers_decoder,
}


def best_times(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Seconds of each contender's fastest round, after one round that does not count."""
    best = dict.fromkeys(contenders, float("inf"))
    for round_ in range(rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if round_:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


@torch.inference_mode()  # as the model runs
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("experts", 64), ("rows", 1024), ("columns", 2048), ("threads", 0), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shape = (arguments.experts, arguments.rows, arguments.columns)
    print(f"{list(shape)}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{torch.backends.cpu.get_cpu_capability()}")  # fmt: skip

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (*shape[:2], shape[2] // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(105, 128, (*shape[:2], shape[2] // 32), dtype=torch.uint8, generator=generator)
    peers: dict[str, Decoder] = {}
    for name, importer in PEERS.items():
        try:
            peers[name] = importer()
        except ImportError:
            print(f"{name}: not installed")

    for dtype in (torch.bfloat16, torch.float32):
        report(dtype, rates(codes, scales, dtype, peers, arguments.rounds))


def rates(
    codes: Tensor, scales: Tensor, dtype: torch.dtype, peers: dict[str, Decoder], rounds: int
) -> dict[str, float]:
    """GB/s of output for each contender."""
    result = decode(codes, scales, dtype)
    buffer, elsewhere = torch.empty_like(result[0]), torch.empty_like(result)
    everyone = range(len(codes))
    few = range(max(1, len(codes) // 8))  # for the others, which take longer

    def all_experts(step: Callable[[int], object], experts: range) -> Callable[[], None]:
        def run() -> None:
            for expert in experts:
                step(expert)

        return run

    def by_peer(peer: Decoder) -> Callable[[int], object]:
        return lambda e: peer(codes[e], scales[e], dtype)

    def ours(into: Callable[[int], Tensor]) -> Callable[[int], object]:
        return lambda e: decode(codes[e], scales[e], dtype, into(e))

    contenders: dict[str, Callable[[], None]] = {}
    for place, into in {"one buffer": lambda e: buffer, "elsewhere": lambda e: elsewhere[e]}.items():
        contenders[f"copy, {place}"] = all_experts(lambda e, into=into: into(e).copy_(result[e]), everyone)
        contenders[f"qwen35_moe, {place}"] = all_experts(ours(into), everyone)
    for name, peer in peers.items():
        assert torch.equal(peer(codes[0], scales[0], dtype), result[0]), name
        contenders[name] = all_experts(by_peer(peer), few)
    return {
        name: len(few if name in peers else everyone) * buffer.nbytes / seconds / 1e9
        for name, seconds in best_times(contenders, rounds).items()
    }


def report(dtype: torch.dtype, rates: dict[str, float]) -> None:
    """Each beside the copy to the same kind of place; other libraries make a new tensor each time: elsewhere."""
    print(f"\n{str(dtype).removeprefix('torch.'):32}   GB/s   / copy")
    for name, rate in rates.items():
        copy = rates["copy, one buffer" if name.endswith("one buffer") else "copy, elsewhere"]
        print(f"{name:32} {rate:6.2f} {rate / copy:8.2f}")


if __name__ == "__main__":
    main()
