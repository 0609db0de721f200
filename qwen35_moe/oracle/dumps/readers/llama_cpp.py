"""llama.cpp: logits of llama-debug (--save-logits), and the base file of llama-perplexity (--kl-divergence-base).

    llamacpp-<model>.bin           float32 [V], logits after the last token; <...>-tokens.bin int32 beside it
    KL base, little-endian:        "_logits_", int32 n_ctx, n_vocab, n_chunk, int32 tokens[n_chunk, n_ctx], then for
                                   each chunk n_ctx - 1 - n_ctx//2 rows of 2*((n_vocab+1)//2) + 4 uint16: float32
                                   scale, float32 min_log_prob, and q: log p = scale * q + min_log_prob

A base file covers the second half of each window: row r is after token n_ctx//2 + r. It resolves 2.4e-4 nat at best.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....errors import Qwen35Error
from ....untrusted import check_regular
from ..dump import Dump, Piece, StepTokens

MAGIC = b"_logits_"


def known(file: Path) -> bool:
    return file.name.startswith(("llamacpp-", "pytorch-"))


def sniff(path: Path) -> bool:
    if path.is_dir():
        return bool(_logit_files(path))
    with path.open("rb") as file:
        return file.read(8) == MAGIC or (path.suffix == ".bin" and path.name.startswith(("llamacpp-", "pytorch-")))


def read(path: Path, *, config: Mapping[str, Any] | None = None, **_: Any) -> Dump:
    if path.is_dir():
        files = _logit_files(path)
        if len(files) > 1:
            raise Qwen35Error("several logits files lie here", where=path, found=", ".join(f.name for f in files[:3]))
        path = files[0]
    size = check_regular(path)
    with path.open("rb") as file:
        if file.read(8) == MAGIC:
            return _read_base(path, config)
    if size == 0 or size % 4:
        raise Qwen35Error("file is truncated", where=path, expected="float32 logits", found=f"{size} bytes")
    tokens_file = path.with_name(path.stem + "-tokens.bin")
    tokens, rows = {}, None
    if tokens_file.is_file():
        ids = torch.from_numpy(np.fromfile(tokens_file, np.int32).astype(np.int64))
        tokens, rows = {0: StepTokens(ids, torch.arange(ids.numel()))}, torch.tensor([ids.numel() - 1])
    load = partial(lambda p: torch.from_numpy(np.fromfile(p, np.float32))[None], path)
    piece = Piece("logits", load, path="next_token_logits", where=str(path), rows=rows)
    return Dump("llama.cpp logits", path, [piece], tokens, config=config)


def _logit_files(path: Path) -> list[Path]:
    return sorted(p for p in path.glob("llamacpp-*.bin") if not p.stem.endswith(("-tokens", "-embeddings")))


def _read_base(path: Path, config: Any) -> Dump:
    with path.open("rb") as file:
        header = file.read(20)
    if len(header) < 20:
        found = f"{len(header)} bytes"
        raise Qwen35Error("file is truncated", where=path, expected="a header of 20 bytes", found=found)
    n_ctx, n_vocab, n_chunk = struct.unpack("<3i", header[8:])
    if min(n_ctx, n_vocab, n_chunk) <= 0:
        raise Qwen35Error("not a KL base file", where=path, found=f"n_ctx, n_vocab, n_chunk {n_ctx, n_vocab, n_chunk}")
    first, width = n_ctx // 2, 2 * ((n_vocab + 1) // 2) + 4
    count = n_ctx - 1 - first
    start, chunk_bytes = 20 + 4 * n_chunk * n_ctx, 2 * count * width
    expected, size = start + n_chunk * chunk_bytes, path.stat().st_size
    if size != expected:
        raise Qwen35Error("file is truncated", where=path, expected=f"{expected} bytes", found=f"{size} bytes",
                          do="let llama-perplexity finish")  # fmt: skip
    ids = torch.from_numpy(np.fromfile(path, np.int32, n_chunk * n_ctx, offset=20).astype(np.int64))
    tokens = {i: StepTokens(row, torch.arange(n_ctx)) for i, row in enumerate(ids.view(n_chunk, n_ctx))}
    rows = torch.arange(first, first + count)
    pieces = [
        Piece(f"chunk {i}", partial(_log_probs, path, start + i * chunk_bytes, count, width, n_vocab), i,
              path="next_token_logprobs", key="next_token_logprobs", where=str(path), rows=rows)
        for i in range(n_chunk)
    ]  # fmt: skip
    return Dump("llama.cpp KL base", path, pieces, tokens, config=config)


def _log_probs(path: Path, offset: int, count: int, width: int, n_vocab: int) -> Tensor:
    rows = np.fromfile(path, np.uint16, count * width, offset=offset).reshape(count, width)
    scale, least = np.ascontiguousarray(rows[:, :4]).view(np.float32).T
    return torch.from_numpy(scale[:, None] * rows[:, 4 : 4 + n_vocab].astype(np.float32) + least[:, None])
