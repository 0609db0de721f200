"""Names of tensors: from a file's spelling to the one that this package uses."""

from __future__ import annotations

import re

# The hub's `model.language_model.`, older `language_model.model.`, text-only `model.`, and repetitions of these.
PREFIX = re.compile(r"(?:(?:model|language_model)\.)+")


def canonical(raw: str) -> str:
    """The name without the checkpoint's prefix.

    >>> canonical("model.language_model.layers.0.mlp.gate.weight"), canonical("model.visual.pos_embed.weight")
    ('layers.0.mlp.gate.weight', 'visual.pos_embed.weight')
    >>> canonical("language_model.lm_head.weight"), canonical("mtp.fc.weight")
    ('lm_head.weight', 'mtp.fc.weight')

    transformers 5.4 and 5.5 repeat a part when they save again what they have loaded (transformers 45216).
    >>> canonical("model.language_model.language_model.language_model.layers.0.mlp.gate.weight")
    'layers.0.mlp.gate.weight'
    """
    return raw[match.end() :] if (match := PREFIX.match(raw)) else raw


# What a quantised module's tensors are called. Those with an underscore in front go with 3-D experts, which have no
# `.weight`: gpt-oss `gate_up_proj_blocks`, transformers' FP8 `gate_up_proj_scale_inv`, ModelOpt's
# `gate_up_proj_weight_scale`.
ROLE = re.compile(
    r"(?P<module>.+?)(?P<role>"
    r"\.(weight|bias|weight_packed|weight_scale|weight_scale_inv|weight_scale_2|weight_global_scale|weight_zero_point"
    r"|weight_shape|weight_g_idx|input_scale|input_global_scale|output_scale|qweight|qzeros|scales|g_idx|qscales|SCB"
    r"|weight_format|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+))"
    r"|(?<=_proj)_(blocks|scales|packed|bias|(weight_|input_|output_)?scale|(weight_)?scale_(inv|2)))"
)


def split_role(name: str) -> tuple[str, str]:
    """(module, role): all tensors of one weight have one module.

    >>> split_role("layers.0.mlp.experts.3.up_proj.weight_scale"), split_role("layers.0.linear_attn.A_log")
    (('layers.0.mlp.experts.3.up_proj', '.weight_scale'), ('layers.0.linear_attn.A_log', ''))
    """
    match = ROLE.fullmatch(name)
    return (match["module"], match["role"]) if match else (name, "")
