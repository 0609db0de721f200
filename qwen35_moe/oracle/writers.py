"""Writing the truth in other programs' formats, so that their own tools can score an engine against it."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..tap_names import TAPS, base_name
from .align import joined
from .trace_file import Trace


def write_sglang_dump(
    trace: Trace,
    path: str | Path,
    *,
    names: Literal["taps", "hooks"] = "taps",
    dtype: torch.dtype | None = None,
    model: str = "model",
) -> int:
    """Write a trace as a dump that SGLang's comparator (0.5.23) takes as its baseline; returns the number of files.

    names    "taps": our names, as people patch them in; "hooks": those of DUMPER_NON_INTRUSIVE_MODE=all, for taps that
             one hook sees whole
    dtype    cast values to it (a rounding); None writes what the trace holds
    model    where the hooks find the decoder, for example "model.language_model"

    All steps of the trace become step 0; tokens are flat without padding: [tokens, features], dims "t ...".
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise Qwen35Error(
            "directory is not empty", where=path, do="choose a new one: the comparator reads all it finds"
        )
    real = trace.mask.bool()
    lengths = real.sum(1)
    core = {"input_ids": trace.ids[real], "positions": trace.positions[real], "seq_lens": lengths}
    index = 0
    for name, x in core.items():
        index += 1
        _save(path, index, name, None, x, "t" if name != "seq_lens" else "")
    for key, site in trace.sites.items():
        tap = base_name(key)
        if site.step or site.expert is not None or tap not in TAPS or not re.match(r"(b )?t ", TAPS[tap].dims):
            continue
        name = tap if names == "taps" else _hook_name(tap, site.layer, model)
        if name:
            index += 1
            x = joined(trace, key)
            x = x[real] if x.shape[:2] == real.shape else x[real.flatten()]
            x = x.reshape(x.shape[0], -1)
            feature = re.sub(r"[^a-z]", "", TAPS[tap].dims.split(" ", 2 if TAPS[tap].dims.startswith("b ") else 1)[-1])
            _save(path, index, name, site.layer, x if dtype is None else x.to(dtype), f"t {feature or '1'}")
    return index


def _hook_name(tap: str, layer: int | None, model: str) -> str:
    first = TAPS[tap].sglang.split(" | ")[0]
    if not first or first.endswith("*") or "." not in first:
        return ""
    if layer is None:
        return f"non_intrusive__{first if first.startswith('logits_processor') else f'{model}.{first}'}"
    return f"non_intrusive__{model}.layers.{layer}.{first}"


def _save(path: Path, index: int, name: str, layer: int | None, x: Tensor, dims: str) -> None:
    tags: dict[str, str | int] = {"step": 0, "rank": 0, "dump_index": index, "name": name}
    if layer is not None:
        tags["layer_id"] = layer
    meta = {**tags, **({"dims": dims} if dims else {})}
    file = "___".join(f"{k}={v}" for k, v in tags.items()) + ".pt"
    torch.save({"value": x.contiguous().clone(), "meta": meta}, path / file)


def write_kl_base(path: str | Path, ids: Tensor, logits: Tensor) -> None:
    """Write the file of `llama-perplexity --kl-divergence-base`: log-probabilities, 16 bits each.

    ids [chunks, n_ctx]; logits [chunks, n_ctx, V], any dtype, after each token. Rows are written for the second half of
    each window, as llama.cpp scores them. Per row, with m the largest logit and l = max(least logit, m - 16):
    scale = (m - l) / 65535, min_log_prob = l - logsumexp, q = round((logit - l) / scale). It resolves (m - l) / 65535.
    """
    if ids.dim() != 2 or logits.shape[:2] != ids.shape or logits.dim() != 3:
        raise Qwen35Error("ids and logits do not fit", expected="[chunks, n_ctx] and [chunks, n_ctx, V]",
                          found=f"{list(ids.shape)} and {list(logits.shape)}")  # fmt: skip
    if not logits.isfinite().all():
        raise Qwen35Error("logits are not finite", where=path, do="a KL base file has no code for NaN or infinity")
    chunks, n_ctx, n_vocab = logits.shape
    first = n_ctx // 2
    temporary = Path(f"{path}.tmp")
    with temporary.open("wb") as file:
        file.write(b"_logits_" + struct.pack("<3i", n_ctx, n_vocab, chunks))
        file.write(ids.to(torch.int32).contiguous().numpy().tobytes())
        for chunk in logits:
            x = chunk[first : n_ctx - 1].to(torch.float64)
            most = x.max(-1, keepdim=True).values
            least = torch.maximum(x.min(-1, keepdim=True).values, most - 16)
            scale = (most - least) / 65535
            q = ((x - least).clamp(min=0) / torch.where(scale > 0, scale, 1)).round()
            head = torch.cat((scale, least - x.logsumexp(-1, keepdim=True)), 1).numpy().astype("<f4")
            rows = np.zeros((len(x), 2 * ((n_vocab + 1) // 2) + 4), "<u2")
            rows[:, :4] = head.view("<u2")
            rows[:, 4 : 4 + n_vocab] = q.numpy()
            file.write(rows.tobytes())
    temporary.replace(path)
