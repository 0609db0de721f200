"""The vision tower: patches of images and video frames in, one embedding for each block of m x m patches out.

Letters in this file: L patches (all images and frames one after the other), and of the tower D its width, N heads,
H head width, F MLP width. Patches come in merge-block order: the m x m patches of a block are neighbours, blocks go row
by row, frames one after the other. Taps stand under part `visual` and are called `vis_*`, the last one `image_embeds`.

Attention is computed for blocks of queries of one frame, so that its memory does not grow with the number of frames.
The taps of a block carry its number as their `index`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import pi, sqrt

import torch
from torch import Tensor, nn

from ...errors import Qwen35Error
from ...numerics import arithmetics as arithmetic
from ...numerics.taps import scope, tap
from ..ops import linear, matmul, promote
from .config import ROPE_THETA, VisionConfig
from .position_table import Grid, interpolate, patch_places
from .positions import check_grids

NORM_EPS = 1e-6
ATTENTION_ELEMENTS = 2**24  # scores held at a time: 128 MiB of float64


def patch_angles(row: Tensor, column: Tensor, head_width: int, dtype: torch.dtype) -> Tensor:
    """Angles [L, H/2]: the first H/4 turn with the row, the others with the column; j-th frequency theta^(-4j/H)."""
    j = torch.arange(head_width // 4, device=row.device).to(dtype)
    frequency = ROPE_THETA ** (-4 * j / head_width)
    return torch.cat((row[:, None] * frequency, column[:, None] * frequency), dim=-1)


def rotate_patches(name: str, x_LNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (a, b) = (x_i, x_{i + H/2}) into (a cos - b sin, b cos + a sin). Rounds once, at the end."""
    a, b = promote(x_LNH).chunk(2, dim=-1)
    cos, sin = promote(cos)[:, None], promote(sin)[:, None]
    return tap(name, torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1))


def query_blocks(grids: Sequence[Grid], heads: int) -> Iterator[tuple[slice, slice]]:
    """(queries, keys) of attention: the keys of a whole frame, for as many of its queries as fit ATTENTION_ELEMENTS."""
    start = 0
    for t, h, w in grids:
        size = h * w
        step = max(1, ATTENTION_ELEMENTS // (heads * size))
        for begin in range(start, start + t * size, size):
            for query in range(begin, begin + size, step):
                yield slice(query, min(query + step, begin + size)), slice(begin, begin + size)
        start += t * size


def attention(q_LNH: Tensor, k_LNH: Tensor, v_LNH: Tensor, grids: Sequence[Grid]) -> Tensor:
    """softmax(q k^T / sqrt(H)) v, every patch of a frame seeing all of that frame and nothing else: [L, N, H]."""
    q_NLH, k_NLH, v_NLH = (x.transpose(0, 1) for x in (q_LNH, k_LNH, v_LNH))
    blocks = []
    for i, (queries, keys) in enumerate(query_blocks(grids, q_LNH.shape[1])):
        with scope(index=i):
            product = matmul("vis_attn_qk", q_NLH[:, queries], k_NLH[:, keys].mT)
            scores = tap("vis_attn_scores", promote(product) * q_LNH.shape[-1] ** -0.5)
            probs = tap("vis_attn_probs", promote(scores).softmax(dim=-1))
            blocks.append(matmul("vis_attn_context", probs, v_NLH[:, keys]))
    return torch.cat(blocks, dim=1).transpose(0, 1)


def layer_norm(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(x - mean) r w + b, r = 1 / sqrt(mean((x - mean)^2) + 1e-6): an ordinary LayerNorm, not the text model's `1 + w`.
    The switch `vis_norm` says in which order."""
    x, how = promote(x), arithmetic.current().switch("vis_norm")
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    variance = x.square().mean(-1, True) - mean**2 if how == "moments" else centred.square().mean(-1, True)
    r = torch.rsqrt(variance + NORM_EPS)
    x = x * r - mean * r if how == "scaled" else centred * r
    return tap(name, x * promote(weight) + promote(bias))


def gelu_tanh(x: Tensor) -> Tensor:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): in the blocks."""
    x = promote(x)
    return x / 2 * (1 + torch.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))


def gelu_exact(x: Tensor) -> Tensor:
    """x/2 (1 + erf(x / sqrt(2))): in the merger. The two differ by up to 5e-4."""
    x = promote(x)
    return x / 2 * (1 + torch.erf(x / sqrt(2)))


class Affine(nn.Module):
    """Holds a weight and a bias under their checkpoint names: a linear layer's, or those of a norm (one dimension)."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(shape[0]), requires_grad=False)

    def forward(self, name: str, x: Tensor) -> Tensor:
        if self.weight.ndim == 1:
            return layer_norm(name, x, self.weight, self.bias)
        return linear(name, x, self.weight.flatten(1), self.bias)


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.num_heads
        self.qkv = Affine(3 * config.hidden_size, config.hidden_size)
        self.proj = Affine(config.hidden_size, config.hidden_size)

    def forward(self, x_LD: Tensor, cos: Tensor, sin: Tensor, grids: Sequence[Grid]) -> Tensor:
        q_LNH, k_LNH, v_LNH = self.qkv("vis_qkv", x_LD).unflatten(-1, (3, self.heads, -1)).unbind(1)
        q_LNH, k_LNH = rotate_patches("vis_q", q_LNH, cos, sin), rotate_patches("vis_k", k_LNH, cos, sin)
        return self.proj("vis_attn_output", attention(q_LNH, k_LNH, tap("vis_v", v_LNH), grids).flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.linear_fc1 = Affine(config.intermediate_size, config.hidden_size)
        self.linear_fc2 = Affine(config.hidden_size, config.intermediate_size)

    def forward(self, x_LD: Tensor) -> Tensor:
        return self.linear_fc2("vis_mlp_output", tap("vis_mlp_act", gelu_tanh(self.linear_fc1("vis_mlp_fc1", x_LD))))


class Block(nn.Module):
    """x += attention(norm1(x)); x += mlp(norm2(x)). Every linear layer has a bias."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1, self.norm2 = Affine(config.hidden_size), Affine(config.hidden_size)
        self.attn, self.mlp = VisionAttention(config), VisionMLP(config)

    def forward(self, x_LD: Tensor, cos: Tensor, sin: Tensor, grids: Sequence[Grid]) -> Tensor:
        x_LD = tap("vis_layer_input", x_LD)
        out_LD = self.attn(self.norm1("vis_norm1", x_LD), cos, sin, grids)
        x_LD = tap("vis_attn_residual", promote(x_LD) + promote(out_LD))
        out_LD = self.mlp(self.norm2("vis_norm2", x_LD))
        return tap("vis_layer_output", promote(x_LD) + promote(out_LD))


class Merger(nn.Module):
    """LayerNorm of each patch, then fc2(gelu(fc1(.))) of the m^2 patches of a block side by side. No tanh here."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.merged = config.hidden_size * config.spatial_merge_size**2
        self.norm = Affine(config.hidden_size)
        self.linear_fc1 = Affine(self.merged, self.merged)
        self.linear_fc2 = Affine(config.out_hidden_size, self.merged)

    def forward(self, x_LD: Tensor) -> Tensor:
        merged = self.norm("vis_merger_norm", x_LD).reshape(-1, self.merged)
        act = tap("vis_merger_act", gelu_exact(self.linear_fc1("vis_merger_fc1", merged)))
        return self.linear_fc2("vis_merger_out", act)


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, that is a linear layer on each patch."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = Affine(config.hidden_size, config.in_channels, *kernel)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.proj("vis_patch_embed", tap("vis_pixels", pixel_values))


class VisionTower(nn.Module):
    """`model.visual` of a checkpoint. Parameters carry the checkpoint's names and are empty until they are loaded."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        table = torch.empty(config.num_position_embeddings, config.hidden_size)
        self.pos_embed = nn.ParameterDict({"weight": nn.Parameter(table, requires_grad=False)})
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.merger = Merger(config)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Images (or videos) of any sizes: `pixel_values` [L, channels * frames * rows * columns], `grid_thw` [n, 3].

        Returns [L / m^2, out_hidden_size]: the embeddings for the placeholders, in order (tap `image_embeds`).
        Source: transformers 5.23 and timm 1.0.31 (`Qwen3VitEncoder`), which agree with it in float32.
        """
        config = self.config
        grids = check_grids(grid_thw, config.spatial_merge_size, "image")
        shape = [sum(t * h * w for t, h, w in grids), config.patch_values]
        if list(pixel_values.shape) != shape:
            expected = f"{shape}: a row for each patch of the grids {grids}"
            found = list(pixel_values.shape)
            raise Qwen35Error("pixels and grids disagree", where="pixel_values", expected=expected, found=found)
        with scope(part="visual"):
            x_LD = self.patch_embed(pixel_values)
            row, column, rows, columns = patch_places(grids, config.spatial_merge_size).to(x_LD.device)
            position_LD = tap("vis_pos_embed", interpolate(self.pos_embed["weight"], row, column, rows, columns))
            x_LD = tap("vis_embed", promote(x_LD) + promote(position_LD))
            angles = patch_angles(row, column, config.hidden_size // config.num_heads, promote(x_LD).dtype)
            cos, sin = tap("vis_rope_cos", angles.cos()), tap("vis_rope_sin", angles.sin())
            for layer, block in enumerate(self.blocks):
                with scope(layer=layer):
                    x_LD = block(x_LD, cos, sin, grids)
            return tap("image_embeds", self.merger(tap("vis_hidden", x_LD)))
