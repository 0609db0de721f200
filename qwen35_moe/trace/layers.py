"""Tracing a model layer by layer, so that a run of hours survives: after each layer its values and the residual stream
are on disk, and a later run goes on from there with the same bytes (`folder.py`)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import UsageReport
from ..errors import Qwen35Error
from ..model.cache import Cache, LayerState, extend
from ..model.rope import rotary_angles
from ..model.text import Model
from ..numerics import arithmetics
from ..numerics.tap_keys import dims_of, split_patterns
from ..numerics.taps import Handler, Site, attach, scope, tap
from ..run.origin import origin_of
from ..run.prompt import Images, embed_prompt
from ..run.streamed import StreamedHead
from .drafts import trace_drafts
from .file import Trace
from .folder import START_ANEW, State, complete_trace, resumable, resumed_complete, run_of
from .images import PIXELS, axes_of, images_meta
from .progress import Progress
from .recorder import Patterns, Recorder, sizes_of, step_record
from .writer import TraceWriter

HEAD = "next_token_logits"


@dataclass(frozen=True)
class LayerOptions:
    """What `trace_layers` is asked for.

    taps, experts  as of `trace`
    last           the last layer to compute; None: all layers, norm and head
    resume         continue after the last layer of an earlier run, which was killed or had a smaller `last`; the bytes
                   are those of an undisturbed run
    meta           what the trace says beside its own
    quiet, label   no progress; how each line of it begins
    images         take the place of placeholders
    drafts         see `trace_drafts`;  hidden [B, T, D]: an engine's hidden states, which they start from where finite
    """

    mask: Tensor | None = None
    taps: Patterns = "*"
    experts: bool = False
    last: int | None = None
    resume: bool = False
    meta: dict[str, Any] | None = None
    quiet: bool = False
    label: str = ""
    images: Images | None = None
    drafts: Sequence[Tensor] = ()
    hidden: Tensor | None = None


@torch.inference_mode()
def trace_layers(model: Model, ids_BT: Tensor, out: str | Path, **options: Any) -> tuple[Trace, UsageReport]:
    """As `trace`, for one forward pass over ids [B, T]: to a directory, and it can be resumed. options: the fields of
    `LayerOptions`.

    Error: disk full, unreadable shard (what is done can be resumed); another run's state.
    """
    asked = LayerOptions(**options)
    mask, taps, last, images, drafts = asked.mask, asked.taps, asked.last, asked.images, asked.drafts
    out, count = Path(out), len(model.layers)
    stop = count if last is None else last + 1
    check_request(model, ids_BT, taps, last)
    aside = aside_of(model, taps, last, images, bool(drafts))
    meta = meta_of(model, ids_BT, mask, taps, asked.experts, asked.meta, images)
    taps = taps if images is None else (*split_patterns(taps), PIXELS)
    if asked.resume and (there := complete_trace(out, count)) is not None:
        return there, resumed_complete(model, there, meta, aside)
    now = State(run_of(meta, ids_BT.device.type))
    state, sum_BTD = now.resumed(out) if asked.resume else (now, None)
    if (start := state.next) > stop:
        expected = f"--layers 0-{start - 1}"
        raise Qwen35Error("more layers are done already", where=out, expected=expected, found=last, do=START_ANEW)
    checkpoint = origin_of(model).checkpoint
    done = ("embed_tokens.", *(f"layers.{i}." for i in range(start))) if start else ()
    checkpoint.used.update(name for name in checkpoint.names() if name.startswith(done))
    writer = TraceWriter(out, {**meta, "layers": stop}, state.files if asked.resume else None)
    recorder = Recorder(taps, experts=asked.experts, out=writer)
    progress = Progress(model, range(start, stop), asked.quiet, asked.label)
    recorder.first_nan = state.nan
    with resumable(out, start):
        h_BTD, given = begin(model, ids_BT, mask, sum_BTD=sum_BTD, handlers=(recorder,), images=images)
    with arithmetics.using(model.arithmetic), attach(recorder, progress):
        for i in range(start, stop):
            with resumable(out, i):
                with scope(layer=i):
                    h_BTD = model.layers[i](h_BTD, *given, LayerState())
                writer.flush()
                state.next, state.files, state.nan = i + 1, dict(writer.sums), recorder.first_nan
                writer.save_state(state, h_BTD)
            progress.done(i)
        with resumable(out, stop):
            if stop == count:
                hidden_BTD = _head(model, h_BTD, recorder, writer)
                if drafts:
                    found = trace_drafts(model, ids_BT, mask, hidden_BTD, recorder, drafts, asked.hidden)
                    writer.meta["draft_ids"] = [x.tolist() for x in found]
            writer.close(goes_on=stop < count)
    if recorder.first_nan:
        of = f" of {asked.label}" if asked.label else ""
        print(f"qwen35-moe: the trace{of} holds NaN or infinity, from {recorder.first_nan} on", file=sys.stderr)
    return Trace.open(out), checkpoint.report(aside)


def check_request(model: Model, ids_BT: Tensor, taps: Patterns, last: int | None) -> None:
    """Error: ids, patterns or a layer that are none. To be found before anything is removed that a run has left."""
    model.checked(ids_BT)
    origin_of(model).checkpoint.reader.check()
    Recorder(taps)
    if last is not None and not 0 <= last < len(model.layers):
        raise Qwen35Error("no such layer", where="--layers", expected=f"0 to {len(model.layers) - 1}", found=last)


def meta_of(
    model: Model, ids_BT: Tensor, mask: Tensor | None, taps: Patterns, experts: bool, more: dict[str, Any] | None,
    images: Images | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What a trace says of its run. What must be the same for the bytes to be is in it."""
    axes = None if images is None else axes_of(model.config, ids_BT.cpu(), None if mask is None else mask.cpu(), images)
    return {
        "arithmetic": model.arithmetic.name,
        "checkpoint": origin_of(model).identity,
        **(more or {}),
        "config": sizes_of(model.config),
        "steps": [step_record(ids_BT, mask, axes, None)],
        **({} if images is None else {"images": images_meta(model.config, images)}),
        "taps": taps if isinstance(taps, str) else list(taps),
        "experts": experts,
    }


def begin(
    model: Model,
    ids_BT: Tensor,
    mask: Tensor | None,
    positions: Tensor | None = None,
    sum_BTD: Tensor | None = None,
    handlers: Iterable[Handler] = (),
    images: Images | None = None,
) -> tuple[Tensor, tuple[Any, ...]]:
    """What the first layer takes: the residual stream [B, T, D], and what all layers take beside it.

    sum_BTD: the stream after some layers that an earlier run has done; handlers: for taps that come before the layers,
    which that run has met. images: what takes the place of placeholders, by the model's own tower.
    """
    handlers, embeds = handlers if sum_BTD is None else (), None
    if images is not None:
        with attach(*handlers):
            prompt = embed_prompt(model, ids_BT, attention_mask=mask, **images.given())
        embeds, positions = prompt["inputs_embeds"], prompt["position_ids"]
    real_BS, positions = extend(Cache(), model.checked(ids_BT), mask, positions)
    with arithmetics.using(model.arithmetic), attach(*handlers):
        if sum_BTD is None:
            h_BTD = tap("embed_tokens", model.embed_tokens(ids_BT) if embeds is None else embeds)
        else:
            h_BTD = sum_BTD.to(ids_BT.device)
        return h_BTD, (rotary_angles(model.config, positions, h_BTD.dtype), real_BS)


def _head(model: Model, h_BTD: Tensor, recorder: Recorder, writer: TraceWriter) -> Tensor:
    """Norm (which is returned) and head, if asked for; a streamed head goes to disk block by block."""
    x_BTD = model.norm(h_BTD)
    site = Site(HEAD)
    if not recorder.wants(site):
        return x_BTD
    if not isinstance(model.lm_head, StreamedHead):
        model.lm_head(HEAD, x_BTD)
        return x_BTD

    def blocks() -> Iterator[tuple[slice, Tensor]]:
        for which, part in rounded_blocks(model, x_BTD):
            recorder.look(HEAD, part)
            yield which, part

    writer.add_blocks(site, dims_of(HEAD, 3), (*x_BTD.shape[:2], model.config.vocab_size), blocks())
    return x_BTD


def aside_of(model: Model, taps: Patterns, last: int | None, images: Images | None, drafts: bool) -> list[str]:
    """Patterns of the tensors that a run has no need of."""
    count, stop = len(model.layers), len(model.layers) if last is None else last + 1
    aside = [name for name, wanted in (("visual.*", images is not None), ("mtp.*", drafts)) if not wanted]
    aside += [f"layers.{i}.*" for i in range(stop, count)]
    if stop < count:
        return [*aside, "norm.*", "lm_head.*"]
    return aside if Recorder(taps).wants(Site(HEAD)) else [*aside, "lm_head.*"]


def rounded_blocks(model: Model, x_BTD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The logits of a streamed head, block by block, as the arithmetic stores them."""
    for rows, part in model.lm_head.blocks(HEAD, x_BTD):  # type: ignore[operator]
        yield rows, model.arithmetic.round(HEAD, part)
