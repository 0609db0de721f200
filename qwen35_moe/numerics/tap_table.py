"""Every name a tap may have: its dims, what it holds, and what other programs call the same value.

`TAPS[name]` documents a tap, spells the dims that a trace records, and is the one place where names of engines meet
ours: `sglang` and `transformers` are module paths below the layer (or below the model, for taps without a layer),
with `.output`, `.output.<i>` or `.inputs.<i>`; `sglang` may also be a bare name, for a value that no hook can see. A
`*` says that the engine's tensor holds more than this value and that a reader splits it (`engine_names.py`). vLLM
and ATOM name their modules as SGLang does, except where `other` says so.

Dims are the letters of the legend in lower case, one a dimension (after "b" the "t" is one sequence's tokens; a "t"
without "b" is all tokens, batch-major; "r" is the rows, that is tokens, that were routed to one expert, or all):

    b batch   t new tokens   s cached + new tokens   d model width   v vocabulary
    n query heads   g key/value heads   h head width   r rotated width
    j value heads   m key heads   k key width   p value width   c conv channels   w conv taps
    e routed experts   a active experts a token (a+1 slots when the shared expert is fused)   f expert width

In the vision tower "d", "n", "h" and "f" are the tower's own, "l" counts patches, "s" patches of one frame, "u" merge
blocks (placeholders in the prompt), "y" the numbers of a patch. The draft head has the text model's taps, under `mtp`.
"""

from __future__ import annotations

from dataclasses import dataclass

# Letters of the legend that a configuration tells.
LETTERS = {
    "n": "num_attention_heads", "g": "num_key_value_heads", "h": "head_dim", "j": "linear_num_value_heads",
    "m": "linear_num_key_heads", "k": "linear_key_head_dim", "p": "linear_value_head_dim", "d": "hidden_size",
    "e": "num_experts", "a": "num_experts_per_tok", "f": "shared_expert_intermediate_size", "v": "vocab_size",
}  # fmt: skip


@dataclass(frozen=True)
class TapName:
    """One row of the table: dims ("" where the rank is free), meaning, and other programs' names."""

    dims: str
    meaning: str
    sglang: str = ""
    transformers: str = ""
    other: str = ""


def _(dims: str, meaning: str, sglang: str = "", transformers: str = "", other: str = "") -> TapName:
    """transformers "=": the same as SGLang's."""
    return TapName(dims, meaning, sglang, sglang if transformers == "=" else transformers, other)


TAPS: dict[str, TapName] = {
    "embed_tokens": _("b t d", "token embeddings", "embed_tokens.output", "="),
    "final_norm": _("b t d", "after the last norm", "norm.output", "=", "vLLM hidden_states file, last layer"),
    "next_token_logits": _("b t v", "logits", "logits_processor.output.next_token_logits", "lm_head.output"),
    # The residual stream and the norms.
    "layer_input": _("b t d", "residual stream at the layer's entry", "layer_input", "inputs.0", "vLLM hidden_states"),
    "input_layernorm": _("b t d", "after the first norm", "input_layernorm.output", "="),
    "pre_mlp_residual_sum": _("b t d", "residual + attn_output as the second norm reads it"),
    "pre_mlp_residual": _("b t d", "the same as it is stored", "pre_mlp_residual", "post_attention_layernorm.inputs.0"),
    "pre_mlp_layernorm_output": _("b t d", "after the second norm", "post_attention_layernorm.output", "="),
    "mlp_output": _("t d", "what the MoE block adds to the stream", "mlp.output", "="),
    "layer_output_sum": _("b t d", "residual stream at the layer's exit", "", "output", "ATOM layerLL_*.pt `hidden`"),
    # Full attention.
    "attn_a1": _("b t d", "input of q, k and v, quantised (where W8A8 rounds)"),
    "attn_a2": _("b t (n*h)", "input of o_proj, likewise"),
    "attn_q_gate": _("b t (n*2h)", "q_proj: per head query, then gate", "qkv_proj.output*", "self_attn.q_proj.output"),
    "attn_k_proj": _("b t (g*h)", "k_proj, before its norm", "qkv_proj.output*", "self_attn.k_proj.output"),
    "attn_v": _("b t (g*h)", "v_proj", "qkv_proj.output*", "self_attn.v_proj.output"),
    "attn_q_norm": _("b t n h", "queries after their norm, before RoPE", "q_norm.output", "self_attn.q_norm.output"),
    "attn_k_norm": _("b t g h", "keys after their norm, before RoPE", "k_norm.output", "self_attn.k_norm.output"),
    "rope_cos": _("b t r/2", "cosines of the rotary angles", "", "rotary_emb.output.0*"),
    "rope_sin": _("b t r/2", "sines of the rotary angles", "", "rotary_emb.output.1*"),
    "attn_q": _("b t n h", "queries after RoPE", "attn.inputs.0", "", "community name in SGLang and miles: attn_q"),
    "attn_k": _("b t g h", "keys after RoPE", "attn.inputs.1", "", "miles: attn_k, before or after RoPE"),
    "attn_k_cache": _("b t g h", "keys as a cache keeps them, where a table rounds them"),
    "attn_v_cache": _("b t g h", "values, likewise"),
    "attn_q.x_cos": _("b t n r", "queries times cosines"),
    "attn_q.x_sin": _("b t n r", "rotated queries times sines"),
    "attn_k.x_cos": _("b t g r", "keys times cosines"),
    "attn_k.x_sin": _("b t g r", "rotated keys times sines"),
    "attn_qk": _("b n t s", "q.k, unscaled"),
    "attn_scores": _("b n t s", "scaled and masked"),
    "attn_probs": _("b n t s", "softmax of the scores", "", "self_attn.output.1"),
    "attn_context": _("b t n h", "probabilities times values", "attn.output"),
    "attn_gate": _("b t n h", "output gate after sigmoid"),
    "attn_pre_o_proj": _("b t n h", "gated context", "o_proj.inputs.0", "self_attn.o_proj.inputs.0"),
    "attn_output": _(
        "b t d",
        "what attention or DeltaNet adds to the stream",
        "o_proj.output | linear_attn.out_proj.output",
        "self_attn.o_proj.output | linear_attn.out_proj.output",
    ),
    # Gated DeltaNet.
    "gdn_a1": _("b t d", "input of in_proj_qkv and in_proj_z, quantised (where W8A8 rounds)"),
    "gdn_a2": _("b t (j*p)", "input of out_proj, likewise"),
    "gdn_qkv": _(
        "b t c", "in_proj_qkv, before the conv", "linear_attn.in_proj_qkvz.output*", "linear_attn.in_proj_qkv.output"
    ),
    "gdn_z": _(
        "b t (j*p)", "output gate before silu", "linear_attn.in_proj_qkvz.output*", "linear_attn.in_proj_z.output"
    ),
    "gdn_b": _("b t j", "beta before sigmoid", "linear_attn.in_proj_ba.output*", "linear_attn.in_proj_b.output"),
    "gdn_a": _("b t j", "decay input before dt_bias", "linear_attn.in_proj_ba.output*", "linear_attn.in_proj_a.output"),
    "gdn_conv_product": _("b t c", "causal conv: one tap's product (indexed), where a table rounds it"),
    "gdn_conv": _("b t c", "causal conv, before silu"),
    "gdn_conv_act": _("b t c", "causal conv, after silu"),
    "gdn_beta": _("b t j", "write strength, sigmoid(b)"),
    "gdn_g": _("b t j", "log decay, -exp(A_log) softplus(a + dt_bias)"),
    "gdn_q": _("b t m k", "queries after l2norm"),
    "gdn_q_scaled": _("b t m k", "queries times K^-0.5"),
    "gdn_k": _("b t m k", "keys after l2norm"),
    "gdn_v": _("b t j p", "values"),
    "gdn_recall": _("b j p", "what the state already answers to one token's key (recurrent rule)"),
    "gdn_state": _("b j k p", "recurrent state after the last token"),
    "gdn_conv_state": _("b c w-1", "conv state after the last token"),
    "gdn_core_out": _(
        "b t j p", "what the recurrence reads out", "linear_attn.attn.output", "linear_attn.norm.inputs.0"
    ),
    "gdn_norm_normed": _("b t j p", "gated norm: x / rms"),
    "gdn_norm_weighted": _("b t j p", "gated norm: times weight"),
    "gdn_z_gate": _("b t j p", "gated norm: silu(z)"),
    "gdn_norm_out": _("b t j p", "gated norm: times silu(z)", "linear_attn.norm.output", "="),
    # MoE: all tokens of the batch in one row of tokens.
    "moe_router_logits": _("t e", "router logits", "mlp.gate.output", "mlp.gate.output.0"),
    "moe_router_probs": _("t e", "softmax over all experts"),
    "moe_topk_ids": _(
        "t a", "chosen experts, routed only", "mlp.topk.output.1", "mlp.gate.output.2", "vLLM and SGLang routed_experts"
    ),
    "moe_topk_probs": _("t a", "their probabilities, before renormalising"),
    "moe_topk_weights": _("t a", "their weights, renormalised", "mlp.topk.output.0", "mlp.gate.output.1"),
    "moe_slot_ids": _("t a", "slots the fused kernel reads, shared last", "mlp.experts.inputs.1.1"),
    "moe_slot_weights": _("t a", "their weights, the shared gate last", "mlp.experts.inputs.1.0"),
    "moe_shared_gate_logit": _("t 1", "shared gate before sigmoid", "mlp.shared_expert_gate.output", "="),
    "moe_shared_gate": _("t 1", "shared gate after sigmoid"),
    "moe_a1": _("t d", "input of quantised experts (where W4A4 and W8A8 round)"),
    "moe_expert_gate_up": _("r 2f", "one expert: gate, then up"),
    "moe_expert_silu": _("r f", "one expert: silu(gate)"),
    "moe_expert_act": _("r f", "one expert: silu(gate) * up"),
    "moe_a2": _("r f", "one expert: input of down_proj, likewise"),
    "moe_expert_down": _("r d", "one expert: output of down_proj"),
    "moe_expert_weighted": _("r d", "one expert, or all tokens' a-th (`moe_sum_order`): times the routing weight"),
    "moe_partial_sum": _("r d", "sum of experts so far, the shared one among them where it is fused"),
    "moe_shared_a1": _("t d", "shared expert: input, where it is a quantised network of its own"),
    "moe_shared_a2": _("t f", "shared expert: input of down_proj, likewise"),
    "moe_shared_gate_proj": _(
        "t f", "shared expert: gate", "mlp.shared_expert.gate_up_proj.output*", "mlp.shared_expert.gate_proj.output"
    ),
    "moe_shared_up_proj": _(
        "t f", "shared expert: up", "mlp.shared_expert.gate_up_proj.output*", "mlp.shared_expert.up_proj.output"
    ),
    "moe_shared_silu": _("t f", "shared expert: silu(gate)", "", "mlp.shared_expert.act_fn.output"),
    "moe_shared_act": _(
        "t f",
        "shared expert: silu(gate) * up",
        "mlp.shared_expert.act_fn.output",
        "mlp.shared_expert.down_proj.inputs.0",
    ),
    "moe_shared_output": _("t d", "shared expert, ungated", "mlp.shared_expert.down_proj.output", "="),
    "moe_shared_gated": _("t d", "shared expert times its gate"),
    "moe_routed_output": _(
        "t d",
        "sum of the routed experts alone",
        "mlp.experts.output",
        "=",
        "with a fused shared expert SGLang's mlp.experts is mlp_output",
    ),
    # The draft head, before its layer; after it `final_norm` and `next_token_logits`, as above.
    "mtp_embedding": _("b t d", "embedding of token t+1 after its norm"),
    "mtp_hidden": _("b t d", "final-normed hidden state of token t after its norm"),
    "mtp_fc": _("b t d", "both side by side, through fc: the layer's input"),
    # The vision tower, and what it puts into the prompt.
    "vis_pixels": _("l y", "normalised pixels, patch by patch"),
    "vis_patch_embed": _("l d", "patch embedding"),
    "vis_pos_embed": _("l d", "position table, interpolated"),
    "vis_embed": _("l d", "their sum"),
    "vis_rope_cos": _("l h/2", "cosines of the rotary angles: rows, then columns"),
    "vis_rope_sin": _("l h/2", "sines of the rotary angles"),
    "vis_layer_input": _("l d", "residual stream at the block's entry"),
    "vis_norm1": _("l d", "after the first norm"),
    "vis_qkv": _("l (3*d)", "queries, keys and values, before RoPE"),
    "vis_q": _("l n h", "queries after RoPE"),
    "vis_k": _("l n h", "keys after RoPE"),
    "vis_v": _("l n h", "values"),
    "vis_attn_qk": _("n l s", "q.k, unscaled: some queries of one frame"),
    "vis_attn_scores": _("n l s", "scaled"),
    "vis_attn_probs": _("n l s", "softmax of the scores"),
    "vis_attn_context": _("n l h", "probabilities times values"),
    "vis_attn_output": _("l d", "what attention adds to the stream"),
    "vis_attn_residual": _("l d", "stream after attention"),
    "vis_norm2": _("l d", "after the second norm"),
    "vis_mlp_fc1": _("l f", "MLP, before its gelu (tanh)"),
    "vis_mlp_act": _("l f", "MLP, after it"),
    "vis_mlp_output": _("l d", "what the MLP adds to the stream"),
    "vis_layer_output": _("l d", "residual stream at the block's exit"),
    "vis_hidden": _("l d", "what the merger gets"),
    "vis_merger_norm": _("l d", "merger: after its norm"),
    "vis_merger_fc1": _("u (4*d)", "merger: patches of a block side by side, before its gelu (exact)"),
    "vis_merger_act": _("u (4*d)", "merger: after it"),
    "vis_merger_out": _("u d", "merger: as wide as the text model"),
    "image_embeds": _("u d", "what replaces the placeholders of images or videos"),
    "inputs_embeds": _("b t d", "the prompt's embeddings with images in it"),
}
del _

# All names that a tap may have. `<norm>.gain` is 1 + w of a norm.
NAMES = frozenset(TAPS) | {f"{name}.gain" for name in TAPS}
