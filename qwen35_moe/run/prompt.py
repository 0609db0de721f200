"""Prompts: from text and images to the model's inputs, by the tokenizer and processor of the checkpoint's folder.

Ids need none of it. transformers is imported where it is used, and never asks the network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Qwen35Error, extra
from ..model.config import Config
from ..model.text import Model
from ..model.vision.config import VisionConfig
from ..model.vision.positions import check_grids, embed_images, rope_positions, token_types
from ..numerics import arithmetics
from ..untrusted import check_regular, parse_json, read_bytes, read_json
from .origin import was_left_out

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")

IDS_LIMIT = 1 << 28  # bytes of a file of token ids: some ten million


def read_ids(text: str, option: str) -> list[list[int]]:
    """Token ids of one or more prompts, as an argument or in a file: "1,2,3", "1 2 3", "[1, 2, 3]", "[[1, 2], [3]]", an
    object with `input_ids` (less what an `attention_mask` beside it marks as padding), or what `generate` prints: ids,
    or --json.

    Raises Qwen35Error for anything else, and for a file that cannot be read.
    """
    try:
        is_file = Path(text).is_file()
    except OSError:  # too long for a name
        is_file = False
    try:
        source = read_bytes(Path(text), IDS_LIMIT).decode("utf-8-sig") if is_file else text
    except UnicodeDecodeError as error:
        raise Qwen35Error("cannot read token ids", where=f"{option} {text}", found=error) from error
    rows = _rows(source.strip())
    if not (rows and all(row and all(type(i) is int and 0 <= i < 2**31 for i in row) for row in rows)):
        expected = '"1,2,3", or a file with a list of ids, or of such lists'
        do = "" if is_file or not re.search(r"[/.]", text) else "if this is a file: it does not exist"
        raise Qwen35Error("not a list of token ids", where=f"{option} {text}" if is_file else option,
                          expected=expected, found=source[:60] or "nothing", do=do)  # fmt: skip
    return rows


def _rows(source: str) -> list[list[Any]]:
    """Lists of ids; empty if the value is not one."""
    if re.fullmatch(r"\d{1,10}((\s*,\s*|\s+)\d{1,10})*", source):
        return [[int(word) for word in re.findall(r"\d+", source)]]
    try:
        found = parse_json(source.encode(), "token ids")
    except ValueError:
        try:  # generate --json: one object a token
            return [[parse_json(line.encode(), "token ids")["id"] for line in source.splitlines()]]
        except (ValueError, KeyError, TypeError):
            return []
    if not isinstance(found, dict):
        return _listed(found)
    rows, mask = _listed(found.get("input_ids")), found.get("attention_mask")
    if mask is None:
        return rows
    marks = _listed(mask)
    if [len(row) for row in rows] != [len(row) for row in marks]:
        return []
    return [[i for i, real in zip(*pair, strict=True) if real] for pair in zip(rows, marks, strict=True)]


def _listed(found: Any) -> list[list[Any]]:
    """Lists of lists, also of a single one."""
    rows = found if isinstance(found, list) and found and isinstance(found[0], list) else [found]
    return rows if all(isinstance(row, list) for row in rows) else []


@dataclass(frozen=True)
class Images:
    """Images and videos of prompts, as a processor gives them: patches [L, patch values], grids [n, 3] (t, h, w)."""

    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None
    pixel_values_videos: Tensor | None = None
    video_grid_thw: Tensor | None = None

    def given(self) -> dict[str, Tensor]:
        """Those that are there, by the names that `embed_prompt` has for them."""
        return {name: x for name, x in vars(self).items() if x is not None}


@torch.inference_mode()
def embed_prompt(
    model: Model,
    input_ids: Tensor,
    pixel_values: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    pixel_values_videos: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """What `model(**...)` takes for prompts with images or videos: inputs_embeds [B, T, D], position_ids [3, B, T], and
    the attention_mask, if there is one.

    input_ids [B, T] hold a placeholder for each merge block (`place_images` writes them); pixels and grids are as the
    processor gives them. Tokens that follow need ids and the same cache only: it knows the next position.
    """
    tower: Any = model.visual
    if tower is None:
        do = "load without text_only" if was_left_out(model, "visual") else "this checkpoint cannot see"
        raise Qwen35Error("the model has no vision tower", where="model.visual", found=None, do=do)
    types_BT = token_types(input_ids, special_id(model.config, "image"), special_id(model.config, "video"))
    pairs = ((pixel_values, image_grid_thw), (pixel_values_videos, video_grid_thw))
    seen = [i for i, (pixels, grids) in enumerate(pairs) if pixels is not None and grids is not None]
    rows, merged = list[Tensor | None]([None, None]), tower.config.spatial_merge_size
    with arithmetics.using(model.arithmetic):
        if seen:  # in one pass, so that each tap of the tower is met once
            pixels_LY, grids_n3 = (torch.cat([pairs[i][k] for i in seen]) for k in (0, 1))  # type: ignore[misc]
            counts = [int(pairs[i][1].prod(1).sum()) // merged**2 for i in seen]  # type: ignore[union-attr]
            for i, part in zip(seen, tower(pixels_LY, grids_n3).split(counts), strict=True):
                rows[i] = part
        embeds_BTD = embed_images(model.embed_tokens(input_ids), types_BT, *rows)
    positions_3BT = rope_positions(types_BT, image_grid_thw, video_grid_thw, attention_mask, merged)
    mask = {} if attention_mask is None else {"attention_mask": attention_mask}
    return {"inputs_embeds": embeds_BTD, "position_ids": positions_3BT, **mask}


def special_id(config: Config, kind: str) -> int:
    """`image_token_id`, `video_token_id`, `vision_start_token_id` or `vision_end_token_id` of config.json."""
    key = f"{kind}_token_id"
    if not isinstance(found := config.raw.get(key), int):
        raise Qwen35Error("a key is missing", where=f"config.json: {key}", expected="an integer", found=found)
    return found


def placeholders(config: Config, ids: Tensor) -> Tensor:
    """`token_types` of ids; all text to a configuration that knows no images."""
    image, video = (config.raw.get(f"{kind}_token_id") for kind in ("image", "video"))
    return token_types(ids, *(i if isinstance(i, int) else -1 for i in (image, video)))


def vision_of(config: Config) -> VisionConfig:
    """What config.json says of the vision tower."""
    return VisionConfig.from_dict(config.raw.get("vision_config") or {}, config.hidden_size)


def place_images(config: Config, ids: Sequence[int], grids: Tensor) -> list[int]:
    """`ids` with one placeholder for each merge block of each image.

    `ids` may have them already, or one placeholder for an image (as chat templates write), or none at all: then the
    images, each between its vision_start and vision_end, come before everything else.
    """
    image, merged = special_id(config, "image"), vision_of(config).spatial_merge_size
    sizes = [t * h * w // merged**2 for t, h, w in check_grids(grids, merged, "image")]
    found = list(ids).count(image)
    if not found:
        start, end = special_id(config, "vision_start"), special_id(config, "vision_end")
        ids, found = [*[start, image, end] * len(sizes), *ids], len(sizes)
    if found == sum(sizes):
        return list(ids)
    if found != len(sizes):
        expected = f"none, {len(sizes)} (one an image) or {sum(sizes)} (one a merge block) times {image}"
        raise Qwen35Error("placeholders and images disagree", where="ids", expected=expected, found=found)
    left = iter(sizes)
    return [i for token in ids for i in ([image] * next(left) if token == image else [token])]


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a checkpoint's folder, as transformers reads it."""
    if not any((Path(folder) / name).is_file() for name in TOKENIZER_FILES):
        do = "give the prompt as ids (--ids), or copy the model's tokenizer files into the folder"
        raise Qwen35Error("no tokenizer", where=folder, expected=" or ".join(TOKENIZER_FILES), do=do)
    with extra("hf"):
        from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Qwen35Error("transformers cannot read the tokenizer", where=folder, found=error) from error


def prompt_ids(folder: str | Path, text: str) -> list[int]:
    """Ids of a prompt. Special tokens in the text count as such; nothing is put in front."""
    ids: list[int] = load_tokenizer(folder).encode(text, add_special_tokens=False)
    return ids


def load_images(folder: str | Path, images: Sequence[str | Path]) -> tuple[Tensor, Tensor]:
    """(pixel_values [L, patch values], image_grid_thw [n, 3]) of image files, by the folder's preprocessor settings.

    Files are opened as transformers' `load_image` does: turned as their EXIF says, transparency dropped.
    transformers' Pillow processor resizes, normalises and cuts into patches, whether or not torchvision is there: it
    resizes differently, and pixels should not depend on what else is installed.
    """
    if not any((Path(folder) / name).is_file() for name in PROCESSOR_FILES):
        do = "copy the model's preprocessor_config.json into the folder"
        raise Qwen35Error("no image processor", where=folder, expected=" or ".join(PROCESSOR_FILES), do=do)
    with extra("vision"):
        from PIL import Image, ImageOps
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    opened = []
    for path in images:
        check_regular(Path(path))
        try:
            opened.append(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise Qwen35Error("cannot read the image", where=path, found=error) from error
    try:
        processor = Qwen2VLImageProcessorPil.from_pretrained(str(folder), local_files_only=True)
        batch = processor(images=opened, return_tensors="pt")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Qwen35Error("transformers cannot process the images", where=folder, found=error) from error
    return batch["pixel_values"], batch["image_grid_thw"]


def stop_ids(folder: str | Path, config: Config) -> tuple[int, ...]:
    """Ids that end a text: `eos_token_id` of generation_config.json, or else of config.json; one or several."""
    path = Path(folder) / "generation_config.json"
    raw: Any = read_json(path) if path.is_file() else {}
    text = config.raw.get("text_config", config.raw)
    found = raw.get("eos_token_id", text.get("eos_token_id")) if isinstance(raw, dict) else raw
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(i) is int for i in ids):
        raise Qwen35Error("bad value", where=f"{path}: eos_token_id", expected="an id, or several", found=found)
    return tuple(ids)


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """[B, T], zeros at the end, and the mask (None where nothing is padded)."""
    T = max(len(r) for r in rows)
    ids, mask = torch.zeros(len(rows), T, dtype=torch.long), torch.zeros(len(rows), T, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, : len(row)], mask[b, : len(row)] = row, 1
    return ids, None if bool(mask.all()) else mask
