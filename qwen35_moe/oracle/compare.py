"""Truth and dump, tap by tap: is it wrong, where first, and by how much more than rounding.

Two errors are measured. The inherited one is what stands between the engine and the truth, and grows from layer to
layer. The added one is what is left when each block of the truth runs on the engine's own captured input with the
engine's own choice of experts: it names the block that is wrong. It needs the checkpoint, and decides where known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .. import arithmetic as arithmetics
from ..arithmetic import Arithmetic
from ..errors import Qwen35Error
from ..load import Source
from ..tap_names import base_name, per_token
from .align import Alignment, Pair, align
from .diagnose import BF16_GRID, diagnose
from .dump import Dump
from .envelope import LIMIT, Class, envelope, judge, legal
from .envelope_file import ENVELOPE, WEIGHTS, Stored, as_rows, stored_envelope
from .logits import compare_logits
from .records import Comparison, Record, block_of, layer_of
from .replay import RESTARTS, STREAMS, Captured
from .rerun import Rerun, Tokens
from .routing import Routing, compare_ids, could_flip
from .scale import scale_errors
from .second_look import second_look
from .trace_file import Trace
from .weights_check import check_weights

IDS = ("moe_topk_ids", "moe_slot_ids")
ROUTED = ("mlp_output", "moe_routed_output", "layer_output_sum", "layer_input", *WEIGHTS)
BOUNDARIES = {STREAMS.get(name, name) for name in RESTARTS} | {"layer_input", "layer_output_sum"}


def compare(
    truth: Trace,
    dump: Dump,
    source: Source | None = None,
    *,
    fused: bool | Sequence[bool] = False,
    engine: str | Arithmetic | None = None,
    limit: float = LIMIT,
    layers: Sequence[int] | None = None,
    diagnoses: int = 2,
    members: Sequence[Arithmetic] | None = None,
) -> Comparison:
    """Compare a dump with the truth.

    source     the checkpoint's weights; without them only inherited errors are known, and nothing is diagnosed
    fused      whether the shared expert is a slot, in all layers or layer by layer
    engine     the arithmetic that the engine says it has, if that is not one of the envelope's
    layers     rerun these layers only
    diagnoses  how many blocks to diagnose, in order of execution
    members    the envelope's arithmetics, where they shall not be `legal(...)`
    """
    alignment = align(dump, truth)
    table = arithmetics.get(truth.meta.get("arithmetic") or "exact")
    members = legal(table.name, engine) if members is None else members
    result = Comparison(
        extra=alignment.extra, unknown=list(dump.unknown), problems=list(alignment.problems),
        notes=list(alignment.notes), limit=limit, truth=f"{table.name}, {truth.path or 'in memory'}",
        engine=f"{dump.format}, {dump.path}", members=tuple(m.name for m in members),
        tokens=(alignment.matched, alignment.tokens),
    )  # fmt: skip
    work = _Work(result, alignment, limit)
    if source is not None:
        config = source.config
        result.layers = tuple("gdn" if kind == "linear_attention" else "attn" for kind in config.layer_types)
        flags = [fused] * config.num_hidden_layers if isinstance(fused, bool) else list(fused)
        if dump.weights:
            result.weights = check_weights(dump, source)
        tokens = Tokens(truth.ids, truth.positions, truth.mask)
        rerun = Rerun(source, flags, tokens, work.captured(), [table, *members])
        for layer, seen in rerun:
            if layers is None or layer is None or layer in layers:
                work.shared = rerun.shared
                work.added(layer, seen)
                seen = second_look(rerun, layer, work, seen)
                if len(result.diagnoses) < diagnoses and (bad := work.guilty(layer)):
                    result.diagnoses.append(diagnose(rerun, layer, bad, work, seen))
    else:
        result.notes.append("without the checkpoint: errors are inherited from all layers before, nothing is diagnosed")
    work.inherited(stored_envelope(truth))
    work.finish(truth, layers)
    return result


class _Work:
    """The state of one comparison."""

    def __init__(self, result: Comparison, alignment: Alignment, limit: float):
        self.result, self.alignment, self.limit = result, alignment, limit
        self.T = alignment.truth.ids.shape[1]
        self.records: dict[str, Record] = {}
        self.flipped: dict[int, Tensor] = {}  # layer -> flat tokens whose experts differ from the truth's
        self.stored: Mapping[str, Tensor] = {}
        self.shared: Tensor | None = None  # the shared expert's part of the true mlp_output of this layer, [tokens, D]

    def index(self, pair: Pair) -> Tensor:
        """Rows of [B*T] (or of [B], for values that are not of one token)."""
        b, t = pair.rows.long().unbind(1)
        return torch.where(t < 0, b, b * self.T + t)

    def rows(self, x: Tensor, pair: Pair) -> Tensor:
        """Our value at the rows of a pair."""
        return as_rows(pair.key, x, self.alignment.truth.ids.numel())[self.index(pair)]

    def captured(self) -> Captured:
        captured = Captured()
        for key in self.alignment.keys:
            if base_name(key) in BOUNDARIES:
                pair = self.alignment.pair(key)
                if pair.engine is not None and not pair.nan and (pair.engine >= 0).all() | (base_name(key) not in IDS):
                    captured.add(key, self.index(pair), pair.engine)
        return captured

    def added(self, layer: int | None, seen: Sequence[dict[str, Tensor]]) -> None:
        """Judge all taps that a rerun computed."""
        loose = self._routing(layer, seen)
        for key in [k for k in seen[0] if k in self.alignment.keys and base_name(k) not in IDS]:
            if key in self.records:
                continue
            pair = self.alignment.pair(key)
            truth, *members = (self.rows(s[key], pair) for s in seen if key in s)
            exclude = loose if base_name(key) in ROUTED else None
            self._judge(key, layer, pair, truth, members, exclude)

    def again(self, keys: Sequence[str], layer: int | None, seen: Sequence[dict[str, Tensor]]) -> None:
        """Judge taps of a layer anew, under more arithmetics."""
        for key in keys:
            del self.records[key]
        if any(base_name(key) in IDS for key in keys):
            self.result.routing = [r for r in self.result.routing if r.layer != layer]
        self.added(layer, seen)

    def _judge(
        self, key: str, layer: int | None, pair: Pair, truth: Tensor, members: list[Tensor], exclude: Tensor | None
    ) -> None:
        kind = self.result.layers[layer] if layer is not None else ""
        record = self.records[key] = Record(
            key, "not comparable", block_of(key, kind), layer, note="; ".join(pair.notes)
        )
        if pair.engine is None or pair.dtype is None:
            record.note = pair.problem
            return
        x, keep = pair.engine, torch.ones(len(pair.rows), dtype=torch.bool)
        if exclude is not None:
            keep = ~exclude[self.index(pair)]
            record.excluded = int((~keep).sum())
        if base_name(key) in WEIGHTS and self._unordered(key):
            x, truth, *members = (y.sort(1, descending=True).values for y in (x, truth, *members))
            record.note = "compared in order of size: the dump's ids are sorted, or missing"
        if not keep.any():
            record.note = "experts could have flipped at every token, and the dump does not say which were chosen"
            return
        x, truth, members = x[keep], truth[keep], [m[keep] for m in members]
        verdict = judge(x, truth, envelope(truth, members, pair.dtype), pair.dtype, self.limit)
        record.cls, record.added, record.ratio_l2, record.ratio_max = (
            verdict.cls, verdict.ratio, verdict.ratio_l2, verdict.ratio_max)  # fmt: skip
        b, t = pair.rows[keep][verdict.worst].tolist()
        record.worst, record.rel, record.rows, record.nan = (int(b), int(t)), verdict.rel, int(keep.sum()), pair.nan
        record.bad_rows = int((verdict.ratios > self.limit).sum())
        if base_name(key) == "gdn_state" and _is_bf16(x) and not any(_is_bf16(m) for m in members):
            record.cls, record.note = "wrong", BF16_GRID
        if base_name(key) in ("mlp_output", "attn_output"):
            self._judge_scale(record, x, truth, self.index(pair)[keep])
        equal = (m for m, y in zip(self.result.members, members, strict=False) if torch.equal(y.to(x.dtype), x))
        record.equal_to = next(equal, "")

    def _judge_scale(self, record: Record, x: Tensor, truth: Tensor, index: Tensor) -> None:
        """A factor that is wrong in all rows alike, however little in each (`scale.py`)."""
        parts = [{"the block": truth}]
        if record.block == "mlp" and self.shared is not None:
            shared = self.shared[index]
            parts.append({"the routed experts": truth - shared, "the shared expert": shared})
        for some in parts:
            for part, (off, ratio) in zip(some, scale_errors(x, truth, list(some.values())), strict=False):
                if ratio > max(self.limit, record.added or 0.0):
                    record.added, record.note = ratio, f"{part}: {100 * off:+.1f} % in all rows"
                    record.cls = "suspicious" if ratio <= 2 * self.limit else "wrong"

    def _unordered(self, key: str) -> bool:
        ids = re.sub(r"(weights|probs)$", "ids", key)
        if ids not in self.alignment.keys:
            return True
        x = self.alignment.pair(ids).engine
        return x is None or (x.shape[1] > 2 and bool((x[:, 1:] >= x[:, :-1]).all()))

    def _routing(self, layer: int | None, seen: Sequence[dict[str, Tensor]]) -> Tensor | None:
        """Compare a layer's ids. Returns, where the dump has none, the tokens at which they might differ."""
        logits_key = f"layers.{layer}.moe_router_logits"
        if logits_key not in seen[0]:
            return None
        logits_TE, *members = (s[logits_key] for s in seen)
        ids_key = next((k for n in IDS if (k := f"layers.{layer}.{n}") in self.alignment.keys and k in seen[0]), "")
        delta_T = envelope(logits_TE, members, torch.bfloat16).max
        pair = self.alignment.pair(ids_key) if ids_key else None
        if pair is None or pair.engine is None:
            A = seen[0][f"layers.{layer}.moe_topk_ids"].shape[1]
            return could_flip(logits_TE, delta_T, A)
        if ids_key in self.records:
            return None
        index = self.index(pair)
        width = max(logits_TE.shape[1], int(seen[0][ids_key].max()) + 1)  # a fused slot has an id, and no logit
        logits = torch.nn.functional.pad(logits_TE, (0, width - logits_TE.shape[1]), value=torch.inf)
        routing = compare_ids(seen[0][ids_key][index], pair.engine, logits[index], delta_T[index], layer)
        self._record_routing(ids_key, layer, pair, routing)
        return None

    def _record_routing(self, key: str, layer: int | None, pair: Pair, routing: Routing) -> None:
        self.result.routing.append(routing)
        bad = len(routing.illegal) + routing.nonsense
        cls: Class = "wrong" if bad else "within rounding" if routing.flips else "bit-equal"
        worst = max(routing.flips, key=lambda f: f.margin - f.noise, default=None)
        ratio = max((f.margin / f.noise if f.noise else float("inf") for f in routing.flips), default=0.0)
        where = None if worst is None else (int(pair.rows[worst.row][0]), int(pair.rows[worst.row][1]))
        note = (
            f"{routing.agree} of {routing.tokens} sets agree, {len(routing.flips) - len(routing.illegal)} legal flips"
        )
        ratio = float("inf") if routing.nonsense else ratio
        record = Record(key, cls, "mlp", layer, ratio, rows=routing.tokens, bad_rows=bad, worst=where, note=note)
        self.records[key] = record

    def guilty(self, layer: int | None) -> list[Record]:
        """The bad records of a layer, in order of execution."""
        return [r for r in self.records.values() if r.layer == layer and r.bad]

    def inherited(self, stored: Mapping[str, Tensor]) -> None:
        """Errors against the truth itself, for tokens that no flip of an earlier layer has touched."""
        if not stored and self.result.layers == ():
            raise Qwen35Error(
                "truth has no envelope, and the checkpoint is not here", where=self.alignment.truth.path,
                expected=ENVELOPE, do="write the truth with `qwen35-moe trace`, or give --checkpoint",
            )  # fmt: skip
        self.stored = stored
        touched = torch.zeros(self.alignment.truth.ids.numel(), dtype=torch.bool)
        for key in self.alignment.keys:
            name, layer = base_name(key), layer_of(key)
            if name in IDS:
                self._find_flips(key, layer)
                if key not in self.records:
                    self._inherited_routing(key, layer, stored)
            if layer in self.flipped and name in ROUTED:
                for token in self.flipped[layer].tolist():
                    touched[token : (token // self.T + 1) * self.T] = True
            if name not in IDS and key in stored:
                self._judge_inherited(key, layer, stored, touched)

    def _judge_inherited(self, key: str, layer: int | None, stored: Mapping[str, Tensor], touched: Tensor) -> None:
        pair = self.alignment.pair(key)
        record = self.records.get(key)
        if record is None:
            record = self.records[key] = Record(key, "not comparable", block_of(key), layer, note=pair.problem)
        if pair.engine is None or pair.dtype is None:
            return
        index, x, truth = self.index(pair), pair.engine, pair.truth
        free = key.endswith(".gain") or not touched.any()
        keep = ~touched[index] if per_token(key) else torch.full((len(index),), bool(free))
        if base_name(key) in WEIGHTS:
            x, truth = x.sort(1, descending=True).values, truth.sort(1, descending=True).values
        if not keep.any():
            if record.added is None:
                record.note = "every token comes after a flip of experts"
            return
        if not keep.all():
            index, x, truth = index[keep], x[keep], truth[keep]
        known = Stored.of(stored[key], index)
        rounding = known.bf16 if pair.dtype == torch.bfloat16 else None
        bound = envelope(truth, [known.error], pair.dtype, known.size, rounding)
        verdict = judge(x, truth, bound, pair.dtype, self.limit, known.size, rounding)
        record.inherited, record.inherited_rel = verdict.ratio, verdict.rel
        if record.added is None:
            b, t = pair.rows[keep][verdict.worst].tolist()
            record.cls, record.ratio_l2, record.ratio_max, record.rel = (
                verdict.cls, verdict.ratio_l2, verdict.ratio_max, verdict.rel)  # fmt: skip
            record.worst, record.rows, record.nan = (int(b), int(t)), int(keep.sum()), pair.nan
            record.bad_rows = int((verdict.ratios > self.limit).sum())
            record.excluded = int((~keep).sum())

    def _find_flips(self, key: str, layer: int | None) -> None:
        """Tokens whose experts are not the truth's: what they become cannot be held against the engine."""
        pair = self.alignment.pair(key)
        if layer is not None and pair.engine is not None:
            differ = (pair.truth.long().sort(1).values != pair.engine.long().sort(1).values).any(1)
            if differ.any():
                self.flipped[layer] = self.index(pair)[differ]

    def _inherited_routing(self, key: str, layer: int | None, stored: Mapping[str, Tensor]) -> None:
        logits_key = f"layers.{layer}.moe_router_logits"
        pair = self.alignment.pair(key)
        if logits_key not in self.alignment.truth or pair.engine is None or logits_key not in stored:
            return
        index = self.index(pair)
        logits = self.alignment.truth[logits_key].flatten(0, -2)
        delta = envelope(logits, [Stored.of(stored[logits_key], torch.arange(len(logits))).error], torch.bfloat16).max
        width = max(logits.shape[1], int(pair.truth.max()) + 1)
        logits = torch.nn.functional.pad(logits, (0, width - logits.shape[1]), value=torch.inf)
        routing = compare_ids(pair.truth, pair.engine, logits[index], delta[index], layer)
        self._record_routing(key, layer, pair, routing)

    def finish(self, truth: Trace, layers: Sequence[int] | None) -> None:
        """Every tap of the truth (of these layers) gets its record; holes and logits are looked for."""
        names = [k for k, site in truth.sites.items() if site.step == 0]
        if layers is not None:
            names = [k for k in names if layer_of(k) in (None, *layers)]
            self.records = {k: r for k, r in self.records.items() if k in names}
            self.result.notes.append(f"only layers {', '.join(map(str, layers))} were judged")
        order = {key: i for i, key in enumerate([*names, "next_token_logprobs"])}  # of execution
        for key in dict.fromkeys([*names, *(self.alignment.keys if layers is None else ())]):
            if key in self.records or (layers is not None and key in self.alignment.keys):
                continue
            present = key in self.alignment.keys
            note = "no envelope for this tap" if present else ""
            if present:
                note = self.alignment.pair(key).problem or note
            cls: Class = "not comparable" if present else "missing"
            self.records[key] = Record(key, cls, block_of(key), layer_of(key), note=note)
        self.result.records = sorted(self.records.values(), key=lambda r: order[r.key])
        self.result.holes = list(_holes(self.alignment))
        logits = next((k for k in self.alignment.keys if k.startswith("next_token_log")), None)
        if logits is not None:
            pair = self.alignment.pair(logits)
            if pair.engine is not None:
                known = self.stored.get("next_token_logits")
                noise = None if known is None else Stored.of(known, self.index(pair)).error.max
                self.result.logits = compare_logits(pair, noise, truth.ids)


def _is_bf16(x: Tensor) -> bool:
    return torch.equal(x.to(torch.bfloat16).to(x.dtype), x)


def _holes(alignment: Alignment) -> Iterator[str]:
    """Taps that the dump has in some layers, and not in another of which it has something: files that were lost."""
    have = {(layer_of(k), base_name(k)) for k in alignment.keys}
    names, layers = {n for _, n in have}, {i for i, _ in have}
    for key in alignment.missing:
        if layer_of(key) is not None and base_name(key) in names and layer_of(key) in layers:
            yield key
