"""A ready corpus of cases: `@pytest.mark.parametrize("case", qt.cases("moe"))`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from itertools import product
from typing import Any

from ..errors import Qwen35Error
from .case import Case
from .deltanet import gdn_case
from .layers import attention_case, conv_case, gated_norm_case, gating_case, l2_norm_case, rms_norm_case, rotary_case
from .moe import append_case, moe_case, router_case
from .tail import draft_case, draft_layer_case, log_p_case

# One token, two, around a tile and a chunk: where kernels take another path.
TOKENS = (1, 2, 40, 41, 257)
FORMATS = (("bf16", "none"), ("fp8", "none"), ("fp8", "fp8"),
           ("mxfp4", "none"), ("mxfp4", "aiter-hip"), ("mxfp4", "aiter-triton"))  # fmt: skip


def _each(case: Callable[..., Case], options: Iterable[dict[str, Any]] | None = None) -> Callable[[str], list[Case]]:
    options = [{"tokens": tokens} for tokens in TOKENS] if options is None else list(options)
    return lambda model: [case(model, **some) for some in options]


OPERATIONS: dict[str, Callable[[str], list[Case]]] = {
    "rms_norm": _each(rms_norm_case),
    "gated_norm": _each(gated_norm_case),
    "l2_norm": _each(l2_norm_case),
    "rotary": _each(rotary_case),
    "attention": _each(attention_case, (
        {"tokens": tokens, "past": past, "kv": kv} for kv in ("bf16", "fp8")
        for tokens, past in ((1, 0), (41, 0), (257, 0), (1, 40), (1, 256), (2, 63)))),
    "conv": _each(conv_case),
    "gating": _each(gating_case),
    "gdn": _each(gdn_case, (
        {"tokens": tokens, "with_state": state} for tokens in (1, 2, 64, 65, 150) for state in (False, True))),
    "router": _each(router_case),
    "append": _each(append_case, ({"tokens": tokens, "scale": scale} for tokens in TOKENS for scale in (1.0, 0.25))),
    "moe": _each(moe_case, (
        {"tokens": tokens, "layout": layout, "fused": fused, "activations": activations}
        for (layout, activations), fused, tokens in product(FORMATS, (True, False), TOKENS))),
    "draft": _each(draft_case),
    "draft_layer": _each(draft_layer_case),
    "log_p": lambda _: [log_p_case(tokens=tokens, temperature=t) for tokens in TOKENS for t in (1.0, 0.7)],
}  # fmt: skip


def cases(operation: str, model: str = "tiny") -> list[Case]:
    """The cases of an operation, a key of OPERATIONS, at the sizes of a model: `tiny`, or a real one such as
    `qwen3.5-35b-a3b`. Inputs and truths are computed when they are first used."""
    if operation not in OPERATIONS:
        near = get_close_matches(operation, OPERATIONS, 1)
        do = f"did you mean {near[0]!r}?" if near else ""
        raise Qwen35Error("unknown operation", expected=", ".join(OPERATIONS), found=operation, do=do)
    return OPERATIONS[operation](model)
