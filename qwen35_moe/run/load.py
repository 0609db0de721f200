"""From a checkpoint to a model: `load(path)` returns the text model, with draft head and vision tower.

A mode says how much of it is held decoded:

    decoded   everything, in the arithmetic's dtype: fastest, largest. Weights stored in that dtype are mapped, not
              copied, and the system may reclaim their pages
    packed    experts stay as they are stored (mapped) and are decoded when a token chooses them; the rest is decoded
    stream    nothing: a layer is read from disk at its turn, an expert when a token chooses it
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..errors import Qwen35Error
from ..gate.decide import decide_layers
from ..model.mtp import MTP
from ..model.text import Model
from ..model.vision.tower import VisionTower
from ..numerics import arithmetics
from ..numerics.arithmetics import Arithmetic
from .experts import fix_threads
from .fill import fill
from .origin import HostCheck, Origin, check_default_device, usable
from .placement import place_model
from .prompt import vision_of
from .source import WeightSource
from .streamed import LAYERS_OF_PART, StreamedEmbedding, StreamedHead, StreamedPart, stream_layers
from .validate import model_config, validate

MODES = ("decoded", "packed", "stream")
SHARED_EXPERT_MODES = ("auto", "unfused", "fused", "fused-online")


def load(
    path: str | Path,
    arithmetic: str | Arithmetic = "exact",
    shared_expert: str = "auto",
    device: str | torch.device = "cpu",
    mode: str = "decoded",
    ignore_config_keys: Iterable[str] = (),
    text_only: bool = False,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
) -> Model:
    """All of a checkpoint folder: the text model, and its draft head and vision tower as `model.mtp`, `model.visual`.

    shared_expert: "unfused"; "fused" (slot E of E+1); "fused-online", where a float shared expert is converted to the
    MXFP4 of the routed ones (`origin_of(model).conversion` says at what cost); or "auto": what the gate (`strict`)
    decides, layer by layer, the draft's among them, unless the arithmetic is of an engine that never fuses.
    mode: "decoded", "packed" or "stream", see above; all three compute the same bits.
    text_only: without draft head and vision tower; `origin_of(model).left_out` counts the tensors left unread.
    device_map: spreads the model over GPUs and "cpu" instead of `device`: "auto", or a dictionary of parts ("layers.3",
    "lm_head", "" for the rest) to devices; `max_memory` as in accelerate.

    Fixes torch's current number of threads (`fix_threads`), so that no bit depends on what ran before.
    """
    fix_threads()
    for name, value, allowed in (("mode", mode, MODES), ("shared_expert", shared_expert, SHARED_EXPERT_MODES)):
        if value not in allowed:
            raise Qwen35Error(f"unknown {name}", where="load()", expected=" | ".join(allowed), found=repr(value))
    if not isinstance(path, str | PathLike):
        raise Qwen35Error("no checkpoint", where="load()", expected="the path of a folder", found=repr(path))
    device = usable(device, "load(device=...)")
    if device_map is not None and mode == "stream":
        raise Qwen35Error("a streamed model stays on disk", where="load()", expected="a device_map, or mode='stream'")
    check_default_device()
    table = arithmetics.get(arithmetic)
    checkpoint = Checkpoint.open(path)
    config = model_config(checkpoint, ignore_config_keys)
    validate(checkpoint, config, text_only)
    checkpoint.reader.mapped = mode != "stream"
    if shared_expert == "auto" and table.fuses:
        decisions = decide_layers(checkpoint.config, stored=checkpoint.spec)
        fused, draft_fused = [bool(d) for d in decisions if not d.draft], any(d for d in decisions if d.draft)
    else:
        draft_fused = shared_expert.startswith("fused")
        fused = [draft_fused] * config.num_hidden_layers
    source = WeightSource(checkpoint, config, online=shared_expert == "fused-online")
    device = torch.device("meta") if device_map is not None else device
    model = build(source, table, fused, device, mode)
    model.register_forward_pre_hook(HostCheck())
    counts = {part: sum(name.startswith(f"{part}.") for name in checkpoint.names()) for part in LAYERS_OF_PART}
    parts = {part: count for part, count in counts.items() if count}
    model.register_forward_pre_hook(Origin(source, checkpoint.identity(), parts if text_only else {}))
    for part in () if text_only else parts:
        setattr(model, part, build_part(part, source, table, draft_fused, device, mode))
    if device_map is not None:
        place_model(model, source, table, mode, device_map, max_memory)
    return model


def build(source: WeightSource, table: Arithmetic, fused: Sequence[bool], device: torch.device, mode: str) -> Model:
    """A text model whose weights come from `source`; on the meta device, one without."""
    config = source.config
    with torch.device("meta"):
        model = Model(config, table, fused)
    if device.type == "meta":
        return model
    if mode == "stream":
        for i, is_fused in enumerate(fused):
            if is_fused:
                source.guard_slot(f"layers.{i}.mlp")  # before a long run begins
        stream_layers(model, "layers", "layers", source, table, device)
        model.embed_tokens, model.lm_head = StreamedEmbedding(source, table), StreamedHead(source, table, device)
        fill(model.norm, "norm", source, table, device)
    else:
        for name, module in model.named_children():
            if name == "lm_head" and config.tie_word_embeddings:
                module.weight = model.embed_tokens.weight
            else:
                fill(module, name, source, table, device, mode)
    return model


def build_part(
    name: str, source: WeightSource, table: Arithmetic, fused: bool, device: torch.device, mode: str
) -> MTP | VisionTower | StreamedPart:
    """The draft head ("mtp"; `fused` is its own) or the vision tower ("visual"), with weights from `source`."""
    config = source.config
    if name == "visual" and config.raw.get("vision_config") is None:
        where, do = f"{source.checkpoint.path}: visual.*", "text_only=True leaves the tower out"
        what, expected = "a vision tower without its configuration", "vision_config in config.json"
        raise Qwen35Error(what, where=where, expected=expected, do=do)
    with torch.device("meta"):
        part = MTP(config, fused) if name == "mtp" else VisionTower(vision_of(config))
    if mode == "stream":
        return StreamedPart(name, part, source, table, device)
    if device.type != "meta":
        fill(part, name, source, table, device, mode)
    return part
