"""The envelope of a whole run: how far legal arithmetics stray from the truth, kept beside it as norms of each row."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import Qwen35Error
from ..tap_names import TAPS, base_name, per_token
from ..taps import OBSERVE, Site, attach
from .envelope import Norms, one_rounding
from .replay import ReplayRouting
from .split_k import splitting
from .trace_file import Trace

ENVELOPE = "envelope.safetensors"
# Taps whose columns follow the order of the ids.
WEIGHTS = ("moe_topk_weights", "moe_topk_probs", "moe_slot_weights")


class Stored(NamedTuple):
    """Of the rows of one tap: the largest legal error, the size of the truth, its loss when it is stored in bf16."""

    error: Norms
    size: Norms
    bf16: Norms

    @classmethod
    def of(cls, rows_R6: Tensor, index: Tensor) -> Stored:
        columns = rows_R6.to(torch.float64)[index].unbind(1)
        return cls(*(Norms(*columns[i : i + 2]) for i in (0, 2, 4)))


def stored_envelope(truth: Trace) -> dict[str, Tensor]:
    """Key -> [rows, 6], the columns of `Stored`."""
    path = None if truth.path is None else truth.path / ENVELOPE
    return load_file(path) if path is not None and path.is_file() else truth.meta.get("_envelope", {})


def as_rows(key: str, x: Tensor, tokens: int) -> Tensor:
    """[rows, features] of a tap as the model hands it over: a row a token, or (states, gains) one a first index."""
    if not per_token(key):
        return x.reshape(x.shape[0], -1)
    x = x.movedim(2, 1) if TAPS[base_name(key)].dims == "b n t s" else x
    return x.reshape(tokens, -1)


class _Errors:
    """Observes a run and keeps the norms of its errors against the truth, the largest of all runs."""

    stage = OBSERVE

    def __init__(self, truth: Trace):
        self.truth, self.tokens = truth, truth.ids.numel()
        self.norms: dict[str, Norms] = {}

    def __call__(self, site: Site, x: Tensor) -> None:
        key = site.key
        if key not in self.truth or not x.is_floating_point():
            return
        truth, x = self.truth[key].to(torch.float64), x.to(torch.float64)
        if site.name in WEIGHTS:
            truth, x = truth.sort(-1, descending=True).values, x.sort(-1, descending=True).values
        error = Norms.of(as_rows(key, x - truth, self.tokens))
        known = self.norms.get(key)
        self.norms[key] = error if known is None else error.largest(known)


def write_envelope(truth: Trace, models: Iterable[Any]) -> None:
    """Run models of legal arithmetics on the truth's tokens and keep their errors beside it (`envelope.safetensors`).

    They choose the truth's experts, so that the envelope measures roundings and not flips. `models` may be a generator.
    """
    if len(truth.steps) != 1:
        raise Qwen35Error("an envelope needs a truth of one forward pass", where=truth.path, found=len(truth.steps))
    errors = _Errors(truth)
    mask = None if bool(truth.mask.all()) else truth.mask
    for model in models:
        with torch.no_grad(), splitting(model.arithmetic), attach(errors, ReplayRouting(truth)):
            model(truth.ids, attention_mask=mask, position_ids=truth.positions)
    out = {}
    for key, error in errors.norms.items():
        x = as_rows(key, truth[key].to(torch.float64), truth.ids.numel())
        norms = (error, Norms.of(x), one_rounding(x, torch.bfloat16))
        out[key] = torch.stack([column for n in norms for column in (n.l2, n.max)], 1).to(torch.float32)
    if truth.path is None:
        truth.meta["_envelope"] = out
        return
    temporary = Path(truth.path) / (ENVELOPE + ".tmp")
    save_file(out, temporary)
    temporary.replace(Path(truth.path) / ENVELOPE)
