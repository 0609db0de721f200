"""The catalogue: every known bug of an engine that can be expressed, with the issues in which it was seen."""

from __future__ import annotations

import torch

from ...quant.mxfp4 import PackedMXFP4
from ...quant.packed import Float
from ..judge.hand_over import DraftFault
from .fault_parts import (
    QK_NORMS,
    QKV,
    activations,
    bf16_as_fp4,
    fp8_experts,
    fp8_keys_and_values,
    gate_first,
    gate_logit,
    ggml,
    half,
    halves_swapped,
    neighbour,
    on_fp8,
    on_packed,
    one_more,
    ones,
    other_head_order,
    rolled,
    rotary,
    routed,
    scaled,
    split_halves,
    sqrt_width,
    swap_b_and_a,
    tiled,
    without_last,
    without_one,
)
from .faults import Fault
from .rank_faults import RANK_FAULTS
from .rope_faults import ROTARY_FAULTS
from .vision_faults import VISION_FAULTS

SHARED_FAULTS = (
    Fault("shared expert dropped", "mlp", "its weights were never loaded, or its output never added",
          "sglang 35719, 40754", scaled(0)),
    Fault("shared expert counted twice", "mlp", "replicated on 2 ranks and summed by the all-reduce",
          "sglang 23084, 26845", scaled(2)),
    Fault("shared expert counted 4 times", "mlp", "replicated on ep_size ranks and summed",
          "sglang 23084, 26845", scaled(4)),
    Fault("shared expert counted 8 times", "mlp", "replicated and summed", "TensorRT-LLM 16286", scaled(8)),
    Fault("shared expert times 1/routed_scaling_factor", "mlp", "0.4 where the factor is 2.5", "sglang 28237",
          scaled(0.4)),
    Fault("shared gate ignored", "mlp", "sigmoid(gate) taken as 1", "ollama 14077", {"moe_shared_gate": ones}),
    Fault("shared gate applied twice", "mlp", "in the kernel and again outside", "",
          {"moe_shared_gate": lambda x, _, __: x * x}),
    Fault("shared gate not squashed", "mlp", "the logit itself is the weight", "ollama 14077",
          {"moe_shared_gate": lambda x, kept, _: kept["moe_shared_gate_logit"]}, ("moe_shared_gate_logit",)),
    Fault("BF16 shared expert read as FP4", "mlp", "BF16 bytes were copied into the fused MXFP4 slot",
          "sglang 22948, 27936", weight=bf16_as_fp4, needs="mxfp4", fused=True),
)  # fmt: skip

ROUTED_FAULTS = (
    Fault("routing weights not renormalised", "mlp", "norm_topk_prob ignored", "vLLM 31523",
          {"moe_topk_weights": lambda x, kept, _: kept["moe_topk_probs"]}, ("moe_topk_probs",)),
    Fault("routed experts times 2.5", "mlp", "routed_scaling_factor, which Qwen3.5 has not", "sglang 8333",
          routed(2.5)),
    Fault("last chosen expert dropped", "mlp", "top-k counted one short, or its slot taken for the shared expert",
          "vLLM 51632", {"moe_topk_weights": without_last}),
    Fault("gate and up swapped", "mlp", "silu(up) * gate", "sglang 26884",
          {"moe_expert_gate_up": lambda x, _, __: x.roll(x.shape[-1] // 2, -1)}),
    Fault("gate and up taken for interleaved", "mlp", "rows g0 u0 g1 u1 expected, g0 g1 .. u0 u1 .. stored",
          "sglang 26884",
          {"moe_expert_gate_up": lambda x, _, __: torch.cat((x[..., 0::2], x[..., 1::2]), -1)}),
    Fault("sigmoid for silu in the experts", "mlp", "", "",
          {"moe_expert_silu": lambda x, kept, _: kept["moe_expert_gate_up"].chunk(2, -1)[0].sigmoid()},
          ("moe_expert_gate_up",)),
    Fault("half of the intermediate missing", "mlp", "one of two TP ranks' partial sums is lost", "vLLM 44679",
          {"moe_expert_act": half}),
    Fault("experts shifted by one", "mlp", "expert map off by one", "sglang 31793", slot=neighbour),
    Fault("nibbles swapped", "mlp", "high nibble read as the even column", "imp 567",
          slot=on_packed(lambda w: PackedMXFP4((w.codes << 4) | (w.codes >> 4), w.scales)), needs="mxfp4"),
    Fault("nibbles split GGML-wise", "mlp", "byte j of a block read as columns j and j + 16", "imp 567",
          slot=on_packed(lambda w: PackedMXFP4(ggml(w.codes), w.scales)), needs="mxfp4"),
    Fault("E8M0 scales one step high", "mlp", "exponent bias 126", "vLLM 46676",
          slot=on_packed(lambda w: PackedMXFP4(w.codes, (w.scales.int() + 1).clamp(max=254).to(torch.uint8))),
          needs="mxfp4"),
    Fault("E8M0 scales one step low", "mlp", "exponent bias 128", "FlyDSL 590",
          slot=on_packed(lambda w: PackedMXFP4(w.codes, (w.scales.int() - 1).clamp(min=0).to(torch.uint8))),
          needs="mxfp4"),
    Fault("scales rotated", "mlp", "each block scaled as its neighbour", "flashinfer 4087",
          slot=on_packed(lambda w: PackedMXFP4(w.codes, w.scales.roll(1, -1) if w.scales.shape[-1] > 1 else
                                         w.scales.roll(1, 0))), needs="mxfp4"),
    Fault("scales not unshuffled", "mlp", "scales in a kernel's tile order read row by row",
          "flashinfer 4093, vLLM 54773",
          slot=on_packed(lambda w: PackedMXFP4(w.codes, tiled(w.scales))), needs="mxfp4"),
    Fault("FP8 scales of the experts rotated", "mlp", "each block scaled as its neighbour", "vLLM 54773",
          slot=fp8_experts(rolled), needs="fp8"),
    Fault("FP8 scales of the experts ignored", "mlp", "values multiplied as they are stored", "Model-Optimizer 2276",
          slot=fp8_experts(torch.ones_like), needs="fp8"),
    Fault("FP8 scales of the experts inverted", "mlp", "weight_scale_inv divides, where it multiplies", "",
          slot=fp8_experts(torch.reciprocal), needs="fp8"),
    Fault("activation scales by the floor rule", "mlp", "one step low for most blocks", "FlyDSL 590, vLLM 43557",
          activations("floor"), needs="a4"),
    Fault("activation scales one rule for another", "mlp", "even where the kernel rounds up", "ATOM 1601",
          activations("even"), needs="a4"),
    Fault("activations quantised to MXFP4", "mlp", "W4A4 is computed where W4A16 was declared", "aprender 1583",
          activations("even"), needs="a16"),
)  # fmt: skip


ONE_EXPERT_FAULTS = (
    Fault("one expert's slot is zero", "mlp", "never loaded, or on a rank that does not answer", "sglang 40754",
          {"moe_expert_down": lambda x, _, __: x * 0}, single=True),
    Fault("one expert's slot is stale", "mlp", "holds another expert", "vllm-plugin-das 15", slot=neighbour,
          single=True),
    Fault("one expert's scales rotated", "mlp", "", "flashinfer 4087",
          slot=on_packed(lambda w: PackedMXFP4(w.codes, w.scales.roll(1, -1) if w.scales.shape[-1] > 1 else
                                         w.scales.roll(1, 0))), needs="mxfp4", single=True),
)  # fmt: skip

NORM_FAULTS = (
    Fault("input norm without 1 +", "input_layernorm", "w for 1 + w", "", {"input_layernorm.gain": without_one}),
    Fault("post-attention norm without 1 +", "post_attention_layernorm", "w for 1 + w", "",
          {"pre_mlp_layernorm_output.gain": without_one}),
    Fault("final norm without 1 +", "final_norm", "w for 1 + w", "", {"final_norm.gain": without_one}),
    Fault("input norm with 1 + twice", "input_layernorm", "1 was added at conversion, and again", "mlx-lm 1442, 1320",
          {"input_layernorm.gain": one_more}),
    Fault("post-attention norm with 1 + twice", "post_attention_layernorm", "1 was added at conversion, and again",
          "mlx-lm 1442, 1320", {"pre_mlp_layernorm_output.gain": one_more}),
    Fault("final norm with 1 + twice", "final_norm", "1 was added at conversion, and again", "mlx-lm 1442, 1320",
          {"final_norm.gain": one_more}),
)  # fmt: skip

ATTENTION_FAULTS = (
    Fault("q and k norms without 1 +", "attn", "w for 1 + w", "",
          {"attn_q_norm.gain": without_one, "attn_k_norm.gain": without_one}),
    Fault("q and k norms with 1 + twice", "attn", "1 was added at conversion, and again", "mlx-vlm 1548",
          {"attn_q_norm.gain": one_more, "attn_k_norm.gain": one_more}),
    Fault("q norm with 1 + twice", "attn", "1 was added at conversion, and again", "", {"attn_q_norm.gain": one_more}),
    Fault("k norm with 1 + twice", "attn", "1 was added at conversion, and again", "", {"attn_k_norm.gain": one_more}),
    Fault("rotary over the whole head", "attn", "partial_rotary_factor ignored", "", rotary(full=True), QK_NORMS),
    Fault("rotary pairs interleaved", "attn", "(2i, 2i + 1) for (i, i + R/2)", "", rotary(interleaved=True), QK_NORMS),
    Fault("rotary theta 10000", "attn", "rope_theta ignored", "", rotary(theta=10000.0), QK_NORMS),
    Fault("no rotary at all", "attn", "", "", {"attn_q": lambda x, kept, _: kept["attn_q_norm"],
                                               "attn_k": lambda x, kept, _: kept["attn_k_norm"]}, QK_NORMS),
    Fault("output gate ignored", "attn", "attn_output_gate", "", {"attn_gate": ones}),
    Fault("silu for sigmoid in the output gate", "attn", "", "",
          {"attn_gate": lambda x, kept, p: gate_logit(kept, p).to(x.dtype) * x}, ("attn_q_gate",)),
    Fault("queries and gates not interleaved by head", "attn", "q_proj read as all queries, then all gates", "",
          {"attn_q_gate": split_halves}),
    Fault("FP8 scales of attention rotated", "attn", "scales of joined projections laid out as another's", "",
          weight=on_fp8("self_attn", rolled), needs="fp8"),
    Fault("undeclared FP8 KV cache", "attn", "declare it with --kv-cache fp8_e4m3",
          "sgl-cookbook 237", {"attn_context": fp8_keys_and_values(own_step=False)}, QKV, rounds=True),
    Fault("undeclared FP8 KV cache, read in its own step, too", "attn",
          "declare it with --kv-cache fp8_e4m3", "InferenceX 1776",
          {"attn_context": fp8_keys_and_values(own_step=True)}, QKV, rounds=True),
    Fault("scores not scaled", "attn", "H^-0.5 missing", "",
          {"attn_scores": lambda x, _, place: x * place.config.head_dim**0.5}),
)  # fmt: skip


DELTANET_FAULTS = (
    Fault("b and a swapped", "gdn", "in_proj_ba sharded or split in the wrong order", "vLLM 36242",
          weight=swap_b_and_a),
    Fault("decay with the wrong sign", "gdn", "exp(+A softplus(a)): the memory grows", "",
          {"gdn_g": lambda x, _, __: -x}),
    Fault("FP8 scales of DeltaNet rotated", "gdn", "scales of joined projections laid out as another's", "",
          weight=on_fp8("linear_attn", rolled), needs="fp8"),
    Fault("no decay", "gdn", "g = 0", "", {"gdn_g": lambda x, _, __: x * 0}),
    Fault("recall term missing", "gdn", "plain linear attention instead of the delta rule", "",
          {"gdn_recall": lambda x, _, __: x * 0}, switches={"gdn_rule": "recurrent"}),
    Fault("q not scaled", "gdn", "K^-0.5 missing", "", {"gdn_q_scaled": sqrt_width}),
    Fault("mean for sum in the L2 norm", "gdn", "q and k K^0.5 too long", "1bit-MONSTER 2134",
          {"gdn_q": sqrt_width, "gdn_k": sqrt_width}),
    Fault("state in bf16", "gdn", "rounded after every token", "ollama 15865, TensorRT Model Connector 725",
          {"gdn_state": lambda x, _, __: x.to(torch.bfloat16).to(x.dtype)}, switches={"gdn_rule": "recurrent"},
          rounds=True),
    Fault("value heads in another order", "gdn", "tiled for grouped", "llama.cpp 19324, weicj 107",
          {"gdn_v": other_head_order}),
    Fault("convolution reversed", "gdn", "taps in the order of another library", "",
          tensor={"linear_attn.conv1d.weight": lambda w: w.flip(-1)}),
    Fault("no silu after the convolution", "gdn", "", "",
          {"gdn_conv_act": lambda x, kept, _: kept["gdn_conv"]}, ("gdn_conv",)),
    Fault("gate before norm", "gdn", "norm(x * silu(z)) * w", "",
          {"gdn_norm_normed": gate_first, "gdn_z_gate": ones}, ("gdn_core_out", "gdn_z")),
    Fault("gated norm with 1 +", "gdn", "its weight is plain", "",
          {"gdn_norm_weighted": lambda x, kept, _: x + kept["gdn_norm_normed"]}, ("gdn_norm_normed",)),
    Fault("sigmoid for silu in the gated norm", "gdn", "output_gate_type ignored", "",
          {"gdn_z_gate": lambda x, kept, _: kept["gdn_z"].view_as(x).sigmoid()}, ("gdn_z",)),
    Fault("A_log in bf16", "gdn", "inherits the model's dtype", "sglang 20741, Automodel 2484",
          tensor={"linear_attn.A_log": lambda x: x.to(torch.bfloat16).to(x.dtype)}, weights=True, rounds=True),
)  # fmt: skip

DRAFT_FAULTS = (
    Fault("MTP shared expert dropped", "mtp", "the draft's loader lacks the remap", "sglang 35719", scaled(0),
          weight=lambda _, module, w: Float(torch.zeros(w.shape, dtype=torch.bfloat16)) if ".shared_expert." in module
          else w, weights=True),
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
          weight=lambda _, module, w: Float(torch.zeros(w.shape, dtype=torch.bfloat16))),
    Fault("halves of the draft's input swapped", "mtp", "hidden state first, embedding second", "",
          weight=halves_swapped, needs="drafts"),
)  # fmt: skip

FAULTS: tuple[Fault, ...] = (
    *SHARED_FAULTS,
    *ROUTED_FAULTS,
    *ONE_EXPERT_FAULTS,
    *NORM_FAULTS,
    *ATTENTION_FAULTS,
    *ROTARY_FAULTS,
    *DELTANET_FAULTS,
    *(fault for fault in RANK_FAULTS if not fault.rare),
    *DRAFT_FAULTS,
    *VISION_FAULTS,
    *(fault for fault in RANK_FAULTS if fault.rare),
)
