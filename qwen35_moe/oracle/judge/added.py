"""The added error: each tap is judged by a rerun of its block on the engine's own captured input."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from torch import Tensor

from ...errors import Qwen35Error
from ...numerics.tap_keys import base_name, part_of
from ...trace.layers import HEAD
from ..diagnose.at_sight import OWN_LOGITS, against_own_logits
from ..dumps.align import Alignment
from ..dumps.pair import Pair, owners
from . import log_p as kl_base
from .envelope import Class, TensorVerdict, envelope, is_bf16, judge
from .envelope_file import SLOT_ORDERED, as_rows
from .patterns import judge_scale, judge_size, log_sizes, wrong_columns
from .records import BF16_GRID, Comparison, Record, block_of
from .replay import RESTARTS, Captured
from .routing import Routing, compare_ids, could_flip

ID_TAPS = ("moe_topk_ids", "moe_slot_ids")
ROUTED_TAPS = ("mlp_output", "moe_routed_output", "layer_output_sum", "layer_input", *SLOT_ORDERED)
# Taps that read what the layer before made -> the tap between the two: where the dump has it, they read that instead.
READ_STREAM = {
    "input_layernorm": "", "pre_mlp_residual": "", "pre_mlp_layernorm_output": "pre_mlp_residual",
    "final_norm": "", "next_token_logits": "final_norm", kl_base.LOG_P: "final_norm",
}  # fmt: skip
BOUNDARIES = {name.removesuffix("_sum") for name in RESTARTS} | {"layer_input", "layer_output_sum", "moe_topk_weights"}


class Judgement:
    """What one comparison has found so far."""

    def __init__(self, result: Comparison, alignment: Alignment):
        self.result, self.alignment, self.limit = result, alignment, result.limit
        self.T = alignment.truth.ids.shape[1]
        self.records: dict[str, Record] = {}
        self.undecided: dict[int, Tensor] = {}  # layer -> [B*T] tokens whose experts may be others than the truth's
        self.bad_at: dict[str, Tensor] = {}  # sequence and token of the bad rows of a tap
        self.shared: Tensor | None = None  # the shared expert's part of the true mlp_output of this layer, [tokens, D]

    def index(self, pair: Pair) -> Tensor:
        """The indices of a pair's rows in [B*T], or in [B] for values of a whole sequence."""
        b, t = pair.rows.long().unbind(1)
        return torch.where(t < 0, b, b * self.T + t)

    def rows(self, x: Tensor, pair: Pair) -> Tensor:
        """The rerun's values x of a tap, at the rows of its pair."""
        return pair.ours(as_rows(pair.key, x, self.alignment.truth.ids.numel())[self.index(pair)])

    def captured(self, experts: int) -> Captured:
        """The engine's values that a rerun continues with. A tap with an id that no expert has is left out."""
        captured = Captured()
        for key in self.alignment.keys:
            if base_name(key) in BOUNDARIES:
                pair, are_ids = self.alignment.pair(key), base_name(key) in ID_TAPS
                x = pair.engine
                if x is not None and not pair.nan and not (are_ids and bool(((x < 0) | (x >= experts)).any())):
                    which, places = self.alignment.tokens_of.beginnings(pair.rows)
                    x = torch.cat((x, x[which])) if len(which) else x
                    captured[key] = torch.cat((self.index(pair), places @ torch.tensor([self.T, 1]))), x
        return captured

    def added(self, layer: int | None, seen: Sequence[dict[str, Tensor]]) -> None:
        """Judge all taps that a rerun computed."""
        undecided = self._routing(layer, seen)
        if layer is not None and undecided is not None:
            self.undecided[layer] = undecided
        kinds = self.result.layers
        turns = layer is None or kinds[layer] == "attn" or "attn" not in kinds
        for key in [k for k in seen[0] if k in self.alignment.keys and base_name(k) not in ID_TAPS]:
            if key in self.records or (key.startswith("rope_") and not turns):
                continue  # the angles belong to the first layer that turns by them
            with self.fenced(key, layer):
                pair = self.alignment.pair(key)
                truth, *members = (self.rows(s[key], pair) for s in seen if key in s)
                self._judge(key, layer, pair, truth, members, self._exclude(key, layer, undecided))

    def _exclude(self, key: str, layer: int | None, undecided: Tensor | None) -> Tensor | None:
        """[B*T] the tokens that are left out of a tap's verdict: those whose experts may be others, in its own layer
        (`undecided`), or in the layer before if the tap reads what that layer made."""
        name, part, keys = base_name(key), part_of(key), self.alignment.keys
        if name in ROUTED_TAPS:
            return undecided
        if part and name in ("final_norm", "next_token_logits"):
            return undecided if f"{part}.layers.0.mlp_output" not in keys else None
        if name not in READ_STREAM or key.removesuffix(name) + READ_STREAM[name] in keys:
            return None
        i = (len(self.result.layers) if layer is None else layer) - 1
        before = ("layer_input", "pre_mlp_residual", "pre_mlp_layernorm_output")  # one of them: no earlier layer counts
        after = (f"layers.{i}.mlp_output", f"layers.{i}.layer_output_sum", f"layers.{i + 1}.layer_input")
        known = any(f"layers.{i}.{name}" in keys for name in before) and not any(key in keys for key in after)
        return self.undecided.get(i) if known else None

    @contextmanager
    def fenced(self, key: str, layer: int | None) -> Iterator[None]:
        """If anything fails inside, this tap alone is "not comparable", with the reason."""
        try:
            yield
        except Exception as error:
            said = str(error) if isinstance(error, Qwen35Error) else f"{type(error).__name__}: {error}"
            note = f"could not be judged: {said}"[:300]
            self.records[key] = Record(key, "not comparable", block_of(key), layer, note=note)

    def again(self, keys: Sequence[str], layer: int | None, seen: Sequence[dict[str, Tensor]]) -> None:
        """Judge taps of a layer again, under more arithmetics."""
        for key in keys:
            del self.records[key]
        if any(base_name(key) in ID_TAPS for key in keys):
            self.result.routing = [r for r in self.result.routing if r.layer != layer]
        self.added(layer, seen)

    def _judge(
        self, key: str, layer: int | None, pair: Pair, truth: Tensor, members: list[Tensor], exclude: Tensor | None
    ) -> None:
        kind = self.result.layers[layer] if layer is not None else ""
        record = Record(key, "not comparable", block_of(key, kind), layer, note="; ".join(pair.notes))
        self.records[key] = record
        if pair.engine is None or pair.dtype is None:
            record.note = pair.problem
            return
        x, index, keep = pair.engine.to(truth.device), self.index(pair), torch.ones(len(pair.rows), dtype=torch.bool)
        if exclude is not None:
            keep = pair.judged(~exclude[index])
            record.excluded = int((~keep).sum())
        if base_name(key) in SLOT_ORDERED and self._unordered(key):
            x, truth, *members = (y.sort(1, descending=True).values for y in (x, truth, *members))
            record.note = "compared in order of size: the dump's ids are sorted, or missing"
        if not keep.any():
            record.note = "experts could have flipped at every token, and the dump does not say which were chosen"
            return
        if not keep.all():
            x, truth, members = x[keep], truth[keep], [m[keep] for m in members]
        rounding = kl_base.loss_in_file(truth) if key == kl_base.LOG_P else None
        bound = envelope(truth, members, pair.dtype, rounding=rounding)
        verdict = judge(x, truth, bound, pair.dtype, self.limit)
        record.added = record.by_rows = verdict.ratio
        bad_rows = self.fill(record, verdict, pair, keep, x, truth)
        if record.bad:
            self.bad_at[key] = bad_rows
        if base_name(key) == "gdn_state" and is_bf16(x) and not any(is_bf16(m) for m in members):
            record.cls, record.note = "wrong", BF16_GRID
        if base_name(key) in ("mlp_output", "attn_output"):
            shared = self.shared if record.block == "mlp" else None
            judge_scale(record, x, truth, None if shared is None else shared[index[keep]], self.limit)
        if key == HEAD:
            judge_size(record, x, truth, max(abs(log_sizes(m, truth)[0]) for m in members), self.limit)
        equal = (m for m, y in zip(self.result.members, members, strict=False) if torch.equal(y.to(x.dtype), x))
        record.equal_to = next(equal, "")

    def fill(
        self, record: Record, verdict: TensorVerdict, pair: Pair, keep: Tensor, x: Tensor, truth: Tensor
    ) -> Tensor:
        """Write a verdict on the rows `keep` of a pair, whose values are x and truth. Returns [n, 2] its bad rows."""
        rows, bad = pair.rows[keep], verdict.ratios > self.limit
        b, t = rows[verdict.worst].tolist()
        record.cls, record.worst, record.rel = verdict.cls, (int(b), int(t)), verdict.rel
        record.rows, record.nan, record.bad_rows = len(rows), pair.nan, int(bad.sum())
        if record.bad:
            record.starts = self.alignment.tokens_of.starts(rows[bad])
            record.where = wrong_columns(x[bad].cpu(), truth[bad].cpu(), self._owners(pair.key, x.shape[1]))
        return rows[bad]

    def _unordered(self, key: str) -> bool:
        ids = re.sub(r"(weights|probs)$", "ids", key)
        if ids not in self.alignment.keys:
            return True
        x = self.alignment.pair(ids).engine
        return x is None or (x.shape[1] > 2 and bool((x[:, 1:] >= x[:, :-1]).all()))

    def _routing(self, layer: int | None, seen: Sequence[dict[str, Tensor]]) -> Tensor | None:
        """Compare a layer's ids. Returns, where the dump has none, the tokens at which they might differ."""
        logits_key = next((key for key in seen[0] if base_name(key) == "moe_router_logits"), "")
        if not logits_key:
            return None
        at = logits_key.removesuffix("moe_router_logits")
        logits_TE, *members = (s[logits_key].cpu() for s in seen)
        ids_key = next((k for n in ID_TAPS if (k := f"{at}{n}") in self.alignment.keys and k in seen[0]), "")
        delta_T = envelope(logits_TE, members, torch.bfloat16).max
        pair = self.alignment.pair(ids_key) if ids_key else None
        if pair is None or pair.engine is None:
            A = seen[0][f"{at}moe_topk_ids"].shape[1]
            return could_flip(logits_TE, delta_T, A)
        if ids_key in self.records:
            return None
        index, truth = self.index(pair), seen[0][ids_key].cpu()
        routing = compare_ids(truth[index], pair.engine, logits_TE[index], delta_T[index], layer)
        own = self.alignment.pair(logits_key) if logits_key in self.alignment.keys else None
        contradicted = 0  # rows of the engine's ids that its own logits contradict, where the dump has both
        if own is not None and own.engine is not None and torch.equal(own.rows, pair.rows):
            contradicted = int(against_own_logits(pair.engine[:, : pair.truth.shape[1]], own.engine).sum())
        self.record_routing(ids_key, pair, routing, contradicted)
        return None

    def record_routing(self, key: str, pair: Pair, routing: Routing, contradicted: int = 0) -> None:
        self.result.routing.append(routing)
        bad, illegal = max(len(routing.illegal) + routing.nonsense, contradicted), routing.illegal
        cls: Class = "wrong" if bad else "within rounding" if routing.flips else "bit-equal"
        ratio = max((f.margin / f.noise if f.noise else float("inf") for f in routing.flips), default=0.0)
        ratio = float("inf") if routing.nonsense or contradicted else ratio
        worst = max(routing.flips, key=lambda f: f.margin - f.noise, default=None)
        row = routing.senseless if routing.nonsense else None if worst is None else worst.row
        where = None if row is None else (int(pair.rows[row][0]), int(pair.rows[row][1]))
        note = f"{routing.agree} of {routing.tokens} sets agree, {len(routing.flips) - len(illegal)} legal flips"
        note += f"; in {contradicted} rows {OWN_LOGITS}" if contradicted else ""
        strange = [flip.row for flip in illegal] + ([] if routing.senseless is None else [routing.senseless])
        starts = self.alignment.tokens_of.starts(pair.rows[strange])
        record = Record(key, cls, "mlp", routing.layer, ratio, rows=routing.tokens, bad_rows=bad, worst=where)
        self.records[key] = replace(record, note=note, starts=starts)

    def judged(self, layer: int | None, seen: Sequence[dict[str, Tensor]]) -> list[Record]:
        """The records that a part of a rerun has made (layer None: the embedding, the head or a draft), in order of
        execution."""
        return [r for r in self.records.values() if r.layer == layer and r.key in seen[0]]

    def _owners(self, key: str, columns: int) -> Tensor | None:
        """[columns] the rank that each column came from, if it is known."""
        dump = self.alignment.dump
        with suppress(Qwen35Error):  # a file of a step that was not compared
            if key in dump.sources and (found := owners(dump, key)) is not None and len(found) == columns:
                return found
        return None
