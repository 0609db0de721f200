"""What is planted beside the catalogue: clean variants of engines, small factors, and bugs that it does not hold.

Those named `UNSEEN` were added when the envelope, the limit and the diagnosis were done, to judge them: nothing was
chosen by them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen35_moe.numerics import arithmetics
from qwen35_moe.numerics.arithmetics import KEEP, Arithmetic
from qwen35_moe.numerics.tables import (
    A8,
    AITER,
    AITER_SMALL_BATCH,
    AITER_VARIANTS,
    SGLANG_BF16,
    TRANSFORMERS_BF16,
    with_fp8_inputs,
)
from qwen35_moe.oracle.diagnose.fault_parts import on_packed, rotate_with, routed, scaled
from qwen35_moe.oracle.diagnose.faults import Fault, FaultSite
from qwen35_moe.oracle.judge.envelope import ALL_BF16
from qwen35_moe.oracle.judge.split_k import SplitK
from qwen35_moe.quant.mxfp4 import PackedMXFP4

SGLANG, TRANSFORMERS, BF16 = "sglang-bf16", "transformers-bf16", "all-bf16"


@dataclass(frozen=True)
class Variant:
    """A clean engine. Its own arithmetic, or the one that it was made from, is `left_out` of the envelope.

    products   the mode in which products are formed;   chunks   feeds the sequence in pieces
    batch      adds a second sequence, padded on the left;   fused   the shared expert is a slot
    """

    name: str
    table: Arithmetic
    left_out: str
    products: Callable[[], AbstractContextManager[Any]] = nullcontext
    chunks: tuple[int, ...] | None = None
    batch: bool = False
    fused: bool = False


def _sglang(**changes: Any) -> Arithmetic:
    rounds, switches = ({**getattr(SGLANG_BF16, n), **changes.get(n, {})} for n in ("rounds", "switches"))
    return replace(SGLANG_BF16, name="variant", rounds=rounds, switches=switches)


def variants(function: str, tokens: int, fusable: bool = False) -> list[Variant]:
    """Clean variants: those of W4A4 engines, of W8A8 and W4A8 ones ("+a8", "+w4a8"), or all others."""
    if function in A8:
        others = variants("", tokens, fusable)
        return [replace(v, table=with_fp8_inputs(v.table, function), left_out=v.left_out + function) for v in others]
    if function:
        return [Variant(a.name.rpartition("/")[2], a, a.name) for a in (AITER, *AITER_VARIANTS)
                if "triton" not in a.name and "threshold" not in a.name]  # fmt: skip
    return [
        Variant("sglang-bf16", SGLANG_BF16, SGLANG),
        Variant("transformers-bf16", TRANSFORMERS_BF16, TRANSFORMERS),
        Variant("all bf16", ALL_BF16, BF16),
        Variant("experts added in reverse", _sglang(switches={"moe_sum_order": "slot-reversed"}), SGLANG),
        Variant("experts added by id", _sglang(switches={"moe_sum_order": "expert"}), SGLANG),
        Variant("recurrent DeltaNet", _sglang(switches={"gdn_rule": "recurrent"}), SGLANG),
        Variant("split-K in 4", SGLANG_BF16, SGLANG, partial(SplitK, 4)),
        Variant("split-K in 2, all bf16", ALL_BF16, BF16, partial(SplitK, 2)),
        Variant("float32", arithmetics.get("float32"), "float32"),
        Variant("batched, padded", SGLANG_BF16, SGLANG, batch=True),
        Variant("chunked prefill and decode", SGLANG_BF16, SGLANG, chunks=_chunks(tokens, tokens // 2, 2)),
        *unseen_variants(tokens, fusable),
    ]


def _chunks(tokens: int, size: int, decode: int) -> tuple[int, ...]:
    whole, rest = divmod(tokens - decode, size)
    return (size,) * whole + (rest,) * (rest > 0) + (1,) * decode


def _online(p: Tensor) -> Tensor:
    """Probabilities as flash attention holds them: bf16 before the division by their sum."""
    most = p.amax(-1, keepdim=True)
    return (p / most).to(torch.bfloat16).to(p.dtype) * most


def unseen_variants(tokens: int, fusable: bool) -> list[Variant]:
    attention = _sglang(rounds={"attn_probs": _online, "attn_context": torch.bfloat16})
    router = _sglang(rounds={"moe_router_logits": KEEP})
    gates = _sglang(rounds={"moe_shared_gate_logit": torch.bfloat16, "moe_shared_gate": torch.bfloat16,
                            "moe_topk_weights": torch.bfloat16})  # fmt: skip
    gain = _sglang(rounds={"*.gain": torch.bfloat16})
    found = [
        Variant("8 ranks, all-reduce in bf16", SGLANG_BF16, SGLANG, partial(SplitK, 8, running=True)),
        Variant("16 parts in fp32, another order", SGLANG_BF16, SGLANG, partial(SplitK, 16, torch.float32, 999)),
        Variant("3 parts, transformers-bf16", TRANSFORMERS_BF16, TRANSFORMERS, partial(SplitK, 3)),
        Variant("chunked prefill of 7, 5 decode steps", TRANSFORMERS_BF16, TRANSFORMERS, chunks=_chunks(tokens, 7, 5)),
        Variant("online softmax", attention, SGLANG),
        Variant("router logits in fp32", router, SGLANG),
        Variant("gates and routing weights in bf16", gates, SGLANG),
        Variant("1 + w of norms in bf16", gain, SGLANG),
        Variant("Aiter's small-batch kernel", AITER_SMALL_BATCH, SGLANG),
    ]
    return [*found, Variant("shared expert fused", SGLANG_BF16, SGLANG, fused=True)] if fusable else found


# Factors that must be found: they are no entries of the catalogue, and the fit names them.
SMALL = (
    Fault("whole block times 1.02", "mlp", taps={"mlp_output": lambda x, _, __: x * 1.02}),
    Fault("shared expert times 1.06", "mlp", taps=scaled(1 + 1 / 16)),
    Fault("shared expert times 1.02", "mlp", taps=scaled(1.02)),
    Fault("routed experts times 0.98", "mlp", taps=routed(0.98)),
)

# Bugs that the catalogue does not hold, so that "unknown" is the right answer.
UNLISTED = (
    Fault("relu for silu in the experts", "mlp",
          taps={"moe_expert_silu": lambda x, kept, _: kept["moe_expert_gate_up"].chunk(2, -1)[0].relu()},
          remembers=("moe_expert_gate_up",)),
    Fault("columns of the output rolled", "mlp", taps={"mlp_output": lambda x, _, __: x.roll(1, -1)}),
    Fault("routing weights squared", "mlp", taps={"moe_topk_weights": lambda x, _, __: x * x}),
    Fault("outputs clamped", "mlp", taps={"moe_expert_down": lambda x, _, __: x.clamp(-x.std(), x.std())}),
    Fault("heads reversed before o_proj", "attn", taps={"attn_context": lambda x, _, __: x.flip(-1)}),
    Fault("values of the next token", "attn", taps={"attn_v": lambda x, _, __: x.roll(-1, 1)}),
    Fault("beta squared", "gdn", taps={"gdn_beta": lambda x, _, __: x * x}),
    Fault("keys negated", "gdn", taps={"gdn_core_out": lambda x, _, __: -x}),
    Fault("every third token's read-out lost", "gdn", taps={"gdn_core_out": lambda x, _, __: x * (
        torch.arange(x.shape[1]) % 3 != 0)[None, :, None, None]}),
)  # fmt: skip


def _one_byte(w: PackedMXFP4) -> PackedMXFP4:
    scales = w.scales.clone()
    scales[0, 0] += 1
    return PackedMXFP4(w.codes, scales)


def _q_only(x: Tensor, kept: dict[str, Tensor], place: FaultSite) -> Tensor:
    return rotate_with("attn_q_norm", offset=1)(x, kept, place)


def _one_element(x: Tensor, _: Any, __: Any) -> Tensor:
    y = x.clone()
    if len(rows := y.view(-1, x.shape[-1])) > 7:  # a decode step has fewer
        rows[7, 3] += 0.5 * x.abs().max()
    return y


def _one_row(x: Tensor, _: Any, __: Any) -> Tensor:
    y = x.clone()
    if len(rows := y.view(-1, x.shape[-1])) > 5:
        rows[5] = rows[4]
    return y


def _swapped(x: Tensor, _: Any, __: Any) -> Tensor:
    return x.roll(x.shape[-1] // 2, -1)


UNSEEN = (
    Fault("first chosen expert dropped", "mlp", taps={"moe_topk_weights": lambda x, _, __: torch.cat(
        (x[:, :1] * 0, x[:, 1:]), 1)}),
    Fault("gate and up swapped in one expert", "mlp", taps={"moe_expert_gate_up": _swapped}, single=True),
    Fault("one expert's scales one step low", "mlp", slot=on_packed(lambda w: PackedMXFP4(w.codes, w.scales - 1)),
          needs="mxfp4", single=True),
    Fault("one scale byte of one expert one step high", "mlp", slot=on_packed(_one_byte), needs="mxfp4", single=True),
    Fault("one row is its neighbour's", "mlp", taps={"mlp_output": _one_row}),
    Fault("one number off by half the largest", "mlp", taps={"mlp_output": _one_element}),
    Fault("attention's output times 1.02", "attn", taps={"attn_output": lambda x, _, __: x * 1.02}),
    Fault("queries one position on", "attn", taps={"attn_q": _q_only}, remembers=("attn_q_norm",)),
    Fault("scores scaled by half the head", "attn", taps={"attn_scores": lambda x, _, __: x * 2**0.5}),
    Fault("convolution without its first tap", "gdn", tensor={"linear_attn.conv1d.weight": lambda w: torch.cat(
        (w[..., :1] * 0, w[..., 1:]), -1)}),
    Fault("keys 10 % too long", "gdn", taps={"gdn_k": lambda x, _, __: x * 1.1}),
    Fault("dt_bias ignored", "gdn", tensor={"linear_attn.dt_bias": torch.zeros_like}),
)  # fmt: skip
