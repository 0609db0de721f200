"""A model that need not fit: streamed by us, mapped by transformers, or on accelerate's disk; one checkpoint, one run.

    python -m weights.build slice-35b --layers 2 --layout bf16 --text-only --out build/slice-35b
    python -m benchmarks.bench_offload build/slice-35b

How it measures: bench_prefill.py. Files are in the page cache. accelerate's layers are on "disk" as `from_pretrained`
puts them there; embedding, norm and head, which it would copy for every pass as well, are left in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.bench_prefill import Load, main, ours, transformers


def on_disk(path: str) -> Callable[[Any], Any]:
    """transformers with each layer on accelerate's disk."""
    config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    count = config.get("text_config", config)["num_hidden_layers"]
    places = {f"model.layers.{i}": "disk" for i in range(count)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    folder = TemporaryDirectory()
    run = transformers(path, device_map=places, offload_folder=folder.name)

    def forward(ids: Any, folder: TemporaryDirectory = folder) -> Any:  # which lives as long as the model
        return run(ids)

    return forward


PROGRAMS: dict[str, Load] = {
    "stream f32": partial(ours, arithmetic="float32", mode="stream"),
    "stream bf16": partial(ours, mode="stream"),
    "resident f32": partial(ours, arithmetic="float32"),
    "resident bf16": ours,
    "transformers": transformers,
    "accelerate disk": on_disk,
}

if __name__ == "__main__":
    main(PROGRAMS, ("transformers", "accelerate disk"), __doc__)
