"""What one GPU does, beside transformers in the same run: random weights of real dimensions, made on the device.

    python benchmarks/bench_gpu.py                       # all sections of the 35B
    python benchmarks/bench_gpu.py limits decode bf16    # some of them
    python benchmarks/bench_gpu.py packed --config qwen3.5-122b-a10b

Times are medians of repeated runs between two device events. Each section prints lines of `name value`, and they go as
JSON to $OUT/bench_gpu.json where that is set. A section that fails prints its traceback and the others go on.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import qwen35_moe as q  # noqa: E402
from qwen35_moe.model.moe import MoE  # noqa: E402
from qwen35_moe.model.text import Model  # noqa: E402
from qwen35_moe.numerics import arithmetics as arithmetic  # noqa: E402
from qwen35_moe.numerics.taps import FunctionHandler  # noqa: E402
from qwen35_moe.quant import mxfp4  # noqa: E402
from qwen35_moe.run.generate import generate  # noqa: E402
from qwen35_moe.run.gpu.graphs import DecodeGraph, PrefillGraph  # noqa: E402
from qwen35_moe.run.gpu.grouped_experts import ResidentExperts, StackedExperts  # noqa: E402

LENGTHS = (128, 512, 2048)
ROUNDS = 3  # of each side in turn
GIB = 2**30
DEVICE = torch.device("cuda")
ROWS: list[dict[str, Any]] = []


def say(name: str, value: float, unit: str = "") -> None:
    ROWS.append({"name": name, "value": value, "unit": unit})
    print(f"  {name:<64} {value:12.4g} {unit}", flush=True)


def milliseconds(run: Callable[[], object], repeat: int = 7, warm_up: int = 2) -> float:
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def config_of(name: str, layers: int | None = None) -> q.Config:
    raw = json.loads((ROOT / "weights" / "configs" / f"{name}.json").read_text(encoding="utf-8"))
    text = raw.get("text_config", raw)
    if layers is not None:
        text.update(num_hidden_layers=layers, layer_types=text.get("layer_types", [])[:layers])
    return q.Config.from_dict(raw)


def random_model(
    config: q.Config, table: str, packed: bool = False, seed: int = 0, device: torch.device = DEVICE
) -> Model:
    """Random parameters in the table's dtypes; `packed`: experts of random MXFP4 bytes with scales near 2^-8."""
    draw = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        model = Model(config, table)
    dtypes = arithmetic.get(table)
    for module in [m for m in model.modules() if isinstance(m, MoE)] if packed else []:
        experts = module.experts
        weights = [_random_mxfp4(p.shape, draw, device) for p in (experts.gate_up_proj, experts.down_proj)]
        module.experts = StackedExperts(*weights, dtypes.weight_dtype("experts"))
    for name, meta in list(model.named_parameters()):
        owner, _, last = name.rpartition(".")
        value = torch.empty(meta.shape, dtype=dtypes.weight_dtype(name), device=device)
        if last == "A_log":
            value.uniform_(0, 2.5, generator=draw)
        elif "norm" in owner:
            value.normal_(1.0 if "linear_attn" in owner else 0.0, 0.05, generator=draw)
        else:
            value.normal_(0, 0.3 if "conv1d" in owner else 0.02, generator=draw)
        model.get_submodule(owner).register_parameter(last, nn.Parameter(value, requires_grad=False))
    for module in [m for m in model.modules() if isinstance(m, MoE)] if not packed else []:
        module.experts = ResidentExperts(module.experts.gate_up_proj, module.experts.down_proj, False)
    return model


def _random_mxfp4(shape: torch.Size, draw: torch.Generator, device: torch.device) -> mxfp4.PackedMXFP4:
    codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, device=device, generator=draw)
    scales = torch.randint(117, 122, (*shape[:-1], shape[-1] // 32), dtype=torch.uint8, device=device, generator=draw)
    return mxfp4.PackedMXFP4(codes, scales)


def transformers_model(config: q.Config, ours: Model, experts: str = "grouped_mm") -> Any:
    """transformers' module over the very same tensors."""
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    raw = dict(config.raw.get("text_config", config.raw))
    theirs = Qwen3_5MoeTextConfig(**raw)
    theirs._attn_implementation, theirs._experts_implementation = "eager", experts
    with torch.device("meta"):
        model = Qwen3_5MoeForCausalLM(theirs)
    model.set_experts_implementation(experts)
    state = {name if name.startswith("lm_head") else f"model.{name}": x for name, x in ours.state_dict().items()}
    model.load_state_dict(state, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(theirs).to(DEVICE)
    return model.eval()


def ids_of(length: int, config: q.Config) -> Tensor:
    return (torch.arange(length, device=DEVICE) * 7919 % min(config.vocab_size, 200_003))[None]


def compare(name: str, ours: Tensor, theirs: Tensor) -> None:
    """In pieces: logits of 2048 tokens in float64 are 4 GB."""
    differ, error, size, same = 0.0, 0.0, 0.0, 0.0
    pairs = zip(ours.flatten(0, -2).split(256), theirs.flatten(0, -2).split(256), strict=True)
    for a, b in ((a.double(), b.double()) for a, b in pairs):
        differ += (a != b).double().sum().item()
        error, size = error + (a - b).square().sum().item(), size + b.square().sum().item()
        same += (a.argmax(-1) == b.argmax(-1)).double().sum().item()
    say(f"{name}: values that differ", differ / ours.numel() * 100, "%")
    say(f"{name}: relative L2 distance", (error / size) ** 0.5)
    say(f"{name}: same argmax", same / (ours.numel() / ours.shape[-1]) * 100, "%")


def limits(args: argparse.Namespace) -> None:
    """The two ceilings."""
    source, target = (torch.empty(4 * GIB, dtype=torch.uint8, device=DEVICE).random_(0, 255) for _ in range(2))
    say("copy, read + written", 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6, "GB/s")
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    say("matmul bf16", 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9, "TFLOP/s")
    a, b = (torch.randn(4096, 4096, device=DEVICE, dtype=torch.float64) for _ in range(2))
    say("matmul float64", 2 * 4096**3 / milliseconds(lambda: a @ b) / 1e9, "TFLOP/s")
    a, b = (torch.randn(4096, 4096, device=DEVICE) for _ in range(2))
    say("matmul float32", 2 * 4096**3 / milliseconds(lambda: a @ b) / 1e9, "TFLOP/s")


def decode(args: argparse.Namespace) -> None:
    """MXFP4 decoding of 256 expert matrices [1024, 2048], in bytes read plus written, over what a copy reaches."""
    shape = torch.Size((256, 1024, 2048))
    packed = _random_mxfp4(shape, torch.Generator(DEVICE).manual_seed(0), DEVICE)
    source = torch.empty(2 * GIB, dtype=torch.uint8, device=DEVICE).random_(0, 255)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6

    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        out = torch.empty(shape, dtype=dtype, device=DEVICE)
        moved = packed.codes.nbytes + packed.scales.nbytes + out.nbytes
        ways = {
            "decode": lambda out=out: packed.decode(out.dtype, out),
            "plain torch": lambda out=out: mxfp4.decode_in_pieces(packed.codes, packed.scales, out.dtype, out),
        }
        results = []
        for name, run in ways.items():
            out.fill_(float("nan"))
            rate = moved / milliseconds(run) / 1e6
            say(f"mxfp4 to {str(dtype)[6:]}, {name}", rate, "GB/s")
            say(f"mxfp4 to {str(dtype)[6:]}, {name}, of copy", 100 * rate / copy, "%")
            results.append(out[::17].clone())
        assert all(torch.equal(results[0], other) for other in results[1:]), "the ways differ"


def bf16(args: argparse.Namespace) -> None:
    """`transformers-bf16`, everything decoded, and transformers with grouped_mm on the same tensors."""
    config = config_of(args.config, args.layers)
    model = random_model(config, "transformers-bf16")
    theirs = None if args.no_peer else transformers_model(config, model)
    say("bf16 weights", torch.cuda.memory_allocated() / GIB, "GiB")
    torch.cuda.reset_peak_memory_stats()
    for length in args.tokens:
        prefill_in_turns(model, theirs, length)
    own = decode_times(args, config, model)
    say("peak memory", torch.cuda.max_memory_allocated() / GIB, "GiB")
    if theirs is not None:
        time = peer_decode(config, theirs)
        say("transformers grouped_mm, decode", time, "ms")
        say("RATIO decode", own["decode eager"] / time)
        say("RATIO decode, as a graph", own["decode"] / time)
        free()
        against_eager(model, theirs, min(args.tokens))


def prefill_in_turns(model: Model, theirs: Any, length: int) -> None:
    """Each side several times, in turn: what a host does beside moves both. The lowest and highest median."""
    ids = ids_of(length, model.config)
    rounds = rounds_of(model, theirs, ids)
    for name, times in rounds.items():
        say(f"{name}, prefill {length}", min(times), "ms")
        say(f"{name}, prefill {length}, slowest round", max(times), "ms")
    free()
    if theirs is None:
        return
    for name in ("ours", "ours, as a graph"):
        ratios = [own / peer for own, peer in zip(rounds[name], rounds["transformers grouped_mm"], strict=True)]
        say(f"RATIO {name}, prefill {length}", statistics.median(ratios))
        say(f"RATIO {name}, prefill {length}, worst round", max(ratios))
    with in_arithmetic(model, "transformers-bf16/grouped_mm"):
        compare(f"prefill {length}, grouped_mm's table against grouped_mm", model(ids), theirs(input_ids=ids).logits)
        free()
        graph = PrefillGraph(model, ids)
        say(f"ours in grouped_mm's table, prefill {length}, as a graph", milliseconds(partial(graph, ids)), "ms")


def rounds_of(model: Model, theirs: Any, ids: Tensor) -> dict[str, list[float]]:
    """Warm-up (the compiler's, and making the graph) is in no time but its own."""
    length, begin = ids.shape[1], perf_counter()
    graph = PrefillGraph(model, ids)
    say(f"ours, prefill {length}: making a graph", perf_counter() - begin, "s")
    logits = model(ids)
    say(f"prefill {length}: two runs, same bits", float(torch.equal(logits, model(ids))))
    say(f"prefill {length}: graph, same bits", float(torch.equal(logits, graph(ids))))
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: model(ids, cache=q.Cache()),
        "ours, as a graph": lambda: graph(ids),
    }
    if theirs is not None:
        sides["transformers grouped_mm"] = lambda: theirs(input_ids=ids, use_cache=True)
    rounds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, run in sides.items():
            rounds[name].append(milliseconds(run, repeat=5, warm_up=1))
    return rounds


@contextmanager
def in_arithmetic(model: Model, name: str) -> Iterator[None]:
    before, model.arithmetic = model.arithmetic, arithmetic.get(name)
    try:
        yield
    finally:
        model.arithmetic = before


# Sees every value but those inside of single experts.
watcher = FunctionHandler(lambda site, x: None, sees_experts=False)


def decode_times(args: argparse.Namespace, config: q.Config, model: Model) -> dict[str, float]:
    """One token after 512: eager on a growing cache, and as a graph on one of fixed capacity."""
    cache, ids = q.Cache(), ids_of(512, config)
    model(ids, cache=cache)
    token, growing = ids[:, :1], cache.clone()
    times = {"decode eager": milliseconds(lambda: model(token, cache=growing), repeat=10)}
    say("ours, decode", times["decode eager"], "ms")
    first = model(token, cache=cache.clone())
    written = [step.id for step in generate(model, ids[0, :40], 24)]
    with q.taps.attach(watcher):  # step by step for who watches
        watched = [step.id for step in generate(model, ids[0, :40], 24)]
    say("24 tokens by graph, the same as without", float(written == watched))
    step = DecodeGraph(model, cache, capacity=1024)
    compare("decode, graph with fixed capacity against growing cache", step.step(token), first)
    times["decode"] = milliseconds(lambda: step.step(token), repeat=20)
    say("ours, decode, as a graph", times["decode"], "ms")
    if args.profile:
        profile("decode graph", lambda: step.step(token))
        for length in args.tokens:
            profile(f"prefill {length}", lambda length=length: model(ids_of(length, config)))
    return times


def against_eager(model: Model, theirs: Any, length: int) -> None:
    """At once, and experts one by one, which is what somebody who watches gets."""
    ids = ids_of(length, model.config)
    theirs.set_experts_implementation("eager")
    truth = theirs(input_ids=ids).logits
    compare(f"prefill {length}, against eager", model(ids), truth)
    with q.taps.attach(lambda site, x: None):
        compare(f"prefill {length}, loop against eager", model(ids), truth)


def peer_decode(config: q.Config, theirs: Any) -> float:
    ids = ids_of(512, config)
    out = theirs(input_ids=ids, use_cache=True)
    name = "cache" if "cache" in out else "past_key_values"  # transformers 5.24 has renamed it
    return milliseconds(lambda: theirs(input_ids=ids[:, :1], use_cache=True, **{name: out[name]}), repeat=7)


def packed(args: argparse.Namespace) -> None:
    """Experts as MXFP4 on the device, decoded when hit."""
    config = config_of(args.config, args.layers)
    model = random_model(config, "transformers-bf16", packed=True)
    say("packed weights", torch.cuda.memory_allocated() / GIB, "GiB")
    torch.cuda.reset_peak_memory_stats()
    for length in args.tokens:
        ids = ids_of(length, config)
        say(f"packed, prefill {length}", milliseconds(lambda ids=ids: model(ids), repeat=3, warm_up=1), "ms")
    cache, ids = q.Cache(), ids_of(512, config)
    model(ids, cache=cache)
    eager_cache = cache.clone()
    say("packed, decode", milliseconds(lambda: model(ids[:, :1], cache=eager_cache)), "ms")
    step = DecodeGraph(model, cache, capacity=1024)
    say("packed, decode, as a graph", milliseconds(lambda: step.step(ids[:, :1])), "ms")
    say("packed, peak memory", torch.cuda.max_memory_allocated() / GIB, "GiB")
    if args.profile:
        profile("packed prefill 512", lambda: model(ids))


def exact(args: argparse.Namespace) -> None:
    """float64 over packed experts, all layers; then some layers also on the CPU."""
    exact_times(args)
    free()
    on_cpu_and_gpu(args)


def exact_times(args: argparse.Namespace) -> None:
    config = config_of(args.config, args.layers)
    model = random_model(config, "exact", packed=True)
    say("exact weights", torch.cuda.memory_allocated() / GIB, "GiB")
    torch.cuda.reset_peak_memory_stats()
    ids = ids_of(512, config)
    say("exact, packed, 512 tokens", milliseconds(lambda: model(ids), repeat=2, warm_up=1) / 1e3, "s")
    say("exact, peak memory", torch.cuda.max_memory_allocated() / GIB, "GiB")
    say("exact: two runs, same bits", float(torch.equal(model(ids), model(ids))))
    if args.profile:
        profile("exact 512", lambda: model(ids))


def on_cpu_and_gpu(args: argparse.Namespace) -> None:
    """Four layers (one of them attention) of `exact` on both devices, the same bytes."""
    config = config_of(args.config, 4)
    model = random_model(config, "exact", packed=True, seed=1)
    ids = ids_of(96, config)
    gpu = {key: x.cpu() for key, x in q.trace(model, ids).items()}
    cpu_model = to_cpu(model)
    del model
    free()
    cpu = dict(q.trace(cpu_model, ids.cpu()).items())
    worst, where = 0.0, ""
    for key, x in cpu.items():
        if not x.is_floating_point():
            assert torch.equal(x, gpu[key]), key
            continue
        distance = ((gpu[key] - x).norm() / x.norm().clamp_min(1e-300)).item()
        worst, where = max((worst, where), (distance, key))
    say(f"exact, GPU against CPU, {len(cpu)} taps of 4 layers, worst ({where})", worst)


def to_cpu(model: Model) -> Model:
    for module in model.modules():
        if isinstance(module, StackedExperts):
            for name in ("gate_up", "down"):
                weight = getattr(module, name)
                setattr(module, name, mxfp4.PackedMXFP4(weight.codes.cpu(), weight.scales.cpu()))
    return model.cpu()


def profile(name: str, run: Callable[[], object]) -> None:
    """How much of the time the device works, and on what."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)
    total, count = sum(row.self_device_time_total for row in rows), sum(row.count for row in rows)
    print(f"  {name}: {count} kernels, {total / 1e3:.2f} ms on the device")
    for row in rows[:22]:
        print(f"    {row.self_device_time_total / 1e3:8.2f} ms {row.count:6d} x  {row.key[:120]}")


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


SECTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "limits": limits, "decode": decode, "bf16": bf16, "packed": packed, "exact": exact, "slice": on_cpu_and_gpu,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", default=[], help=", ".join(SECTIONS))
    parser.add_argument("--config", default="qwen3.5-35b-a3b")
    parser.add_argument("--layers", type=int, help="only the first so many")
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--no-peer", action="store_true", help="without transformers")
    parser.add_argument("--profile", action="store_true", help="also list kernels")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here")
        return 1
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    failed = 0
    for name in args.sections or [s for s in SECTIONS if s != "slice"]:
        print(name, flush=True)
        try:
            with torch.inference_mode():
                SECTIONS[name](args)
        except Exception:
            failed += 1
            traceback.print_exc()
            sys.stderr.flush()
        free()
        if "OUT" in os.environ:
            (Path(os.environ["OUT"]) / "bench_gpu.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
