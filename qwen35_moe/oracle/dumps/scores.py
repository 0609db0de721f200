"""Attention's scores and probabilities: one column a key, and as many keys as the cache has by then.

A dump's keys are laid out as its steps fed them, padding and packed neighbours among them; the truth's as its tokens
are. Columns are brought to the truth's layout; keys that the engine had not yet seen are no difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import Qwen35Error
from .dump import Dump

TokenRows = dict[int, Tensor]  # step -> [n, 3]: row in the dump, b, t


def keys_of(dump: Dump, where: TokenRows, step: int, width: int) -> Tensor:
    """[rows of the batch, width, 2]: which (b, t) of the truth each key of a step is; -1 for those that are none.

    Raises Qwen35Error where the batches of the steps before do not lead to so many keys.
    """
    batch = dump.tokens[step].batch
    if batch is None:
        raise Qwen35Error("keys of a flat step are not known", found=f"step {step}", do="dump [B, T] batches")
    parts: list[Tensor] = []
    for s in (s for s in dump.target_steps if s <= step):
        tokens = dump.tokens.get(s)
        if tokens is None or tokens.batch is None or tokens.batch[0] != batch[0]:
            continue
        part = torch.full((tokens.batch[0] * tokens.batch[1], 2), -1)
        if s in where:
            part[where[s][:, 0]] = where[s][:, 1:]
        parts.append(part.view(*tokens.batch, 2))
    own = parts[-1]
    keys = own if own.shape[1] == width else torch.cat(parts, 1)
    if keys.shape[1] > width:  # steps before were of another request
        keys = keys[:, -width:]
    return torch.nn.functional.pad(keys, (0, 0, 0, width - keys.shape[1]), value=-1)


def scores(dump: Dump, where: TokenRows, source: str, step: int, truth_BTNS: Tensor) -> Tensor:
    """A step's rows [B * T, n * S] with S keys of the truth: the engine's values, and the truth's own where the engine
    had no such key."""
    batch = dump.tokens[step].batch or (1, dump.count(step) or 1)
    N, S = truth_BTNS.shape[2:]
    x_BTNS = dump.read(source, step).unflatten(0, batch)
    if x_BTNS.shape[2] % N:
        raise Qwen35Error(f"misshapen: {x_BTNS.shape[2]} scores of {N} heads")
    x_BTNS = x_BTNS.unflatten(2, (N, -1))
    out = torch.zeros(x_BTNS.shape[0] * x_BTNS.shape[1], N, S, dtype=x_BTNS.dtype)
    keys = keys_of(dump, where, step, x_BTNS.shape[3])
    for row, b, t in where[step].tolist():
        line, at = divmod(row, batch[1])
        mine = (keys[line, :, 0] == b).nonzero().flatten()
        out[row] = truth_BTNS[b, t].to(out.dtype)
        out[row][:, keys[line, mine, 1]] = x_BTNS[line, at][:, mine]
    return out.flatten(1)
