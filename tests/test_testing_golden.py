"""What SGLang's and Aiter's own kernels returned on a GPU passes the public checks; once it is changed, it does not."""

from __future__ import annotations

import pytest
import torch
from test_golden import golden

from qwen35_moe import testing as qt
from qwen35_moe.quant.mxfp4 import decode


@pytest.mark.parametrize("kernel", ["chunk", "recurrent"])
def test_delta_rule(kernel):
    g = golden("gdn")
    inputs = (g["q"], g["k"], g["v"], g["g"], g["beta"])
    out, state = g[f"{kernel}.out"], g[f"{kernel}.state_vk"]
    qt.assert_gdn(out, state, *inputs, state_layout="vk")
    with pytest.raises(AssertionError, match="all its values are bf16"):
        qt.assert_gdn(out, state.to(torch.bfloat16), *inputs, state_layout="vk")
    with pytest.raises(AssertionError, match='looks like "state returned transposed"'):
        qt.assert_gdn(out, state, *inputs, state_layout="kv")


@pytest.mark.parametrize("name", ["randexp", "ties", "normal", "tiny"])
def test_quantiser(name):
    g = golden("quant")
    x, codes, scales = (g[f"{name}.{part}"] for part in ("x", "codes", "scales"))
    qt.assert_mxfp4(codes, scales, x, rule="aiter-triton-on-cuda")
    with pytest.raises(AssertionError, match=r"blocks differ.*first: row \d+, block \d+, .*aiter-triton-on-cuda"):
        qt.assert_mxfp4(codes, scales, x, rule="aiter-triton")


@pytest.mark.parametrize("name", ["a", "b"])
def test_append(name):
    g = {key.removeprefix(f"{name}."): x for key, x in golden("append").items()}
    inputs = {"x": g["h"], "shared_gate": g["w"].reshape(1, -1), "topk_ids": g["topk_ids"],
              "topk_weights": g["topk_weights"], "scale": g["scale"].reshape(())}  # fmt: skip
    case = qt.append_given(lambda: inputs, f"append-{name}")
    qt.assert_legal(g["out_weights"], case)
    wrong = g["out_weights"].clone()
    wrong[:, -1] /= inputs["scale"] / 2
    with pytest.raises(AssertionError):
        qt.assert_legal(wrong, case)


@pytest.mark.parametrize("name", ["moe_s", "moe_m"])
def test_fused_moe(name):
    """a1 as it was recorded (its scales are not below 127, see README of the data), which quantises to itself."""
    g = golden(name)
    inputs = {"x": decode(g["a1_codes"], g["a1_scales"], torch.bfloat16), "ids": g["ids"], "weights": g["weights"]}
    inputs |= {key: g[key] for key in ("w13_codes", "w13_scales", "w2_codes", "w2_scales")}
    case = qt.moe_given(lambda: inputs, name, activations="aiter-triton")
    qt.assert_legal(g["out"], case)
    less = g["out"].double() - g["down_weighted"][:, -1].double()
    with pytest.raises(AssertionError, match='looks like "shared expert dropped"'):
        qt.assert_legal(less.to(torch.bfloat16), case)


def test_other_kernels():
    g = golden("gdn")
    gated = qt.Case("norm", ("gdn_norm_out",), lambda: {"x": g["norm.x"], "z": g["norm.z"], "weight": g["norm.w"]},
                    qt.gated_norm_case().compute)  # fmt: skip
    qt.assert_legal(g["norm.out"], gated)
    gates = qt.Case("gating", ("gdn_g", "gdn_beta"), lambda: {key: g[key] for key in ("a", "b", "A_log", "dt_bias")},
                    qt.gating_case().compute)  # fmt: skip
    qt.assert_legal((g["g"], g["beta"]), gates)
    conv = {"x": g["conv.x"].T[None], "weight": g["conv.w"][:, None], "state": torch.zeros(1, 256, 3)}
    case = qt.Case("conv", ("gdn_conv_act", "gdn_conv_state"), lambda: conv, qt.conv_case().compute)
    qt.assert_legal((g["conv.out"].T[None], g["conv.state"]), case)
