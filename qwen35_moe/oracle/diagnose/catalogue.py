"""The catalogue: every known bug of an engine that can be expressed, with the issues in which it was seen."""

from __future__ import annotations

import torch

from ..judge.hand_over import DraftFault
from . import fault_parts as parts
from .fault_parts import one_more, ones, plain, sqrt_width, taken_from, without_one
from .faults import Fault, SlotChange
from .rank_faults import RANK_FAULTS
from .vision_faults import ROTARY_FAULTS, VISION_FAULTS

SHARED_FAULTS = (
    *(Fault(name, "mlp", doc, seen, parts.scaled(factor)) for name, doc, seen, factor in (
        ("shared expert dropped", "its weights were never loaded, or its output never added", "sglang 35719, 40754", 0),
        ("shared expert counted twice", "replicated on 2 ranks and summed by the all-reduce", "sglang 23084, 26845", 2),
        ("shared expert counted 4 times", "replicated on ep_size ranks and summed", "sglang 23084, 26845", 4),
        ("shared expert counted 8 times", "replicated and summed", "TensorRT-LLM 16286", 8),
        ("shared expert times 1/routed_scaling_factor", "0.4 where the factor is 2.5", "sglang 28237", 0.4),
    )),
    Fault("shared gate ignored", "mlp", "sigmoid(gate) taken as 1", "ollama 14077", {"moe_shared_gate": ones}),
    Fault("shared gate applied twice", "mlp", "in the kernel and again outside", "",
          {"moe_shared_gate": plain(torch.square)}),
    Fault("shared gate not squashed", "mlp", "the logit itself is the weight", "ollama 14077",
          {"moe_shared_gate": taken_from("moe_shared_gate_logit")}, ("moe_shared_gate_logit",)),
    Fault("BF16 shared expert read as FP4", "mlp", "BF16 bytes were copied into the fused MXFP4 slot",
          "sglang 22948, 27936", weight=parts.bf16_as_fp4, needs="mxfp4", fused=True),
)  # fmt: skip

ROUTED_FAULTS = (
    Fault("routing weights not renormalised", "mlp", "norm_topk_prob ignored", "vLLM 31523",
          {"moe_topk_weights": taken_from("moe_topk_probs")}, ("moe_topk_probs",)),
    Fault("routed experts times 2.5", "mlp", "routed_scaling_factor, which Qwen3.5 has not", "sglang 8333",
          parts.routed(2.5)),
    Fault("last chosen expert dropped", "mlp", "top-k counted one short, or its slot taken for the shared expert",
          "vLLM 51632", {"moe_topk_weights": parts.without_last}),
    Fault("gate and up swapped", "mlp", "silu(up) * gate", "sglang 26884",
          {"moe_expert_gate_up": plain(lambda x: x.roll(x.shape[-1] // 2, -1))}),
    Fault("gate and up taken for interleaved", "mlp", "rows g0 u0 g1 u1 expected, g0 g1 .. u0 u1 .. stored",
          "sglang 26884", {"moe_expert_gate_up": plain(lambda x: torch.cat((x[..., 0::2], x[..., 1::2]), -1))}),
    Fault("sigmoid for silu in the experts", "mlp", "", "",
          {"moe_expert_silu": lambda x, kept, _: kept["moe_expert_gate_up"].chunk(2, -1)[0].sigmoid()},
          ("moe_expert_gate_up",)),
    Fault("half of the intermediate missing", "mlp", "one of two TP ranks' partial sums is lost", "vLLM 44679",
          {"moe_expert_act": plain(lambda x: parts.one_share(x, 0, 2))}),
    Fault("experts shifted by one", "mlp", "expert map off by one", "sglang 31793", slot=SlotChange(shift=1)),
    *(Fault(name, "mlp", doc, seen, slot=slot, needs="mxfp4") for name, doc, seen, slot in (
        ("nibbles swapped", "high nibble read as the even column", "imp 567",
         parts.codes(lambda x: (x << 4) | (x >> 4))),
        ("nibbles split GGML-wise", "byte j of a block read as columns j and j + 16", "imp 567",
         parts.codes(parts.ggml)),
        ("E8M0 scales one step high", "exponent bias 126", "vLLM 46676",
         parts.scales(lambda x: (x.int() + 1).clamp(max=254).to(torch.uint8))),
        ("E8M0 scales one step low", "exponent bias 128", "FlyDSL 590",
         parts.scales(lambda x: (x.int() - 1).clamp(min=0).to(torch.uint8))),
        ("scales rotated", "each block scaled as its neighbour", "flashinfer 4087", parts.scales(parts.rolled)),
        ("scales not unshuffled", "scales in a kernel's tile order read row by row", "flashinfer 4093, vLLM 54773",
         parts.scales(parts.tiled)),
    )),
    *(Fault(f"FP8 scales of the experts {name}", "mlp", doc, seen, slot=SlotChange(parts.fp8_scales(change)),
            needs="fp8") for name, doc, seen, change in (
        ("rotated", "each block scaled as its neighbour", "vLLM 54773", parts.rolled),
        ("ignored", "values multiplied as they are stored", "Model-Optimizer 2276", torch.ones_like),
        ("inverted", "weight_scale_inv divides, where it multiplies", "", torch.reciprocal),
    )),
    *(Fault(name, "mlp", doc, seen, parts.activations(rule), needs=needs) for name, doc, seen, rule, needs in (
        ("activation scales by the floor rule", "one step low for most blocks", "FlyDSL 590, vLLM 43557", "floor",
         "a4"),
        ("activation scales one rule for another", "even where the kernel rounds up", "ATOM 1601", "even", "a4"),
        ("activations quantised to MXFP4", "W4A4 is computed where W4A16 was declared", "aprender 1583", "even",
         "a16"),
    )),
    Fault("one expert's slot is zero", "mlp", "never loaded, or on a rank that does not answer", "sglang 40754",
          {"moe_expert_down": plain(torch.zeros_like)}, single=True),
    Fault("one expert's slot is stale", "mlp", "holds another expert", "vllm-plugin-das 15", slot=SlotChange(shift=1),
          single=True),
    Fault("one expert's scales rotated", "mlp", "", "flashinfer 4087", slot=parts.scales(parts.rolled), needs="mxfp4",
          single=True),
)  # fmt: skip

WITHOUT = ("without 1 +", "w for 1 + w", "", without_one)
TWICE = ("with 1 + twice", "1 was added at conversion, and again", "mlx-lm 1442, 1320", one_more)
NORM_FAULTS = tuple(
    Fault(f"{norm} {name}", block, doc, seen, {f"{tap}.gain": change})
    for name, doc, seen, change in (WITHOUT, TWICE)
    for norm, block, tap in (
        ("input norm", "input_layernorm", "input_layernorm"),
        ("post-attention norm", "post_attention_layernorm", "pre_mlp_layernorm_output"),
        ("final norm", "final_norm", "final_norm"),
    )
)

ATTENTION_FAULTS = (
    *(Fault(f"{norms} {name}", "attn", doc, seen, {f"attn_{norm}_norm.gain": change for norm in which})
      for norms, which, (name, doc, _, change), seen in (
        ("q and k norms", "qk", WITHOUT, ""), ("q and k norms", "qk", TWICE, "mlx-vlm 1548"),
        ("q norm", "q", TWICE, ""), ("k norm", "k", TWICE, ""))),
    Fault("rotary over the whole head", "attn", "partial_rotary_factor ignored", "", parts.rotary(full=True),
          parts.QK_NORMS),
    Fault("rotary pairs interleaved", "attn", "(2i, 2i + 1) for (i, i + R/2)", "", parts.rotary(interleaved=True),
          parts.QK_NORMS),
    Fault("rotary theta 10000", "attn", "rope_theta ignored", "", parts.rotary(theta=10000.0), parts.QK_NORMS),
    Fault("no rotary at all", "attn", "", "", {name: taken_from(f"{name}_norm") for name in ("attn_q", "attn_k")},
          parts.QK_NORMS),
    Fault("output gate ignored", "attn", "attn_output_gate", "", {"attn_gate": ones}),
    Fault("silu for sigmoid in the output gate", "attn", "", "", {"attn_gate": parts.gate_by_silu}, ("attn_q_gate",)),
    Fault("queries and gates not interleaved by head", "attn", "q_proj read as all queries, then all gates", "",
          {"attn_q_gate": parts.split_halves}),
    Fault("FP8 scales of attention rotated", "attn", "scales of joined projections laid out as another's", "",
          weight=parts.on_fp8("self_attn", parts.rolled), needs="fp8"),
    *(Fault(f"undeclared FP8 KV cache{more}", "attn", "declare it with --kv-cache fp8_e4m3", seen,
            {"attn_context": parts.fp8_keys_and_values(own_step)}, parts.QKV, rounds=True)
      for more, seen, own_step in (
        ("", "sgl-cookbook 237", False), (", read in its own step, too", "InferenceX 1776", True))),
    Fault("scores not scaled", "attn", "H^-0.5 missing", "",
          {"attn_scores": lambda x, _, place: x * place.config.head_dim**0.5}),
)  # fmt: skip

DELTANET_FAULTS = (
    Fault("b and a swapped", "gdn", "in_proj_ba sharded or split in the wrong order", "vLLM 36242",
          weight=parts.swap_b_and_a),
    Fault("decay with the wrong sign", "gdn", "exp(+A softplus(a)): the memory grows", "", {"gdn_g": plain(torch.neg)}),
    Fault("FP8 scales of DeltaNet rotated", "gdn", "scales of joined projections laid out as another's", "",
          weight=parts.on_fp8("linear_attn", parts.rolled), needs="fp8"),
    Fault("no decay", "gdn", "g = 0", "", {"gdn_g": plain(lambda x: x * 0)}),
    Fault("recall term missing", "gdn", "plain linear attention instead of the delta rule", "",
          {"gdn_recall": plain(lambda x: x * 0)}, switches={"gdn_rule": "recurrent"}),
    Fault("q not scaled", "gdn", "K^-0.5 missing", "", {"gdn_q_scaled": sqrt_width}),
    Fault("mean for sum in the L2 norm", "gdn", "q and k K^0.5 too long", "1bit-MONSTER 2134",
          {"gdn_q": sqrt_width, "gdn_k": sqrt_width}),
    Fault("state in bf16", "gdn", "rounded after every token", "ollama 15865, TensorRT Model Connector 725",
          {"gdn_state": plain(parts.bf16)}, switches={"gdn_rule": "recurrent"}, rounds=True),
    Fault("value heads in another order", "gdn", "tiled for grouped", "llama.cpp 19324, weicj 107",
          {"gdn_v": parts.other_head_order}),
    Fault("convolution reversed", "gdn", "taps in the order of another library", "",
          tensor={"linear_attn.conv1d.weight": lambda w: w.flip(-1)}),
    Fault("no silu after the convolution", "gdn", "", "", {"gdn_conv_act": taken_from("gdn_conv")}, ("gdn_conv",)),
    Fault("gate before norm", "gdn", "norm(x * silu(z)) * w", "",
          {"gdn_norm_normed": parts.gate_first, "gdn_z_gate": ones}, ("gdn_core_out", "gdn_z")),
    Fault("gated norm with 1 +", "gdn", "its weight is plain", "",
          {"gdn_norm_weighted": lambda x, kept, _: x + kept["gdn_norm_normed"]}, ("gdn_norm_normed",)),
    Fault("sigmoid for silu in the gated norm", "gdn", "output_gate_type ignored", "",
          {"gdn_z_gate": lambda x, kept, _: kept["gdn_z"].view_as(x).sigmoid()}, ("gdn_z",)),
    Fault("A_log in bf16", "gdn", "inherits the model's dtype", "sglang 20741, Automodel 2484",
          tensor={"linear_attn.A_log": parts.bf16}, weights=True, rounds=True),
)  # fmt: skip

DRAFT_FAULTS = (
    Fault("MTP shared expert dropped", "mtp", "the draft's loader lacks the remap", "sglang 35719", parts.scaled(0),
          weight=parts.no_shared_expert, weights=True),
    *(Fault(name, "mtp", doc, draft=wrong, needs="drafts") for name, doc, wrong in (
        ("draft from hidden states before the final norm", "the target hands on its stream", DraftFault("pre-norm")),
        ("draft with the embedding of the same token", "of token t, not t + 1", DraftFault("same token")),
        ("positions of chained drafts do not move on", "", DraftFault(chained="in place")),
        ("chained drafts from the target's hidden states", "stale: the draft before handed on none",
         DraftFault(chained="target's")),
        ("chained drafts from the hidden states of the row before", "", DraftFault(chained="row before")),
        ("chained drafts from hidden states before the draft head's norm", "", DraftFault(chained="pre-norm")),
        ("chained drafts with the token of the first draft", "", DraftFault(chained="first token")),
    )),
    Fault("draft weights are zero", "mtp", "never loaded: the layer that the module was made with", "", needs="drafts",
          weight=parts.zeros),
    Fault("halves of the draft's input swapped", "mtp", "hidden state first, embedding second", "",
          weight=parts.halves_swapped, needs="drafts"),
)  # fmt: skip

FAULTS: tuple[Fault, ...] = (
    *SHARED_FAULTS,
    *ROUTED_FAULTS,
    *NORM_FAULTS,
    *ATTENTION_FAULTS,
    *ROTARY_FAULTS,
    *DELTANET_FAULTS,
    *(fault for fault in RANK_FAULTS if not fault.rare),
    *DRAFT_FAULTS,
    *VISION_FAULTS,
    *(fault for fault in RANK_FAULTS if fault.rare),
)
