"""Prompts with images for a running SGLang: a processor's files, drawn images, and bugs of their own.

Each run has images of its own, since SGLang keeps the embeddings of an image that it has seen. Runs but `as-released`
take the attention's unfused path: the fused kernel of 0.5.17 gives all axes the position in time (sglang 34446).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from .bugs import CLEAN

RECIPE = "engine-image"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PROMPT = f"t337 t438 t539 t340 {IMAGE} t941 t374 t475 t1276 {IMAGE} t577 t678 t779 t1880 t981"
SIZES = [(96, 160), (96, 160)]  # height and width in pixels; equal, so that their order can be wrong
ARGUMENTS = {"skip_tokenizer_init": False, "enable_multimodal": True, "mm_attention_backend": "triton_attn"}


def write_processor(checkpoint: Path) -> None:
    """What AutoProcessor reads: a tokenizer with a token an id, and the settings of the image and video processors."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    config = json.loads((checkpoint / "config.json").read_text())
    vision = config["vision_config"]
    special = {config[f"{name}_token_id"]: f"<|{text}|>" for name, text in
               (("vision_start", "vision_start"), ("vision_end", "vision_end"), ("image", "image_pad"),
                ("video", "video_pad"))}  # fmt: skip
    names = {special.get(i, f"t{i}"): i for i in range(config["text_config"]["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special.values()])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    area = (vision["patch_size"] * vision["spatial_merge_size"]) ** 2
    common = {
        "processor_class": "Qwen3VLProcessor", "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"], "merge_size": vision["spatial_merge_size"],
        "size": {"shortest_edge": area, "longest_edge": 64 * area}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    files = {
        "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0", "pad_token": "t1",
                             "eos_token": "t2", "additional_special_tokens": list(special.values())},
        "preprocessor_config": {"image_processor_type": "Qwen2VLImageProcessorFast", **common},
        "video_preprocessor_config": {"video_processor_type": "Qwen3VLVideoProcessor", **common},
    }  # fmt: skip
    for name, content in files.items():
        (checkpoint / f"{name}.json").write_text(json.dumps(content))


def draw(checkpoint: Path, folder: Path, name: str) -> tuple[list[str], list[int]]:
    """Image files of a run, and the ids of its prompt; what the processor makes of them goes to NAME.safetensors."""
    import numpy
    from PIL import Image
    from safetensors.torch import save_file
    from transformers import AutoProcessor

    files, images = [], []
    for i, (height, width) in enumerate(SIZES):
        y, x = numpy.indices((height, width))
        a, b, c = (crc32(f"{name} {i} {k}".encode()) % 13 + 1 for k in range(3))
        red = (a * x + b * y + x * y * c // 32) % 256
        image = Image.fromarray(numpy.stack([red, (red + 85 * (x > width // 2)) % 256, 255 - red], -1).astype("uint8"))
        files.append(str(folder / f"{name}.{i}.png"))
        image.save(files[-1])
        images.append(image)
    made = AutoProcessor.from_pretrained(checkpoint)(text=PROMPT, images=images, return_tensors="pt")
    kept = {key: made[key].contiguous() for key in ("pixel_values", "image_grid_thw")}
    save_file(kept, folder / f"{name}.safetensors")
    return files, made["input_ids"][0].tolist()


def _unfused(site: Any) -> None:
    from sglang.srt.models import qwen3_5

    site.patch(qwen3_5, "_is_cuda", False)


def _positions(change: Callable[[Tensor, Any], Tensor]) -> Callable[[Any], None]:
    """change: of a batch's positions [3, tokens]."""

    def plant(site: Any) -> None:
        _unfused(site)
        site.before.append(lambda batch: batch.mrope_positions.copy_(change(batch.mrope_positions.clone(), batch)))

    return plant


def _embeddings(change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    def plant(site: Any) -> None:
        _unfused(site)
        site.wrap(site.runner.model.visual, lambda forward, *a, **k: change(forward(*a, **k)))

    return plant


def _no_table(site: Any) -> None:
    _unfused(site)
    weight = site.runner.model.visual.pos_embed.weight
    site.set(weight, torch.zeros_like(weight))


PLANT: dict[str, Callable[[Any], None]] = {
    CLEAN: _unfused,
    "as-released": lambda site: None,
    "height-and-width-swapped": _positions(lambda x, _: x[[0, 2, 1]]),
    "positions-by-tokens": _positions(lambda x, batch: batch.positions.expand_as(x)),
    "images-reversed": _embeddings(lambda x: torch.cat(x.chunk(len(SIZES))[::-1])),
    "embeddings-late": _embeddings(lambda x: x.roll(1, 0)),
    "position-table-ignored": _no_table,
}
