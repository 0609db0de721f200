"""Which tensors a configuration implies, by canonical name, with their shapes; experts once a layer."""

from __future__ import annotations

from collections.abc import Iterator

from ..model.config import FULL, Config
from ..model.vision.tower import VisionConfig

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]


def expected_tensors(config: Config, mtp_layers: int = 0, vision: VisionConfig | None = None) -> Named:
    """(name, shape) of every tensor of the model; `layers.N.mlp.experts` stands for all of a layer's and has shape
    [E, F, D]. Source: the hub's configs under transformers 5.23 on the meta device (693, 831, 1038 text tensors)."""
    D = config.hidden_size
    yield "embed_tokens.weight", (config.vocab_size, D)
    for i, kind in enumerate(config.layer_types):
        yield from _layer(f"layers.{i}", kind, config)
    yield "norm.weight", (D,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, D)
    if mtp_layers:
        yield "mtp.fc.weight", (D, 2 * D)
        for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            yield f"mtp.{name}.weight", (D,)
        for i in range(mtp_layers):
            yield from _layer(f"mtp.layers.{i}", FULL, config)
    if vision:
        yield from _vision(vision, D)


def _layer(at: str, kind: str, config: Config) -> Named:
    D = config.hidden_size
    yield f"{at}.input_layernorm.weight", (D,)
    yield f"{at}.post_attention_layernorm.weight", (D,)
    yield from _attention(f"{at}.self_attn", config) if kind == FULL else _deltanet(f"{at}.linear_attn", config)
    S = config.shared_expert_intermediate_size
    yield f"{at}.mlp.gate.weight", (config.num_experts, D)
    yield f"{at}.mlp.shared_expert_gate.weight", (1, D)
    yield f"{at}.mlp.shared_expert.gate_proj.weight", (S, D)
    yield f"{at}.mlp.shared_expert.up_proj.weight", (S, D)
    yield f"{at}.mlp.shared_expert.down_proj.weight", (D, S)
    yield f"{at}.mlp.experts", (config.num_experts, config.moe_intermediate_size, D)


def _attention(at: str, config: Config) -> Named:
    """q_proj has the gate beside each head's query, hence twice the width."""
    D, H = config.hidden_size, config.head_dim
    query, key = config.num_attention_heads * H, config.num_key_value_heads * H
    yield f"{at}.q_proj.weight", (2 * query, D)
    yield f"{at}.k_proj.weight", (key, D)
    yield f"{at}.v_proj.weight", (key, D)
    yield f"{at}.o_proj.weight", (D, query)
    yield f"{at}.q_norm.weight", (H,)
    yield f"{at}.k_norm.weight", (H,)


def _deltanet(at: str, config: Config) -> Named:
    D, J = config.hidden_size, config.linear_num_value_heads
    value = J * config.linear_value_head_dim
    C = config.conv_dim
    yield f"{at}.in_proj_qkv.weight", (C, D)
    yield f"{at}.in_proj_z.weight", (value, D)
    yield f"{at}.in_proj_b.weight", (J, D)
    yield f"{at}.in_proj_a.weight", (J, D)
    yield f"{at}.conv1d.weight", (C, 1, config.linear_conv_kernel_dim)
    yield f"{at}.A_log", (J,)
    yield f"{at}.dt_bias", (J,)
    yield f"{at}.norm.weight", (config.linear_value_head_dim,)
    yield f"{at}.out_proj.weight", (D, value)


def _vision(vision: VisionConfig, text_width: int) -> Named:
    width, inner = vision.hidden_size, vision.intermediate_size
    merged = width * vision.spatial_merge_size**2
    patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    yield "visual.pos_embed.weight", (vision.num_position_embeddings, width)
    yield from _affine("visual.patch_embed.proj", (width, *patch))
    for i in range(vision.depth):
        at = f"visual.blocks.{i}"
        yield from _affine(f"{at}.norm1", (width,))
        yield from _affine(f"{at}.norm2", (width,))
        yield from _affine(f"{at}.attn.qkv", (3 * width, width))
        yield from _affine(f"{at}.attn.proj", (width, width))
        yield from _affine(f"{at}.mlp.linear_fc1", (inner, width))
        yield from _affine(f"{at}.mlp.linear_fc2", (width, inner))
    yield from _affine("visual.merger.norm", (width,))
    yield from _affine("visual.merger.linear_fc1", (merged, merged))
    yield from _affine("visual.merger.linear_fc2", (text_width, merged))


def _affine(module: str, shape: Shape) -> Named:
    yield f"{module}.weight", shape
    yield f"{module}.bias", shape[:1]
