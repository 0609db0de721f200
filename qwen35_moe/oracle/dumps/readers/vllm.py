"""vLLM (0.32): hidden states of the extract_hidden_states connector, and routed experts (also SGLang's).

    {request}.safetensors    hidden_states [tokens, asked layers, D], token_ids [tokens]
    routed experts           numpy [tokens, layers, A], as .npy, or base64 text in a file or a JSON answer

Layer id i of the hidden states is the residual stream at the entry of layer i; the number of layers stands for the end.
Which ids were asked for is not in the file: `layers` says so.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....errors import Qwen35Error
from ....untrusted import check_regular, parse_json, read_bytes, tensor_file
from ...servers.answer import from_base64, from_npy
from ..dump import Dump, Piece, StepTokens
from ..engine_names import text_config
from ..pieces import itself

LARGEST_TEXT = 1 << 28  # bytes
NPY = base64.b64encode(b"\x93NUMPY").decode()  # how a .npy file begins


def sniff(path: Path) -> bool:
    return bool(_hidden_files(path)) or (path.is_file() and _routed(path) is not None)


def read(path: Path, *, config: Mapping[str, Any] | None = None, layers: list[int] | None = None, **_: Any) -> Dump:
    if files := _hidden_files(path):
        return _read_hidden(path, files, config, layers)
    ids = _routed(path)
    assert ids is not None
    if ids.dim() == 1:  # SGLang's has no shape
        sizes = text_config(config)
        shape = [sizes.get(name, 0) for name in ("num_hidden_layers", "num_experts_per_tok")]
        if not all(shape) or len(ids) % (shape[0] * shape[1]):
            raise Qwen35Error("shape of the routed experts is not known", where=path, found=f"{len(ids)} ids",
                              expected=f"[tokens, {shape[0] or 'layers'}, {shape[1] or 'experts a token'}]",
                              do="ask for a request of this model, and give the checkpoint")  # fmt: skip
        ids = ids.reshape(-1, *shape)
    if layers is not None and len(layers) != ids.shape[1]:
        raise Qwen35Error("layers do not fit", where=path, expected=f"{ids.shape[1]} layer ids", found=layers)
    if not ids.any():
        raise Qwen35Error("routed experts are all zero", where=path, do="this build returns no routing for this model")
    numbers = range(ids.shape[1]) if layers is None else layers
    pieces = [
        Piece(f"routed_experts[{i}]", partial(itself, ids[:, i]), layer=layer, path="moe_topk_ids", where=str(path))
        for i, layer in enumerate(numbers)
    ]
    return Dump("routed experts", path, pieces, config=config, notes=["the last token of a request has no routing"])


def _read_hidden(path: Path, files: list[Path], config: Any, layers: list[int] | None) -> Dump:
    pieces, tokens = [], {}
    for step, file in enumerate(files):
        with tensor_file(file) as opened:
            hidden = opened.get_tensor("hidden_states")
            ids = opened.get_tensor("token_ids")
        count, last = hidden.shape[1], text_config(config).get("num_hidden_layers")
        if layers is None and (last is None or count not in (last, last + 1)):
            do = "give --layer-ids, as in eagle_aux_hidden_state_layer_ids"
            raise Qwen35Error("layers of these hidden states are not known", where=file, found=count, do=do)
        numbers = list(range(count)) if layers is None else sorted(layers)  # as vLLM writes them, whatever was asked
        known = set(numbers) if last is None else set(range(last + 1))
        if len(numbers) != count or len(set(numbers) & known) != count:
            expected = f"{count} different layer ids" + ("" if last is None else f", 0 to {last}")
            raise Qwen35Error("layers do not fit", where=file, expected=expected, found=numbers)
        tokens[step] = StepTokens(ids.flatten(), torch.arange(ids.numel()))
        for i, layer in enumerate(numbers):
            name, at = ("layer_output_sum", layer - 1) if layer == last else ("layer_input", layer)
            raw = f"hidden_states[{layer}]"
            pieces.append(Piece(raw, partial(itself, hidden[:, i]), step, layer=at, path=name, where=str(file)))
    return Dump("vllm hidden states", path, pieces, tokens, config=config)


def _hidden_files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.suffix == ".safetensors" else []
    return [file for file in files if {"hidden_states", "token_ids"} <= _keys(file)]


def _keys(file: Path) -> set[str]:
    try:
        with tensor_file(file) as opened:
            return set(opened.keys())
    except Qwen35Error:
        return set()


def _routed(path: Path) -> Tensor | None:
    """Routed experts [tokens, layers, A] of a .npy file, of base64 text, or of a JSON answer; flat where no shape is
    told; None for other files."""
    if path.suffix == ".npy":
        check_regular(path)
        x = np.load(path, allow_pickle=False, mmap_mode="r")
        return torch.from_numpy(x.astype(np.int64)) if x.ndim == 3 and x.dtype.kind in "iu" else None
    if path.suffix not in (".json", ".b64", ".txt") or path.stat().st_size >= LARGEST_TEXT:
        return None
    raw, shape = read_bytes(path), None
    text: Any = raw.decode("utf-8")
    if path.suffix == ".json":
        answer = parse_json(raw, path)
        text, shape = _find(answer, "routed_experts"), _find(answer, "routed_experts_shape")
    if not text or str(text).startswith(NPY):
        return from_npy(text, str(path)) if text else None
    found = from_base64(text, str(path))
    return found.reshape(shape) if shape else found


def _find(answer: Any, key: str) -> Any:
    """The first value under `key` anywhere in a JSON answer."""
    if isinstance(answer, Mapping) and key in answer:
        return answer[key]
    below = answer.values() if isinstance(answer, Mapping) else answer if isinstance(answer, list) else ()
    return next((found for value in below if (found := _find(value, key)) is not None), None)
