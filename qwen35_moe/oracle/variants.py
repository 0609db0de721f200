"""What is planted beside the catalogue: clean variants of engines, the smallest errors, and bugs unknown to it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .. import arithmetic as arithmetics
from ..arithmetic import Arithmetic
from ..tables import AITER, AITER_VARIANTS, SGLANG_BF16, TRANSFORMERS_BF16
from .catalogue import scaled
from .envelope import ALL_BF16
from .faults import Fault


@dataclass(frozen=True)
class Variant:
    """A clean engine. `chunks` feeds the sequence in pieces, `batch` adds a second sequence, padded on the left."""

    name: str
    table: Arithmetic
    split_k: int = 1
    chunks: tuple[int, ...] | None = None
    batch: bool = False


def variants(a4: bool, tokens: int) -> list[Variant]:
    """Clean variants: those of W4A4 engines, or all others."""
    if a4:
        return [Variant(a.name.rpartition("/")[2], a) for a in (AITER, *AITER_VARIANTS) if "triton" not in a.name
                and "threshold" not in a.name]  # fmt: skip
    reverse = replace(SGLANG_BF16, name="reversed", switches={**SGLANG_BF16.switches, "moe_sum_order": "slot-reversed"})
    by_id = replace(SGLANG_BF16, name="by id", switches={**SGLANG_BF16.switches, "moe_sum_order": "expert"})
    recurrent = replace(SGLANG_BF16, name="recurrent", switches={**SGLANG_BF16.switches, "gdn_rule": "recurrent"})
    return [
        Variant("sglang-bf16", SGLANG_BF16),
        Variant("transformers-bf16", TRANSFORMERS_BF16),
        Variant("all bf16", ALL_BF16),
        Variant("experts added in reverse", reverse),
        Variant("experts added by id", by_id),
        Variant("recurrent DeltaNet", recurrent),
        Variant("split-K in 4", SGLANG_BF16, split_k=4),
        Variant("split-K in 2, all bf16", ALL_BF16, split_k=2),
        Variant("float32", arithmetics.get("float32")),
        Variant("batched, padded", SGLANG_BF16, batch=True),
        Variant("chunked prefill and decode", SGLANG_BF16, chunks=(tokens // 2, tokens - tokens // 2 - 2, 1, 1)),
    ]


# The smallest errors that must be found: they are no entries of the catalogue, and the fit names them.
SMALL = (
    Fault("whole block times 1.02", "mlp", taps={"mlp_output": lambda x, _, __: x * 1.02}),
    Fault("shared expert times 1.06", "mlp", taps=scaled(1 + 1 / 16)),
)

# Bugs that the catalogue does not hold, so that "unknown" is the right answer.
UNLISTED = (
    Fault("relu for silu in the experts", "mlp",
          taps={"moe_expert_silu": lambda x, kept, _: kept["moe_expert_gate_up"].chunk(2, -1)[0].relu()},
          remembers=("moe_expert_gate_up",)),
    Fault("columns of the output rolled", "mlp", taps={"mlp_output": lambda x, _, __: x.roll(1, -1)}),
    Fault("routing weights squared", "mlp", taps={"moe_topk_weights": lambda x, _, __: x * x}),
    Fault("outputs clamped", "mlp", taps={"moe_expert_down": lambda x, _, __: x.clamp(-x.std(), x.std())}),
    Fault("heads permuted before o_proj", "attn", taps={"attn_context": lambda x, _, __: x.roll(1, 2)}),
    Fault("values of the next token", "attn", taps={"attn_v": lambda x, _, __: x.roll(-1, 1)}),
    Fault("beta squared", "gdn", taps={"gdn_beta": lambda x, _, __: x * x}),
    Fault("keys negated", "gdn", taps={"gdn_core_out": lambda x, _, __: -x}),
    Fault("every third token's read-out lost", "gdn", taps={"gdn_core_out": lambda x, _, __: x * (
        torch.arange(x.shape[1]) % 3 != 0)[None, :, None, None]}),
)  # fmt: skip
