"""What a lint reads besides headers: the files beside the tensors, ids of special tokens, and every stored value."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint
from ..errors import Qwen35Error
from ..model.config import Config
from ..untrusted import read_json

BYTES_AT_ONCE = 1 << 20  # a piece stays in a core's cache until it has been looked at
# dtype -> bytes of a value, and its bits without the sign from which on it is infinite or NaN.
FIRST_NOT_FINITE = {"BF16": (2, 0x7F80), "F16": (2, 0x7C00), "F32": (4, 0x7F80_0000), "F64": (8, 0x7FF0 << 48),
                    "F8_E4M3": (1, 0x7F), "F8_E5M2": (1, 0x7C)}  # fmt: skip
SPECIAL = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "eos_token_id",
           "bos_token_id", "pad_token_id")  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. level: "error" (it breaks), "warning" (it may), or "note". rule: its kind, as "nan"."""

    level: str
    rule: str
    where: str
    text: str
    engine: str = ""  # "" where every reader is concerned

    def __str__(self) -> str:
        return f"{self.level}: {self.where}: {self.text}" + (f" [{self.engine}]" if self.engine else "")


def check_ids(checkpoint: Checkpoint, config: Config) -> Iterator[Finding]:
    """Ids of special tokens that have no row in the embedding, and rotary settings that are absent."""
    root = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    generation = root / "generation_config.json"
    places: list[tuple[str, Any]] = [("config.json", config.raw), ("config.json", config.raw.get("text_config"))]
    try:
        places += [(generation.name, read_json(generation))] if generation.is_file() else []
    except Qwen35Error as error:
        yield Finding("error", "special-id", generation.name, error.what)
    for file, place in places:
        for key in SPECIAL if isinstance(place, Mapping) else ():
            ids = place.get(key)
            for i in ids if isinstance(ids, list) else [ids]:
                if type(i) is int and not 0 <= i < config.vocab_size:
                    text = f"{i} is no row of an embedding of {config.vocab_size}"
                    yield Finding("error", "special-id", f"{file}: {key}", text)
    inner = config.raw.get("text_config", config.raw)
    if not any(inner.get(key) for key in ("rope_parameters", "rope_scaling", "rope_theta")):
        text = "absent: readers fall back on defaults, and not all on 10,000,000 and a quarter of the head"
        yield Finding("warning", "rope", "config.json: rope_parameters", text)


def check_files(path: Path) -> Iterator[Finding]:
    """A missing tokenizer, without which a server knows ids only, or chat template, without which it refuses chats."""
    root = path if path.is_dir() else path.parent
    if not any((root / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        yield Finding("note", "tokenizer", str(root), "no tokenizer.json: a server needs one, or ids only")
    elif not _has_template(root):
        yield Finding("warning", "chat-template", str(root), "no chat template: /v1/chat/completions will refuse")


def _has_template(root: Path) -> bool:
    if any((root / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return "chat_template" in read_json(root / "tokenizer_config.json")
    except (Qwen35Error, TypeError, json.JSONDecodeError):
        return False


def check_bytes(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Reads every tensor, in the order of the files: NaN and infinity, scales that are zero, tensors of zeros only."""
    buffer = np.empty(BYTES_AT_ONCE, np.uint8)
    for name, stored in sorted(checkpoint.tensors.items(), key=lambda item: (item[1].file, item[1].begin)):
        scale, sizes = "scale" in name.rpartition(".")[2], range(0, stored.nbytes, BYTES_AT_ONCE)
        bad = zero = largest = 0
        for at in sizes:
            piece = buffer[: min(BYTES_AT_ONCE, stored.nbytes - at)]
            checkpoint.reader.read(stored, at, piece.data)
            wrong, nothing, top = _count(piece, stored.dtype, scale)
            bad, zero, largest = bad + wrong, zero + nothing, max(largest, top)
        if bad:
            yield Finding("error", "nan", stored.where, f"{bad} values are NaN or infinite")
        if zero:
            yield Finding("warning", "zero-scale", stored.where, f"{zero} scales are zero: what they scale is lost")
        if not scale and not largest and sizes and len(stored.shape) > 1:
            text = "every byte is zero: an interrupted download leaves such tensors"
            yield Finding("warning", "zeros", stored.where, text)


def _count(piece: np.ndarray, dtype: str, scale: bool) -> tuple[int, int, int]:
    """(values that are NaN or infinite, scales that are zero, the largest bit pattern).

    The bits of a positive value that is not finite are at least `limit`, read as a signed number. Those of a negative
    one are at least sign + limit, read as an unsigned number. So two maxima tell whether there is anything to count.
    """
    size, limit = FIRST_NOT_FINITE.get(dtype, (1, 0))
    bits, sign = piece.view(f"u{size}"), 1 << 8 * size - 1
    largest = int(bits.max())
    if dtype in ("U8", "F8_E8M0"):  # E8M0 has no sign and no zero, and 255 is NaN
        return int((bits == 255).sum()) if scale and largest == 255 else 0, 0, largest
    if not limit:
        return 0, 0, largest
    odd = largest >= sign + limit or int(bits.view(f"i{size}").max()) >= limit
    magnitudes = bits & (sign - 1) if odd or scale else bits
    return int((magnitudes >= limit).sum()) if odd else 0, int((magnitudes == 0).sum()) if scale else 0, largest
