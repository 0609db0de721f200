"""A ready corpus of cases: `@pytest.mark.parametrize("case", qt.cases("moe"))`."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from ..errors import Qwen35Error
from .attention import attention_case, rotary_case
from .case import Case
from .deltanet import conv_case, gating_case, gdn_case
from .moe import append_case, moe_case, router_case
from .norms import gated_norm_case, l2_norm_case, rms_norm_case
from .tail import draft_case, draft_layer_case, log_p_case

# One token, two, around a tile and a chunk: where kernels take another path.
TOKENS = (1, 2, 40, 41, 257)
FORMATS = (
    ("bf16", "none"),
    ("fp8", "none"),
    ("fp8", "fp8"),
    ("mxfp4", "none"),
    ("mxfp4", "aiter-hip"),
    ("mxfp4", "aiter-triton"),
)


def _sizes(case: Callable[..., Case]) -> Callable[[str], list[Case]]:
    return lambda model: [case(model, tokens=tokens) for tokens in TOKENS]


def _attention(model: str) -> list[Case]:
    shapes = ((1, 0), (41, 0), (257, 0), (1, 40), (1, 256), (2, 63))
    return [attention_case(model, tokens, past, kv) for kv in ("bf16", "fp8") for tokens, past in shapes]


def _moe(model: str) -> list[Case]:
    return [
        moe_case(model, tokens, layout=layout, fused=fused, activations=activations)
        for layout, activations in FORMATS for fused in (True, False) for tokens in TOKENS
    ]  # fmt: skip


OPERATIONS: dict[str, Callable[[str], list[Case]]] = {
    "rms_norm": _sizes(rms_norm_case),
    "gated_norm": _sizes(gated_norm_case),
    "l2_norm": _sizes(l2_norm_case),
    "rotary": _sizes(rotary_case),
    "attention": _attention,
    "conv": _sizes(conv_case),
    "gating": _sizes(gating_case),
    "gdn": lambda model: [gdn_case(model, t, state) for t in (1, 2, 64, 65, 150) for state in (False, True)],
    "router": _sizes(router_case),
    "append": lambda model: [append_case(model, t, scale) for t in TOKENS for scale in (1.0, 0.25)],
    "moe": _moe,
    "draft": _sizes(draft_case),
    "draft_layer": _sizes(draft_layer_case),
    "log_p": lambda _: [log_p_case(tokens=t, temperature=s) for t in TOKENS for s in (1.0, 0.7)],
}


def cases(operation: str, model: str = "tiny") -> list[Case]:
    """The cases of an operation, a key of OPERATIONS, at the sizes of a model: `tiny`, or a real one such as
    `qwen3.5-35b-a3b`. Inputs and truths are computed when they are first used."""
    if operation not in OPERATIONS:
        near = get_close_matches(operation, OPERATIONS, 1)
        do = f"did you mean {near[0]!r}?" if near else ""
        raise Qwen35Error("unknown operation", expected=", ".join(OPERATIONS), found=operation, do=do)
    return OPERATIONS[operation](model)
