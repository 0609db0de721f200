"""Kernels with one fault each are refused, and the fault is named; the same kernels without it pass."""

from __future__ import annotations

import re

import pytest
import torch
import wrong_kernels as kernels

from qwen35_moe import testing as qt

MOE = qt.moe_case(tokens=16)
UNFUSED = qt.moe_case(tokens=16, fused=False)
MXFP4 = qt.moe_case(tokens=16, layout="mxfp4")
HIP = qt.moe_case(tokens=16, layout="mxfp4", activations="aiter-hip")


def kernel_of(case):
    """case, fault -> the outputs of the kernel for it."""
    if case is HIP:
        rules = {"": "round-up", 'activation scales by the "even" rule': "even"}
        return lambda _, fault="": kernels.moe(case, fault, rules.get(fault, ""))
    return vars(kernels)[case.name.partition("-")[0]]


WRONG = {
    MOE: ("expert dropped", "last chosen expert dropped", "shared expert dropped", "shared expert counted twice",
          "gate and up swapped", "gate and up taken for interleaved", "sigmoid for silu in the experts",
          "routing weights ignored", "experts shifted by one"),
    UNFUSED: ("shared gate ignored", "shared gate applied twice"),
    MXFP4: ("nibbles swapped", "scales one step high", "scales one step low", "scales rotated"),
    HIP: ('activation scales by the "even" rule', "activations not quantised"),
    qt.gdn_case(tokens=65): (
        "state in bf16", "recall term missing", "decay with the wrong sign", "no decay", "state ignored",
        "q not scaled", "beta left out", "eps left out of the L2 norm", "q and k not normalised",
        "value heads in another order"),
    qt.rms_norm_case(): ("input norm without 1 +", "input norm with 1 + twice", "eps 1e-5 for 1e-6", "eps left out",
                         "mean subtracted, as in LayerNorm"),
    qt.gated_norm_case(): ("gate before norm", "gated norm with 1 +", "sigmoid for silu in the gated norm"),
    qt.l2_norm_case(): ("mean for sum in the L2 norm", "eps left out, as in F.normalize"),
    qt.attention_case(): ("output gate ignored", "silu for sigmoid in the output gate", "scores not scaled",
                          "no causal mask", "key heads tiled, not grouped"),
    qt.attention_case(tokens=1, past=40, kv="fp8"): ("scales of the FP8 cache ignored",),
    qt.conv_case(): ("convolution reversed", "no silu after the convolution", "convolution's history dropped",
                     "state not updated"),
    qt.gating_case(): ("b and a swapped", "dt_bias left out", "decay with the wrong sign"),
    qt.rotary_case(): ("rotary over the whole head", "rotary theta 10000", "M-RoPE height and width dropped",
                       "M-RoPE sections in blocks", "rotary pairs interleaved"),
    qt.append_case(scale=0.25): ("shared gate ignored", "shared gate applied twice", "1/ep_size left out",
                                 "shared weight renormalised with the routed ones"),
    qt.draft_case(): ("hidden state first", "draft norms without 1 +", "embedding of token t"),
    qt.log_p_case(): ("temperature ignored", "log of base 2"),
}  # fmt: skip
EACH = [(case, fault) for case, faults in WRONG.items() for fault in faults]


@pytest.mark.parametrize(("case", "fault"), EACH, ids=[f"{case.name}: {fault}" for case, fault in EACH])
def test_a_wrong_kernel_is_named(case, fault):
    with pytest.raises(AssertionError, match="x the legal error") as failure:
        qt.assert_legal(kernel_of(case)(case, fault), case)
    assert f'looks like "{fault}"' in str(failure.value)


@pytest.mark.parametrize("operation", sorted({*qt.OPERATIONS} - {"router", "draft_layer"}))
def test_a_right_kernel_passes_the_corpus(operation):
    """Routers: below. A draft layer has no kernel here."""
    some = [
        case for case in qt.cases(operation) if not any(part in case.name for part in ("257", "tiny-fp8", "tiny-mxfp4"))
    ]
    assert len(some) > 2
    for case in some:
        qt.assert_legal(kernel_of(case)(case), case)


def test_quantised_kernels_pass():
    qt.assert_legal(kernels.moe(MXFP4), MXFP4)
    qt.assert_legal(kernel_of(HIP)(HIP), HIP)
    fp8 = qt.moe_case(tokens=16, layout="fp8", activations="fp8", fused=False)
    qt.assert_legal(kernels.moe(fp8, rule="fp8"), fp8)
    weights_alone = qt.moe_case(tokens=16, layout="fp8", fused=False)
    qt.assert_legal(kernels.moe(weights_alone), weights_alone)
    assert not qt.check_legal(kernels.moe(weights_alone, rule="fp8"), weights_alone)[0].ok


def test_the_record_says_which_function_was_computed():
    """A kernel that does not quantise activations is nearer to the true values, and may be within the limit."""
    fp8 = qt.moe_case(tokens=16, layout="fp8", activations="fp8", fused=False)
    found = [qt.check_legal(kernels.moe(fp8, rule=rule), fp8)[0].function for rule in ("fp8", "")]
    assert found == ["exact+a8", "exact"]
    (other,) = qt.check_legal(kernel_of(HIP)(HIP, 'activation scales by the "even" rule'), HIP)
    assert "it computes the function exact+a4;" in str(other)
    assert qt.check_legal(kernel_of(HIP)(HIP), HIP)[0].function == "exact+a4-round-up"


def test_a_draft_layer_with_a_fault_is_named():
    case = qt.draft_layer_case(tokens=16)
    for name in case.wrong:
        with pytest.raises(AssertionError, match=re.escape(f'looks like "{name}"')):
            qt.assert_legal(case.broken(name), case)


def test_router():
    for case in qt.cases("router")[:4]:
        qt.assert_routing(*kernels.router(case), case)
        ids, weights = kernels.router(case)
        qt.assert_routing(ids.flip(1), weights.flip(1), case)
    for fault in ("routing weights not renormalised", "sigmoid for softmax"):
        with pytest.raises(AssertionError, match=f'looks like "{fault}"'):
            qt.assert_routing(*kernels.router(case, fault), case)
    with pytest.raises(AssertionError, match=r"41 choices beyond the noise of the logits"):
        qt.assert_routing(*kernels.router(case, "lowest logits"), case)
    with pytest.raises(AssertionError, match="weights in another order than ids"):
        qt.assert_routing(ids, weights.flip(1), case)
    with pytest.raises(AssertionError, match="twice or out of range"):
        qt.assert_routing(torch.zeros_like(ids), weights, case)


def test_a_failure_reads_as_promised():
    with pytest.raises(AssertionError) as failure:
        qt.assert_legal(kernels.moe(MOE, "expert dropped"), MOE)
    pattern = (
        r"mlp_output: [\d.]+ x the legal error \(limit 3\), worst row \d+, column \d+, \d+ of 16 rows; looks like "
    )
    assert re.search(pattern + r'"expert dropped" \(\d+ %\)', str(failure.value))
