"""Running blocks again on an engine's captured input: that gives the error that each block adds, without inherited
errors.

A layer runs under several arithmetics from the same values. These are the engine's at each captured boundary of blocks
(`replay.RESTARTS`), or else the arithmetic's own. One layer is held at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...model.cache import LayerState
from ...model.rope import rotary_angles
from ...model.text import Layer, Model
from ...model.vision.config import VisionConfig
from ...numerics.arithmetics import Arithmetic, using
from ...numerics.tap_keys import part_of
from ...numerics.taps import Handler, attach, scope, tap
from ...run.fill import fill
from ...run.load import build, build_part
from ...run.prompt import embed_prompt, placeholders
from ...run.source import WeightSource
from ..diagnose.faults import Fault, FaultSite
from ..diagnose.seen import Seen
from .drafted import Drafting, drafted
from .hand_over import HandOver, stepped
from .log_p import LOG_P, log_p
from .replay import Captured, Restart
from .rerun_parts import LayerSource, SharedPart, TruthTokens
from .split_k import splitting
from .where import HERE, Where

SMALL = 1 << 26
CPU = torch.device("cpu")


class Rerun:
    """Reruns the parts of a checkpoint's model on captured values. `tables`: the truth's arithmetic first."""

    def __init__(
        self, source: WeightSource, fused: Sequence[bool], tokens: TruthTokens, captured: Captured,
        tables: Sequence[Arithmetic], with_log_p: bool = False, where: Where = HERE,
    ):  # fmt: skip
        self.source, self.fused, self.tokens, self.captured = source, list(fused), tokens, captured
        self.tables, self.with_log_p, self.where = list(tables), with_log_p, where
        self.config = source.config
        c = self.config
        size = 24 * c.num_experts * c.moe_intermediate_size * c.hidden_size  # of one layer's experts in float64
        self.mode = where.mode or ("decoded" if size < SMALL else "stream")
        self._layers: dict[Any, Layer] = {}
        self._index: int | None = None
        self._held = LayerSource(source, CPU)
        self.models: list[Model] = []  # one a table; their layers are not used
        self.streams: list[Tensor] = []  # one a table: what the current layer reads
        self.before: list[Tensor] = []  # one a table: what the layer before it read
        self.after_layers = False
        self.chosen: Tensor | None = None  # the experts that were chosen there
        self.shared: Tensor | None = None  # what the shared expert adds to the first table's mlp_output [tokens, D]

    def place(self, layer: int | None, expert: int = 0) -> FaultSite:
        layers = None if layer is None else frozenset({layer})
        tokens = self.tokens
        weights = self.captured.whole(f"layers.{layer}.moe_topk_weights", tokens.count)
        return FaultSite(self.config, tokens.positions, layers, expert, tokens.steps, self._seen(), weights)

    def device(self, part: str) -> torch.device:
        """The device of a part of the model."""
        return self.where.of(part, self.config.num_hidden_layers)

    def layer(self, i: int, table: Arithmetic, source: WeightSource, fused: bool) -> Layer:
        """Layer i with the weights of a source, in the dtypes of a table. It is kept while i is the current layer."""
        if self._index != i:
            self._index, self._layers, self._held = i, {}, LayerSource(self.source, self.device(f"layers.{i}"))
        key = (id(source), table.dtype, tuple(sorted(table.weights.items())), table.quantised, fused)
        if key not in self._layers:
            with torch.device("meta"):
                layer = Layer(self.config, self.config.layer_types[i], fused)
            read_from = self._held if source is self.source else source
            fill(layer, f"layers.{i}", read_from, table, self.device(f"layers.{i}"), self.mode)
            if source is not self.source:
                return layer
            self._held.share(layer)
            self._layers[key] = layer
        return self._layers[key]

    @torch.inference_mode()
    def run_layer(
        self,
        i: int,
        table: Arithmetic,
        stream_BTD: Tensor,
        handlers: Sequence[Handler] = (),
        source: WeightSource | None = None,
        fused: bool | None = None,
        hand_over: HandOver | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The values at the taps of layer i by key, its hand-over among them, and the stream after it."""
        layer = self.layer(i, table, source or self.source, self.fused[i] if fused is None else fused)
        restart = Restart(self.captured, self.tokens.count)
        device = self.device(f"layers.{i}")
        tokens, stream_BTD = self.tokens.on(device), stream_BTD.to(device)
        with using(table), splitting(table), attach(*handlers, restart):
            angles = rotary_angles(self.config, tokens.positions, stream_BTD.dtype)
            with scope(layer=i), stepped(layer, hand_over, restart, tokens, self.config):
                out = layer(stream_BTD, angles, tokens.real, LayerState())
            after = self._enter(i + 1, out)
        restart.seen.pop(f"layers.{i}.layer_input")  # an output of the layer before
        return restart.seen, after

    def fault(
        self, i: int | None, fault: Fault, table: Arithmetic, like: int, expert: int = 0, to_head: bool = False
    ) -> dict[str, Tensor]:
        """The values at the taps of layer i with this fault, under a table that starts where table `like` did. to_head:
        the values at the taps after the last layer, which may be layer i."""
        place = self.place(i, expert)
        source, table = fault.source(self.source, place), fault.arithmetic(table)
        if fault.block == "vision":
            return self._begin(self.models[like], table, fault.handlers(place))[1]
        if fault.block == "mtp":
            given, handlers = self._drafting(source), fault.handlers(place)
            start = self.models[like], self.streams[like], table
            return {} if given is None else drafted(given, *start, handlers, fault.draft, fault.hand_over)
        if i is None:
            model = build(source, table, self.fused, self.device("norm"), "stream")
            return self.head(model, self.streams[like], fault.handlers(place))
        stream = (self.before if to_head else self.streams)[like]
        taps, after = self.run_layer(
            i, table, stream, fault.handlers(place), source, fault.fused or None, fault.hand_over
        )
        return self.head(self.models[like], after, table=table) if to_head else taps

    @torch.inference_mode()
    def __iter__(self) -> Iterator[tuple[int | None, list[dict[str, Tensor]]]]:
        """(layer, one dict of taps a table) in order of execution: None (embedding), 0, 1, ..., None (norm and head).

        What layer i hands on is among its own taps, under the names that the next layer gives to it.
        """
        device, count = self.device("norm"), self.config.num_hidden_layers
        self.models = [build(self.source, table, self.fused, device, "stream") for table in self.tables]
        begin = said = time.monotonic()
        seen, self.streams = [], []
        for table, model in zip(self.tables, self.models, strict=True):
            stream, taps = self._begin(model, table)
            self.streams.append(stream)
            seen.append(taps)
        yield None, seen
        for i in range(count):
            seen, after = [], []
            part = SharedPart(self.config.num_experts, self.tables[0], self.fused[i])
            for table, stream in zip(self.tables, self.streams, strict=True):
                taps, out = self.run_layer(i, table, stream, () if seen else (part,))
                seen.append(taps)
                after.append(out)
            self.shared = part.value
            yield i, seen
            said = self.where.progress(i + 1, count, len(self.tables), begin, said)
            self.before, self.streams, self.chosen = self.streams, after, seen[0][f"layers.{i}.moe_topk_ids"]
        self.after_layers = True
        yield None, [self.head(model, stream) for model, stream in zip(self.models, self.streams, strict=True)]
        if (given := self._drafting(self.source)) is not None:
            runs = zip(self.models, self.streams, self.tables, strict=True)
            seen = [drafted(given, model, stream, table) for model, stream, table in runs]
            for draft in dict.fromkeys(map(part_of, seen[0])):
                yield None, [{key: x for key, x in taps.items() if part_of(key) == draft} for taps in seen]

    def _drafting(self, source: WeightSource) -> Drafting | None:
        """What the draft head starts from; None where the truth has none."""
        return Drafting(self.tokens, self.captured, source, self.device("norm")) if self.tokens.drafts else None

    def _begin(
        self, model: Model, table: Arithmetic, handlers: Sequence[Handler] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The stream that the first layer reads, and what the taps on the way held, those of the tower among them."""
        restart, before = Restart(self.captured, self.tokens.count), model.arithmetic
        model.arithmetic = table
        try:
            with splitting(table), attach(*handlers, restart):
                embeds = self._images(model, table)
                with using(table):
                    ids = self.tokens.ids.to(self.device("norm"))
                    embeds = model.embed_tokens(ids) if embeds is None else embeds
                    return self._enter(0, tap("embed_tokens", embeds)), restart.seen
        finally:
            model.arithmetic = before

    def _seen(self) -> Seen | None:
        """What the vision tower was given, for faults of it."""
        if (images := self.tokens.images) is None:
            return None
        table = self.source.tensor("visual.pos_embed.weight").double()
        vision = VisionConfig.from_dict(self.config.raw["vision_config"], self.config.hidden_size)
        return Seen.of(images, placeholders(self.config, self.tokens.ids), table, vision)

    def _images(self, model: Model, table: Arithmetic) -> Tensor | None:
        """The prompt's embeddings with its images in them, by the tower under this table; None for text."""
        if self.tokens.images is None:
            return None
        device = self.device("norm")
        model.visual = build_part("visual", self.source, table, False, device, "stream")
        real = None if self.tokens.real is None else self.tokens.mask.to(device)
        images, ids = self.tokens.images.given(), self.tokens.ids.to(device)
        return embed_prompt(model, ids, attention_mask=real, **images)["inputs_embeds"]

    def taps(self, i: int | None, tables: Sequence[tuple[int, Arithmetic]]) -> list[dict[str, Tensor]]:
        """The values at the taps of layer i (None: after the last layer) under more tables, each from where a table of
        `tables`, given by index, started. If nothing is captured, the values after the last layer are those of a whole
        run."""
        if i is None and self.after_layers and not self.captured.values:
            more = [table for _, table in tables]
            whole = Rerun(self.source, self.fused, self.tokens, self.captured, more, self.with_log_p, self.where)
            return list(whole)[-1][1]
        if i is None and not self.after_layers:
            return [self._begin(self.models[like], table)[1] for like, table in tables]
        if i is None:
            return [self.head(self.models[like], self.streams[like], table=table) for like, table in tables]
        return [self.run_layer(i, table, self.streams[like])[0] for like, table in tables]

    @torch.inference_mode()
    def head(
        self, model: Model, stream_BTD: Tensor, handlers: Sequence[Handler] = (), table: Arithmetic | None = None
    ) -> dict[str, Tensor]:
        """The values at the taps after the last layer."""
        restart, table = Restart(self.captured, self.tokens.count), table or model.arithmetic
        with using(table), splitting(table), attach(*handlers, restart):
            model.lm_head("next_token_logits", model.norm(stream_BTD.to(self.device("norm"))))
        if self.with_log_p:
            restart.seen[LOG_P] = log_p(restart.seen["next_token_logits"])
        return restart.seen

    def _enter(self, i: int, stream: Tensor) -> Tensor:
        """The stream that layer i reads: the engine's, where it captured it on either side of the boundary."""
        keys = [f"layers.{i}.layer_input", f"layers.{i - 1}.layer_output_sum"]
        if i < self.config.num_hidden_layers:
            with scope(layer=i):
                tap("layer_input", stream)
        for key in keys:
            if key in self.captured:
                return self.captured.put(key, stream, self.tokens.count, keep_sums=True)
        return stream
