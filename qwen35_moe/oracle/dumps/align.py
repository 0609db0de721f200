"""Which row of an engine's dump belongs to which token of the truth.

The truth is a trace over [B, T] tokens. An engine may have run the same sequences flat in one batch, in chunks, or as
prefill and decode steps, in any order, among other requests; `match` finds which row is which token. An `Alignment`
gives the values of both sides, tap by tap, as rows of the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ...errors import Qwen35Error
from ...numerics.tap_keys import base_name, is_vision, part_of, per_token
from ...numerics.tap_table import TAPS
from ...trace.drafts import draft_ids_of
from ...trace.file import TURN, Trace
from ...trace.images import stands_for_images
from ..judge.log_p import LOG_P, log_p
from .draft_rows import match_drafts, same_drafts
from .dump import Dump
from .match import match
from .matched import Matched
from .pair import Pair, broken_rows, fit, is_log_p, scores, source_of, take
from .sequences import LOGITS
from .step_rows import StepRows

# Modules whose output may have the shared gate in it. Their down_proj's has not, and is read instead if it was dumped.
WITH_GATE = ("mlp.shared_expert.output", "mlp.shared_expert")
TWO_MEANINGS = (
    ("moe_routed_output", "mlp_output", "the experts' output was taken for the block's"),
    ("moe_shared_output", "moe_shared_gated", "the shared expert's output was taken for the gated one"),
)
STATE_TAPS = ("gdn_state", "gdn_conv_state")


@dataclass
class Alignment:
    """Which taps both sides have, and which row is which token. Tensors are read when they are asked for.

    keys          taps that both have; missing: the truth only, extra: the dump only
    tokens_of     which row of the dump is which token of the truth
    problems      Qwen35Errors about the whole dump
    matched       how many of the truth's `tokens` the dump has
    """

    dump: Dump
    truth: Trace
    keys: list[str]
    missing: list[str]
    extra: list[str]
    tokens_of: Matched
    problems: list[Qwen35Error] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    matched: int = 0
    tokens: int = 0

    def __iter__(self) -> Iterator[Pair]:
        for key in self.keys:
            yield self.pair(key)

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def step_rows(self) -> StepRows:
        return StepRows(self.dump, self.tokens_of, self.truth.mask)

    def pair(self, key: str) -> Pair:
        """Read one tap of both sides. What cannot be read or compared comes back with a `problem`, not as an error."""
        truth = torch.empty(0)
        try:
            truth = joined(self.truth, key)
            pair = self._rows(key, truth) if per_token(key) else self._whole(key, truth)
            if not pair.truth.sum().isfinite() and not pair.truth.isfinite().all():
                raise Qwen35Error("the truth itself holds NaN or infinity here", where=key)
            return pair
        except Exception as error:  # one odd tensor costs its own tap
            known = isinstance(error, Qwen35Error)
            said = str(error) if known else f"cannot be compared: {type(error).__name__}: {error}"
            return Pair(key, truth, None, torch.empty(0, 2), problem=said)

    def _rows(self, key: str, truth: Tensor) -> Pair:
        """Values of tokens, from all steps."""
        B, T = truth.shape[:2]
        source, columns = source_of(self.dump, self.truth, key)
        dims = TAPS[base_name(key)].dims if base_name(key) in TAPS else ""
        ours, theirs, rows, some = (list[Tensor]() for _ in range(4))
        for step in sorted(set(self.dump.sources[source]) & {*self.tokens_of.where, *self.tokens_of.drafts}):
            if dims == "b n t s" and self.dump.tokens[step].batch is not None:
                x = scores(self.dump, self.tokens_of.where, source, step, truth)
            else:
                x = self.dump.read(source, step)[:, columns]
            if theirs and x.shape[1] != theirs[0].shape[1]:
                raise Qwen35Error(f"misshapen: {x.shape[1]} features in step {step}, {theirs[0].shape[1]} before")
            table = self.table(x, source, step)
            if self.dump.draft_ids and part_of(key).startswith("mtp"):
                table = same_drafts(self.dump.draft_ids, draft_ids_of(self.truth), part_of(key), table)
            if base_name(key) == "embed_tokens":  # engines put the images in afterwards
                table = table[~stands_for_images(self.truth)[table[:, 1], table[:, 2]]]
            ours.append(take(truth.reshape(B * T, -1), table[:, 1] * T + table[:, 2]))
            theirs.append(take(x, table[:, 0]))
            if (tokens := self.dump.sources[source][step].pieces[0].chosen) is not None:
                some.append(tokens[table[:, 0]])
            rows.append(table[:, 1:])
        if not theirs:
            raise Qwen35Error("none of its steps belongs to the truth", where=key)
        left, right = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (ours, theirs))
        chosen = torch.cat(some) if some else None
        as_log_p = key == LOGITS and (chosen is not None or (is_log_p(right) and not is_log_p(left)))
        right, notes = (right, ()) if chosen is not None else fit(key, left, right)
        pair = Pair(key, left, right, torch.cat(rows), self.dump.dtype(source), notes=notes, as_log_p=as_log_p,
                    chosen=chosen)  # fmt: skip
        pair.truth = pair.ours(left)
        pair.broken = broken_rows(pair.truth, right)
        if as_log_p:
            pair.notes = (*notes, "log p: compared with the truth's log p")
        return pair

    def table(self, x: Tensor, source: str, step: int) -> Tensor:
        """[n, 3] row of x, b, t. x may have fewer rows than its step has tokens: those of each run's last token, or
        those that its piece names."""
        table, count = self.tokens_of.table(step), self.dump.count(step)
        held = self.dump.sources[source][step].pieces[0].rows
        if held is not None:
            at = {int(row): i for i, row in enumerate(held)}
            return torch.tensor([[at[r], b, t] for r, b, t in table.tolist() if r in at]).reshape(-1, 3)
        if count is None or x.shape[0] == count:
            return table
        if base_name(source) == LOGITS and len(x) == len(ends := self.tokens_of.ends(self.dump, step)):
            return ends[ends[:, 1] >= 0]
        raise Qwen35Error(f"misshapen: {x.shape[0]} rows for {count} tokens in step {step}")

    def _whole(self, key: str, truth: Tensor) -> Pair:
        """States and parameters, as the last step has them. Error: the shapes do not agree."""
        step = max(set(self.dump.sources[key]) & set(self.tokens_of.where), default=max(self.dump.sources[key]))
        x = self.dump[key].view(-1, *truth.shape[1:]) if is_vision(key) else self.dump.read(key, step)
        if base_name(key) in STATE_TAPS:
            truth = truth[: len(truth) - len(self.tokens_of.branches)]
        if x.shape != truth.shape:
            raise Qwen35Error(f"misshapen: {list(x.shape)} against {list(truth.shape)}")
        left, right = (y.reshape(y.shape[0], -1) for y in (truth, x))
        rows = torch.stack([torch.arange(len(left)), torch.full((len(left),), -1)], 1)
        return Pair(key, left, right, rows, self.dump.dtype(key, step), broken=broken_rows(left, right))


def align(dump: Dump, truth: Trace, only: list[int] | None = None) -> Alignment:
    """Match a dump with the truth, by name and by token. only: which sequences a dump without ids is of.

    Raises Qwen35Error if no token of the dump is one of the truth's, or nothing has a common name.
    """
    matched = match(dump, truth, only)
    match_drafts(dump, truth, matched)
    where, notes = matched.where, matched.notes + _settle(dump, truth, matched)
    names = truth.comparable
    held = {key: source_of(dump, truth, key)[0] for key in names}
    keys = [key for key in names if held[key] in dump.sources]
    used = {held[key] for key in keys}
    if LOG_P in dump.sources and "next_token_logits" in names:
        keys.append(LOG_P)
        used.add(LOG_P)
    if not keys:
        raise Qwen35Error("dump and truth have no tap in common", where=dump.path, found=", ".join(list(dump)[:4]),
                          expected=", ".join(names[:4]), do="record those taps, or give a name map")  # fmt: skip
    mask = truth.mask.bool()
    mask[len(mask) - len(matched.branches) :] = False
    hit = torch.zeros_like(mask)
    for table in where.values():
        hit[table[:, 1], table[:, 2]] = True
    if early := [k for k in keys if base_name(k) in STATE_TAPS and not _after_last_token(dump, truth, matched, k)]:
        keys = [key for key in keys if key not in early]
        notes.append(f"{len(early)} states were not compared: they are not those after the truth's last tokens")
    common = set(keys)
    missing = [key for key in names if key not in common]
    used.add("inputs_embeds")  # of text: the embeddings, once more
    extra = [key for key in dump.sources if key not in used and not TURN.search(key)]
    total, found = int(mask.sum()), int((hit & mask).sum())
    if found < total:
        notes.append(f"{total - found} of {total} tokens of the truth are not in the dump")
    notes = [*dump.notes, *notes]
    return Alignment(dump, truth, keys, missing, extra, matched, list(dump.problems), notes, found, total)


def _settle(dump: Dump, truth: Trace, matched: Matched) -> list[str]:
    """Rename taps whose name means one of two things: the one that the values are nearer to. The experts' output has
    the shared expert in it where that is fused; vLLM's shared expert has its gate in it, SGLang's has not. Returns
    notes."""
    notes = []
    for name, other, what in TWO_MEANINGS:
        settled = []
        for key in [k for k in dump.sources if base_name(k) == name and not part_of(k)]:
            there, new = next(iter(dump.sources[key].values())).pieces[0], key.removesuffix(name) + other
            unsaid = dump.fused.get(("", there.layer), False) is None
            open_to_both = unsaid if other == "mlp_output" else there.path in WITH_GATE
            if not open_to_both or new in dump.sources or new not in truth or key not in truth:
                continue
            pair = Alignment(dump, truth, [], [], [], matched).pair(key)
            if pair.engine is None:
                continue
            rows = pair.rows[:, 0] * truth.ids.shape[1] + pair.rows[:, 1]
            far = [(pair.engine - x).nan_to_num(posinf=0, neginf=0).norm()
                   for x in (joined(truth, new).flatten(0, -2)[rows], pair.truth)]  # fmt: skip
            nearer = bool(far[0] < far[1])
            if other == "mlp_output":
                dump.fused["", there.layer] = nearer
            if nearer:
                dump.rename(key, new)
                settled.append(key)
        if settled:
            notes.append(f"{what} of {len(settled)} layers, which it is nearer to")
    return notes


def _after_last_token(dump: Dump, truth: Trace, matched: Matched, key: str) -> bool:
    """Whether a state was dumped where all sequences of the truth end, and not before or behind."""
    step = max(dump.sources[key])
    if step not in matched.where or not any(t.ids is not None for t in dump.tokens.values()):
        return step == max(matched.where)
    real = truth.mask.bool()
    last = torch.where(real.any(1), real.shape[1] - 1 - real.flip(1).int().argmax(1), -1)
    b, t = matched.ends(dump, step)[:, 1:].unbind(1)
    return bool((b >= 0).all() and (t == last[b]).all())


def joined(truth: Trace, key: str) -> Tensor:
    """A tap of the truth over all its steps: [B, T, ...] for values of tokens, else that of the last step."""
    if key == LOG_P:
        return log_p(joined(truth, "next_token_logits"))
    keys = [key if step == 0 else f"step.{step}.{key}" for step in range(max(1, len(truth.steps)))]
    keys = [k for k in keys if k in truth.sites]
    if not per_token(key):
        return truth[keys[-1]]
    B = len(truth.steps[0]["ids"])
    parts = [truth[k] for k in keys]
    if TAPS[base_name(key)].dims == "b n t s":
        S = max(x.shape[3] for x in parts)  # a step has no scores of the keys after it
        parts = [torch.nn.functional.pad(x, (0, S - x.shape[3])).movedim(2, 1) for x in parts]
    elif not TAPS[base_name(key)].dims.startswith("b "):
        parts = [x.unflatten(0, (B, -1)) for x in parts]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]
