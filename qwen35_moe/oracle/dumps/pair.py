"""One tap on both sides: where the dump holds it, and the values of the same tokens side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import Qwen35Error
from ...numerics.tap_keys import base_name
from ...trace.file import Trace
from ..judge.log_p import LOG_P
from .dump import Dump
from .ranks import by_row, join_ranks, joining

# A tap that another one holds: (the other, whether in the one column that is appended to the other's own).
INSTEAD = {
    "moe_topk_ids": ("moe_slot_ids", False),
    "moe_topk_weights": ("moe_slot_weights", False),
    "moe_shared_gate": ("moe_slot_weights", True),
    "moe_shared_gate_logit": ("moe_router_logits", True),  # ATOM has one product for both
}
# A log p of some 12 is off by up to 2^-9 of that in bf16, and the sum of many such errors by less.
LOG_P_SLACK = 0.05
# A list of slots -> the tap that is as wide as its columns without the shared slot.
BESIDE = {"moe_slot_ids": "moe_topk_ids", "moe_slot_weights": "moe_topk_weights"}


@dataclass
class Pair:
    """One tap in truth and engine: rows of the same tokens.

    truth, engine   [rows, features of the truth]; engine is None where `problem` says why
    rows            [rows, 2]: sequence b and index t of each row in the truth; t is -1 for values not of one token
    dtype           what the engine wrote (partial sums come as float64)
    as_log_p        the engine's logits are log p, and so is the truth here; chosen [rows, K]: of these tokens only
    broken          [rows] which of the engine's hold NaN or infinity where the truth does not; None: none
    """

    key: str
    truth: Tensor
    engine: Tensor | None
    rows: Tensor
    dtype: torch.dtype | None = None
    problem: str = ""
    broken: Tensor | None = None
    notes: tuple[str, ...] = ()
    as_log_p: bool = False
    chosen: Tensor | None = None

    def ours(self, x: Tensor) -> Tensor:
        """The truth's rows of this tap, as the engine gives them."""
        x = x.to(torch.float64).log_softmax(-1) if self.as_log_p else x
        return x if self.chosen is None else x.gather(1, self.chosen.to(x.device))

    @property
    def nan(self) -> int:
        return 0 if self.broken is None else int(self.broken.sum())

    def judged(self, keep: Tensor) -> Tensor:
        """`keep`, and the rows that are NaN, which no choice of experts excuses."""
        return keep if self.broken is None else keep | self.broken


def source_of(dump: Dump, truth: Trace, key: str) -> tuple[str, slice]:
    """Which of the dump's taps holds this one, and in which columns. An appended one is read if the other tap
    is wider by one."""
    name = base_name(key)
    if key in dump.sources or name not in INSTEAD:
        return key, slice(None)
    other, appended = INSTEAD[name]
    source = key.removesuffix(name) + other
    first = key.removesuffix(name) + BESIDE.get(other, other)
    width = truth.sites[first].shape[-1] if first in truth.sites else None
    if source not in dump.sources or width is None:
        return key, slice(None)
    if not appended:
        return source, slice(width)
    return (source, slice(width, None)) if dump.width(source) == width + 1 else (key, slice(None))


def fit(key: str, left: Tensor, right: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """Known reasons for a wider tensor: a padded vocabulary, an appended shared slot."""
    name, n, more = base_name(key), left.shape[1], right.shape[1] - left.shape[1]
    if more == 0:
        return right, ()
    if 0 < more < n and name in ("next_token_logits", LOG_P):
        return right[:, :n], (f"{more} padded columns of the vocabulary left out",)
    if more == 1 and name in ("moe_topk_ids", "moe_topk_weights"):
        return right[:, :n], ("the appended shared slot was left out",)
    if more == 1 and name == "moe_router_logits":
        return right[:, :n], ("the appended logit of the shared gate was left out",)
    raise Qwen35Error(f"misshapen: {right.shape[1]} features for {n}")


def is_log_p(x: Tensor) -> bool:
    """Whether every row's logsumexp is 0, but for what rounding makes of it."""
    most = x.to(torch.float64).logsumexp(-1).abs().max() if len(x) else torch.inf
    return bool(most < LOG_P_SLACK * (1 if x.dtype in (torch.float16, torch.bfloat16) else 2**-8))


def take(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], without copying where that is x."""
    return x if len(rows) == len(x) and torch.equal(rows, torch.arange(len(x))) else x[rows]


def owners(dump: Dump, key: str) -> Tensor | None:
    """[features] the rank that each column of a tap came from; None where ranks hold no columns of it."""
    step, source = next(iter(dump.sources[key].items()))
    join, pieces = joining(source)
    if join != "cat" or len(source.pieces) < 2:
        return None
    count = None if source.pieces[0].rows is not None else dump.count(step)
    ranks = [torch.full_like(by_row(p.load(), count), p.rank, dtype=torch.float64) for p in pieces]
    return join_ranks(key, ranks, join, source.rule.blocks, dump.sizes)[0]


def broken_rows(left: Tensor, right: Tensor) -> Tensor | None:
    """Rows with NaN or infinity where the truth has none."""
    if right.sum().isfinite():  # no NaN or infinity anywhere: most tensors are read once only
        return None
    return ~right.isfinite().all(1) & left.isfinite().all(1)


# Attention's scores have one column a key, and as many keys as the cache has by then. A dump's keys are laid out as its
# steps fed them, padding and packed neighbours among them; the truth's as its tokens are. Columns are brought to the
# truth's layout; keys that the engine had not yet seen are no difference.
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
