"""The answers of a server: log-probabilities by position, the same for all engines."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import Qwen35Error
from ...untrusted import parse_npy

API_KEY = "QWEN35_MOE_API_KEY"
UNKNOWN = -1  # an id that the answer does not tell
LEAST = -9000.0  # SGLang and vLLM write -9999 for log 0
LARGEST_LOG_P = 1e-3  # a log p above 0 by more than float noise is none
NO_LOG_P = "the answer holds no log-probabilities"
FAR = 3.5  # a quantile of the answers' errors, in legal ones, that is surely beyond it is wrong
MAX_TOKENS = 1 << 20  # of one answer


@dataclass(frozen=True)
class Row:
    """One position: log p of tokens at `place`, given the tokens before it.

    log_p   token id -> log p: the token that stands there, the likeliest K, or both
    best    the likeliest token, where the engine says which it is
    """

    place: int
    log_p: dict[int, float]
    best: int | None = None


@dataclass
class Answer:
    """One sequence.

    ids      the prompt and what was generated, UNKNOWN where the answer does not tell
    routed   the experts [tokens, layers, A], or one flat row where the engine tells no shape
    clamped  ids that were sent and came back as 0
    warm     log p of generated tokens may be after a temperature: the answer does not say which one was asked for
    accepted tokens of the prompt, and how often 0, 1, ... drafts were accepted behind it
    """

    engine: str
    ids: list[int]
    rows: list[Row]
    routed: Tensor | None = None
    notes: list[str] = field(default_factory=list)
    clamped: list[int] = field(default_factory=list)
    warm: bool = False
    accepted: tuple[int, list[int]] | None = None


def bad(what: str, where: str, found: Any = "", expected: str = "", do: str = "") -> Qwen35Error:
    """The error of an answer. What it quotes is cut, and printable: it comes from a stranger."""
    return Qwen35Error(what, where=where, found=clean(found), expected=expected, do=do)


def secret() -> str:
    """The API key, which no message shows. Error: one that cannot stand in a header."""
    key = os.environ.get(API_KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise Qwen35Error("no API key", where=API_KEY, expected="printable ASCII on one line")
    return key


def without_key(found: Any) -> Any:
    """A JSON value without our key, which a server may send back, in its texts."""
    if not (key := os.environ.get(API_KEY, "").strip()):
        return found
    if isinstance(found, dict):
        return {name.replace(key, "***"): without_key(x) for name, x in found.items()}
    if isinstance(found, list):
        return [without_key(x) for x in found]
    return found.replace(key, "***") if isinstance(found, str) else found


def clean(found: Any, most: int = 160) -> str:
    """A stranger's text on one line, without our key."""
    text = without_key(str(found)[: 64 * most])
    text = "".join(c if c.isprintable() else " " for c in text[: 4 * most])
    return text if len(text) <= most else f"{text[:most]}..."


def token(found: Any, where: str) -> int:
    """A token id: an integer, or a string of digits, or "token_id:N"."""
    if isinstance(found, str):
        digits = found.removeprefix("token_id:")
        found = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 10 else found
    if type(found) is not int or not 0 <= found < 2**31:
        raise bad("not a token id", where, found, "a whole number, 0 or more")
    return found


def number(found: Any, where: str) -> float | None:
    """A log p; None for log 0, which engines write for tokens that a filter took away. NaN is kept: it is a verdict.
    Servers whose JSON has no NaN write null for it (SGLang, llama.cpp)."""
    if found is None:
        return math.nan
    if type(found) not in (int, float):
        raise bad("not a log-probability", where, found, "a number, 0 or less")
    if found > LARGEST_LOG_P:
        do = "ask for log p, not probabilities or logits (llama.cpp: without post_sampling_probs; vLLM: raw_logprobs)"
        raise bad("log-probability above 0", where, found, "0 or less", do)
    return None if found < LEAST else float(found)


def checked_list(found: Any, where: str) -> list[Any]:
    if not isinstance(found, list):
        raise bad("not a list", where, found)
    if len(found) > MAX_TOKENS:
        raise bad("too long", where, f"{len(found)} entries", f"at most {MAX_TOKENS}")
    return found


def ids_in(found: Any, where: str) -> list[int]:
    return [token(i, where) for i in checked_list(found, where)]


def mapping(found: Any, where: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise bad("not an object", where, found)
    return found


def row(place: int, pairs: Sequence[tuple[int, float | None]], has_top: bool) -> Row:
    """A row of pairs (id, log p); of two pairs with one id the last counts. has_top: the likeliest tokens are among
    them, so that the likeliest is known."""
    log_p = {i: x for i, x in pairs if x is not None}
    likely = [i for i, x in log_p.items() if not math.isnan(x)] if has_top else []
    return Row(place, log_p, max(likely, key=lambda i: (log_p[i], -i), default=None))


def prompt_of(request: Mapping[str, Any], where: str, *keys: str) -> list[int] | None:
    """The ids that were sent, if they were."""
    found = next((request[k] for k in keys if isinstance(request.get(k), list)), None)
    return None if found is None or not found or isinstance(found[0], str) else ids_in(found, where)


def agreed(sent: list[int] | None, said: list[int], where: str, clamped: list[int] | None = None) -> list[int]:
    """The ids that were sent, or what was said where these are not known. Error: both are known and differ. UNKNOWN
    fits any id. An engine that writes 0 for large ids hands in `clamped`, to which the ids it wrote 0 for are added."""
    if sent is None:
        return said
    what = "the answer is for other tokens"
    if len(said) != len(sent):
        raise bad(what, where, f"{len(said)} tokens", f"the {len(sent)} that were sent")
    for place, (a, b) in enumerate(zip(sent, said, strict=True)):
        if a == b or b == UNKNOWN:
            continue
        if b or clamped is None:
            raise bad(what, where, f"id {b} at place {place}", f"id {a}, as sent")
        clamped.append(a)
    return sent


def decoded_bytes(text: object, where: str) -> bytes:
    try:
        return base64.b64decode(text if isinstance(text, str) else "?", validate=True)
    except ValueError as error:
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
