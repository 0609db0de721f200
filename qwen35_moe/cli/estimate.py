"""What a run will take: memory and disk, counted; time, from parts of it that are run here."""

from __future__ import annotations

import os
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..model.cache import LayerState
from ..model.config import FULL, Config
from ..model.rope import rotary_angles
from ..numerics import arithmetics
from ..numerics.arithmetics import Arithmetic, get
from ..numerics.tap_table import TAPS
from ..run.load import build
from ..run.source import WeightSource
from ..run.streamed import HEAD_ROWS
from ..trace.file import CHUNK_BYTES

SLACK = 64 << 20  # what the libraries take once they compute more than `warm_up`
SAMPLE, HEAD_SAMPLE = 128, 512  # tokens that are run, and what they take is multiplied
EXPERTS, ROWS = 16, 512  # that are run, with as many rows as each will have, or with so many


def estimate(
    checkpoint: Checkpoint, config: Config, rows: Sequence[dict[str, Any]], tokens: int, arithmetic: str
) -> dict[str, Any]:
    """Peak memory, time and disk of a streamed run over so many tokens. rows: what `info` tells of the modules.

    Time of one forward pass: see `pace`. Writing a trace comes on top.

    Memory, an upper bound for `qwen35-moe trace` with all taps when it streams: the process; the weights of one layer;
    an expert a thread; what taps hold until they are written, and once more while they are. For the other modes: one
    forward pass, whose logits are held.
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
    warm_up(table.dtype, D, F)
    process = resident() + SLACK  # as much as this one, which has just multiplied
    parts = pace(checkpoint, config, table, tokens)
    taps = [tap_bytes(config, kind, tokens, width) for kind in config.layer_types]
    held = max(min(sum(sizes), CHUNK_BYTES + max(sizes)) for sizes in taps)
    logits, stream = tokens * V * width, tokens * D * width * 8
    some = torch.get_num_threads() * 3 * D * F * width
    head = min(HEAD_ROWS, V) * (D * (width + 2) + 2 * tokens * width)
    mapped = all(row["format"] == str(table.dtype).removeprefix("torch.").replace("float", "f") for row in text)
    return {
        "tokens": tokens,
        "arithmetic": arithmetic,
        "seconds": sum(parts.values()),
        "parts": parts,
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
    """Bytes of each tap of a layer: the product of its dims (tap_names.py), for one sequence of so many tokens."""
    c, elsewhere = config, "gdn_" if kind == FULL else "attn_"
    J, K, P, M = c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim, c.linear_num_key_heads
    sizes = {
        "t": tokens, "s": tokens, "d": c.hidden_size, "n": c.num_attention_heads, "g": c.num_key_value_heads,
        "h": c.head_dim, "r": c.head_dim, "j": J, "m": M, "k": K, "p": P, "c": c.conv_dim,
        "w": c.linear_conv_kernel_dim - 1, "e": c.num_experts, "a": c.num_experts_per_tok + 1,
        "f": c.shared_expert_intermediate_size,
    }  # fmt: skip
    found = []
    for name, tap in TAPS.items():
        in_layer = re.match(r"(layer_|input_layernorm|pre_mlp_|mlp_output|moe_|attn_|gdn_)", name)
        in_loop = re.match(r"(moe_expert_|moe_a2|moe_partial_sum|gdn_recall|gdn_conv_product)", name)
        if in_layer and not in_loop and (not name.startswith(elsewhere) or name == "attn_output"):
            words = re.findall(r"\d+|[a-z]", tap.dims)
            found.append(width * prod(int(word) if word.isdigit() else sizes.get(word, 1) for word in words))
    return found


def warm_up(dtype: torch.dtype, D: int, F: int) -> None:
    """One product, for which the libraries take their memory."""
    torch.nn.functional.linear(torch.ones(16, D, dtype=dtype), torch.ones(2 * F, D, dtype=dtype))


@torch.inference_mode()
def pace(checkpoint: Checkpoint, config: Config, table: Arithmetic, tokens: int) -> dict[str, float]:
    """Seconds of one streamed pass over so many tokens, by part of the model.

    Run here, with this checkpoint's weights: the plain weights of the first layer of each kind are read; its mixer and
    its shared expert see up to SAMPLE tokens; EXPERTS experts see as many rows each as they will have, up to ROWS; a
    block of the head sees up to HEAD_SAMPLE tokens. Each counts as often as it will be. Files are taken to be in the
    page cache, and attention's share that grows with the square of the tokens, as linear.
    """
    D, E, A, V = config.hidden_size, config.num_experts, config.num_experts_per_tok, config.vocab_size
    model = build(
        WeightSource(checkpoint, config), table, [False] * config.num_hidden_layers, torch.device("cpu"), "stream"
    )
    some, few, hit = min(tokens, SAMPLE), min(E, EXPERTS), E * (1 - (1 - A / E) ** tokens)
    long_BTD = torch.linspace(-1, 1, min(tokens, HEAD_SAMPLE) * D, dtype=table.dtype).view(1, -1, D)
    x_BTD = long_BTD[:, :some]
    each = ceil(tokens * A / hit)  # rows of an expert
    ids_T1 = torch.arange(few).repeat(min(each, ROWS))[:, None]
    x_TD, weights_T1 = x_BTD[0, torch.arange(len(ids_T1)) % some], torch.ones(ids_T1.shape, dtype=table.dtype)
    parts, used = dict.fromkeys(("plain weights", "mixers", "experts", "head"), 0.0), set(checkpoint.used)
    with arithmetics.using(table):
        angles = rotary_angles(config, torch.arange(some)[None], table.dtype)
        for kind in set(config.layer_types):
            i, count = config.layer_types.index(kind), config.layer_types.count(kind)
            layer: Any = model.layers[i]
            mixer = partial(layer.self_attn, x_BTD, *angles) if kind == FULL else partial(layer.linear_attn, x_BTD)
            sampled = _best(lambda mixer=mixer: mixer(None, LayerState())) + _best(layer.mlp.shared_expert, x_BTD[0])
            parts["plain weights"] += count * _best(model.layers.__getitem__, i)
            parts["mixers"] += count * tokens / some * sampled
            sampled = _best(layer.mlp.experts.combine, x_TD, ids_T1, weights_T1)
            parts["experts"] += count * hit / few * max(1, each / ROWS) * sampled
        blocks: Any = model.lm_head.blocks
        block = _best(lambda: next(blocks("next_token_logits", long_BTD)))
    parts["head"] = tokens / long_BTD.shape[1] * V / min(V, HEAD_ROWS) * block
    checkpoint.used.intersection_update(used)
    return parts


def _best(step: Callable[..., object], *arguments: Any, seconds: float = 0.1) -> float:
    """Of at least two; the first, which sets things up, does not count."""
    step(*arguments)
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds:
        start = time.perf_counter()
        step(*arguments)
        times.append(time.perf_counter() - start)
    return min(times)


def resident() -> int:
    """Bytes of memory that this process holds; where the system does not tell, the most that it ever held."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")
