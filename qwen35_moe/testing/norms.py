"""The three norms: zero-centred RMSNorm, the gated norm of a DeltaNet head, and the L2 norm of queries and keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.norms import gated_rms_norm, l2_norm, rms_norm
from ..numerics.taps import tap
from .case import Case, Compute, Inputs, Outputs, WrongKernel, known_faults
from .drawn import config_of, drawn, heads, hidden

NORM, GATED, L2 = "input_layernorm", "gdn_norm_out", "gdn_k"
OTHER_EPS = 1e-5


def rms_norm_case(model: str = "tiny", tokens: int = 41, seed: int = 0) -> Case:
    """y = x / sqrt(mean(x^2) + eps) * (1 + w): `x` [T, D], `weight` [D] -> `input_layernorm` [T, D]. Some rows are as
    small as sqrt(eps)."""
    config = config_of(model)

    def make() -> Inputs:
        x = hidden(seed, "x", tokens, config.hidden_size)
        x[::3] *= 2.0**-10
        return {"x": x, "weight": drawn(seed, "weight", config.hidden_size, spread=0.25)}

    def at(eps: float) -> Compute:
        return lambda i: {NORM: rms_norm(NORM, i["x"], i["weight"], eps)}

    def layer_norm(i: Inputs) -> Outputs:
        x = i["x"] - i["x"].mean(-1, keepdim=True)
        return {NORM: rms_norm(NORM, x, i["weight"], config.rms_norm_eps)}

    wrong = (
        *known_faults("input norm without 1 +"),
        WrongKernel("1 + added twice", lambda i: i | {"weight": i["weight"] + 1}),
        WrongKernel("eps 1e-5 for 1e-6", compute=at(OTHER_EPS)),
        WrongKernel("eps left out", compute=at(0.0)),
        WrongKernel("mean subtracted, as in LayerNorm", compute=layer_norm),
    )
    name = f"rms_norm-{model}-{tokens}"
    return Case(name, (NORM,), make, at(config.rms_norm_eps), wrong=wrong, rowwise=("x",), config=config)


def gated_norm_case(model: str = "tiny", tokens: int = 41, seed: int = 0) -> Case:
    """y = x / sqrt(mean(x^2) + eps) * w * silu(z) per head: `x`, `z` [T, J, P], `weight` [P] -> `gdn_norm_out`. One
    head is of norm 1e-3."""
    config = config_of(model)
    shape = (tokens, config.linear_num_value_heads, config.linear_value_head_dim)

    def make() -> Inputs:
        weight = drawn(seed, "weight", shape[-1], mean=1.0, spread=0.25)
        return {"x": heads(seed, "x", *shape), "z": drawn(seed, "z", *shape, spread=2.0), "weight": weight}

    def at(eps: float, kind: str = config.output_gate_type) -> Compute:
        return lambda i: {GATED: gated_rms_norm(i["x"], i["z"], i["weight"], eps, kind)}

    def gate_first(i: Inputs) -> Outputs:
        y = i["x"] * F.silu(i["z"])
        return {GATED: i["weight"] * y * torch.rsqrt(y.square().mean(-1, keepdim=True) + config.rms_norm_eps)}

    wrong = (
        WrongKernel("gate before norm", compute=gate_first),
        WrongKernel("gated norm with 1 +", lambda i: i | {"weight": i["weight"] + 1}),
        WrongKernel("sigmoid for silu in the gated norm", compute=at(config.rms_norm_eps, "sigmoid")),
        WrongKernel("eps 1e-5 for 1e-6", compute=at(OTHER_EPS)),
        WrongKernel("eps left out", compute=at(0.0)),
        WrongKernel("gate ignored", outputs=lambda o, i: {GATED: o[GATED] / F.silu(i["z"])}),
    )
    name = f"gated_norm-{model}-{tokens}"
    return Case(name, (GATED,), make, at(config.rms_norm_eps), wrong=wrong, rowwise=("x", "z"), config=config)


def l2_norm_case(model: str = "tiny", tokens: int = 41, seed: int = 0) -> Case:
    """y = x / sqrt(sum(x^2) + 1e-6) per head: `x` [T, M, K] -> `gdn_k` [T, M, K]. One head is of norm 1e-3, where the
    eps is as large as the sum."""
    config = config_of(model)

    def make() -> Inputs:
        x = heads(seed, "x", tokens, config.linear_num_key_heads, config.linear_key_head_dim)
        return {"x": x * 0.125}

    def compute(i: Inputs) -> Outputs:
        return {L2: tap(L2, l2_norm(i["x"]))}

    def by(denominator: Compute) -> Compute:
        return lambda i: {L2: i["x"] / denominator(i)["d"]}

    def size(x: Tensor) -> Tensor:
        return x.square().sum(-1, keepdim=True).sqrt()

    wrong = (
        WrongKernel("eps left out, as in F.normalize", compute=by(lambda i: {"d": size(i["x"])})),
        WrongKernel("eps outside of the root", compute=by(lambda i: {"d": size(i["x"]) + 1e-6})),
        WrongKernel("mean for sum in the L2 norm", compute=by(
            lambda i: {"d": (i["x"].square().mean(-1, keepdim=True) + 1e-6).sqrt()})),
    )  # fmt: skip
    return Case(f"l2_norm-{model}-{tokens}", (L2,), make, compute, wrong=wrong, rowwise=("x",), config=config)
