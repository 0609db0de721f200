"""The files beside the tensors, ids of special tokens, and every stored value: what a lint reads besides headers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..errors import Qwen35Error
from ..model.config import Config
from ..untrusted import read_json

BYTES_AT_ONCE = 1 << 26
SPECIAL = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "eos_token_id",
           "bos_token_id", "pad_token_id")  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. level: "error" (it breaks), "warning" (it may), or "note"."""

    level: str
    rule: str
    where: str
    text: str
    engine: str = ""  # "" where every reader is concerned

    def __str__(self) -> str:
        return f"{self.level}: {self.where}: {self.text}" + (f" [{self.engine}]" if self.engine else "")


def check_ids(checkpoint: Checkpoint, config: Config) -> Iterator[Finding]:
    """Ids of special tokens, which must have a row of the embedding, and rotary settings that are not stated."""
    text = config.raw.get("text_config")
    for place in (config.raw, text if isinstance(text, Mapping) else {}):
        for key in SPECIAL:
            ids = place.get(key)
            for i in ids if isinstance(ids, list) else [ids]:
                if type(i) is int and not 0 <= i < config.vocab_size:
                    text = f"{i} is no row of an embedding of {config.vocab_size}"
                    yield Finding("error", "special-id", f"config.json: {key}", text)
    inner = config.raw.get("text_config", config.raw)
    if not any(key in inner for key in ("rope_parameters", "rope_scaling", "rope_theta")):
        text = "absent: readers fall back on defaults, and not all on 10,000,000 and a quarter of the head"
        yield Finding("warning", "rope", "config.json: rope_parameters", text)


def check_files(path: Path) -> Iterator[Finding]:
    """Tokenizer and chat template, without which a server starts and answers nothing, or in another format."""
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
    """Reads every tensor, in the order of the files: NaN and infinite values, scales that are zero."""
    for name, stored in sorted(checkpoint.tensors.items(), key=lambda item: (item[1].file, item[1].begin)):
        scale = "scale" in name.rpartition(".")[2]
        if stored.dtype not in ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E8M0") and not (
            scale and stored.dtype == "U8"
        ):
            continue
        bad = zero = 0
        for part in _pieces(checkpoint, name):
            wrong, nothing = _wrong(part, scale)
            bad, zero = bad + wrong, zero + nothing
        if bad:
            yield Finding("error", "nan", stored.where, f"{bad} values are NaN or infinite")
        if zero and scale:
            yield Finding("warning", "zero-scale", stored.where, f"{zero} scales are zero: what they scale is lost")


def _pieces(checkpoint: Checkpoint, name: str) -> Iterator[Any]:
    stored = checkpoint.stored(name)
    if not stored.shape or stored.nbytes <= BYTES_AT_ONCE:
        yield checkpoint.read(name)
        return
    rows = max(1, stored.shape[0] * BYTES_AT_ONCE // stored.nbytes)
    for at in range(0, stored.shape[0], rows):
        yield checkpoint.read(name, slice(at, min(at + rows, stored.shape[0])))


def _wrong(x: torch.Tensor, scale: bool) -> tuple[int, int]:
    """(values that are NaN or infinite, scales that are zero). E8M0: 255 is NaN, 0 a small power of two."""
    if x.element_size() == 1:
        codes = x.view(torch.uint8)
        nan = codes == 255 if x.dtype != torch.float8_e4m3fn else (codes & 127) == 127
        zero = (codes & 127) == 0 if scale and x.dtype == torch.float8_e4m3fn else codes.new_zeros(1)
        return int(nan.sum()), int(zero.sum())
    return int((~x.isfinite()).sum()), int((x == 0).sum()) if scale else 0
