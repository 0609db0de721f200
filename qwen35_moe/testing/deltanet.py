"""The delta rule of Gated DeltaNet, with its state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import Qwen35Error
from ..model.deltanet import chunked_delta_rule, recurrent_delta_rule
from ..model.norms import l2_norm
from ..model.ops import promote
from ..numerics.arithmetics import current
from ..numerics.taps import tap
from .case import Case, Inputs, Make, Outputs, by, known, on, out
from .checks import Check, assertion, check_legal
from .drawn import config_of, drawn, heads
from .layers import BETA, G, gating_case

GDN_OUTPUT, GDN_STATE = "gdn_core_out", "gdn_state"


def gdn_case(model: str = "tiny", tokens: int = 65, with_state: bool = True, seed: int = 0) -> Case:
    """The delta rule: `q`, `k` [1, T, M, K], `v` [1, T, J, P], `g` (log decay, float32), `beta` [1, T, J], `state`
    [1, J, K, P] float32 -> `gdn_core_out` [1, T, J, P], `gdn_state` [1, J, K, P]. Decode: tokens 1.

    The kernel normalises q and k (x / sqrt(sum x^2 + 1e-6)) and scales q by K^-0.5; value head j reads key head
    j // (J/M). One key head is of norm 1e-3.
    """
    config = config_of(model)
    J, M, K, P = (config.linear_num_value_heads, config.linear_num_key_heads, config.linear_key_head_dim,
                  config.linear_value_head_dim)  # fmt: skip

    def make() -> Inputs:
        q, k = (heads(seed, name, 1, tokens, M, K) for name in "qk")
        gates = gating_case(model, tokens, seed).truth
        state = drawn(seed, "state", 1, J, K, P, spread=0.25, dtype=torch.float32)
        return {
            "q": q * 0.125, "k": k * 0.125, "v": drawn(seed, "v", 1, tokens, J, P),
            "g": gates[G][None].float(), "beta": gates[BETA][None].to(torch.bfloat16),
            "state": state if with_state else torch.zeros_like(state),
        }  # fmt: skip

    return _delta_rule(f"gdn-{model}-{tokens}{'-state' if with_state else ''}", make, l2=True)


def gdn_given(*inputs: Tensor | None, l2: bool = True, name: str = "gdn") -> Case:
    """The case of given tensors: q, k, v, g, beta, and state or None (empty). l2: the kernel normalises q and k."""
    names = ("q", "k", "v", "g", "beta", "state")
    given = {key: x for key, x in zip(names, inputs, strict=False) if x is not None}
    if missing := [key for key in names[:5] if key not in given]:
        raise Qwen35Error("inputs are missing", where=name, expected=", ".join(names), found=f"no {missing[0]}")
    q, v = given["q"], given["v"]
    for key, shape in (("k", q.shape), ("beta", v.shape[:3]), ("g", v.shape[:3])):
        if given[key].shape != shape:
            expected = f"{key} {list(shape)} beside q {list(q.shape)} and v {list(v.shape)}"
            raise Qwen35Error("shapes disagree", where=name, expected=expected, found=list(given[key].shape))
    given.setdefault("state", torch.zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3]))
    return _delta_rule(name, lambda: given, l2)


def _rule(i: Inputs, l2: bool, tiled: bool = False) -> Outputs:
    """tiled: value head j reads key head j % M, a fault."""
    groups, width = i["v"].shape[2] // i["q"].shape[2], i["q"].shape[-1]
    q, k = (l2_norm(i[name]) if l2 else i[name] for name in "qk")
    q = tap("gdn_q_scaled", promote(tap("gdn_q", q)) * width**-0.5)
    k = tap("gdn_k", k)
    q, k = (x.repeat(1, 1, groups, 1) if tiled else x.repeat_interleave(groups, 2) for x in (q, k))
    v, g, beta = tap("gdn_v", i["v"]), tap(G, i["g"]), tap(BETA, i["beta"])
    one_by_one = i["q"].shape[1] == 1 or current().switch("gdn_rule") == "recurrent"
    o, state = (recurrent_delta_rule if one_by_one else chunked_delta_rule)(q, k, v, g, beta, promote(i["state"]))
    return {GDN_OUTPUT: tap(GDN_OUTPUT, o), GDN_STATE: tap(GDN_STATE, state)}


def _transposed(x: Tensor) -> Tensor:
    return x.mT.reshape(x.shape)


def _delta_rule(name: str, make: Make, l2: bool) -> Case:
    wrong = known("state in bf16", "recall term missing", "decay with the wrong sign", "no decay", "q not scaled") | {
        "g one token late": on(lambda g: F.pad(g[:, :-1], (0, 0, 1, 0)), "g"),
        "state ignored": on(torch.zeros_like, "state"),
        "state transposed": on(_transposed, "state"),
        "state returned transposed": out(GDN_STATE, lambda state, _: _transposed(state)),
        "state not updated": out(GDN_STATE, lambda _, i: i["state"]),
        "q scaled twice": out(GDN_OUTPUT, lambda o, i: o * i["q"].shape[-1] ** -0.5),
        "beta left out": on(torch.ones_like, "beta"),
        "value heads in another order": by(lambda i: _rule(i, l2, tiled=True)),
    }
    if l2:
        wrong["eps left out of the L2 norm"] = on(lambda x: x * 2.0**40, "q", "k")  # beside which the eps is nothing
        wrong["q and k not normalised"] = by(lambda i: _rule(i, l2=False))
    return Case(name, (GDN_OUTPUT, GDN_STATE), make, lambda i: _rule(i, l2), wrong)


def check_gdn(
    out: Tensor, state_out: Tensor, *inputs: Tensor | None, state: Tensor | None = None, l2: bool = True,
    state_layout: str = "kv",
) -> list[Check]:  # fmt: skip
    """Output and state of a delta rule kernel, prefill or decode, against the float64 truth of the same inputs.

    inputs: q, k [B, T, M, K], v [B, T, J, P], g (log decay) and beta [B, T, J], state [B, J, K, P] or None (empty);
    state_layout `vk`: states are [B, J, P, K], as SGLang's and fla's newer kernels keep them. l2: the kernel normalises
    q and k. A state whose digits are all bf16 is wrong, whatever its error.
    """
    if state_layout not in ("kv", "vk"):
        raise Qwen35Error("unknown layout of a state", expected="kv, vk", found=state_layout)
    before = inputs[5] if len(inputs) > 5 else state
    if state_layout == "vk":
        state_out, before = state_out.mT, None if before is None else before.mT
    return check_legal((out, state_out), gdn_given(*inputs[:5], before, l2=l2))


assert_gdn = assertion(check_gdn)
