"""What engines call the taps of the vision tower (rules as in `engine_names.py`): transformers and vLLM (`qkv`,
`act_fn`), SGLang (`qkv_proj`, `act`).

SGLang adds to the stream in place, and its dumper writes what a module took after it ran: a block's own input is its
output by then, and is not read.
"""

VISION_NAMES = {
    "patch_embed.inputs.0": "same vis_pixels",
    "patch_embed.output": "same vis_patch_embed",
    "rotary_pos_emb.output.0": "same vis_rope_cos:1 -:1",
    "rotary_pos_emb.output.1": "same vis_rope_sin:1 -:1",
    "norm1.inputs.0": "same vis_layer_input",
    "norm1.output": "same vis_norm1",
    "attn.qkv.output": "same vis_qkv",
    "attn.qkv_proj.output": "cat vis_qkv:1 vis_qkv:1 vis_qkv:1",
    "attn.proj.output": "sum vis_attn_output",
    "attn.output": "sum vis_attn_output",
    "norm2.inputs.0": "same vis_attn_residual",
    "norm2.output": "same vis_norm2",
    "mlp.linear_fc1.output": "cat vis_mlp_fc1",
    "mlp.act_fn.output": "cat vis_mlp_act",
    "mlp.act.output": "cat vis_mlp_act",
    "mlp.linear_fc2.output": "sum vis_mlp_output",
    "mlp.output": "sum vis_mlp_output",
    "output": "same vis_layer_output",
    "merger.inputs.0": "same vis_hidden",
    "merger.norm.inputs.0": "same vis_hidden",
    "merger.norm.output": "same vis_merger_norm",
    "merger.linear_fc1.output": "cat vis_merger_fc1",
    "merger.act_fn.output": "cat vis_merger_act",
    "merger.linear_fc2.output": "sum vis_merger_out",
    "merger.output": "same image_embeds",
}
