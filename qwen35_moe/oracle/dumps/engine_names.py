"""What engines call our taps, and what their tensors hold: fused, partial or sharded values among them.

A rule is one line of text: how ranks are joined, then which taps the columns hold.

    "same moe_router_logits"                      every rank holds all of it
    "sum attn_output"                             partial sums: add up the ranks
    "cat attn_q_gate:2nh attn_k_proj:gh attn_v:gh"   each rank holds its share of each block, blocks side by side

Widths are products of LETTERS (a leading number is a factor), or plain numbers if only their proportion matters. "-" is
a block to leave out. Rules are in order of preference: where two modules hold one value, the first that the dump has
counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ...numerics.tap_table import LETTERS, TAPS


def rule_by_name(names: Mapping[str, str]) -> dict[str, str]:
    """rule -> names with spaces between, as name -> rule."""
    return {name: rule for rule, some in names.items() for name in some.split()}


# SGLang 0.5.23, and vLLM and ATOM, which descend from the same module names. `o_proj.output` and friends are partial
# because SGLang's layers leave the all-reduce to the layer boundary; engines that reduce inside are recognised by
# their ranks being equal bit by bit.
# SGLang's layer boundary runs the norms without their modules: what the next module takes is the same. What a decoder
# layer returns is its last contribution, and the stream before it, which is not the residual stream.
SGLANG_NAMES = rule_by_name({
    "same embed_tokens": "embed_tokens.output",
    "same mtp_embedding": "pre_fc_norm_embedding.output",
    "same mtp_hidden": "pre_fc_norm_hidden.output",
    "same mtp_fc": "fc.output",
    "same inputs_embeds": "model.inputs.input_embeds",
    "same final_norm": "norm.output norm.output.0 model.output",
    "same next_token_logits":
        "logits_processor.output logits_processor.output.next_token_logits next_token_logits lm_head.output",
    "same input_layernorm":
        "input_layernorm.output input_layernorm.output.0 linear_attn.inputs.0 "
        "linear_attn.in_proj_qkvz.inputs.0 qkv_proj.inputs.0",
    "same layer_input": "input_layernorm.output.1",
    "same pre_mlp_layernorm_output":
        "post_attention_layernorm.output post_attention_layernorm.output.0 mlp.inputs.0 mlp.experts.inputs.0 "
        "mlp.experts.inputs.hidden_states",
    "same pre_mlp_residual": "post_attention_layernorm.output.1 output.1",
    "cat attn_q_gate:2nh attn_k_proj:gh attn_v:gh": "qkv_proj.output",
    "cat attn_q_norm:nh": "q_norm.output",
    "cat attn_k_norm:gh": "k_norm.output",
    "cat attn_q:nh": "attn.inputs.0",
    "cat attn_k:gh": "attn.inputs.1",
    "cat attn_v:gh": "attn.inputs.2",
    "cat attn_context:nh": "attn.output",
    "cat attn_pre_o_proj:nh": "o_proj.inputs.0",
    "sum attn_output": "o_proj.output linear_attn.out_proj.output linear_attn.output self_attn.output",
    "cat gdn_qkv:mk gdn_qkv:mk gdn_qkv:jp gdn_z:jp": "linear_attn.in_proj_qkvz.output",
    "cat gdn_qkv:mk gdn_qkv:mk gdn_qkv:jp": "linear_attn.attn.inputs.mixed_qkv",
    "cat gdn_b:j gdn_a:j": "linear_attn.in_proj_ba.output",
    "cat gdn_b:j": "linear_attn.attn.inputs.b",
    "cat gdn_a:j": "linear_attn.attn.inputs.a",
    "cat gdn_core_out:jp": "linear_attn.attn.output linear_attn.norm.inputs.0",
    "cat gdn_z:jp": "linear_attn.norm.inputs.1",
    "cat gdn_norm_out:jp": "linear_attn.norm.output linear_attn.out_proj.inputs.0",
    "same moe_router_logits": "mlp.gate.output mlp.gate.output.0 mlp.topk.output.2",
    "same moe_topk_ids": "mlp.topk.output.1",
    "same moe_topk_weights": "mlp.topk.output.0",
    "same moe_slot_ids": "mlp.experts.inputs.1.1 mlp.experts.inputs.topk_output.1",
    "same moe_slot_weights": "mlp.experts.inputs.1.0 mlp.experts.inputs.topk_output.0",
    "same moe_shared_gate_logit": "mlp.shared_expert_gate.output",
    "cat moe_shared_gate_proj:f moe_shared_up_proj:f": "mlp.shared_expert.gate_up_proj.output",
    "cat moe_shared_act:f": "mlp.shared_expert.act_fn.output",
    "sum moe_shared_output": "mlp.shared_expert.down_proj.output mlp.shared_expert.output",
    "sum moe_routed_output": "mlp.experts.output moe_expert_output",
    "sum mlp_output": "mlp.output output output.0",
})  # fmt: skip

TRANSFORMERS_NAMES = rule_by_name({
    "same embed_tokens": "embed_tokens.output",
    "same inputs_embeds": "model.inputs.inputs_embeds",
    "same rope_cos:1 -:1": "rotary_emb.output.0",
    "same rope_sin:1 -:1": "rotary_emb.output.1",
    "same final_norm": "norm.output",
    "same next_token_logits": "lm_head.output",
    "same layer_input": "inputs.0 inputs.hidden_states input_layernorm.inputs.0",
    "same input_layernorm": "input_layernorm.output",
    "same attn_q_gate": "self_attn.q_proj.output",
    "same attn_k_proj": "self_attn.k_proj.output",
    "same attn_v": "self_attn.v_proj.output",
    "same attn_q_norm": "self_attn.q_norm.output",
    "same attn_k_norm": "self_attn.k_norm.output",
    "same attn_probs": "self_attn.output.1",
    "same attn_pre_o_proj": "self_attn.o_proj.inputs.0",
    "same attn_output":
        "self_attn.o_proj.output linear_attn.out_proj.output self_attn.output self_attn.output.0 "
        "linear_attn.output",
    "same gdn_qkv": "linear_attn.in_proj_qkv.output",
    "same gdn_z": "linear_attn.in_proj_z.output",
    "same gdn_b": "linear_attn.in_proj_b.output",
    "same gdn_a": "linear_attn.in_proj_a.output",
    "same gdn_core_out": "linear_attn.norm.inputs.0",
    "same gdn_norm_out": "linear_attn.norm.output linear_attn.out_proj.inputs.0",
    "same pre_mlp_residual": "post_attention_layernorm.inputs.0",
    "same pre_mlp_layernorm_output": "post_attention_layernorm.output mlp.inputs.0",
    "same moe_router_logits": "mlp.gate.output.0",
    "same moe_topk_weights": "mlp.gate.output.1",
    "same moe_topk_ids": "mlp.gate.output.2",
    "same moe_routed_output": "mlp.experts.output",
    "same moe_shared_gate_logit": "mlp.shared_expert_gate.output",
    "same moe_shared_gate_proj": "mlp.shared_expert.gate_proj.output",
    "same moe_shared_up_proj": "mlp.shared_expert.up_proj.output",
    "same moe_shared_silu": "mlp.shared_expert.act_fn.output",
    "same moe_shared_act": "mlp.shared_expert.down_proj.inputs.0",
    "same moe_shared_output": "mlp.shared_expert.down_proj.output mlp.shared_expert.output",
    "same mlp_output": "mlp.output",
    "same layer_output_sum": "output",
})  # fmt: skip

# The vision tower: transformers and vLLM (`qkv`, `act_fn`), SGLang (`qkv_proj`, `act`). SGLang adds to the stream in
# place, and its dumper writes what a module took after it ran: a block's own input is its output by then, and not read.
VISION_NAMES = rule_by_name({
    "same vis_pixels": "patch_embed.inputs.0",
    "same vis_patch_embed": "patch_embed.output",
    "same vis_rope_cos:1 -:1": "rotary_pos_emb.output.0",
    "same vis_rope_sin:1 -:1": "rotary_pos_emb.output.1",
    "same vis_layer_input": "norm1.inputs.0",
    "same vis_norm1": "norm1.output",
    "same vis_qkv": "attn.qkv.output",
    "cat vis_qkv:1 vis_qkv:1 vis_qkv:1": "attn.qkv_proj.output",
    "sum vis_attn_output": "attn.proj.output attn.output",
    "same vis_attn_residual": "norm2.inputs.0",
    "same vis_norm2": "norm2.output",
    "cat vis_mlp_fc1": "mlp.linear_fc1.output",
    "cat vis_mlp_act": "mlp.act_fn.output mlp.act.output",
    "sum vis_mlp_output": "mlp.linear_fc2.output mlp.output",
    "same vis_layer_output": "output",
    "same vis_hidden": "merger.inputs.0 merger.norm.inputs.0",
    "same vis_merger_norm": "merger.norm.output",
    "cat vis_merger_fc1": "merger.linear_fc1.output",
    "cat vis_merger_act": "merger.act_fn.output",
    "sum vis_merger_out": "merger.linear_fc2.output",
    "same image_embeds": "merger.output",
})  # fmt: skip

# How SGLang's ranks share a tensor that has our name already, if the dump does not say.
OURS = {tap: rule.split()[0] for rule in SGLANG_NAMES.values() for tap in re.findall(r"\b(?:[a-z]+_)+[a-z]+\b", rule)}


@dataclass(frozen=True)
class TapRule:
    """How ranks join ("same", "cat", "sum"), and blocks of columns: (tap name, width expression or "")."""

    join: str
    blocks: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, text: str) -> TapRule:
        join, *blocks = text.split()
        return cls(join, tuple((name, width) for name, _, width in (b.partition(":") for b in blocks)))


def place(raw: str) -> tuple[str, int | None, str]:
    """Split an engine's name into part, layer and the path below the layer.

    >>> place("model.language_model.layers.3.self_attn.qkv_proj.output")
    ('', 3, 'self_attn.qkv_proj.output')
    """
    raw = raw.removeprefix("non_intrusive__")
    part = "mtp" if re.match(r"(model\.)?mtp\b", raw) else "visual" if re.match(r"(model\.)?visual\b", raw) else ""
    if found := re.search(rf"(?:^|\.){'blocks' if part == 'visual' else 'layers'}\.(\d+)(?:\.|$)", raw):
        return part, int(found[1]), raw[found.end() :]
    path = re.sub(r"^(?:model\.|language_model\.|mtp\.|visual\.)+", "", raw)
    return part, None, "tower.output" if (part, path) == ("visual", "output") else path  # no block's


def family_of(paths: Iterable[str]) -> str:
    """Whose modules these are: transformers' where some are that no other engine has."""
    theirs = ("self_attn.q_proj.", "linear_attn.in_proj_qkv.", "mlp.gate.output.2")
    return "transformers" if any(f"{path}.".startswith(theirs) for path in paths) else "sglang"


def rule_for(path: str, family: str) -> tuple[TapRule, int] | None:
    """The rule of a path below the layer, and its preference (0 is best); None for names without meaning."""
    table = {"transformers": TRANSFORMERS_NAMES, "vision": VISION_NAMES}.get(family, SGLANG_NAMES)
    if table is SGLANG_NAMES and not path.startswith("self_attn.output"):  # "output" alone is the layer's
        path = path.removeprefix("self_attn.")
    if path in table:
        return TapRule.parse(table[path]), 1 + list(table).index(path)
    if path in TAPS:
        return TapRule(OURS.get(path, "same"), ((path, ""),)), 0
    if not re.search(r"(^|\.)(output|inputs)(\.|$)", path):  # a module: what it returns
        return rule_for(f"{path}.output".lstrip("."), family)
    return None


def text_config(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The text model's part of a config.json; empty without one."""
    return (config or {}).get("text_config", config or {})


def letters(config: Mapping[str, Any] | None) -> dict[str, int]:
    """Sizes by the legend's lower-case letters; empty without a config."""
    config = text_config(config)
    return {letter: int(config[name]) for letter, name in LETTERS.items() if name in config}


def width(expression: str, sizes: Mapping[str, int]) -> int | None:
    """The value of a product, "2nh" or "n (2*h)"; None where a letter is not known.

    >>> width("2nh", {"n": 4, "h": 8})
    64
    """
    if any(letter not in sizes for letter in re.findall("[a-z]", expression)):
        return None
    return prod(int(f) if f.isdigit() else sizes[f] for f in re.findall(r"\d+|[a-z]", expression))


def features(tap: str, sizes: Mapping[str, int]) -> int | None:
    """How many features a token has in this tap, where the sizes are known."""
    found = re.fullmatch(r"(?:b )?t (.*)", TAPS[tap].dims) if tap in TAPS else None
    return width(found[1], sizes) if found else None
