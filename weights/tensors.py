"""Which tensors a config implies, by canonical name, with their sizes and the values that they are drawn from.

Canonical: text tensors without the prefix of a layout (`layers.0.mlp.gate.weight`), one entry for each matrix of each
expert (`layers.0.mlp.experts.7.gate_proj.weight`), `visual.*`, `mtp.*`. Every layout stores these same values: a fused
tensor is the experts' matrices one after another, a quantised one is their encoding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from math import sqrt
from typing import Any

from .draw import Values, rows_of

Json = dict[str, Any]


@dataclass(frozen=True)
class Logical:
    name: str
    size: tuple[int, ...]
    values: Values


def text_config(config: Json) -> Json:
    return config.get("text_config", config)


# What makes the model a healthy one: a residual stream of order 1 to which every block adds about half as much, gates
# and router spread but not saturated, decays between 0.998 and 0.1 a token. FAN: the spread is divided by
# sqrt(columns); a square root, unlike a power, is exact to the last bit everywhere.
# The first pattern that matches decides.
FAN, PLAIN = True, False
RULES: tuple[tuple[str, bool, Values], ...] = (
    ("embed_tokens.weight", PLAIN, Values()),
    ("lm_head.weight", FAN, Values(spread=2.0)),
    ("*linear_attn.norm.weight", PLAIN, Values(mean=1.0, spread=0.25)),  # the one norm without 1 + w
    ("*.A_log", PLAIN, Values(mean=0.25, spread=1.75, shape="flat")),
    ("*.dt_bias", PLAIN, Values(mean=-2.5, spread=1.5, shape="flat")),
    ("*conv1d.weight", FAN, Values()),
    ("*linear_attn.out_proj.weight", FAN, Values(spread=0.75)),
    ("*self_attn.o_proj.weight", FAN, Values(spread=2.0)),
    ("*self_attn.[qk]_norm.weight", PLAIN, Values(mean=0.25, spread=0.25)),
    ("*mlp.gate.weight", FAN, Values(spread=1.5)),
    ("*experts.*.down_proj.weight", FAN, Values(spread=1.25, mixed=True)),
    ("*experts.*_proj.weight", FAN, Values(spread=0.87, mixed=True)),  # 0.87 undoes the mean of the mixed exponents
    ("*shared_expert.down_proj.weight", FAN, Values(spread=1.0, mixed=True)),
    ("*shared_expert.*_proj.weight", FAN, Values(spread=0.87, mixed=True)),
    ("visual.*norm*.weight", PLAIN, Values(mean=1.0, spread=0.25)),
    ("visual.*.bias", PLAIN, Values(spread=0.125)),
    ("visual.pos_embed.weight", PLAIN, Values(spread=0.5)),
    ("*norm*.weight", PLAIN, Values(spread=0.25)),  # zero-centred: about half of them are negative
    ("*", FAN, Values()),
)


def values_of(name: str, size: tuple[int, ...]) -> Values:
    return _values_of(re.sub(r"\.\d+\.", ".#.", name), size)  # no rule tells layers or experts apart


@lru_cache(maxsize=1024)
def _values_of(name: str, size: tuple[int, ...]) -> Values:
    for pattern, fan, values in RULES:
        if fnmatchcase(name, pattern):
            return replace(values, spread=values.spread / sqrt(rows_of(size)[1])) if fan else values
    raise AssertionError("the last rule matches everything")


def logical(
    config: Json, *, vision: bool = True, mtp: bool = True, short_heads: int | None = None
) -> Iterator[Logical]:
    """Every tensor of the model that `config` describes. short_heads: the binary exponent by which the queries and keys
    of key head 1 of every DeltaNet layer are made short, so that the eps of their L2 norm shows."""
    text = text_config(config)
    tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings")))
    for name, size in _text(text, tied):
        # A tied embedding is spread as a head is: as an embedding it is normalised at once, as a head nothing helps it.
        role = "lm_head.weight" if tied and name == "embed_tokens.weight" else name
        yield Logical(name, size, _shortened(name, values_of(role, size), text, short_heads))
    if vision and "vision_config" in config:
        for name, size in _vision(config["vision_config"]):
            yield Logical(name, size, values_of(name, size))
    if mtp and text.get("mtp_num_hidden_layers", 0):
        for name, size in _mtp(text):
            yield Logical(name, size, values_of(name, size))


def _shortened(name: str, values: Values, text: Json, power: int | None) -> Values:
    if power is None or not name.endswith("linear_attn.in_proj_qkv.weight"):
        return values
    width, heads = text["linear_key_head_dim"], text["linear_num_key_heads"]
    query, key = width * 1, width * (heads + 1)
    return replace(values, short=((query, query + width, power), (key, key + width, power)))


Named = Iterator[tuple[str, tuple[int, ...]]]


def _text(text: Json, tied: bool) -> Named:
    vocabulary, width = text["vocab_size"], text["hidden_size"]
    yield "embed_tokens.weight", (vocabulary, width)
    for index, kind in enumerate(text["layer_types"]):
        yield from _layer(f"layers.{index}", kind, text)
    yield "norm.weight", (width,)
    if not tied:
        yield "lm_head.weight", (vocabulary, width)


def _layer(prefix: str, kind: str, text: Json) -> Named:
    width = text["hidden_size"]
    yield f"{prefix}.input_layernorm.weight", (width,)
    if kind == "linear_attention":
        heads, value = text["linear_num_value_heads"], text["linear_num_value_heads"] * text["linear_value_head_dim"]
        channels = 2 * text["linear_num_key_heads"] * text["linear_key_head_dim"] + value
        mixer = f"{prefix}.linear_attn"
        yield f"{mixer}.A_log", (heads,)
        yield f"{mixer}.dt_bias", (heads,)
        yield f"{mixer}.conv1d.weight", (channels, 1, text["linear_conv_kernel_dim"])
        yield f"{mixer}.in_proj_qkv.weight", (channels, width)
        yield f"{mixer}.in_proj_z.weight", (value, width)
        yield f"{mixer}.in_proj_b.weight", (heads, width)
        yield f"{mixer}.in_proj_a.weight", (heads, width)
        yield f"{mixer}.norm.weight", (text["linear_value_head_dim"],)
        yield f"{mixer}.out_proj.weight", (width, value)
    else:
        head = text["head_dim"]
        query, key = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
        mixer = f"{prefix}.self_attn"
        yield f"{mixer}.q_proj.weight", (2 * query, width)
        yield f"{mixer}.k_proj.weight", (key, width)
        yield f"{mixer}.v_proj.weight", (key, width)
        yield f"{mixer}.o_proj.weight", (width, query)
        yield f"{mixer}.q_norm.weight", (head,)
        yield f"{mixer}.k_norm.weight", (head,)
    yield f"{prefix}.post_attention_layernorm.weight", (width,)
    mlp = f"{prefix}.mlp"
    yield f"{mlp}.gate.weight", (text["num_experts"], width)
    yield f"{mlp}.shared_expert_gate.weight", (1, width)
    yield from _expert(f"{mlp}.shared_expert", width, text["shared_expert_intermediate_size"])
    for expert in range(text["num_experts"]):
        yield from _expert(f"{mlp}.experts.{expert}", width, text["moe_intermediate_size"])


def _expert(prefix: str, width: int, inner: int) -> Named:
    yield f"{prefix}.gate_proj.weight", (inner, width)
    yield f"{prefix}.up_proj.weight", (inner, width)
    yield f"{prefix}.down_proj.weight", (width, inner)


def _mtp(text: Json) -> Named:
    width = text["hidden_size"]
    yield "mtp.fc.weight", (width, 2 * width)
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        yield f"mtp.{name}.weight", (width,)
    for index in range(text["mtp_num_hidden_layers"]):
        yield from _layer(f"mtp.layers.{index}", "full_attention", text)


def _vision(vision: Json) -> Named:
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    patch = (vision["in_channels"], vision["temporal_patch_size"], vision["patch_size"], vision["patch_size"])
    yield from _affine("visual.patch_embed.proj", (width, *patch))
    yield "visual.pos_embed.weight", (vision["num_position_embeddings"], width)
    for index in range(vision["depth"]):
        block = f"visual.blocks.{index}"
        yield from _affine(f"{block}.norm1", (width,))
        yield from _affine(f"{block}.norm2", (width,))
        yield from _affine(f"{block}.attn.qkv", (3 * width, width))
        yield from _affine(f"{block}.attn.proj", (width, width))
        yield from _affine(f"{block}.mlp.linear_fc1", (inner, width))
        yield from _affine(f"{block}.mlp.linear_fc2", (width, inner))
    merged = width * vision["spatial_merge_size"] ** 2
    yield from _affine("visual.merger.norm", (width,))
    yield from _affine("visual.merger.linear_fc1", (merged, merged))
    yield from _affine("visual.merger.linear_fc2", (vision["out_hidden_size"], merged))


def _affine(name: str, size: tuple[int, ...]) -> Named:
    yield f"{name}.weight", size
    yield f"{name}.bias", (size[0],)
