"""The MoE block: router, appended shared slot, and the experts in each format."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import Qwen35Error
from ..model.config import Config
from ..model.moe import Experts, expert
from ..model.ops import add, multiply
from ..model.router import append_shared, route, shared_gate
from ..numerics.arithmetics import current, using
from ..numerics.tables import SGLANG_BF16
from ..numerics.taps import tap
from ..quant.fp8 import FP8_BLOCK
from ..quant.mxfp4 import PackedMXFP4
from .case import Case, Inputs, Make, Outputs, WrongKernel, known_faults
from .drawn import config_of, hidden, matrix, packed_bytes
from .moe_faults import wrong_experts

BLOCK_OUTPUT, SLOT_IDS, SLOT_WEIGHTS = "mlp_output", "moe_slot_ids", "moe_slot_weights"
WEIGHT_FORMATS = ("bf16", "fp8", "mxfp4")
# How the inputs of both products are quantised -> the arithmetic of the truth.
FUNCTIONS = {
    "none": "exact", "aiter-hip": "exact+a4-round-up", "aiter-triton": "exact+a4", "quark": "exact+a4",
    "fp8": "exact+a8",
}  # fmt: skip


class GivenExperts(Experts):
    """Experts that are decoded when they are hit."""

    def __init__(self, inputs: Inputs, quantised: bool):
        w13, w2 = (inputs[name if name in inputs else f"{name}_codes"] for name in ("w13", "w2"))
        super().__init__(w2.shape[0], w13.shape[1] // 2, quantised)
        self.inputs = inputs

    def at(self, e: int) -> tuple[Tensor, Tensor]:
        dtype = current().weight_dtype("layers.0.mlp.experts")
        return decoded(self.inputs, "w13", dtype, e), decoded(self.inputs, "w2", dtype, e)


def decoded(i: Inputs, name: str, dtype: torch.dtype, e: int | None = None) -> Tensor:
    """The values of a weight, or of its expert e, in any of the layouts."""
    parts = [i[n] for n in (name, f"{name}_codes", f"{name}_scales") if n in i]
    parts = parts if e is None else [x[e] for x in parts]
    if len(parts) == 1:
        return parts[0].to(dtype)
    codes, scales = parts
    if codes.dtype == torch.uint8:
        return PackedMXFP4(codes, scales).decode(dtype)
    spread = scales.to(dtype).repeat_interleave(FP8_BLOCK, -2).repeat_interleave(FP8_BLOCK, -1)
    return codes.to(dtype) * spread[..., : codes.shape[-2], : codes.shape[-1]]


def packed(seed: int, name: str, shape: tuple[int, int, int], spread: float, layout: str) -> Inputs:
    """Weights [X, O, I] as a kernel gets them, `name`, or `name_codes` and `name_scales`: slot by slot, since those of
    a real model are gigabytes. MXFP4 is drawn as it is stored."""
    slots: list[tuple[Tensor, ...]] = []
    for e in range(shape[0]):
        if layout == "mxfp4":
            slots.append(packed_bytes(seed, f"{name}.{e}", *shape[1:], spread=spread))
        else:
            weight = matrix(seed, f"{name}.{e}", *shape[1:], spread=spread, mixed=True)
            slots.append((weight,) if layout == "bf16" else _blocks(weight))
    names = (name,) if layout == "bf16" else (f"{name}_codes", f"{name}_scales")
    return {n: torch.stack(parts) for n, parts in zip(names, zip(*slots, strict=True), strict=True)}


def _blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 codes [O, I] and their multipliers: amax / 448 of each block of 128 x 128, in bf16."""
    O, I = weight.shape  # noqa: E741
    blocks = F.pad(weight.float(), (0, -I % FP8_BLOCK, 0, -O % FP8_BLOCK))
    blocks = blocks.unflatten(-1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    scales = (blocks.abs().amax((1, 3)) / 448).to(torch.bfloat16)
    spread = scales.float().repeat_interleave(FP8_BLOCK, -2).repeat_interleave(FP8_BLOCK, -1)[:O, :I]
    return (weight.float() / spread).to(torch.float8_e4m3fn), scales


def router_case(model: str = "tiny", tokens: int = 41, seed: int = 0, ties: bool = True) -> Case:
    """softmax over all experts, the top k of them, renormalised: `x` [T, D], `router` [E, D] -> ids and weights
    [T, A], for `assert_routing`. ties: pairs of experts have equal rows, so that their logits tie exactly."""
    config = config_of(model)
    return Case(f"router-{model}-{tokens}", ("moe_topk_weights",), lambda: routing_inputs(config, tokens, seed, ties),
                lambda i: {"moe_topk_weights": route(i["x"], i["router"], config.num_experts_per_tok)[1]},
                config=config, top_k=config.num_experts_per_tok)  # fmt: skip


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
        ids, weights = _routed(inputs, config.num_experts_per_tok)
        gate = matrix(seed, "shared_gate", 1, config.hidden_size)
        return {"x": inputs["x"], "shared_gate": gate, "topk_ids": ids, "topk_weights": weights,
                "scale": torch.tensor(scale)}  # fmt: skip

    return append_given(make, f"append-{model}-{tokens}", config)


def append_given(make: Make, name: str, config: Config | None = None) -> Case:
    """The case of such inputs, by a function that returns them."""
    config = config or config_of("tiny")

    def compute(i: Inputs) -> Outputs:
        gate = shared_gate(i["x"], i["shared_gate"])
        return {SLOT_WEIGHTS: append_shared(i["topk_ids"], i["topk_weights"], gate, 0, float(i["scale"]))[1]}

    def dropped(o: Outputs, _: Inputs) -> Outputs:
        return {SLOT_WEIGHTS: torch.cat((o[SLOT_WEIGHTS][:, :-1], 0 * o[SLOT_WEIGHTS][:, -1:]), 1)}

    wrong = (
        *known_faults("shared gate ignored", "shared gate applied twice", "shared gate not squashed"),
        WrongKernel("1/ep_size left out", lambda i: i | {"scale": torch.ones(())}),
        WrongKernel("shared weight renormalised with the routed ones",
                    outputs=lambda o, i: {SLOT_WEIGHTS: o[SLOT_WEIGHTS] / o[SLOT_WEIGHTS].sum(1, keepdim=True)}),
        WrongKernel("shared expert dropped", outputs=dropped),
    )  # fmt: skip
    rowwise = ("x", "topk_ids", "topk_weights")
    return Case(name, (SLOT_WEIGHTS,), make, compute, wrong=wrong, config=config, rowwise=rowwise)


def _routed(inputs: Inputs, top_k: int) -> tuple[Tensor, Tensor]:
    """Ids and weights as SGLang's router has them: ranked by bf16 logits, weights in float32."""
    with torch.inference_mode(), using(SGLANG_BF16):
        return route(inputs["x"], inputs["router"], top_k)


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
    D, N, E, A = config.hidden_size, config.moe_intermediate_size, config.num_experts, config.num_experts_per_tok
    E = E if experts is None else experts

    def make() -> Inputs:
        inputs = routing_inputs(config, tokens, seed, ties=False)
        inputs["router"] = inputs["router"][:E]
        inputs["shared_gate"] = matrix(seed, "shared_gate", 1, D)
        ids, weights = _routed(inputs, A)
        if fused:
            with torch.inference_mode(), using(SGLANG_BF16):
                ids, weights = append_shared(ids, weights, shared_gate(inputs["x"], inputs["shared_gate"]), E, 1.0)
        slots = E + 1 if fused else E
        inputs |= {"ids": ids, "weights": weights}
        inputs |= packed(seed, "w13", (slots, 2 * N, D), 0.87, layout)
        inputs |= packed(seed, "w2", (slots, D, N), 1.25, layout)
        if not fused:
            inputs["shared_w13"] = matrix(seed, "shared_w13", 2 * N, D, spread=0.87)
            inputs["shared_w2"] = matrix(seed, "shared_w2", D, N)
        return inputs

    kind = "" if activations == "none" else f"-{activations}"
    name = f"moe-{model}-{layout}{kind}-{'fused' if fused else 'unfused'}-{tokens}"
    return moe_given(make, name, activations, config)


def moe_given(make: Make, name: str, activations: str = "none", config: Config | None = None) -> Case:
    """The case of such inputs, by a function that returns them."""
    config = config or config_of("tiny")
    wrong = wrong_experts(lambda i: block(i, quantised=True), activations != "none")
    return Case(name, (BLOCK_OUTPUT,), make, lambda i: block(i, activations != "none"), FUNCTIONS[activations], wrong,
                ("x", "ids", "weights"), config=config, top_k=config.num_experts_per_tok)  # fmt: skip


def block(i: Inputs, quantised: bool) -> Outputs:
    """The experts' weighted sum, and the shared expert beside them where it is unfused."""
    routed = GivenExperts(i, quantised).combine(i["x"], i["ids"].long(), i["weights"])
    if "shared_w13" not in i:
        return {BLOCK_OUTPUT: tap(BLOCK_OUTPUT, routed)}
    dtype = current().dtype
    shared = expert(i["x"], i["shared_w13"].to(dtype), i["shared_w2"].to(dtype))
    shared = multiply("moe_shared_gated", shared_gate(i["x"], i["shared_gate"]), shared)
    return {BLOCK_OUTPUT: add(BLOCK_OUTPUT, tap("moe_routed_output", routed), shared)}
