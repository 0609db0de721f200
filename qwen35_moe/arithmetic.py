"""Arithmetics: tables that say who rounds where.

An arithmetic is a table from tap names to roundings. Model code computes on promoted values (bf16 becomes fp32,
float64 stays float64) and hands every result to `tap`; the table then says what becomes of it:

    torch.bfloat16      round to this dtype, nearest even
    KEEP                do not round: the value stays as wide as it was computed
    a callable          x -> x, any other rounding (an MXFP4 quantiser, say)

Names without a row get the table's `dtype`. Matrix products accumulate wide and round once, to the row of their tap.
`weights` does the same for parameters by name, when they are loaded. `switches` holds what is no rounding but an
order or a choice, with the alternatives listed in `SWITCHES`.

A table of one's own:

    mine = replace(TRANSFORMERS_BF16, name="mine", rounds={**TRANSFORMERS_BF16.rounds, "moe_topk_weights": KEEP})
    q.load(path, arithmetic=mine)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from . import taps
from .errors import Qwen35Error

KEEP = None
Rounding = torch.dtype | Callable[[Tensor], Tensor] | None

SWITCHES: Mapping[str, tuple[str, ...]] = {
    # In which order the experts' weighted outputs of a token are added: by slot (the order of `moe_topk_ids`, the
    # fused shared expert last), or by expert id. The running sum is the tap `moe_partial_sum`.
    "moe_sum_order": ("slot", "expert", "slot-reversed"),
    # How a weighted output enters the running sum: as a product that may be rounded before (`moe_expert_weighted`),
    # or in one fused multiply-add of weight and output.
    "moe_weight": ("product", "fma"),
    # Which expert wins an exact tie between router logits: the lowest id, or the one that torch.topk happens to return.
    "moe_ties": ("lowest-id", "torch.topk"),
    # How the router's softmax and the shared gate's dot product are summed: in the library's order, in the dtype of the
    # table; or exactly, to be rounded once, which is the fair model of an fp32 kernel whose order is not known.
    "moe_router_sums": ("library", "exact"),
    # Which rule DeltaNet uses for more than one token. A single token always takes the recurrent rule.
    "gdn_rule": ("chunked", "recurrent"),
    # Whether DeltaNet's memory fades over padding. In transformers it does: harmless left of a new sequence, where the
    # memory is empty (only the running sum of decays rounds differently), wrong before a continued one.
    "gdn_padding": ("still", "fades"),
}


@dataclass(frozen=True)
class Arithmetic:
    """Who rounds where. See the module's docstring for the meaning of the fields."""

    name: str
    dtype: torch.dtype
    doc: str = ""
    rounds: Mapping[str, Rounding] = field(default_factory=dict)
    weights: Mapping[str, torch.dtype] = field(default_factory=dict)
    switches: Mapping[str, str] = field(default_factory=dict)
    # An engine may pick another expert kernel by shape: (tokens, hidden, intermediate) -> arithmetic.
    for_experts: Callable[[int, int, int], Arithmetic | None] | None = None

    stage = taps.ROUND

    def __post_init__(self) -> None:
        for key, value in self.switches.items():
            if value not in SWITCHES.get(key, ()):
                raise Qwen35Error(
                    "unknown switch or value",
                    where=f"arithmetic {self.name!r}",
                    expected=dict(SWITCHES),
                    found=(key, value),
                )

    @cached_property
    def _found(self) -> dict[str, Rounding]:
        return {}

    def rounding(self, name: str) -> Rounding:
        """The row that decides for a tap name: the exact name, else the first matching glob, else `dtype`."""
        if name not in self._found:
            self._found[name] = _first_match(name, self.rounds, self.dtype)
        return self._found[name]

    def weight_dtype(self, name: str) -> torch.dtype:
        """The dtype in which the parameter `name` is held."""
        return _first_match(name, self.weights, self.dtype)

    def switch(self, name: str) -> str:
        return self.switches.get(name, SWITCHES[name][0])

    def __call__(self, site: taps.Site, x: Tensor) -> Tensor | None:
        how = self.rounding(site.name)
        if how is KEEP or not x.is_floating_point():
            return None
        return x.to(how) if isinstance(how, torch.dtype) else how(x)


def _first_match(name: str, table: Mapping, default):
    if name in table:
        return table[name]
    return next((value for pattern, value in table.items() if fnmatchcase(name, pattern)), default)


EXACT = Arithmetic(
    name="exact",
    dtype=torch.float64,
    doc="float64 from the embedding to the logits. Nothing is narrowed anywhere.",
    switches={"moe_sum_order": "expert"},  # needs no buffer of slots; in float64 the order is worth 1e-16
)

FLOAT32 = Arithmetic(
    name="float32",
    dtype=torch.float32,
    doc="float32 from the embedding to the logits; what transformers and llama.cpp compute with F32 weights.",
)

TRANSFORMERS_BF16 = Arithmetic(
    name="transformers-bf16",
    dtype=torch.bfloat16,
    doc="transformers 5.23, eager attention and eager experts, model in bfloat16. Every operation rounds to bf16, "
    "but for the rows here. Parameters are all bf16, A_log too.",
    rounds={
        # Norms square, scale and gain in fp32 and round once, at the end; the gated norm rounds in the middle too.
        "*.gain": KEEP,
        "gdn_norm_weighted": torch.bfloat16,
        # cos and sin are computed in fp32 and rounded before use; so are both products and their sum.
        "rope_cos": torch.bfloat16,
        "rope_sin": torch.bfloat16,
        # The vision tower rotates in fp32 and rounds the result alone.
        "vis_rope_*": KEEP,
        # Softmax in fp32, rounded once. The raw product q k^T is rounded, and again after the scale.
        "attn_probs": torch.bfloat16,
        "moe_router_probs": KEEP,
        "moe_topk_probs": KEEP,
        "gdn_conv_product": KEEP,
        # The delta rule itself runs in fp32 on bf16 inputs; only its output is rounded.
        "gdn_g": KEEP,
        "gdn_q": KEEP,
        "gdn_q_scaled": KEEP,
        "gdn_k": KEEP,
        "gdn_state": KEEP,
        "gdn_recall": KEEP,
        "gdn_z_gate": KEEP,
    },
    switches={"gdn_padding": "fades", "moe_sum_order": "expert", "moe_ties": "torch.topk"},
)

SGLANG_BF16 = Arithmetic(
    name="sglang-bf16",
    dtype=torch.bfloat16,
    doc="SGLang 0.5.23 on ROCm, unquantised weights, 2-D M-RoPE positions, prefill. Fused kernels keep fp32 where "
    "transformers rounds in the middle.",
    rounds={
        # Residual add and norm are one kernel: the norm sees the fp32 sum, the stored stream is bf16.
        "pre_mlp_residual_sum": KEEP,
        "layer_output_sum": KEEP,
        "*.gain": KEEP,
        # RoPE: q and k in fp32, cos and sin from an fp32 cache, one rounding on store.
        "rope_cos": KEEP,
        "rope_sin": KEEP,
        "*.x_cos": KEEP,
        "*.x_sin": KEEP,
        # Flash attention: scores and softmax stay in fp32 registers; the probabilities are rounded for the MFMA.
        "attn_qk": KEEP,
        "attn_scores": KEEP,
        "attn_gate": KEEP,
        # Convolution: each bf16 x bf16 product is rounded, the sum and the SiLU stay in fp32.
        "gdn_conv_product": torch.bfloat16,
        # GDN gating kernel: g in fp32, beta rounded to bf16. q and k are stored in bf16 after the L2 norm in prefill;
        # the scale K^-0.5 is applied later, in fp32.
        "gdn_conv": KEEP,
        "gdn_g": KEEP,
        "gdn_q_scaled": KEEP,
        "gdn_state": KEEP,
        "gdn_recall": KEEP,
        # Gated norm: all in fp32 until the store.
        "gdn_norm_normed": KEEP,
        "gdn_norm_weighted": KEEP,
        "gdn_z_gate": KEEP,
        # Router: ranks bf16 logits, weights are fp32.
        "moe_router_probs": KEEP,
        "moe_topk_probs": KEEP,
        "moe_topk_weights": torch.float32,
        # Shared-expert gate: fp32 dot product, fp32 sigmoid, fp32 product and sum, one bf16 store.
        "moe_shared_gate_logit": KEEP,
        "moe_shared_gate": torch.float32,
        "moe_shared_gated": KEEP,
        "moe_slot_weights": torch.float32,
        # Experts: gate and up stay fp32 until h is stored; each slot's weighted output is bf16, their sum is fp32.
        "moe_expert_gate_up": KEEP,
        "moe_expert_silu": KEEP,
        "moe_expert_down": KEEP,
        "moe_partial_sum": KEEP,
    },
    weights={"*.A_log": torch.float32},
    switches={"moe_router_sums": "exact"},
)

ARITHMETICS: dict[str, Arithmetic] = {a.name: a for a in (EXACT, FLOAT32, TRANSFORMERS_BF16, SGLANG_BF16)}

# What functions of the model do when they are called on their own, outside of a model: nothing is rounded.
AS_GIVEN = Arithmetic(name="as-given", dtype=torch.float64, rounds=MappingProxyType({"*": KEEP}))

_current: ContextVar[Arithmetic] = ContextVar("arithmetic", default=AS_GIVEN)


def get(arithmetic: str | Arithmetic) -> Arithmetic:
    """An arithmetic by name (`exact`, `float32`, ...), or the given one."""
    if isinstance(arithmetic, Arithmetic):
        return arithmetic
    if arithmetic not in ARITHMETICS:
        near = get_close_matches(str(arithmetic), ARITHMETICS, n=1)
        raise Qwen35Error(
            "unknown arithmetic",
            expected=f"one of {', '.join(ARITHMETICS)}, or an Arithmetic",
            found=repr(arithmetic),
            do=f"did you mean {near[0]!r}?" if near else "see qwen35_moe.arithmetic",
        )
    return ARITHMETICS[arithmetic]


def current() -> Arithmetic:
    """The arithmetic in use here and now."""
    return _current.get()


@contextmanager
def using(arithmetic: str | Arithmetic) -> Iterator[None]:
    """Compute in this arithmetic inside the `with` block."""
    arithmetic, outer = get(arithmetic), _current.get()
    token = _current.set(arithmetic)
    try:
        with taps.attach(arithmetic, instead_of=outer):
            yield
    finally:
        _current.reset(token)
