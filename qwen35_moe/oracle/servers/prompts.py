"""Drawn prompts: ids from the integer hash, so that anyone can repeat them."""

from __future__ import annotations

from typing import Any

from ...model.config import Config
from ...run.generate import uniform


def ordinary(config: Config) -> int:
    """The number of ordinary tokens. Special tokens and rows that pad the vocabulary come after them."""
    text: dict[str, Any] = config.raw.get("text_config", config.raw)
    found = [v for part in (config.raw, text) for k, v in part.items() if k.endswith("_token_id")]
    flat = [i for v in found for i in (v if isinstance(v, list) else [v])]
    special = [i for i in flat if type(i) is int and config.vocab_size // 2 <= i < config.vocab_size]
    return min([*special, config.vocab_size - 1])


def drawn_prompts(config: Config, prompts: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """`prompts` lists of `tokens` ids, uniform over the ordinary ones: id = floor(u(seed, place) n)."""
    n = ordinary(config)
    return [[int(uniform(seed, p * tokens + t) * n) for t in range(tokens)] for p in range(prompts)]
