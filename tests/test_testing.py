"""The public checks themselves: inputs, envelopes, quantisers, layouts and the gate."""

from __future__ import annotations

import re

import pytest
import torch
import wrong_kernels as kernels

from qwen35_moe import can_fuse_shared_expert
from qwen35_moe import testing as qt
from qwen35_moe.errors import Qwen35Error
from qwen35_moe.numerics.metrics import rel_l2
from qwen35_moe.quant.layouts import interleave_gate_up, shuffle_scales, shuffle_weight
from qwen35_moe.quant.mxfp4 import encode


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("operation", sorted(qt.OPERATIONS))
def test_corpus(operation):
    """Truths are float64 from whatever dtype, inputs the same in every process, and other arithmetics are legal."""
    case = next(c for c in qt.cases(operation) if c.name.endswith(("-41", "-65", "+41", "-65-state")))
    assert all(x.dtype == torch.float64 for x in case.truth.values())
    assert all(x.isfinite().all() for x in case.truth.values())
    for member in case.members:
        for check in qt.check_legal({name: x.clone() for name, x in member.items()}, case):
            assert check.ok, check
    again = next(c for c in qt.cases(operation) if c.name == case.name)
    assert all(torch.equal(bits(case[name]), bits(again[name])) for name in case)


def test_inputs_are_pinned():
    """The first numbers of a stream, which are to be the same on every machine and in every version."""
    assert qt.drawn(0, "x", 2, 2).tolist() == [[-1.109375, -0.7265625], [-0.0106201171875, 0.5]]


def test_a_kernel_that_writes_into_its_inputs_changes_nothing():
    case = qt.rms_norm_case()
    x = case["x"]
    x.zero_()
    case.to("cpu")["weight"].zero_()
    assert case["x"].any() and case["weight"].any()
    qt.assert_legal(kernels.rms_norm(case), case)


def test_what_a_kernel_returns_does_not_widen_its_envelope():
    """A wrong output is as wrong when it is judged again, and as wrong beside others."""
    case = qt.moe_case(tokens=16)
    wrong = kernels.moe(case, "gate and up swapped")
    first, second = (qt.check_legal(wrong, case)[0].ratio for _ in range(2))
    assert first == second > 100
    alone = qt.moe_case(tokens=16)
    qt.assert_legal(kernels.moe(alone), alone)
    assert qt.check_legal(wrong, alone)[0].ratio == first


def test_nan_and_shape_are_errors():
    case = qt.rms_norm_case()
    right = kernels.rms_norm(case)
    right[3, 5] = torch.nan
    check = qt.check_legal(right, case)[0]
    assert (check.ok, check.row, check.column, check.bad_rows) == (False, (3,), 5, 1)
    with pytest.raises(AssertionError, match=r"shape \[40, 64\], expected \[41, 64\]"):
        qt.assert_legal(right[:40], case)
    with pytest.raises(Qwen35Error, match="not the outputs"):
        qt.check_legal((right, right), case)


def test_a_kernel_that_wrote_nothing_has_no_state_in_bf16():
    case = qt.gdn_case(tokens=2)
    checks = qt.check_legal({name: torch.zeros_like(x) for name, x in case.truth.items()}, case)
    assert [check.ok for check in checks] == [False, False] and not any(check.looks_like for check in checks)


def test_float32_is_held_to_float32():
    """Where no input is bf16, bf16 roundings are not legal."""
    case = qt.gated_norm_case()
    wide = {name: case[name].float() for name in case}
    exact = qt.Case("wide", case.outputs, lambda: wide, case.compute, rowwise=case.rowwise)
    right = kernels.gated_norm(exact)
    assert not qt.check_legal(right.float(), exact)[0].ok, right
    qt.assert_legal(exact.truth["gdn_norm_out"].float(), exact)


def test_mxfp4():
    x = qt.drawn(0, "x", 8, 128, mixed=True).float()
    x[0, :32] = 0
    qt.assert_mxfp4(*encode(x, "round-up", absmax_floor=1e-10), x, rule="aiter-hip")
    with pytest.raises(AssertionError, match='all of it is as "aiter-hip" has it'):
        qt.assert_mxfp4(*encode(x, "round-up", absmax_floor=1e-10), x, rule="even")
    codes, scales = encode(x, "even")
    with pytest.raises(AssertionError, match="nibbles swapped"):
        qt.assert_mxfp4((codes << 4) | (codes >> 4), scales, x)
    with pytest.raises(AssertionError, match="1 of 32 blocks differ, in 0 the scale; first: row 2, block 1.*element 1"):
        codes[2, 16] ^= 16
        qt.assert_mxfp4(codes, scales, x)


def test_fp8():
    x = qt.drawn(0, "x", 8, 256, mixed=True)
    scales = x.float().unflatten(-1, (-1, 128)).abs().amax(-1) / 448
    codes = (x.float().unflatten(-1, (-1, 128)) / scales[..., None]).to(torch.float8_e4m3fn).flatten(-2)
    qt.assert_fp8(codes, scales, x)
    with pytest.raises(AssertionError, match="scales off by up to 1"):
        qt.assert_fp8(codes, 2 * scales, x)
    with pytest.raises(AssertionError, match=r"1 of 2048 codes differ; first at \[1, 7\]"):
        codes.view(torch.uint8)[1, 7] ^= 2
        qt.assert_fp8(codes, scales, x)


def test_layouts():
    plain = torch.arange(256 * 32, dtype=torch.int32).remainder(251).to(torch.uint8).view(256, 32)
    qt.assert_layout(shuffle_weight(plain), plain, "aiter-weight")
    qt.assert_layout(interleave_gate_up(plain), plain, "gate-up-interleaved")
    with pytest.raises(AssertionError, match='not aiter-weight; looks like "aiter-scales"'):
        qt.assert_layout(shuffle_scales(plain), plain, "aiter-weight")


def test_gate():
    rule = "sglang-0.5.23"
    qt.assert_gate(lambda config: can_fuse_shared_expert(config, rule=rule), rule=rule, lists=300)

    with pytest.raises(AssertionError) as failure:
        qt.assert_gate(lambda config: True, rule=rule, lists=300)
    assert re.search(r"configurations differ; first .*(exclude|ignore)\[\d+\] = '", str(failure.value)), failure.value


def test_unknown_names():
    with pytest.raises(Qwen35Error, match="did you mean 'moe'"):
        qt.cases("moee")
    with pytest.raises(Qwen35Error, match="unknown model"):
        qt.moe_case("qwen3.5-36b")
    assert qt.config_of("Qwen3.5-35B-A3B").num_experts == 256


def test_float64_inputs_are_taken():
    """The truth of float64 inputs is that of the same numbers in bf16."""
    case = qt.gdn_case(tokens=2)
    wide = qt.gdn_given(*(case[name].double() for name in ("q", "k", "v", "g", "beta", "state")))
    assert rel_l2(wide.truth["gdn_core_out"], case.truth["gdn_core_out"]) == 0
