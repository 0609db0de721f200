"""From a checkpoint to a model: `load(path)`, and beside its text model the draft head and the vision tower.

A mode says how much of it is held decoded:

    decoded   everything, in the arithmetic's dtype: fastest, largest. What is stored in that dtype stays in its file,
              mapped to memory: it costs no copy, and the system may take its pages back
    packed    experts as they are stored (mapped), decoded when hit; the rest decoded
    stream    nothing: a layer is read from disk when it is its turn, an expert when it is hit
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from itertools import groupby, islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import arithmetic as arithmetics
from .ahead import Order, feed
from .arithmetic import Arithmetic
from .checkpoint import Checkpoint
from .checkpoint.names import split_role
from .checkpoint.plan import Plan
from .checkpoint.weight import Weight, settle
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
HEAD_ROWS_GPU = 16384  # the same on a GPU, whose host has more to do the more there are of them


class Source:
    """Weights by name, as a checkpoint stores them. A fault wraps one and changes what it gives (no more `as_stored`).

    online: a float shared expert is converted to MXFP4 where it becomes a slot of MXFP4 experts; `conversion` then has
    what this costs, MoE block -> |converted - stored| / |stored|.
    """

    as_stored = True  # so that a GPU's may be read past it

    def __init__(self, checkpoint: Checkpoint, config: Config, online: bool = False):
        self.checkpoint, self.config, self.online = checkpoint, config, online
        self.conversion: dict[str, float] = {}

    def tensor(self, name: str) -> Tensor:
        """A tensor that is never packed: norms, convolutions, A_log."""
        return self.checkpoint.read(name)

    def weight(self, module: str, rows: slice | None = None) -> Packed:
        """The weight of a linear module, packed or not."""
        return self.checkpoint.weight(module).read(rows)

    def stored(self, mlp: str, e: int) -> tuple[Weight, ...]:
        """Where the bytes of `slot` are; nowhere if they are not as stored."""
        if e < self.config.num_experts:
            return self.checkpoint.experts(f"{mlp}.experts").weights(e)
        if self.online and self.spec(f"{mlp}.experts").kind == "mxfp4":
            return ()
        return tuple(self.checkpoint.weight(f"{mlp}.shared_expert.{name}_proj") for name in ("gate", "up", "down"))

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
        layers = stream_layers(model, "layers", "layers", source, table, device)
        model.embed_tokens, model.lm_head = StreamedEmbedding(source, table), StreamedHead(source, table)
        model.embed_tokens.before, layers.then = layers.begin, partial(model.lm_head.begin, device)
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
    fill_experts(module, prefix, source, table, device, mode)
    for path, owner in module.named_modules(prefix=prefix):
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta:
                dtype = table.weight_dtype(f"{path}.{name}")
                if isinstance(owner, Linear):
                    value = moved(source.weight(path), device).decode(dtype)
                else:
                    value = source.tensor(f"{path}.{name}").to(dtype)
                owner.register_parameter(name, nn.Parameter(value.to(device), requires_grad=False))


def fill_experts(
    module: nn.Module, prefix: str, source: Source, table: Arithmetic, device: torch.device, mode: str
) -> None:
    for path, owner in list(module.named_modules(prefix=prefix)):
        if isinstance(owner, MoE):
            _fill_experts(owner, path, source, table, device, mode)


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
    if device.type == "cuda" and source.as_stored:
        stored = partial(source.stored, path)
        moe.experts = PassingExperts(count, F, partial(source.slot, path), dtype, quantised, device, stored)
    else:
        moe.experts = PackedExperts(count, F, read, dtype, quantised, device)


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
    """Layers that are read when it is their turn, and dropped after it. `empty`: the same on the meta device.

    Those for a GPU are read ahead: the dense weights of the next layer, and its experts, too, if the layer before it
    was hit in nearly all of its own; after the last layer `then` is called.
    """

    def __init__(
        self, prefix: str, empty: Sequence[nn.Module], source: Source, table: Arithmetic, device: torch.device
    ):
        self.prefix, self.empty, self.source, self.table, self.device = prefix, empty, source, table, device
        self.ahead = device.type == "cuda" and source.as_stored
        self.then: Callable[[], object] = lambda: None
        self.dense: dict[int, Dense] = {}
        self.coming: tuple[int, Order] | None = None
        self.experts: list[PassingExperts] = []  # of the layer that was handed out last

    def __len__(self) -> int:
        return len(self.empty)

    def __getitem__(self, i: int) -> nn.Module:  # type: ignore[override]  # no slices
        if not 0 <= i < len(self):
            raise IndexError(i)
        if not self.ahead:
            layer = deepcopy(self.empty[i])
            fill(layer, f"{self.prefix}.{i}", self.source, self.table, self.device, "stream")
            return layer
        order = self.coming[1] if self.coming and self.coming[0] == i else self._order(i)
        self._begin_experts(i)
        if i + 1 < len(self):
            self.coming = i + 1, self._order(i + 1)
        else:
            self.coming = None
            self.then()
        layer = twin(self.empty[i])
        self.dense[i].put(layer, order)
        self.experts = passing(layer)
        return layer

    def begin(self) -> None:
        """Has the first layer read, unless that has begun."""
        if self.ahead and (self.coming is None or self.coming[0] != 0):
            self.coming = 0, self._order(0)

    def _order(self, i: int) -> Order:
        if i not in self.dense:
            prefix = f"{self.prefix}.{i}"
            fill_experts(self.empty[i], prefix, self.source, self.table, self.device, "stream")
            self.dense[i] = Dense(self.empty[i], prefix, self.source.checkpoint, self.table)
        order = feed(self.device).order(self.dense[i].plan)
        self._begin_experts(i)
        return order

    def _begin_experts(self, i: int) -> None:
        if any(experts.nearly_all for experts in self.experts):
            for experts in passing(self.empty[i]):
                experts.begin()


def twin(module: nn.Module) -> nn.Module:
    """A copy that can have parameters of its own. The rest, experts with it, is the same."""
    new = object.__new__(type(module))
    new.__dict__.update(module.__dict__)
    new._parameters = dict(module._parameters)
    new._modules = {
        name: child if child is None or isinstance(child, PassingExperts) else twin(child)
        for name, child in module._modules.items()
    }
    return new


def passing(module: nn.Module) -> list[PassingExperts]:
    return [m.experts for m in module.modules() if isinstance(m, MoE) and isinstance(m.experts, PassingExperts)]


class Dense:
    """All weights of a module but its experts, to be read at once. `module` is the same on the meta device."""

    def __init__(self, module: nn.Module, prefix: str, checkpoint: Checkpoint, table: Arithmetic):
        self.checkpoint = checkpoint
        self.wanted: list[tuple[str, str, Weight, torch.dtype]] = []
        for path, owner in module.named_modules():
            for name, _ in owner.named_parameters(recurse=False):
                full = ".".join(part for part in (prefix, path, name) if part)
                weight = checkpoint.find(split_role(full)[0])
                self.wanted.append((path, name, weight, table.weight_dtype(full)))
        self.names = {stored.name for *_, weight, _ in self.wanted for stored in weight.tensors}
        for path, part in module.named_modules(prefix=prefix):
            self.names.update(checkpoint.expert_names(f"{path}.experts") if isinstance(part, MoE) else ())
        self.plan = Plan(checkpoint.reader, [[rows for *_, weight, _ in self.wanted for rows in weight.parts]])

    def put(self, module: nn.Module, order: Order) -> None:
        """Into a copy of the module."""
        self.checkpoint.used.update(self.names)
        parts, doubts = (x[0] for x in order.result()), list[Tensor]()
        for path, name, weight, dtype in self.wanted:
            value = weight.of(islice(parts, len(weight.parts)), doubts).decode(dtype)
            owner = module.get_submodule(path)
            value = value.view(owner.get_parameter(name).shape)  # of a scalar
            owner.register_parameter(name, nn.Parameter(value, requires_grad=False))
        settle(doubts, (weight for *_, weight, _ in self.wanted))


def stream_layers(
    module: nn.Module, name: str, prefix: str, source: Source, table: Arithmetic, device: torch.device
) -> StreamedLayers:
    """Puts `StreamedLayers` in the place of the list of modules `name`."""
    empty = list(getattr(module, name))
    delattr(module, name)  # modules; what takes their place is none
    layers = StreamedLayers(prefix, empty, source, table, device)
    setattr(module, name, layers)
    return layers


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
    """Reads the rows of the tokens that occur, after a call of `before`."""

    def __init__(self, source: Source, table: Arithmetic):
        super().__init__()
        self.source, self.dtype = source, table.weight_dtype("embed_tokens.weight")
        self.before: Callable[[], object] = lambda: None

    def forward(self, ids_BT: Tensor) -> Tensor:
        self.before()
        unique, inverse = ids_BT.unique(return_inverse=True)
        weight, wanted = self.source.checkpoint.weight("embed_tokens"), list(runs(unique.tolist()))
        if weight.kind == "float":
            rows = weight.values.gather(weight.reader, wanted).to(self.dtype)
        else:
            rows = torch.cat([weight.read(run).decode(self.dtype) for run in wanted])
        return rows.to(ids_BT.device)[inverse]


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
        self.plans: list[tuple[Weight, Plan]] = []
        self.coming: list[Order] = []

    def begin(self, device: torch.device) -> None:
        """Has it read for a GPU, unless that has begun."""
        if not self.plans:
            weight = self.source.checkpoint.weight(self.module)
            self.plans = [(part, Plan(part.reader, [part.parts])) for part in map(weight.some, self._rows(device))]
        self.coming = self.coming or [feed(device).order(plan) for _, plan in self.plans]

    def blocks(self, name: str, x_BTD: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(which of the vocabulary, their logits [B, T, v] untapped), one block after another."""
        for rows, weight in zip(self._rows(x_BTD.device), self._weights(x_BTD.device), strict=True):
            dtype = accumulation_dtype(name, x_BTD, weight)
            yield rows, F.linear(x_BTD.to(dtype), weight.to(dtype))

    def _rows(self, device: torch.device) -> list[slice]:
        V, step = self.source.config.vocab_size, HEAD_ROWS_GPU if device.type == "cuda" else HEAD_ROWS
        return [slice(v, min(v + step, V)) for v in range(0, V, step)]

    def _weights(self, device: torch.device) -> Iterator[Tensor]:
        if device.type != "cuda" or not self.source.as_stored:
            for rows in self._rows(device):
                yield moved(self.source.weight(self.module, rows), device).decode(self.dtype)
            return
        self.begin(device)
        coming, self.coming, doubts = deque(self.coming), [], list[Tensor]()
        for weight, _ in self.plans:
            yield weight.of([x[0] for x in coming.popleft().result()], doubts).decode(self.dtype)
        settle(doubts, (weight for weight, _ in self.plans))

    def forward(self, name: str, x_BTD: Tensor) -> Tensor:
        logits_BTV = None
        for rows, part in self.blocks(name, x_BTD):
            if logits_BTV is None:
                logits_BTV = part.new_empty(*x_BTD.shape[:2], self.source.config.vocab_size)
            logits_BTV[..., rows] = part
        assert logits_BTV is not None
        return tap(name, logits_BTV)
