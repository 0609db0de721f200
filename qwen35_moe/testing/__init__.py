"""Parity tests in anyone's repository: cases with a float64 truth, and assertions that allow for rounding.

    from qwen35_moe import testing as qt

    case = qt.moe_case(tokens=64, layout="mxfp4", fused=True)
    qt.assert_legal(my_moe(**case.to("cuda")), case)

Each `*_case` draws its inputs from an integer hash; `cases("moe")` is a ready corpus. `assert_*` raise AssertionError;
`check_*` return the same as records. Truths are computed in float64 on the CPU, from inputs that no kernel sees.
"""

from .case import Case
from .checks import Check, assert_legal, check_legal
from .corpus import OPERATIONS, cases
from .deltanet import assert_gdn, check_gdn, gdn_case, gdn_given
from .drawn import config_of, drawn
from .gate import assert_gate, check_gate
from .layers import attention_case, conv_case, gated_norm_case, gating_case, l2_norm_case, rms_norm_case, rotary_case
from .moe import append_case, append_given, moe_case, moe_given, router_case
from .quantisers import assert_fp8, assert_layout, assert_mxfp4, check_fp8, check_layout, check_mxfp4
from .routing import assert_routing, check_routing
from .tail import draft_case, draft_layer_case, log_p_case

__all__ = [
    "OPERATIONS", "Case", "Check", "append_case", "append_given", "assert_fp8", "assert_gate", "assert_gdn",
    "assert_layout", "assert_legal", "assert_mxfp4", "assert_routing", "attention_case", "cases", "check_fp8",
    "check_gate", "check_gdn", "check_layout", "check_legal", "check_mxfp4", "check_routing", "config_of", "conv_case",
    "draft_case", "draft_layer_case", "drawn", "gated_norm_case", "gating_case", "gdn_case", "gdn_given",
    "l2_norm_case", "log_p_case", "moe_case", "moe_given", "rms_norm_case", "rotary_case", "router_case",
]  # fmt: skip
