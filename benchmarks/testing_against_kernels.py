"""SGLang's own kernels, with the fla that it carries, against `qwen35_moe.testing` at real dimensions, on a GPU.

    python -m benchmarks.testing_against_kernels [--model qwen3.5-35b-a3b] [--experts 32] [NAME ...]

One line for each kernel as it is, which must pass, and one for the same kernel made wrong, which must not. It needs
`sglang` (0.5.17 was used). A kernel that cannot be run is said, and the others go on.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35_moe import testing as qt
from qwen35_moe.testing.case import Inputs
from weights.build import build

GPU = "cuda"
Checks = list[qt.Check]
Wrong = Callable[[Inputs], Inputs]
Tried = tuple[Callable[[Inputs], Checks], qt.Case, str, Wrong]  # kernel and check, case, what is made wrong


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Wrong:
    return lambda i: i | {name: change(i[name])}


def without_last(weights: Tensor) -> Tensor:
    """The last of the routed experts counts nothing; the shared expert's column is behind it."""
    weights[:, -2] = 0
    return weights


def experts(i: Inputs, **more: Any) -> Tensor:
    """The Triton kernels of a fused MoE, on all slots that are there."""
    from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
    from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import fused_experts
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    w13, w2 = (i[n] if n in i else i[f"{n}_codes"] for n in ("w13", "w2"))
    X, N, D = w13.shape[0], w13.shape[1] // 2, w13.shape[2]
    config = MoeRunnerConfig(num_experts=X, num_local_experts=X, hidden_size=D, intermediate_size_per_partition=N,
                             top_k=i["ids"].shape[1], inplace=True, activation="silu")  # fmt: skip
    chosen = StandardTopKOutput(i["weights"].float(), i["ids"].to(torch.int32), i["weights"])
    return fused_experts(i["x"].clone(), w13, w2, chosen, config, **more)


def moe(model: str, slots: int) -> Tried:
    case = qt.moe_case(model, tokens=64, experts=slots)
    return lambda i: qt.check_legal(experts(i), case), case, "one expert less", changed("weights", without_last)


def moe_w8a8(model: str, slots: int) -> Tried:
    case = qt.moe_case(model, tokens=64, experts=slots, layout="fp8", activations="fp8")

    def run(i: Inputs) -> Checks:
        w1, w2 = (i[f"{n}_scales"].float() for n in ("w13", "w2"))
        return qt.check_legal(experts(i, use_fp8_w8a8=True, block_shape=[128, 128], w1_scale=w1, w2_scale=w2), case)

    return run, case, "one expert less", changed("weights", without_last)


def moe_unfused(model: str, slots: int) -> Tried:
    from sglang.kernels.ops.elementwise.elementwise import fused_gate_sigmoid_mul_add

    case = qt.moe_case(model, tokens=64, experts=slots, fused=False)

    def run(i: Inputs) -> Checks:
        out = experts(i)
        gate, up = F.linear(i["x"], i["shared_w13"]).chunk(2, -1)
        shared = F.linear((F.silu(gate.float()) * up.float()).to(gate.dtype), i["shared_w2"])
        fused_gate_sigmoid_mul_add(i["x"], i["shared_gate"].squeeze(0), shared, out)
        return qt.check_legal(out, case)

    return run, case, "shared gate negated", changed("shared_gate", torch.neg)


def router(model: str, _: int) -> Tried:
    from sglang.srt.layers.moe.topk import fused_topk

    case = qt.router_case(model, tokens=257)

    def run(i: Inputs) -> Checks:
        weights, ids, *_ = fused_topk(i["x"], F.linear(i["x"], i["router"]), case.top_k, True)
        return qt.check_routing(ids, weights, case)

    return run, case, "two experts' rows swapped", changed("router", lambda w: w.roll(1, 0))


def append(model: str, _: int) -> Tried:
    from sglang.kernels.ops.moe.fused_moe_triton_kernels import fused_append_shared_experts_with_weights

    case = qt.append_case(model, tokens=257, scale=0.5)

    def run(i: Inputs) -> Checks:
        gate = F.linear(i["x"], i["shared_gate"])
        ids, weights, more = i["topk_ids"].to(torch.int32), i["topk_weights"], {"scale": float(i["scale"])}
        more |= {"N": case.config.num_experts, "apply_sigmoid": True}
        return qt.check_legal(fused_append_shared_experts_with_weights(ids, weights, gate, 1, **more)[1], case)

    return run, case, "1/ep_size left out", changed("scale", torch.ones_like)


def conv(model: str, _: int) -> Tried:
    from sglang.kernels.ops.mamba.causal_conv1d_triton import causal_conv1d_fn

    case = qt.conv_case(model, tokens=257)

    def run(i: Inputs) -> Checks:
        T, state = i["x"].shape[1], i["state"].contiguous()
        y = causal_conv1d_fn(
            i["x"][0].T, i["weight"][:, 0].contiguous(), None, state,
            torch.tensor([0, T], dtype=torch.int32, device=GPU), [T],
            cache_indices=torch.zeros(1, dtype=torch.int32, device=GPU),
            has_initial_state=torch.ones(1, dtype=torch.bool, device=GPU), activation="silu",
        )  # fmt: skip
        return qt.check_legal((y.T[None], state), case)

    return run, case, "taps in the other order", changed("weight", lambda w: w.flip(-1))


def gating(model: str, _: int) -> Tried:
    from sglang.kernels.ops.attention.fla.fused_gdn_gating import fused_gdn_gating

    case = qt.gating_case(model, tokens=257)

    def run(i: Inputs) -> Checks:
        g, beta = fused_gdn_gating(i["A_log"], i["a"], i["b"], i["dt_bias"])
        return qt.check_legal((g[0], beta[0]), case)

    return run, case, "dt_bias left out", changed("dt_bias", torch.zeros_like)


def delta_rule(model: str, tokens: int, chunked: bool) -> Tried:
    from sglang.kernels.ops.attention.fla.chunk import chunk_gated_delta_rule
    from sglang.kernels.ops.attention.fla.fused_recurrent import fused_recurrent_gated_delta_rule

    case = qt.gdn_case(model, tokens=tokens)
    names = ("q", "k", "v", "g", "beta")

    def run(i: Inputs) -> Checks:
        given = [i[name] for name in names]
        state, ends = i["state"].mT.contiguous(), torch.tensor([0, i["q"].shape[1]], device=GPU)
        more = {"initial_state": state, "cu_seqlens": ends, "use_qk_l2norm_in_kernel": True}
        if chunked:  # the state is written in its place
            where = torch.zeros(1, dtype=torch.int32, device=GPU)
            out, *_ = chunk_gated_delta_rule(*given, initial_state_indices=where, **more)
        else:
            out, state = fused_recurrent_gated_delta_rule(*given, output_final_state=True, **more)
        return qt.check_legal((out, state.mT), case)

    return run, case, "g one token late", changed("g", lambda g: F.pad(g[:, :-1], (0, 0, 1, 0)))


def gemma_norm(model: str, _: int) -> Tried:
    from sgl_kernel import gemma_rmsnorm

    case = qt.rms_norm_case(model, tokens=257)

    def run(i: Inputs) -> Checks:
        return qt.check_legal(gemma_rmsnorm(i["x"], i["weight"], case.config.rms_norm_eps), case)

    return run, case, "1 + left out", changed("weight", lambda w: w - 1)


def gated_norm(model: str, _: int) -> Tried:
    from sglang.kernels.ops.attention.fla.layernorm_gated import rms_norm_gated

    case = qt.gated_norm_case(model, tokens=257)

    def run(i: Inputs) -> Checks:
        y = rms_norm_gated(x=i["x"], weight=i["weight"], bias=None, z=i["z"], eps=case.config.rms_norm_eps,
                           norm_before_gate=True, is_rms_norm=True)  # fmt: skip
        return qt.check_legal(y, case)

    return run, case, "gate negated", changed("z", torch.neg)


KERNELS = {
    "fused_experts": moe,
    "fused_experts, W8A8": moe_w8a8,
    "fused_experts, unfused shared": moe_unfused,
    "fused_topk": router,
    "fused_append_shared_experts": append,
    "causal_conv1d_fn": conv,
    "fused_gdn_gating": gating,
    "chunk_gated_delta_rule": lambda model, _: delta_rule(model, 257, chunked=True),
    "fused_recurrent, 65 tokens": lambda model, _: delta_rule(model, 65, chunked=False),
    "fused_recurrent, decode": lambda model, _: delta_rule(model, 1, chunked=False),
    "gemma_rmsnorm": gemma_norm,
    "rms_norm_gated": gated_norm,
}


def said(checks: Sequence[qt.Check]) -> str:
    worst = max(checks, key=lambda check: (not check.ok, check.ratio))
    looks = f'; looks like "{worst.looks_like}"' if worst.looks_like else ""
    ratios = ", ".join(f"{check.output} {check.ratio:.3g}" for check in checks)
    return f"{ratios} x the legal error, {worst.bad_rows} of {worst.rows} rows beyond {worst.limit}{looks}"


def tried(name: str, model: str, slots: int) -> bool:
    """Whether the kernel passes, and the wrong one does not."""
    try:
        run, case, fault, wrong = KERNELS[name](model, slots)
        right, broken = run(case.to(GPU)), run(wrong(case.to(GPU)))
    except Exception as error:
        print(f"{'NOT RUN':9}{name:31}{type(error).__name__}: {error}"[:300], flush=True)
        return False
    good, seen = all(check.ok for check in right), not all(check.ok for check in broken)
    print(f"{'passes' if good else 'FAILS':9}{name:31}{case.name}: {said(right)}")
    print(f"{'is seen' if seen else 'UNSEEN':9}{'  ' + fault:31}{said(broken)}", flush=True)
    return good and seen


def prepare(folder: Path) -> None:
    """What SGLang's kernels ask of a server's arguments."""
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import ServerArgs

    path = build("engine-size", folder / "checkpoint")
    publish(ServerArgs(model_path=str(path), skip_tokenizer_init=True), role="scheduler")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(KERNELS))
    parser.add_argument("--model", default="qwen3.5-35b-a3b")
    parser.add_argument("--experts", type=int, default=32, help="fewer than the model has: weights are drawn here")
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for name in args.names or KERNELS:
            results.append(tried(name, args.model, args.experts))
    print(f"{sum(results)} of {len(results)} kernels pass, and are seen when they are wrong")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
