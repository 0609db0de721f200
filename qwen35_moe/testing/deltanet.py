"""The parts of Gated DeltaNet: convolution, gating, and the delta rule with its state."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import Qwen35Error
from ..model.deltanet import causal_conv, chunked_delta_rule, recurrent_delta_rule
from ..model.norms import l2_norm
from ..model.ops import apply, promote
from ..numerics.arithmetics import current
from ..numerics.taps import tap
from .case import Case, Inputs, Make, Outputs, WrongKernel
from .drawn import config_of, drawn, heads, matrix
from .judging import Check, check_legal, require

CONV, CONV_STATE, G, BETA, GDN_OUTPUT, GDN_STATE = (
    "gdn_conv_act", "gdn_conv_state", "gdn_g", "gdn_beta", "gdn_core_out", "gdn_state",
)  # fmt: skip


def conv_case(model: str = "tiny", tokens: int = 41, seed: int = 0) -> Case:
    """y_t = silu(sum_w weight_w x_{t-W+1+w}), depthwise and causal: `x` [1, T, C], `weight` [C, 1, W], `state`
    [1, C, W-1] (the inputs before the first token) -> `gdn_conv_act` [1, T, C], `gdn_conv_state` [1, C, W-1]."""
    config = config_of(model)
    C, W = config.conv_dim, config.linear_conv_kernel_dim

    def make() -> Inputs:
        state = drawn(seed, "state", 1, C, W - 1)
        return {"x": drawn(seed, "x", 1, tokens, C), "weight": matrix(seed, "weight", C, 1, W), "state": state}

    def compute(i: Inputs) -> Outputs:
        y, state = causal_conv(i["x"], i["weight"], i["state"], None)
        return {CONV: y, CONV_STATE: tap(CONV_STATE, state)}

    def not_activated(i: Inputs) -> Outputs:
        x = torch.cat((i["state"].mT, i["x"]), 1)
        y = sum(x[:, w : w + tokens] * i["weight"][:, 0, w] for w in range(W))
        return {CONV: torch.as_tensor(y), CONV_STATE: compute(i)[CONV_STATE]}

    wrong = (
        WrongKernel("convolution reversed", lambda i: i | {"weight": i["weight"].flip(-1)}),
        WrongKernel("no silu after the convolution", compute=not_activated),
        WrongKernel("convolution's history dropped", lambda i: i | {"state": torch.zeros_like(i["state"])}),
        WrongKernel("history read backwards", lambda i: i | {"state": i["state"].flip(-1)}),
        WrongKernel("silu twice", outputs=lambda o, i: o | {CONV: F.silu(o[CONV])}),
        WrongKernel("state not updated", outputs=lambda o, i: o | {CONV_STATE: i["state"]}),
    )
    return Case(f"conv-{model}-{tokens}", (CONV, CONV_STATE), make, compute, wrong=wrong, config=config,
                matrices=(CONV_STATE,))  # fmt: skip


def gating_case(model: str = "qwen3.5-35b-a3b", tokens: int = 41, seed: int = 0) -> Case:
    """g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b): `a`, `b` [T, J], `A_log` [J] float32, `dt_bias` [J] ->
    `gdn_g`, `gdn_beta` [T, J]."""
    config = config_of(model)
    J = config.linear_num_value_heads

    def make() -> Inputs:
        A_log = drawn(seed, "A_log", J, mean=0.25, spread=1.75, kind="flat", dtype=torch.float32)
        dt_bias = drawn(seed, "dt_bias", J, mean=-2.5, spread=1.5, kind="flat")
        a, b = drawn(seed, "a", tokens, J, spread=2.0), drawn(seed, "b", tokens, J, spread=2.0)
        return {"a": a, "b": b, "A_log": A_log, "dt_bias": dt_bias}

    def compute(i: Inputs) -> Outputs:
        decay = -promote(i["A_log"]).exp()
        g = tap(G, decay * F.softplus(promote(i["a"]) + promote(i["dt_bias"])))
        return {G: g, BETA: apply(BETA, torch.sigmoid, i["b"])}

    wrong = (
        WrongKernel("b and a swapped", lambda i: i | {"a": i["b"], "b": i["a"]}),
        WrongKernel("decay with the wrong sign", outputs=lambda o, i: o | {G: -o[G]}),
        WrongKernel("dt_bias left out", lambda i: i | {"dt_bias": torch.zeros_like(i["dt_bias"])}),
        WrongKernel("A_log taken for A", lambda i: i | {"A_log": i["A_log"].abs().log()}),
        WrongKernel("relu for softplus", outputs=lambda o, i: o | {
            G: -i["A_log"].exp() * (i["a"] + i["dt_bias"]).clamp(min=0)}),
        WrongKernel("the decay itself, exp(g)", outputs=lambda o, i: o | {G: o[G].exp()}),
        WrongKernel("beta without sigmoid", outputs=lambda o, i: o | {BETA: i["b"]}),
    )  # fmt: skip
    return Case(f"gating-{model}-{tokens}", (G, BETA), make, compute, wrong=wrong, rowwise=("a", "b"), config=config)


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
    """The case of given tensors: q, k, v, g, beta, and state or None (empty)."""
    names = ("q", "k", "v", "g", "beta", "state")
    given = {key: x for key, x in zip(names, inputs, strict=False) if x is not None}
    if missing := [key for key in names[:5] if key not in given]:
        raise Qwen35Error("inputs are missing", where=name, expected=", ".join(names), found=f"no {missing[0]}")
    q, v, beta = given["q"], given["v"], given["beta"]
    for key, shape in (("k", q.shape), ("beta", v.shape[:3]), ("g", v.shape[:3])):
        if given[key].shape != shape:
            expected = f"{key} {list(shape)} beside q {list(q.shape)} and v {list(v.shape)}"
            raise Qwen35Error("shapes disagree", where=name, expected=expected, found=list(given[key].shape))
    if "state" not in given:
        zeros = torch.zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3], device=beta.device)
        given["state"] = zeros
    return _delta_rule(name, lambda: given, l2)


def _operands(i: Inputs, l2: bool, tiled: bool = False) -> list[Tensor]:
    """What the rule itself takes: a query and a key for each value head. tiled: head j reads key j % M, a fault."""
    groups, width = i["v"].shape[2] // i["q"].shape[2], i["q"].shape[-1]
    q, k = (l2_norm(i[name]) if l2 else i[name] for name in "qk")
    q = tap("gdn_q_scaled", promote(tap("gdn_q", q)) * width**-0.5)
    k = tap("gdn_k", k)
    q, k = (x.repeat(1, 1, groups, 1) if tiled else x.repeat_interleave(groups, 2) for x in (q, k))
    return [q, k, tap("gdn_v", i["v"]), tap(G, i["g"]), tap(BETA, i["beta"]), promote(i["state"])]


def _finish(o: Tensor, state: Tensor) -> Outputs:
    return {GDN_OUTPUT: tap(GDN_OUTPUT, o), GDN_STATE: tap(GDN_STATE, state)}


def _step_by_step(i: Inputs, l2: bool, recall: bool, rounded: bool) -> Outputs:
    """The rule token by token, without its recall term (the state is only added to) or with the state kept in bf16."""
    q, k, v, g, beta, state = _operands(i, l2)
    outputs = []
    for t in range(q.shape[1]):
        faded = state * g[:, t].exp()[..., None, None]
        known = (faded * k[:, t, :, :, None]).sum(-2) if recall else 0.0
        u = (v[:, t] - known) * beta[:, t, :, None]
        state = faded + k[:, t, :, :, None] * u[:, :, None]
        outputs.append((state * q[:, t, :, :, None]).sum(-2))
        state = state.to(torch.bfloat16).to(state.dtype) if rounded else state
    return _finish(torch.stack(outputs, 1), state)


def _rule(i: Inputs, l2: bool, tiled: bool = False) -> Outputs:
    step = i["q"].shape[1] == 1 or current().switch("gdn_rule") == "recurrent"
    return _finish(*(recurrent_delta_rule if step else chunked_delta_rule)(*_operands(i, l2, tiled)))


def _delta_rule(name: str, make: Make, l2: bool) -> Case:
    def transposed(x: Tensor) -> Tensor:
        return x.mT.reshape(x.shape)

    def longer(i: Inputs) -> Inputs:  # so long that the eps of the norm is nothing
        return i | {name: i[name].double() * 2.0**40 for name in "qk"}

    wrong = [
        WrongKernel("state in bf16", compute=lambda i: _step_by_step(i, l2, recall=True, rounded=True)),
        WrongKernel("recall term missing", compute=lambda i: _step_by_step(i, l2, recall=False, rounded=False)),
        WrongKernel("decay with the wrong sign", lambda i: i | {"g": -i["g"]}),
        WrongKernel("no decay", lambda i: i | {"g": torch.zeros_like(i["g"])}),
        WrongKernel("g one token late", lambda i: i | {"g": F.pad(i["g"][:, :-1], (0, 0, 1, 0))}),
        WrongKernel("state ignored", lambda i: i | {"state": torch.zeros_like(i["state"])}),
        WrongKernel("state transposed", lambda i: i | {"state": transposed(i["state"])}),
        WrongKernel("state returned transposed", outputs=lambda o, i: o | {GDN_STATE: transposed(o[GDN_STATE])}),
        WrongKernel("state not updated", outputs=lambda o, i: o | {GDN_STATE: i["state"]}),
        WrongKernel("q not scaled", outputs=lambda o, i: o | {GDN_OUTPUT: o[GDN_OUTPUT] * i["q"].shape[-1] ** 0.5}),
        WrongKernel("q scaled twice", outputs=lambda o, i: o | {GDN_OUTPUT: o[GDN_OUTPUT] * i["q"].shape[-1] ** -0.5}),
        WrongKernel("beta left out", lambda i: i | {"beta": torch.ones_like(i["beta"])}),
        WrongKernel("value heads in another order", compute=lambda i: _rule(i, l2, tiled=True)),
    ]
    if l2:
        wrong.append(WrongKernel("eps left out of the L2 norm", longer))
        wrong.append(WrongKernel("q and k not normalised", compute=lambda i: _rule(i, l2=False)))
    return Case(name, (GDN_OUTPUT, GDN_STATE), make, lambda i: _rule(i, l2), wrong=tuple(wrong))


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


def assert_gdn(out: Tensor, state_out: Tensor, *inputs: Tensor | None, **options: Any) -> None:
    """`check_gdn` as an assertion."""
    require(check_gdn(out, state_out, *inputs, **options))
