"""One small model, stored in every layout a checkpoint may have: all of them decode to the very same values.

A matrix is drawn as E2M1 codes times 2^block times 2^row, so that MXFP4, FP8 of any kind of scale, and every float hold
it exactly. Sizes are no multiples of 128, so that FP8 has a partial block at the end of either dimension.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from weights.tensors import logical

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
D, F, E = 160, 160, 3
TEXT: dict[str, Any] = {
    "hidden_size": D, "num_hidden_layers": 2, "vocab_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "num_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": F,
    "shared_expert_intermediate_size": F, "layer_types": ["linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6, "mtp_num_hidden_layers": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
                        "mrope_section": [2, 1, 1], "mrope_interleaved": True},
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "in_channels": 3, "patch_size": 4,
    "temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 16, "out_hidden_size": D,
}  # fmt: skip
CONFIG = {"model_type": "qwen3_5_moe", "text_config": TEXT, "vision_config": VISION, "tie_word_embeddings": False}
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Matrix:
    """[O, I] as codes [O, I / 2], scale bytes [O, I / 32], and the power of two that goes with each row."""

    codes: Tensor
    scales: Tensor
    row: Tensor

    @cached_property
    def values(self) -> Tensor:
        codes = torch.stack((self.codes & 15, self.codes >> 4), -1).flatten(1)
        return torch.ldexp(E2M1[codes.long()], self.scales.int().repeat_interleave(32, 1) - 127)


def draw_matrix(rows: int, columns: int, generator: torch.Generator) -> Matrix:
    codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    row = torch.randint(-3, 0, (rows, 1), generator=generator)
    block = torch.randint(-1, 2, (rows, columns // 32), generator=generator)
    return Matrix(codes, (127 + row + block).to(torch.uint8), row)


def experts_of(prefix: str, seed: int = 0) -> list[dict[str, Matrix]]:
    """The experts of one layer, by projection."""
    generator = torch.Generator().manual_seed(seed + sum(map(ord, prefix)))
    sizes = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    return [{name: draw_matrix(*size, generator) for name, size in sizes.items()} for _ in range(E)]


def plain(dtype: torch.dtype) -> Callable[[Matrix], Tensors]:
    return lambda m: {".weight": m.values.to(dtype)}


def quark(m: Matrix) -> Tensors:
    return {".weight": m.codes, ".weight_scale": m.scales}


def compressed(m: Matrix) -> Tensors:
    return {".weight_packed": m.codes, ".weight_scale": m.scales}


def fp8(kind: str, name: str, dtype: torch.dtype) -> Callable[[Matrix], Tensors]:
    """Block scales 2^(i - j), channel scales 2^row, or one scale 1/2."""

    def store(m: Matrix) -> Tensors:
        rows, columns = m.values.shape
        i, j = torch.arange(rows)[:, None] // 128, torch.arange(columns) // 128
        scale = {"block": 2.0 ** (i - j), "channel": 2.0 ** m.row.double(), "tensor": torch.tensor(0.5)}[kind]
        stored = {"block": 2.0 ** (i - j)[::128, ::128], "channel": scale, "tensor": scale}[kind]
        if name.endswith("/1d"):
            stored = stored.flatten()
        return {".weight": (m.values / scale).to(torch.float8_e4m3fn), name.removesuffix("/1d"): stored.to(dtype)}

    return store


def one_by_one(store: Callable[[Matrix], Tensors]) -> Callable[[list[dict[str, Matrix]]], Tensors]:
    def all_of(experts: list[dict[str, Matrix]]) -> Tensors:
        return {
            f".{e}.{name}{suffix}": tensor
            for e, expert in enumerate(experts)
            for name, matrix in expert.items()
            for suffix, tensor in store(matrix).items()
        }

    return all_of


def gate_up(expert: dict[str, Matrix]) -> Matrix:
    """[2F, D]: F rows of gate, then F of up."""
    gate, up = expert["gate_proj"], expert["up_proj"]
    return Matrix(*(torch.cat((getattr(gate, f), getattr(up, f))) for f in ("codes", "scales", "row")))


def stacked(store: Callable[[Matrix], Tensors], rename: Callable[[str], str]) -> Callable[..., Tensors]:
    """3-D tensors over all experts."""

    def all_of(experts: list[dict[str, Matrix]]) -> Tensors:
        pairs = [("gate_up_proj", [gate_up(x) for x in experts]), ("down_proj", [x["down_proj"] for x in experts])]
        return {
            f".{name}{rename(suffix)}": torch.stack([store(m)[suffix] for m in matrices])
            for name, matrices in pairs
            for suffix in store(matrices[0])
        }

    return all_of


def gpt_oss(experts: list[dict[str, Matrix]]) -> Tensors:
    """Blocks [E, O, Q, 16] and scales [E, O, Q]; rows of gate and up take turns."""
    found: Tensors = {}
    for role, field in (("_blocks", "codes"), ("_scales", "scales")):
        pairs = [torch.stack((getattr(x["gate_proj"], field), getattr(x["up_proj"], field)), 1) for x in experts]
        found[f".gate_up_proj{role}"] = torch.stack([pair.flatten(0, 1) for pair in pairs])
        found[f".down_proj{role}"] = torch.stack([getattr(x["down_proj"], field) for x in experts])
    return {name: t.unflatten(-1, (-1, 16)) if name.endswith("_blocks") else t for name, t in found.items()}


def mixed(experts: list[dict[str, Matrix]]) -> Tensors:
    """Every matrix in another format."""
    stores = [quark, plain(torch.bfloat16), fp8("block", ".weight_scale_inv", torch.bfloat16), compressed]
    found: Tensors = {}
    for i, (e, name) in enumerate((e, name) for e, expert in enumerate(experts) for name in expert):
        found |= {f".{e}.{name}{k}": t for k, t in stores[i % len(stores)](experts[e][name]).items()}
    return found


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
BLOCK = fp8("block", ".weight_scale_inv", BF16)
# layout: (how the experts are stored, how one other linear module is, the kind that the experts are recognised as)
LAYOUTS: dict[str, tuple[Callable[..., Tensors], Callable[[Matrix], Tensors], str]] = {
    "bf16 fused": (stacked(plain(BF16), lambda s: ""), plain(BF16), "float"),
    "f32 fused": (stacked(plain(F32), lambda s: ""), plain(F32), "float"),
    "f16 fused": (stacked(plain(F16), lambda s: ""), plain(F16), "float"),
    "bf16 one by one": (one_by_one(plain(BF16)), plain(F32), "float"),
    "fp8 block": (one_by_one(BLOCK), BLOCK, "fp8-block"),
    "fp8 block, f32 scales": (one_by_one(fp8("block", ".weight_scale_inv", F32)), BLOCK, "fp8-block"),
    "fp8 block, quark's name": (one_by_one(fp8("block", ".weight_scale", F32)), BLOCK, "fp8-block"),
    "fp8 block fused": (stacked(BLOCK, lambda s: s.replace(".weight", "")), BLOCK, "fp8-block"),
    "fp8 channel": (one_by_one(fp8("channel", ".weight_scale", F32)), BLOCK, "fp8-channel"),
    "fp8 channel 1-d": (one_by_one(fp8("channel", ".weight_scale/1d", BF16)), quark, "fp8-channel"),
    "fp8 channel fused": (
        stacked(fp8("channel", ".weight_scale", F32), lambda s: s.replace(".weight", "")), quark, "fp8-channel"
    ),
    "fp8 tensor": (one_by_one(fp8("tensor", ".weight_scale", F32)), fp8("tensor", ".weight_scale", BF16), "fp8-tensor"),
    "fp8 tensor fused": (
        stacked(fp8("tensor", ".weight_scale/1d", F32), lambda s: s.replace("/1d", "")), quark, "fp8-tensor"
    ),
    "quark mxfp4": (one_by_one(quark), plain(BF16), "mxfp4"),
    "quark mxfp4, attention fp8": (one_by_one(quark), fp8("channel", ".weight_scale", F32), "mxfp4"),
    "quark mxfp4, shared too": (one_by_one(quark), quark, "mxfp4"),
    "compressed-tensors": (one_by_one(compressed), compressed, "mxfp4"),
    "compressed-tensors 3-d": (stacked(compressed, lambda s: s), compressed, "mxfp4"),
    "gpt-oss": (gpt_oss, plain(BF16), "mxfp4"),
    "mixed": (mixed, quark, "mxfp4"),
}  # fmt: skip
LINEAR = ("self_attn.q_proj", "linear_attn.out_proj", "shared_expert.down_proj", "lm_head")


def tensors(layout: str = "quark mxfp4", prefix: str = "model.language_model.") -> tuple[Tensors, Tensors]:
    """(what is stored, by raw name; what it means, by canonical name, float64)."""
    stored, meant = _tensors(layout, prefix)
    return dict(stored), dict(meant)


@cache
def _tensors(layout: str, prefix: str) -> tuple[Tensors, Tensors]:
    store_experts, store_linear, _ = LAYOUTS[layout]
    stored: Tensors = {}
    meant: Tensors = {}
    generator = torch.Generator().manual_seed(1)
    for tensor in logical(CONFIG):
        name, raw = tensor.name, raw_name(tensor.name, prefix)
        if ".experts." in name:
            continue
        module = name.removesuffix(".weight")
        if module.endswith(LINEAR):
            matrix = draw_matrix(*tensor.size, generator)
            meant[name] = matrix.values
            stored |= {raw.removesuffix(".weight") + k: t for k, t in store_linear(matrix).items()}
        else:
            dtype = F32 if name.endswith(("A_log", "linear_attn.norm.weight")) and "f32" in layout else BF16
            stored[raw] = torch.randn(tensor.size, generator=generator).to(dtype)
            meant[name] = stored[raw].double()
    for at in ("layers.0.mlp.experts", "layers.1.mlp.experts", "mtp.layers.0.mlp.experts"):
        experts = experts_of(at)
        # As Quark does: the draft's experts are left in BF16, one by one.
        store = store_experts if not at.startswith("mtp.") else LAYOUTS["bf16 one by one"][0]
        stored |= {raw_name(at, prefix) + k: t for k, t in store(experts).items()}
        meant |= {f"{at}.{e}.{n}.weight": m.values for e, x in enumerate(experts) for n, m in x.items()}
    return stored, meant


def raw_name(name: str, prefix: str) -> str:
    """As transformers and older exports spell it: the head and the draft stand beside the language model."""
    if name.startswith("mtp."):
        return name
    if name.startswith("visual."):
        return "model." + name
    if name.startswith("lm_head."):
        return "language_model." + name if prefix == "language_model.model." else name
    return prefix + name


def write(
    folder: Path,
    stored: Tensors,
    shards: tuple[str, ...] = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    index: str | None = "model.safetensors.index.json",
    config: dict[str, Any] = CONFIG,
) -> Path:
    """A checkpoint folder; tensors are dealt to the shards in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(stored)
    files = {shard: names[i :: len(shards)] for i, shard in enumerate(shards)}
    for shard, own in files.items():
        save_file({name: stored[name].contiguous() for name in own}, folder / shard)
    if index:
        weight_map = {name: shard for shard, own in files.items() for name in own}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def config_with(**changes: Any) -> dict[str, Any]:
    """CONFIG with other text keys."""
    config = deepcopy(CONFIG)
    config["text_config"] |= changes
    return config
