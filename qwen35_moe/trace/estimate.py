"""The memory and disk that a run will need."""

from __future__ import annotations

import os
import re
import resource
import sys
from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..model.config import FULL, Config
from ..numerics.arithmetics import get
from ..numerics.tap_table import LETTERS, TAPS
from ..run.streamed import HEAD_ROWS
from .file import CHUNK_BYTES

SLACK = 64 << 20  # what the libraries take once they compute more than one product


def estimate(
    checkpoint: Checkpoint, config: Config, rows: Sequence[dict[str, Any]], tokens: int, arithmetic: str
) -> dict[str, Any]:
    """Peak memory and disk of a run over so many tokens. rows: the modules, as `info` lists them.

    Memory is an upper bound. When `qwen35-moe trace` streams with all taps, it holds the process, the weights of one
    layer, an expert a thread, and the values of taps until they are written, twice while they are. The other modes:
    one forward pass with its logits.
    """
    table = get(arithmetic)
    width, D, F = table.dtype.itemsize, config.hidden_size, config.moe_intermediate_size
    V = config.vocab_size
    text = [row for row in rows if not row["module"].startswith(("mtp.", "visual."))]
    all_values = sum(row["parameters"] for row in text)
    experts = [row for row in text if ".mlp.experts" in row["module"]]
    packed, expert_values = sum(row["bytes"] for row in experts), sum(row["parameters"] for row in experts)
    ends = V * D * (1 if config.tie_word_embeddings else 2)
    plain = all_values - expert_values - ends
    layers, largest = _layers(checkpoint)
    torch.nn.functional.linear(torch.ones(16, D, dtype=table.dtype), torch.ones(2 * F, D, dtype=table.dtype))
    process = resident() + SLACK  # as much as this one, whose libraries have just taken their memory for a product
    taps = [tap_bytes(config, kind, tokens, width) for kind in config.layer_types]
    held = max(min(sum(sizes), CHUNK_BYTES + max(sizes)) for sizes in taps)
    logits, stream = tokens * V * width, tokens * D * width * 8
    some = torch.get_num_threads() * 3 * D * F * width
    head = min(HEAD_ROWS, V) * (D * (width + 2) + 2 * tokens * width)
    mapped = all(row["format"] == str(table.dtype).removeprefix("torch.").replace("float", "f") for row in text)
    return {
        "tokens": tokens,
        "arithmetic": arithmetic,
        "trace_bytes": sum(map(sum, taps)) + logits,
        "memory": {
            "stream": int(process + max(layers * width + largest + some + 2 * held, head) + stream),
            "packed": int(process + packed + (plain + ends) * width + some + logits + stream),
            "decoded": int(process + (0 if mapped else all_values * width) + logits + stream),
        },
    }


def _layers(checkpoint: Checkpoint) -> tuple[int, int]:
    """Values of the largest layer without its experts, and stored bytes of the largest weight in one."""
    values, largest = Counter[str](), 0
    for module, roles in checkpoint.modules.items():
        if module.startswith("layers.") and ".mlp.experts" not in module:
            values[module.split(".")[1]] += prod(checkpoint.find(module).shape)
            largest = max(largest, *(stored.nbytes for stored in roles.values()))
    return max(values.values()), largest


def tap_bytes(config: Config, kind: str, tokens: int, width: int) -> list[int]:
    """Bytes of each tap of a layer: the product of its dims (tap_table.py), for one sequence of so many tokens."""
    elsewhere = "gdn_" if kind == FULL else "attn_"
    sizes = {letter: vars(config)[key] for letter, key in LETTERS.items()} | {
        "t": tokens, "s": tokens, "r": config.head_dim, "c": config.conv_dim, "w": config.linear_conv_kernel_dim - 1,
        "a": config.num_experts_per_tok + 1,
    }  # fmt: skip
    found = []
    for name, tap in TAPS.items():
        in_layer = re.match(r"(layer_|input_layernorm|pre_mlp_|mlp_output|moe_|attn_|gdn_)", name)
        in_loop = re.match(r"(moe_expert_|moe_a2|moe_partial_sum|gdn_recall|gdn_conv_product)", name)
        if in_layer and not in_loop and (not name.startswith(elsewhere) or name == "attn_output"):
            words = re.findall(r"\d+|[a-z]", tap.dims)
            found.append(width * prod(int(word) if word.isdigit() else sizes.get(word, 1) for word in words))
    return found


def resident() -> int:
    """Bytes of memory that this process holds; where the system does not tell, the most that it ever held."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")
