"""From a checkpoint to a model: `load(path)`, and beside its text model the draft head and the vision tower.

A mode says how much of it is held decoded:

    decoded   everything, in the arithmetic's dtype: fastest, largest. What is stored in that dtype stays in its file,
              mapped to memory: it costs no copy, and the system may take its pages back
    packed    experts as they are stored (mapped), decoded when hit; the rest decoded
    stream    nothing: a layer is read from disk when it is its turn, an expert when it is hit
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import arithmetic as arithmetics
from .ahead import Ahead, fetch_ahead
from .arithmetic import Arithmetic
from .checkpoint import Checkpoint
from .config import Config
from .errors import Qwen35Error
from .experts import (
    PackedExperts,
    PassingExperts,
    Slot,
    ViewedExperts,
    as_one,
    is_plain,
    moved,
    tensors,
)
from .grouped import stack_slots
from .model import Model
from .moe import Experts, ExpertSource, MoE
from .mtp import MTP
from .ops import Linear, accumulation_dtype
from .quant.gate import decide_layers, slot_guard
from .quant.mxfp4 import MXFP4, encode
from .quant.packed import Packed, concatenate
from .quant.precision import ModuleSpec
from .taps import tap
from .vision import VisionConfig, VisionTower

MODES = ("decoded", "packed", "stream")
PARTS = {"mtp": "layers", "visual": "blocks"}  # what is not the text model, and what its layers are called
SHARED = ("auto", "unfused", "fused", "fused-online")
HEAD_ROWS = 4096  # rows of the head that a streamed model holds at a time


class Source:
    """Weights by name, as a checkpoint stores them. A fault wraps one and changes what it gives.

    online: a float shared expert is converted to MXFP4 where it becomes a slot of MXFP4 experts; `conversion` then has
    what this costs, MoE block -> |converted - stored| / |stored|.
    """

    def __init__(self, checkpoint: Checkpoint, config: Config, online: bool = False):
        self.checkpoint, self.config, self.online = checkpoint, config, online
        self.conversion: dict[str, float] = {}

    def tensor(self, name: str) -> Tensor:
        """A tensor that is never packed: norms, convolutions, A_log."""
        return self.checkpoint.read(name)

    def weight(self, module: str, rows: slice | None = None) -> Packed:
        """The weight of a linear module, packed or not."""
        return self.checkpoint.weight(module).read(rows)

    def spec(self, module: str) -> ModuleSpec:
        """What the bytes of a module, or of all experts of a layer, are."""
        spec = self.checkpoint.spec(module)
        if spec is None:
            raise Qwen35Error(
                "experts of one layer differ in their format",
                where=f"{self.checkpoint.path}: {module}",
                expected="one format",
            )
        return spec

    def guard_slot(self, mlp: str) -> None:
        """Error unless the shared expert's bytes are what a slot of the routed experts holds (PR 22948)."""
        shared = {f"{mlp}.shared_expert.{p}_proj": None for p in ("gate", "up", "down")}
        stored = {module: self.checkpoint.spec(module) for module in shared}
        routed = self.spec(f"{mlp}.experts")
        convert = self.online and routed.kind == "mxfp4"
        slot_guard(f"{mlp}.experts[{self.config.num_experts}]", routed, stored, convert=convert)

    def slot(self, mlp: str, e: int) -> Slot:
        """Expert e of the MoE block `mlp`; number E is the shared one."""
        if e < self.config.num_experts:
            return self.checkpoint.experts(f"{mlp}.experts").read(e)
        parts = [self.weight(f"{mlp}.shared_expert.{name}_proj") for name in ("gate", "up", "down")]
        if self.online and self.spec(f"{mlp}.experts").kind == "mxfp4":
            converted = [_convert(part) for part in parts]
            if mlp not in self.conversion:  # a streamed model comes here at every pass
                self.conversion[mlp] = _distance(converted, parts)
            parts = converted
        return concatenate(*parts[:2]), parts[2]


def _convert(weight: Packed) -> Packed:
    """A float weight as MXFP4, scale rule "even", as SGLang's online conversion does; MXFP4 stays as it is."""
    return weight if isinstance(weight, MXFP4) else MXFP4(*encode(weight.decode(torch.float32), "even"))


def _distance(converted: Sequence[Packed], stored: Sequence[Packed]) -> float:
    """|converted - stored| / |stored|, over all of them."""
    pairs = [(a.decode(torch.float64), b.decode(torch.float64)) for a, b in zip(converted, stored, strict=True)]
    error, size = (sum(float(x.square().sum()) for x in xs) for xs in zip(*((a - b, b) for a, b in pairs), strict=True))
    return (error / size) ** 0.5 if size else 0.0


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
    offload_folder: str | Path | None = None,
) -> Model:
    """All of a checkpoint folder: the text model, and its draft head and vision tower as `model.mtp`, `model.visual`.

    shared_expert: "unfused"; "fused" (slot E of E+1); "fused-online", where a float shared expert is converted to the
    MXFP4 of the routed ones (`model.conversion` says at what cost); or "auto": what the gate (`strict`) decides, layer
    by layer, the draft's among them, unless the arithmetic is of an engine that never fuses.
    mode: "decoded", "packed" or "stream", see above; all three compute the same bits.
    text_only: without draft head and vision tower; `model.left_out` counts the tensors that this leaves unread.
    device_map: spreads the model over GPUs, "cpu" and "disk" instead of `device`: "auto", or a dictionary of parts
    ("layers.3", "lm_head", "" for the rest) to devices; `max_memory` and `offload_folder` as in accelerate.
    """
    for name, value, allowed in (("mode", mode, MODES), ("shared_expert", shared_expert, SHARED)):
        if value not in allowed:
            raise Qwen35Error(f"unknown {name}", where="load()", expected=" | ".join(allowed), found=repr(value))
    if not isinstance(path, str | PathLike):
        raise Qwen35Error("no checkpoint", where="load()", expected="the path of a folder", found=repr(path))
    device = usable(device, "load(device=...)")
    if device_map is not None and mode == "stream":
        raise Qwen35Error("a streamed model stays on disk", where="load()", expected="a device_map, or mode='stream'")
    table = arithmetics.get(arithmetic)
    checkpoint = Checkpoint.open(path)
    config = Config.from_dict(checkpoint.config, ignore=ignore_config_keys)
    checkpoint.validate(config)
    checkpoint.reader.mapped = mode != "stream"
    checkpoint.reader.pinned = mode == "stream" and device.type == "cuda"
    if shared_expert == "auto" and table.fuses:
        decisions = decide_layers(checkpoint.config, stored=checkpoint.spec)
        fused, draft_fused = [bool(d) for d in decisions if not d.draft], any(d for d in decisions if d.draft)
    else:
        draft_fused = shared_expert.startswith("fused")
        fused = [draft_fused] * config.num_hidden_layers
    source = Source(checkpoint, config, online=shared_expert == "fused-online")
    device = torch.device("meta") if device_map is not None else device
    model = build(source, table, fused, device, mode)
    model.source, model.identity, model.conversion = source, checkpoint.identity(), source.conversion
    counts = {part: sum(name.startswith(f"{part}.") for name in checkpoint.names()) for part in PARTS}
    for part in (part for part, count in counts.items() if count):
        if text_only:
            model.left_out[part] = counts[part]
        else:
            setattr(model, part, build_part(part, source, table, draft_fused, device, mode))
    if device_map is not None:
        from .placement import place  # here: accelerate takes its time

        place(model, source, table, mode, device_map, max_memory, offload_folder)
    return model


def usable(device: str | torch.device, where: str) -> torch.device:
    """The device, if tensors can be made on it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # what torch raises without CUDA is an assertion
        raise Qwen35Error("no such device here", where=where, found=str(error).splitlines()[0]) from error


def build(source: Source, table: Arithmetic, fused: Sequence[bool], device: torch.device, mode: str) -> Model:
    """A text model whose weights come from `source`; on the meta device, one without."""
    config = source.config
    with torch.device("meta"):
        model = Model(config, table, fused)
    if device.type == "meta":
        return model
    if mode == "stream":
        stream_layers(model, "layers", "layers", source, table, device)
        model.embed_tokens, model.lm_head = StreamedEmbedding(source, table), StreamedHead(source, table)
        fill(model.norm, "norm", source, table, device)
    else:
        for name, module in model.named_children():
            if name == "lm_head" and config.tie_word_embeddings:
                module.weight = model.embed_tokens.weight
            else:
                fill(module, name, source, table, device, mode)
    return model


def build_part(
    name: str, source: Source, table: Arithmetic, fused: bool, device: torch.device, mode: str
) -> MTP | VisionTower | StreamedPart:
    """The draft head ("mtp"; `fused` is its own) or the vision tower ("visual"), with weights from `source`."""
    config, vision = source.config, source.config.raw.get("vision_config")
    if name == "visual" and vision is None:
        raise Qwen35Error(
            "a vision tower without its configuration",
            where=f"{source.checkpoint.path}: visual.*",
            expected="vision_config in config.json",
            do="text_only=True leaves the tower out",
        )
    with torch.device("meta"):
        part = (
            MTP(config, fused)
            if name == "mtp"
            else VisionTower(VisionConfig.from_dict(vision or {}, config.hidden_size))
        )
    if mode == "stream":
        return StreamedPart(name, part, source, table, device)
    if device.type != "meta":
        fill(part, name, source, table, device, mode)
    return part


def fill(
    module: nn.Module, prefix: str, source: Source, table: Arithmetic, device: torch.device, mode: str = "decoded"
) -> None:
    """Puts the checkpoint's weights in the place of the meta parameters of `module`, in the table's dtypes."""
    for path, owner in list(module.named_modules(prefix=prefix)):
        if isinstance(owner, MoE):
            _fill_experts(owner, path, source, table, device, mode)
    for path, owner in module.named_modules(prefix=prefix):
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta:
                dtype = table.weight_dtype(f"{path}.{name}")
                if isinstance(owner, Linear):
                    value = moved([source.weight(path)], device)[0].decode(dtype)
                else:
                    value = source.tensor(f"{path}.{name}").to(dtype)
                owner.register_parameter(name, nn.Parameter(value.to(device), requires_grad=False))


def _fill_experts(moe: MoE, path: str, source: Source, table: Arithmetic, device: torch.device, mode: str) -> None:
    """Experts of one block, decoded or packed; a BF16 shared expert never reaches a slot of packed ones."""
    count, F, dtype = moe.experts.count, moe.experts.intermediate, table.weight_dtype(f"{path}.experts")
    quantised = source.spec(f"{path}.experts").kind == "mxfp4"
    if moe.shared_expert is None:
        source.guard_slot(path)
    else:
        moe.shared_expert.quantised = source.spec(f"{path}.shared_expert.gate_proj").kind == "mxfp4"
    read: Callable[[int], Slot] = partial(source.slot, path)
    if mode != "stream":
        slots = [read(e) for e in range(count)]
        if mode == "decoded":
            moe.experts = decoded_experts(slots, dtype, device, quantised)
            return
        if device.type == "cuda" and (stacked := stack_slots(slots, dtype, device, quantised)) is not None:
            moe.experts = stacked
            return
        read = slots.__getitem__
    kind = PassingExperts if device.type == "cuda" else PackedExperts
    moe.experts = kind(count, F, read, dtype, quantised, device)


def decoded_experts(slots: list[Slot], dtype: torch.dtype, device: torch.device, quantised: bool) -> ExpertSource:
    """Experts in memory. Those that are in this memory and of this dtype as they are stored are used where they lie."""
    if device.type == "cpu" and all(is_plain(weight, dtype) for slot in slots for weight in slot):
        gate_up, down = (as_one([slot[i] for slot in slots]) for i in (0, 1))
        return ViewedExperts(slots, dtype) if gate_up is None or down is None else Experts(gate_up, down, quantised)
    first = slots[0]
    gate_up, down = (torch.empty(len(slots), *weight.shape, dtype=dtype, device=device) for weight in first)
    for e, slot in enumerate(slots):
        gate_up[e], down[e] = slot[0].decode(dtype), slot[1].decode(dtype)
    return Experts(gate_up, down, quantised)


class StreamedLayers(Sequence[nn.Module]):
    """Layers that are read when it is their turn, and dropped after it. `empty`: the same on the meta device."""

    def __init__(
        self, prefix: str, empty: Sequence[nn.Module], source: Source, table: Arithmetic, device: torch.device
    ):
        self.prefix, self.empty, self.source, self.table, self.device = prefix, empty, source, table, device
        self.coming: tuple[int, Ahead[nn.Module]] | None = None  # what a thread reads while a GPU computes

    def __len__(self) -> int:
        return len(self.empty)

    def __getitem__(self, i: int) -> nn.Module:  # type: ignore[override]  # no slices
        if not 0 <= i < len(self):
            raise IndexError(i)
        if self.device.type != "cuda":
            return self._read(i)
        if self.coming is None or self.coming[0] != i:
            self.coming = i, self._ahead(i)
        layer = self.coming[1].result()
        self.coming = (i + 1, self._ahead(i + 1)) if i + 1 < len(self) else None
        return layer

    def _ahead(self, i: int) -> Ahead[nn.Module]:
        return Ahead(lambda: self._read(i), lambda layer: (p.data for p in layer.parameters()), self.device)

    def _read(self, i: int) -> nn.Module:
        layer = deepcopy(self.empty[i])
        fill(layer, f"{self.prefix}.{i}", self.source, self.table, self.device, "stream")
        return layer


def stream_layers(
    module: nn.Module, name: str, prefix: str, source: Source, table: Arithmetic, device: torch.device
) -> None:
    """Puts `StreamedLayers` in the place of the list of modules `name`."""
    empty = list(getattr(module, name))
    delattr(module, name)  # modules; what takes their place is none
    setattr(module, name, StreamedLayers(prefix, empty, source, table, device))


class StreamedPart(nn.Module):
    """The draft head or the vision tower: read when it is called, layer by layer, and dropped after it."""

    def __init__(self, name: str, empty: MTP | VisionTower, source: Source, table: Arithmetic, device: torch.device):
        super().__init__()
        self.name, self.config, self.read_from = name, empty.config, (source, table, device)
        self.empty = (empty,)  # in a tuple: its parameters, which are none, are not this module's

    def forward(self, *args: Any) -> Tensor:
        part = deepcopy(self.empty[0])
        stream_layers(part, PARTS[self.name], f"{self.name}.{PARTS[self.name]}", *self.read_from)
        fill(part, self.name, *self.read_from, mode="stream")
        return part(*args)


class StreamedEmbedding(nn.Module):
    """Reads the rows of the tokens that occur."""

    def __init__(self, source: Source, table: Arithmetic):
        super().__init__()
        self.source, self.dtype = source, table.weight_dtype("embed_tokens.weight")

    def forward(self, ids_BT: Tensor) -> Tensor:
        unique, inverse = ids_BT.unique(return_inverse=True)
        rows = [self.source.weight("embed_tokens", run).decode(self.dtype) for run in runs(unique.tolist())]
        return torch.cat(rows).to(ids_BT.device)[inverse]


def runs(ascending: Iterable[int]) -> Iterator[slice]:
    """Slices of consecutive numbers: 3, 4, 5, 9 are 3:6 and 9:10."""
    for _, group in groupby(enumerate(ascending), key=lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in group]
        yield slice(numbers[0], numbers[-1] + 1)


class StreamedHead(nn.Module):
    """Multiplies with some rows of the head at a time."""

    def __init__(self, source: Source, table: Arithmetic):
        super().__init__()
        tied = source.config.tie_word_embeddings
        self.source, self.module = source, "embed_tokens" if tied else "lm_head"
        self.dtype = table.weight_dtype("lm_head.weight")

    def blocks(self, name: str, x_BTD: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(which of the vocabulary, their logits [B, T, v] untapped), one block after another."""
        V = self.source.config.vocab_size
        blocks = [slice(v, min(v + HEAD_ROWS, V)) for v in range(0, V, HEAD_ROWS)]

        def fetch(rows: slice) -> list[Packed]:
            return moved([self.source.weight(self.module, rows)], x_BTD.device)

        found = fetch_ahead(fetch, blocks, tensors, x_BTD.device, 4) if x_BTD.is_cuda else map(fetch, blocks)
        for rows, (packed,) in zip(blocks, found, strict=True):
            weight = packed.decode(self.dtype)
            dtype = accumulation_dtype(name, x_BTD, weight)
            yield rows, F.linear(x_BTD.to(dtype), weight.to(dtype))

    def forward(self, name: str, x_BTD: Tensor) -> Tensor:
        logits_BTV = None
        for rows, part in self.blocks(name, x_BTD):
            if logits_BTV is None:
                logits_BTV = part.new_empty(*x_BTD.shape[:2], self.source.config.vocab_size)
            logits_BTV[..., rows] = part
        assert logits_BTV is not None
        return tap(name, logits_BTV)
