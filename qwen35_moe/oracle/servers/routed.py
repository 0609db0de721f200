"""The experts that a server reports. Its bytes are a stranger's, and are read as plain integers."""

from __future__ import annotations

import base64
import binascii

import numpy as np
import torch
from torch import Tensor

from ...untrusted import parse_npy
from .answer import bad


def decoded_bytes(text: object, where: str) -> bytes:
    try:
        return base64.b64decode(text if isinstance(text, str) else "?", validate=True)
    except binascii.Error as error:
        raise bad("routed_experts are no base64", where, error) from error


def from_base64(text: object, where: str) -> Tensor:
    """SGLang: bare int32, in a row. The shape [tokens, layers, A] is known with the model."""
    data = decoded_bytes(text, where)
    if len(data) % 4:
        raise bad("routed_experts are cut off", where, f"{len(data)} bytes", "a multiple of 4")
    return torch.from_numpy(np.frombuffer(data, "<i4").astype(np.int64))


def from_npy(text: object, where: str) -> Tensor:
    """vLLM: a .npy file [tokens, layers, A]; nothing is unpickled."""
    found = parse_npy(decoded_bytes(text, where), f"{where}: routed_experts")
    if found.ndim != 3 or found.dtype.kind not in "iu":
        raise bad("routed_experts have the wrong shape", where, found.shape, "[tokens, layers, A]")
    return torch.from_numpy(found.astype(np.int64))


def shaped(found: Tensor, layers: int, top_k: int, where: str) -> Tensor:
    """[tokens, layers, A] of either form; a slot of a fused shared expert is cut off, as SGLang cuts it."""
    if found.dim() == 1:
        if len(found) % (layers * top_k):
            raise bad("routed_experts of another model", where, f"{len(found)} ids", f"a multiple of {layers * top_k}")
        found = found.view(-1, layers, top_k)
    if found.shape[1] != layers or found.shape[2] < top_k:
        raise bad("routed_experts of another model", where, list(found.shape), f"[tokens, {layers}, {top_k}]")
    return found[:, :, :top_k]
