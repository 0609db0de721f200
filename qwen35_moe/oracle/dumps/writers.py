"""Writing the truth in other programs' formats, so that their own tools can score an engine against it."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ...errors import Qwen35Error
from ...numerics.tap_keys import base_name
from ...numerics.tap_table import TAPS
from ...run.files import whole
from ...trace.file import Trace
from ..judge.log_p import log_p, to_codes
from .align import joined
from .engine_names import SGLANG_NAMES, TapRule, features

# What engines' dumps usually hold.
DUMPED = (
    "embed_tokens,layer_input,input_layernorm,attn_output,pre_mlp_residual,pre_mlp_layernorm_output,moe_router_logits,"
    "moe_topk_ids,moe_topk_weights,mlp_output,gdn_state,final_norm,next_token_logits"
)


def write_sglang_dump(
    trace: Trace, path: str | Path, *,
    names: Literal["taps", "hooks"] = "taps", dtype: torch.dtype | None = None, model: str = "model",
) -> int:  # fmt: skip
    """Write a trace as a dump that SGLang's comparator (0.5.23) takes as its baseline; returns the number of files.

    names    "taps": our names, as people patch them in; "hooks": the names and shapes of DUMPER_NON_INTRUSIVE_MODE=all,
             fused projections and logits of last tokens among them
    dtype    cast values to it (a rounding); None writes what the trace holds
    model    where the hooks find the decoder, for example "model.language_model"

    All steps of the trace become step 0; tokens are flat, sequence after sequence, without padding.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        do = "choose a new one: the comparator reads all it finds"
        raise Qwen35Error("the folder is not empty", where=path, do=do)
    real = trace.mask.bool()
    _save(path, 1, "input_ids", None, trace.ids[real], "t")
    _save(path, 2, "positions", None, trace.positions[real], "t")
    _save(path, 3, "seq_lens", None, real.sum(1), "")
    i = 3
    for i, (name, layer, x) in enumerate((_by_tap if names == "taps" else _by_hook)(trace, real, model), 4):
        dims = f"t {re.sub('[^a-z]', '', TAPS[name].dims.split('t ', 1)[1]) or '1'}" if names == "taps" else ""
        _save(path, i, name, layer, x if dtype is None else x.to(dtype), dims)
    return i


Written = Iterator[tuple[str, int | None, Tensor]]


def _by_tap(trace: Trace, real: Tensor, _: str) -> Written:
    for key, site in trace.sites.items():
        tap = base_name(key)
        if site.step == 0 and site.expert is None and site.part == "" and features(tap, _ANY) is not None:
            yield tap, site.layer, _rows(trace, key, real).flatten(1)


def _by_hook(trace: Trace, real: Tensor, model: str) -> Written:
    layers = dict.fromkeys(site.layer for site in trace.sites.values())
    last = real & (real.cumsum(1) == real.sum(1, keepdim=True))
    for layer in layers:
        prefix = "" if layer is None else f"layers.{layer}."
        for path, text in SGLANG_NAMES.items():
            taps = list(dict.fromkeys(name for name, _ in TapRule.parse(text).blocks))
            top = path.startswith(("embed_tokens", "norm.", "model.", "logits_processor"))
            if top != (layer is None) or "." not in path or any(prefix + tap not in trace for tap in taps):
                continue
            rows = last if taps == ["next_token_logits"] else real
            x = torch.cat([_rows(trace, prefix + tap, rows).flatten(1) for tap in taps], 1)
            if re.search(r"(q_norm|k_norm|linear_attn\.norm)\.", path):  # these see one head at a time
                x = x.reshape(-1, _rows(trace, prefix + taps[0], real).shape[-1])
            elif path == "linear_attn.attn.output":
                x = _rows(trace, prefix + taps[0], real)
            where = "" if path.startswith("logits_processor") else f"{model}."
            yield f"non_intrusive__{where}{prefix}{path.removeprefix('model.')}", layer, x


_ANY = dict.fromkeys("abcdefghijklmnopqrstuvwxyz", 1)


def _rows(trace: Trace, key: str, rows: Tensor) -> Tensor:
    """A tap at the tokens that `rows` [B, T] marks."""
    x = joined(trace, key)
    return x[rows] if x.shape[:2] == rows.shape else x.reshape(*rows.shape, *x.shape[1:])[rows]


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
    each window, as llama.cpp scores them: scale, least and q of `kl_base.encode`.
    """
    if ids.dim() != 2 or logits.shape[:2] != ids.shape or logits.dim() != 3:
        raise Qwen35Error("ids and logits do not fit", expected="[chunks, n_ctx] and [chunks, n_ctx, V]",
                          found=f"{list(ids.shape)} and {list(logits.shape)}")  # fmt: skip
    if not logits.isfinite().all():
        raise Qwen35Error("logits are not finite", where=path, do="a KL base file has no code for NaN or infinity")
    chunks, n_ctx, n_vocab = logits.shape
    first = n_ctx // 2
    with whole(Path(path)) as temporary, temporary.open("wb") as file:
        file.write(b"_logits_" + struct.pack("<3i", n_ctx, n_vocab, chunks))
        file.write(ids.to(torch.int32).contiguous().numpy().tobytes())
        for chunk in logits:
            scale, least, q = to_codes(log_p(chunk[first : n_ctx - 1]))
            head = torch.cat((scale, least), 1).numpy().astype("<f4")
            rows = np.zeros((len(q), 2 * ((n_vocab + 1) // 2) + 4), "<u2")
            rows[:, :4] = head.view("<u2")
            rows[:, 4 : 4 + n_vocab] = q.numpy()
            file.write(rows.tobytes())
