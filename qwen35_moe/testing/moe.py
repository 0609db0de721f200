"""The MoE block: router, appended shared slot, and the experts in each format."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..model.config import Config
from ..model.moe import Experts, expert
from ..model.ops import add, multiply
from ..model.router import append_shared, route, shared_gate
from ..numerics.arithmetics import current, using
from ..numerics.tables import SGLANG_BF16
from ..numerics.taps import tap
from ..quant.fp8 import FP8
from ..quant.mxfp4 import PackedMXFP4
from ..weights.encode import encode_fp8
from .case import Case, Compute, Inputs, Make, Outputs, Wrong, known, on, out
from .drawn import config_of, hidden, matrix, packed_bytes

BLOCK_OUTPUT, SLOT_WEIGHTS, TOPK_WEIGHTS = "mlp_output", "moe_slot_weights", "moe_topk_weights"
WEIGHT_FORMATS = ("bf16", "fp8", "mxfp4")
# How the inputs of both products are quantised -> the arithmetic of the truth.
FUNCTIONS = {
    "none": "exact", "aiter-hip": "exact+a4-round-up", "aiter-triton": "exact+a4", "quark": "exact+a4",
    "fp8": "exact+a8",
}  # fmt: skip
CODES, SCALES = ("w13_codes", "w2_codes"), ("w13_scales", "w2_scales")


class GivenExperts(Experts):
    """Experts that are decoded when they are hit."""

    def __init__(self, inputs: Inputs, quantised: bool):
        w13, w2 = (inputs[name if name in inputs else f"{name}_codes"] for name in ("w13", "w2"))
        super().__init__(w2.shape[0], w13.shape[1] // 2, quantised)
        self.inputs = inputs

    def at(self, e: int) -> tuple[Tensor, Tensor]:
        return self._decoded("w13", e), self._decoded("w2", e)

    def _decoded(self, name: str, e: int) -> Tensor:
        dtype = current().weight_dtype("layers.0.mlp.experts")
        if name in self.inputs:
            return self.inputs[name][e].to(dtype)
        codes, scales = self.inputs[f"{name}_codes"][e], self.inputs[f"{name}_scales"][e]
        mxfp4 = codes.dtype == torch.uint8
        return (PackedMXFP4(codes, scales) if mxfp4 else FP8(codes, scales.to(torch.float32))).decode(dtype)


def packed(seed: int, name: str, shape: tuple[int, int, int], spread: float, layout: str) -> Inputs:
    """Weights [X, O, I] as a kernel gets them, `name`, or `name_codes` and `name_scales`: slot by slot, since those of
    a real model are gigabytes. MXFP4 is drawn as it is stored."""
    slots: list[tuple[Tensor, ...]] = []
    for e in range(shape[0]):
        if layout == "mxfp4":
            slots.append(packed_bytes(seed, f"{name}.{e}", *shape[1:], spread=spread))
            continue
        weight = matrix(seed, f"{name}.{e}", *shape[1:], spread=spread, mixed=True)
        if layout == "bf16":
            slots.append((weight,))
        else:
            codes, scales = map(torch.from_numpy, encode_fp8(weight, block=True))
            slots.append((codes.view(torch.float8_e4m3fn), scales.view(torch.bfloat16)))
    names = (name,) if layout == "bf16" else (f"{name}_codes", f"{name}_scales")
    return {n: torch.stack(parts) for n, parts in zip(names, zip(*slots, strict=True), strict=True)}


def router_case(model: str = "tiny", tokens: int = 41, seed: int = 0, ties: bool = True) -> Case:
    """softmax over all experts, the top k of them, renormalised: `x` [T, D], `router` [E, D] -> ids and weights
    [T, A], for `assert_routing`. ties: pairs of experts have equal rows, so that their logits tie exactly."""
    config = config_of(model)
    return Case(f"router-{model}-{tokens}", (TOPK_WEIGHTS,), lambda: routing_inputs(config, tokens, seed, ties),
                lambda i: {TOPK_WEIGHTS: route(i["x"], i["router"], config.num_experts_per_tok)[1]},
                config=config)  # fmt: skip


def routing_inputs(config: Config, tokens: int, seed: int, ties: bool) -> Inputs:
    router = matrix(seed, "router", config.num_experts, config.hidden_size, spread=1.5)
    if ties:
        router[1::4] = router[0::4][: len(router[1::4])]
    return {"x": hidden(seed, "x", tokens, config.hidden_size), "router": router}


def append_case(model: str = "tiny", tokens: int = 41, scale: float = 1.0, seed: int = 0) -> Case:
    """The shared expert as one more column: `x` [T, D], `shared_gate` [1, D], `topk_weights` [T, A] float32 and
    `scale` [] (1/ep_size) -> `moe_slot_weights` [T, A+1], the last sigmoid(gate . x) * scale, never renormalised."""
    config = config_of(model)

    def make() -> Inputs:
        inputs = routing_inputs(config, tokens, seed, ties=False)
        with torch.inference_mode(), using(SGLANG_BF16):
            ids, weights = route(inputs["x"], inputs["router"], config.num_experts_per_tok)
        gate = matrix(seed, "shared_gate", 1, config.hidden_size)
        return {"x": inputs["x"], "shared_gate": gate, "topk_ids": ids, "topk_weights": weights,
                "scale": torch.tensor(scale)}  # fmt: skip

    return append_given(make, f"append-{model}-{tokens}", config)


def append_given(make: Make, name: str, config: Config | None = None) -> Case:
    """The case of such inputs, by a function that returns them."""

    def compute(i: Inputs) -> Outputs:
        gate = shared_gate(i["x"], i["shared_gate"])
        return {SLOT_WEIGHTS: append_shared(i["topk_ids"], i["topk_weights"], gate, 0, float(i["scale"]))[1]}

    wrong = known(
        "shared gate ignored", "shared gate applied twice", "shared gate not squashed", "shared expert dropped"
    ) | {
        "1/ep_size left out": on(torch.ones_like, "scale"),
        "shared weight renormalised with the routed ones": out(SLOT_WEIGHTS, lambda w, _: w / w.sum(1, keepdim=True)),
    }
    rowwise = ("x", "topk_ids", "topk_weights")
    return Case(name, (SLOT_WEIGHTS,), make, compute, wrong, rowwise, config=config or config_of("tiny"))


def moe_case(
    model: str = "tiny", tokens: int = 41, seed: int = 0, layout: str = "bf16", fused: bool = True,
    activations: str = "none", experts: int | None = None,
) -> Case:  # fmt: skip
    """The experts of an MoE block -> `mlp_output` [T, D]. Inputs, with X = E + 1 slots if fused, else E:

        x [T, D]   ids [T, A(+1)]   weights [T, A(+1)] float32   router [E, D]   shared_gate [1, D]
        w13 [X, 2F, D] (gate rows, then up rows)   w2 [X, D, F]
        unfused: shared_w13 [2F, D], shared_w2 [D, F], whose output is added times sigmoid(shared_gate . x)

    layout: `bf16`; `fp8` (blocks of 128 x 128) or `mxfp4` (scales by the "even" rule), where w13_codes and w13_scales
    stand for w13. activations: `none` (W4A16), `fp8` (W8A8: e4m3 per token and 128 columns, amax/448), or the MXFP4
    quantiser of `aiter-hip`, `aiter-triton` or `quark` (W4A4). experts: fewer than the model has, to save memory.
    """
    if layout not in WEIGHT_FORMATS or activations not in FUNCTIONS:
        raise Qwen35Error("unknown format", expected=f"{', '.join(WEIGHT_FORMATS)}; activations {', '.join(FUNCTIONS)}",
                          found=f"{layout}, {activations}")  # fmt: skip
    config = config_of(model)
    D, N, E = config.hidden_size, config.moe_intermediate_size, experts or config.num_experts

    def make() -> Inputs:
        inputs = routing_inputs(config, tokens, seed, ties=False)
        inputs["router"] = inputs["router"][:E]
        inputs["shared_gate"] = matrix(seed, "shared_gate", 1, D)
        with torch.inference_mode(), using(SGLANG_BF16):  # ranked by bf16 logits, weights in float32
            ids, weights = route(inputs["x"], inputs["router"], config.num_experts_per_tok)
            if fused:
                ids, weights = append_shared(ids, weights, shared_gate(inputs["x"], inputs["shared_gate"]), E, 1.0)
        inputs |= {"ids": ids, "weights": weights}
        inputs |= packed(seed, "w13", (E + fused, 2 * N, D), 0.87, layout)
        inputs |= packed(seed, "w2", (E + fused, D, N), 1.25, layout)
        if not fused:
            inputs["shared_w13"] = matrix(seed, "shared_w13", 2 * N, D, spread=0.87)
            inputs["shared_w2"] = matrix(seed, "shared_w2", D, N)
        return inputs

    kind = "" if activations == "none" else f"-{activations}"
    name = f"moe-{model}-{layout}{kind}-{'fused' if fused else 'unfused'}-{tokens}"
    return moe_given(make, name, activations, config)


def moe_given(make: Make, name: str, activations: str = "none", config: Config | None = None) -> Case:
    """The case of such inputs, by a function that returns them."""
    quantised = activations != "none"
    return Case(name, (BLOCK_OUTPUT,), make, lambda i: block(i, quantised), wrong_experts(quantised),
                ("x", "ids", "weights"), FUNCTIONS[activations], config or config_of("tiny"))  # fmt: skip


def block(i: Inputs, quantised: bool) -> Outputs:
    """The experts' weighted sum, and the shared expert beside them where it is unfused."""
    routed = GivenExperts(i, quantised).combine(i["x"], i["ids"].long(), i["weights"])
    if "shared_w13" not in i:
        return {BLOCK_OUTPUT: tap(BLOCK_OUTPUT, routed)}
    dtype = current().dtype
    shared = expert(i["x"], i["shared_w13"].to(dtype), i["shared_w2"].to(dtype))
    shared = multiply("moe_shared_gated", shared_gate(i["x"], i["shared_gate"]), shared)
    return {BLOCK_OUTPUT: add(BLOCK_OUTPUT, tap("moe_routed_output", routed), shared)}


def wrong_experts(quantised: bool) -> dict[str, Wrong]:
    """The known faults of kernels that compute the experts. quantised: whether activations are."""
    if quantised:
        functions = {"activation scales rounded up": "exact+a4-round-up", "activations not quantised": "exact",
                     'activation scales by the "even" rule': "exact+a4"}  # fmt: skip
    else:
        functions = {"activations quantised to MXFP4": "exact+a4"}
    return known(
        "gate and up swapped", "gate and up taken for interleaved", "sigmoid for silu in the experts",
        "half of the intermediate missing", "shared gate ignored", "shared gate applied twice",
    ) | {
        "last chosen expert dropped": _share(0, lambda fused: -1 - fused),
        "first chosen expert dropped": _share(0, lambda _: 0),
        "shared expert dropped": _share(0),
        "shared expert counted twice": _share(2),
        "routing weights ignored": on(torch.ones_like, "weights"),
        "routing weights in another order": on(lambda w: w.flip(1), "weights"),
        "experts shifted by one": on(lambda w: w.roll(-1, 0), "w13", "w2", *CODES, *SCALES),
        "nibbles swapped": on(lambda w: (w << 4) | (w >> 4) if w.dtype == torch.uint8 else w, *CODES),
        "scales one step high": on(lambda s: _stepped(s, 1), *SCALES),
        "scales one step low": on(lambda s: _stepped(s, -1), *SCALES),
        "scales rotated": on(lambda s: s.roll(1, -1), *SCALES),
    } | {name: Wrong(lambda _, i: block(i, True), function) for name, function in functions.items()}  # fmt: skip


def _share(factor: float, column: Callable[[bool], int] | None = None) -> Wrong:
    """The share of one chosen expert times a factor, by its column where the last one is a fused shared expert's or
    not; without a column: that of the shared expert."""

    def compute(right: Compute, i: Inputs) -> Outputs:
        slots = i["w2" if "w2" in i else "w2_codes"].shape[0]
        fused = "shared_w13" not in i and bool((i["ids"][:, -1] == slots - 1).all())
        if column is None and not fused:
            return right(i | {"shared_w2": i["shared_w2"] * factor} if "shared_w2" in i else i)
        weights = i["weights"].clone()
        weights[:, column(fused) if column else -1] *= factor
        return right(i | {"weights": weights})

    return Wrong(compute)


def _stepped(scales: Tensor, step: int) -> Tensor:
    return (scales.int() + step).clamp(0, 254).to(torch.uint8) if scales.dtype == torch.uint8 else scales * 2.0**step
