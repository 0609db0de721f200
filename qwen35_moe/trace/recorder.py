"""Recording what the taps of a run hold: `trace(model, ids)`, or `with record("attn_*") as recorder: model(ids)`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..model.cache import Cache
from ..model.config import Config
from ..model.text import Model
from ..numerics.tap_keys import check_patterns, dims_of, matching, split_patterns
from ..numerics.tap_table import TAPS
from ..numerics.taps import Handler, Site, attach
from ..run.origin import identity_of
from ..run.prompt import Images, embed_prompt
from .file import Trace
from .head import Entry
from .images import PIXELS, images_meta
from .writer import TraceWriter

Patterns = str | Iterable[str]


INSIDE = {name for name, tap in TAPS.items() if tap.dims.startswith("r ")}  # values of single experts


def _last(pattern: str) -> str:
    """ "layers.3.moe_a2" -> "moe_a2"."""
    return pattern.rpartition(".")[2]


class Recorder(Handler):
    """A tap handler that copies every matching value into a Trace, or, with `out`, to a trace directory.

    `patterns` are globs over tap names ("gdn_*") or keys ("layers.3.*"), in a list or separated by commas. Values of
    single experts and of single turns of a loop (`site.index`) are many: they are kept with `experts=True` only, or
    when a pattern names them in full ("moe_a2", "gdn_recall") or, for experts, in part ("moe_expert_*").
    The copies have the dtype that the run computed. Call `next_step()` between forward passes of one recording.
    """

    def __init__(
        self, patterns: Patterns = "*", experts: bool = False, out: TraceWriter | None = None,
        meta: dict[str, Any] | None = None,
    ):  # fmt: skip
        self.patterns = split_patterns(patterns)
        check_patterns(self.patterns)
        self.experts, self.step = experts, 0
        self.meta = {"steps": [], **(meta or {})}
        self.trace, self._writer = Trace(meta=self.meta), out
        self._seen: set[str] = set()
        self.first_nan = ""  # key of the first value that holds one

    @property
    def sees_experts(self) -> bool:
        """Whether values inside of single experts are asked for, which the grouped form does not show."""
        return self.experts or any("expert" in p or _last(p) in INSIDE for p in self.patterns)

    def wants(self, site: Site) -> bool:
        found = matching(self.patterns, site.name, site.key)
        if self.experts or site.index is None and site.expert is None:
            return bool(found)
        return any(_last(p) == site.name or "expert" in p and site.index is None for p in found)

    def __call__(self, site: Site, x: Tensor) -> None:
        if not self.wants(site):
            return
        entry = Entry.of(site, x, dims_of(site.name, x.dim()), self.step)
        if entry.key in self._seen:
            do = "call recorder.next_step() between forward passes"
            raise Qwen35Error("tap was met twice in one forward pass", found=entry.key, do=do)
        self._seen.add(entry.key)
        self.look(entry.key, x)
        # A copy: caches and states are changed in place later on.
        (self._writer or self.trace).add(entry, x.detach().clone())

    def look(self, key: str, x: Tensor) -> None:
        """Whether this is the first value that holds NaN or infinity."""
        if not self.first_nan and x.is_floating_point() and not bool(x.isfinite().all()):
            self.first_nan = key

    def next_step(self) -> None:
        self.step += 1


@contextmanager
def record(
    patterns: Patterns = "*",
    experts: bool = False,
    out: str | Path | None = None,
    meta: dict[str, Any] | None = None,
) -> Iterator[Recorder]:
    """A Recorder that sees what runs inside of the block; `.trace` holds it, after the block the one in `out`."""
    writer = None if out is None else TraceWriter(out)
    recorder = Recorder(patterns, experts, writer, meta)
    with attach(recorder):
        yield recorder
    if writer is not None:
        writer.meta = recorder.meta
        writer.close()
        recorder.trace = Trace.open(writer.out)


def trace(
    model: Model,
    input_ids: Tensor,
    *,
    taps: Patterns = "*",
    experts: bool = False,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Cache | None = None,
    replay: Handler | Iterable[Handler] = (),
    chunks: Iterable[int] | None = None,
    images: Images | None = None,
    out: str | Path | None = None,
    meta: dict[str, Any] | None = None,
) -> Trace:
    """Run the model on input_ids [B, T] and return the values of its taps.

    `replay` are tap handlers to attach for the run (routing to repeat, faults to plant). `chunks` are token counts: the
    sequence is then fed in pieces through `cache`, one step each ([5, 1, 1]: a prefill of 5 and two decode steps).
    `images` takes the place of the placeholders in input_ids; positions then have three axes.
    With `out` the trace is streamed to that directory and memory stays flat. No rounding happens here.
    """
    input_ids = torch.as_tensor(input_ids)
    attention_mask = None if attention_mask is None else torch.as_tensor(attention_mask)
    if input_ids.dim() != 2:
        raise Qwen35Error("input_ids must be [B, T]", found=list(input_ids.shape), do="add the batch dimension")
    sizes = [input_ids.shape[1]] if chunks is None else list(chunks)
    if sum(sizes) != input_ids.shape[1] or (len(sizes) > 1 and cache is None):
        raise Qwen35Error("chunks do not fit",
                          expected=f"{input_ids.shape[1]} tokens, and a cache for several chunks",
                          found=f"{sizes}, cache {cache}")  # fmt: skip
    handlers = (replay,) if callable(replay) else tuple(replay)
    known = {"arithmetic": model.arithmetic.name, "checkpoint": identity_of(model), "config": sizes_of(model.config)}
    taps = taps if images is None else (*split_patterns(taps), PIXELS)
    known |= {} if images is None else {"images": images_meta(model.config, images)}
    with record(taps, experts=experts, out=out, meta={**known, **(meta or {})}) as recorder, attach(*handlers):
        embeds = None
        if images is not None:
            prompt = embed_prompt(model, input_ids, attention_mask=attention_mask, **images.given())
            embeds, position_ids = prompt["inputs_embeds"], prompt["position_ids"]
        for index, (at, mask) in enumerate(_pieces(sizes, attention_mask)):
            if index:
                recorder.next_step()
            ids, positions = input_ids[:, at], None if position_ids is None else position_ids[..., at]
            recorder.meta["steps"].append(step_record(ids, mask, positions, cache))
            with torch.no_grad():
                fed = {"input_ids": ids} if embeds is None else {"inputs_embeds": embeds[:, at]}
                model(**fed, attention_mask=mask, cache=cache, position_ids=positions)
    return recorder.trace


def _pieces(sizes: list[int], mask: Tensor | None) -> Iterator[tuple[slice, Tensor | None]]:
    """Tokens of each piece, and the mask of all tokens so far; its last sum(sizes) columns are these tokens."""
    stop = 0
    for size in sizes:
        start, stop = stop, stop + size
        yield slice(start, stop), None if mask is None else mask[:, : mask.shape[1] - sum(sizes) + stop]


def sizes_of(config: Config) -> dict[str, int]:
    """The whole numbers of a config: what a reader needs to split fused tensors."""
    return {key: value for key, value in vars(config).items() if type(value) is int}


def step_record(ids: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Cache | None) -> dict[str, Any]:
    """Ids, positions and mask [B, T] of one forward pass. A mask may also cover the cached tokens: then [B, S]."""
    new = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :].long()
    if positions is None:
        past = None if cache is None else cache.next_position
        positions = (new.cumsum(1) - 1).clamp(min=0) + (0 if past is None else past[:, None])
    axes = {"axes": positions.tolist()} if positions.dim() == 3 else {}
    if positions.dim() == 3:  # time, height, width: the time row orders tokens
        positions = positions[0]
    return {"ids": ids.tolist(), "positions": positions.expand_as(ids).tolist(), "mask": new.tolist(), **axes}
