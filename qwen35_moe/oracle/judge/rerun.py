"""The rerun: each block of the truth runs again on the engine's own input, so that only the error of that block shows.

A layer runs under several arithmetics ("tables"). At each boundary of blocks (`replay.RESTARTS`) they go on with the
engine's value if the dump has it, else with their own. One layer is held at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from ...model.cache import LayerState
from ...model.config import FULL
from ...model.rope import rotary_angles
from ...model.text import Model
from ...model.vision.config import VisionConfig
from ...numerics.arithmetics import Arithmetic, using
from ...numerics.tap_keys import part_of
from ...numerics.taps import Handler, scope, tap
from ...run.load import build, build_part
from ...run.prompt import embed_prompt, placeholders
from ...run.source import WeightSource
from ..diagnose.faults import Fault, FaultSite, Seen
from .hand_over import stepped
from .log_p import LOG_P, log_p
from .replay import Captured, Reached, Restart, Until
from .rerun_parts import Layers, SharedPart, TruthTokens, drafted, under
from .where import HERE, Where

SMALL = 1 << 26
CPU = torch.device("cpu")
NO_FAULT, NO_DRAFT_FAULT = Fault("", ""), Fault("", "mtp")

Taps = dict[str, Tensor]


class Rerun:
    """Reruns the parts of a checkpoint's model on captured values. `tables`: the truth's arithmetic first."""

    def __init__(
        self, source: WeightSource, fused: Sequence[bool], tokens: TruthTokens, captured: Captured,
        tables: Sequence[Arithmetic], with_log_p: bool = False, where: Where = HERE,
    ):  # fmt: skip
        self.source, self.fused, self.tokens, self.captured = source, list(fused), tokens, captured
        self.tables, self.with_log_p, self.where = list(tables), with_log_p, where
        c = self.config = source.config
        size = 24 * c.num_experts * c.moe_intermediate_size * c.hidden_size  # of one layer's experts in float64
        self.mode = where.mode or ("decoded" if size < SMALL else "stream")
        self.layers = Layers(source, lambda i: self.device(f"layers.{i}"), self.mode)
        self.models: list[Model] = []  # one a table; their layers are not used
        self.streams: list[Tensor] = []  # one a table: what the current layer reads
        self.before: list[Tensor] = []  # one a table: what the layer before it read
        self.after_layers = False
        self.chosen: Tensor | None = None  # the experts of the layer before, under the first table
        self.shared: Tensor | None = None  # what the shared expert adds to the first table's mlp_output [tokens, D]

    def device(self, part: str) -> torch.device:
        """The device of a part of the model."""
        return self.where.of(part, self.config.num_hidden_layers)

    @torch.inference_mode()
    def parts(self, layers: Sequence[int] | None = None) -> Iterator[tuple[int | None, list[Taps]]]:
        """(layer, one dict of taps a table) in order of execution: None (embedding), 0, 1, ..., None (norm and head),
        None (each draft). layers: those that are needed; others run only where the stream is not captured.

        What layer i hands on is among its own taps, under the names that the next layer gives to it.
        """
        count = self.config.num_hidden_layers
        needed = set(range(count + 1)) if layers is None else {*layers, *(count for i in layers if i == count - 1)}
        self.models = [build(self.source, table, self.fused, self.device("norm"), "stream") for table in self.tables]
        begin = said = time.monotonic()
        pairs = [self._begin(model, table) for table, model in zip(self.tables, self.models, strict=True)]
        self.streams = [stream for stream, _ in pairs]
        yield None, [taps for _, taps in pairs]
        for i in range(min(count, max(needed, default=-1) + 1)):
            if needed.isdisjoint((i, i + 1)) and self.captured.covers(self._boundary(i + 1), self.tokens.mask):
                self.streams = [self._enter(i + 1, torch.zeros_like(stream)) for stream in self.streams]
                continue
            part = SharedPart(self.config.num_experts, self.tables[0], self.fused[i])
            runs = [
                self.run_layer(i, table, stream, handlers=(part,) if k == 0 else ())
                for k, (table, stream) in enumerate(zip(self.tables, self.streams, strict=True))
            ]
            self.shared, seen = part.value, [taps for taps, _ in runs]
            yield i, seen
            said = self.where.progress(i + 1, count, len(self.tables), begin, said)
            self.before, self.streams = self.streams, [after for _, after in runs]
            self.chosen = seen[0][f"layers.{i}.moe_topk_ids"]
        if count not in needed:
            return
        self.after_layers = True
        yield None, [self.head(model, stream) for model, stream in zip(self.models, self.streams, strict=True)]
        seen = [self.fault(None, NO_DRAFT_FAULT, table, k) for k, table in enumerate(self.tables)]
        for draft in dict.fromkeys(map(part_of, seen[0])):
            yield None, [{key: x for key, x in taps.items() if part_of(key) == draft} for taps in seen]

    @torch.inference_mode()
    def run_layer(
        self, i: int, table: Arithmetic, stream_BTD: Tensor, fault: Fault = NO_FAULT, expert: int = 0,
        handlers: Sequence[Handler] = (), fused: bool | None = None,
    ) -> tuple[Taps, Tensor]:  # fmt: skip
        """The values at the taps of layer i by key, and the stream after it."""
        place, device = self.place(fault, i, expert), self.device(f"layers.{i}")
        if fault.rows:
            place = replace(place, beside=self._beside(i, table, fault.remembers))
        restart = Restart(self.captured, self.tokens.count)
        layer = self.layers.broken(i, table, self.fused[i] if fused is None else fused, fault, place)
        tokens, stream_BTD = self.tokens.on(device), stream_BTD.to(device)
        after = stream_BTD  # where a handler ends the run
        with suppress(Reached), under(table, *handlers, *fault.handlers(place), restart):
            angles = rotary_angles(self.config, tokens.positions, stream_BTD.dtype)
            with scope(layer=i), stepped(layer, fault.hand_over, restart, tokens, self.config):
                out = layer(stream_BTD, angles, tokens.real, LayerState())
            after = self._enter(i + 1, out)
        restart.seen.pop(f"layers.{i}.layer_input", None)  # an output of the layer before
        return restart.seen, after

    @torch.inference_mode()
    def fault(
        self, i: int | None, fault: Fault, table: Arithmetic, like: int, expert: int = 0, to_head: bool = False,
        until: str = "",
    ) -> Taps:  # fmt: skip
        """The values at the taps of layer i (None: before the first, or after the last layer) with a fault, under a
        table that reads the stream of table `like`. to_head: i is the last layer, and the values are those at the taps
        after it. until: the key of the one tap that is wanted; the layer does not run on behind it."""
        place, model, table = self.place(fault, i, expert), self.models[like], fault.arithmetic(table)
        if fault.block == "mtp":
            return drafted(self, model, self.streams[like], table, fault, place)
        if fault.block == "vision" or (i is None and not self.after_layers):
            return self._begin(model, table, fault.handlers(place))[1]
        if i is None:
            source = fault.source(self.source, place)
            if source is not self.source:
                model = build(source, table, self.fused, self.device("norm"), "stream")
            return self.head(model, self.streams[like], fault.handlers(place), table)
        stream = (self.before if to_head else self.streams)[like]
        wanted = [Until(until)] if until and not to_head and fault.hand_over is None else []
        taps, after = self.run_layer(i, table, stream, fault, expert, wanted)
        return self.head(model, after, table=table) if to_head else taps

    def taps(self, i: int | None, tables: Sequence[tuple[int, Arithmetic]]) -> list[Taps]:
        """The values at the taps of layer i under more tables, each with the index of the table whose stream it
        reads. If nothing is captured, the values after the last layer come from whole runs."""
        if i is None and self.after_layers and not self.captured:
            more = [table for _, table in tables]
            whole = Rerun(self.source, self.fused, self.tokens, self.captured, more, self.with_log_p, self.where)
            return list(whole.parts())[-1][1]
        return [self.fault(i, NO_FAULT, table, like) for like, table in tables]

    @torch.inference_mode()
    def head(
        self, model: Model, stream_BTD: Tensor, handlers: Sequence[Handler] = (), table: Arithmetic | None = None
    ) -> Taps:
        """The values at the taps after the last layer."""
        restart = Restart(self.captured, self.tokens.count)
        with under(table or model.arithmetic, *handlers, restart):
            model.lm_head("next_token_logits", model.norm(stream_BTD.to(self.device("norm"))))
        if self.with_log_p:
            restart.seen[LOG_P] = log_p(restart.seen["next_token_logits"])
        return restart.seen

    def place(self, fault: Fault, layer: int | None, expert: int) -> FaultSite:
        """Where a fault strikes: its layer, its expert, the engine's steps and images."""
        tokens, images = self.tokens, self.tokens.images
        layout = {} if tokens.step_rows is None else tokens.step_rows.layout
        if fault in (NO_FAULT, NO_DRAFT_FAULT):
            return FaultSite(self.config, tokens.positions)
        layers, seen = None if layer is None else frozenset({layer}), None
        weights = self.captured.whole(f"layers.{layer}.moe_topk_weights", tokens.count)
        if images is not None:
            table = self.source.tensor("visual.pos_embed.weight").double()
            vision = VisionConfig.from_dict(self.config.raw["vision_config"], self.config.hidden_size)
            seen = Seen.of(images, placeholders(self.config, tokens.ids), table, vision)
        return FaultSite(self.config, tokens.positions, layers, expert, layout, seen, weights)

    def _begin(self, model: Model, table: Arithmetic, handlers: Sequence[Handler] = ()) -> tuple[Tensor, Taps]:
        """The stream that the first layer reads, and what the taps on the way held, those of the tower among them."""
        restart, device, tokens = Restart(self.captured, self.tokens.count), self.device("norm"), self.tokens
        ids = tokens.ids.to(device)
        with under(table, *handlers, restart, model=model):
            embeds = None
            if tokens.images is not None:
                model.visual = build_part("visual", self.source, table, False, device, "stream")
                real = None if tokens.real is None else tokens.mask.to(device)
                embeds = embed_prompt(model, ids, attention_mask=real, **tokens.images.given())["inputs_embeds"]
            with using(table):
                stream = self._enter(0, tap("embed_tokens", model.embed_tokens(ids) if embeds is None else embeds))
        return stream, restart.seen

    def _boundary(self, i: int) -> tuple[str, str]:
        """The names of the stream that layer i reads."""
        return f"layers.{i}.layer_input", f"layers.{i - 1}.layer_output_sum"

    def _beside(self, i: int, table: Arithmetic, names: Sequence[str]) -> dict[int, Taps]:
        """By step, the values [n, ...] at some taps of the mixer of layer i in the engine's other rows."""
        layer, found = self.layers.whole(i, table, self.fused[i]), {}
        mixer = layer.self_attn if layer.kind == FULL else layer.linear_attn
        steps = {} if self.tokens.step_rows is None else self.tokens.step_rows.beside(i)
        for step, rows in steps.items():
            x_1TD, watch = rows.x[None].to(self.device(f"layers.{i}"), self.streams[0].dtype), Restart(Captured(), 0)
            with under(table, watch), scope(layer=i):
                mixer(x_1TD if rows.normed else layer.input_layernorm(x_1TD), None, LayerState())
            found[step] = {name: watch.seen[f"layers.{i}.{name}"][0].cpu() for name in names}
        return found

    def _enter(self, i: int, stream: Tensor) -> Tensor:
        """The stream that layer i reads: the engine's, where it captured it on either side of the boundary."""
        if i < self.config.num_hidden_layers:
            with scope(layer=i):
                tap("layer_input", stream)
        for key in self._boundary(i):
            if key in self.captured:
                return self.captured.put(key, stream, self.tokens.count, keep_sums=True)
        return stream
