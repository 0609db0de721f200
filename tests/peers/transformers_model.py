"""transformers' Qwen3.5 MoE, loaded from a checkpoint directory: no network, no warning, on the CPU."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, Qwen3_5MoeForCausalLM, Qwen3_5MoeForConditionalGeneration
from transformers.cache_utils import DynamicCache
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar, and nothing on the console below an error: it says, once a process, that kernels are missing."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_transformers(path: str | Path, dtype: torch.dtype, attn: str = "eager", experts: str = "eager") -> Any:
    """The checkpoint in `path` (config.json nested or flat) as transformers' module, every parameter in `dtype`.

    bfloat16 also rounds the tensors that are stored as float32 (A_log, the gated norm's weight), as `dtype="auto"` does
    for a bfloat16 config. float64 takes the stored values exactly; see `float64.float64_clean` before running it.
    """
    with quiet():
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        nested = hasattr(config, "text_config")
        model, info = (Qwen3_5MoeForConditionalGeneration if nested else Qwen3_5MoeForCausalLM).from_pretrained(
            path, config=config, dtype=dtype, attn_implementation=attn, experts_implementation=experts,
            local_files_only=True, output_loading_info=True,
        )  # fmt: skip
    problems = {name: found for name, found in info.items() if found}
    if problems:
        raise AssertionError(f"transformers did not load {path} whole: {problems}")
    return model.eval()


def new_cache(model: Any) -> DynamicCache:
    """An empty cache; a model takes it as `model(..., **cached(cache))`."""
    return DynamicCache(config=model.config.get_text_config())


def cached(cache: DynamicCache) -> dict[str, Any]:
    """The arguments that give a model its cache: transformers 5.24 has renamed `past_key_values` to `cache`."""
    known = inspect.signature(Qwen3_5MoeForCausalLM.forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache, "use_cache": True}


@torch.no_grad()
def logits_of(model: Any, input_ids: Tensor, **arguments: Any) -> Tensor:
    """[B, T, V], in the dtype in which transformers computes them."""
    with quiet():
        return model(input_ids=input_ids, **{"use_cache": False, **arguments}).logits
