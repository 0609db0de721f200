"""From a checkpoint to a model: `load(path)`, and beside its text model the draft head and the vision tower.

A mode says how much of it is held decoded:

    decoded   everything, in the arithmetic's dtype: fastest, largest
    packed    experts as they are stored, decoded when hit; the rest decoded
    stream    nothing: a layer is read from disk when it is its turn, an expert when it is hit
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import arithmetic as arithmetics
from .arithmetic import Arithmetic
from .checkpoint import Checkpoint
from .config import Config
from .errors import Qwen35Error
from .experts import PackedExperts, Slot
from .model import Model
from .moe import MoE
from .mtp import MTP
from .ops import Linear, linear
from .quant.gate import decide_layers, slot_guard
from .quant.packed import Packed, concatenate
from .quant.precision import ModuleSpec
from .vision import VisionConfig, VisionTower

MODES = ("decoded", "packed", "stream")
PARTS = {"mtp": "layers", "visual": "blocks"}  # what is not the text model, and what its layers are called
HEAD_ROWS = 8192  # rows of the head that a streamed model holds at a time


class Source:
    """Weights by name, as a checkpoint stores them. A fault wraps one and changes what it gives."""

    def __init__(self, checkpoint: Checkpoint, config: Config):
        self.checkpoint, self.config = checkpoint, config

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
        slot_guard(f"{mlp}.experts[{self.config.num_experts}]", self.spec(f"{mlp}.experts"), stored)

    def slot(self, mlp: str, e: int) -> Slot:
        """Expert e of the MoE block `mlp`; number E is the shared one."""
        if e < self.config.num_experts:
            return self.checkpoint.experts(f"{mlp}.experts").read(e)
        gate, up, down = (self.weight(f"{mlp}.shared_expert.{name}_proj") for name in ("gate", "up", "down"))
        return concatenate(gate, up), down


def load(
    path: str | Path,
    arithmetic: str | Arithmetic = "exact",
    shared_expert: str = "auto",
    device: str | torch.device = "cpu",
    mode: str = "decoded",
    ignore_config_keys: Iterable[str] = (),
    text_only: bool = False,
) -> Model:
    """All of a checkpoint folder: the text model, and its draft head and vision tower as `model.mtp`, `model.visual`.

    shared_expert: "unfused", "fused" (slot E of E+1), or "auto": what the gate (`strict`) decides, layer by layer, the
    draft's among them.
    mode: "decoded", "packed" or "stream", see above; all three compute the same bits.
    text_only: without draft head and vision tower; `model.left_out` counts the tensors that this leaves unread.
    """
    for name, value, allowed in (("mode", mode, MODES), ("shared_expert", shared_expert, ("auto", "unfused", "fused"))):
        if value not in allowed:
            raise Qwen35Error(f"unknown {name}", where="load()", expected=" | ".join(allowed), found=repr(value))
    table = arithmetics.get(arithmetic)
    checkpoint = Checkpoint.open(path)
    config = Config.from_dict(checkpoint.config, ignore=ignore_config_keys)
    checkpoint.validate(config)
    if shared_expert == "auto":
        decisions = decide_layers(checkpoint.config, stored=checkpoint.spec)
        fused, draft_fused = [bool(d) for d in decisions if not d.draft], any(d for d in decisions if d.draft)
    else:
        fused, draft_fused = [shared_expert == "fused"] * config.num_hidden_layers, shared_expert == "fused"
    source = Source(checkpoint, config)
    model = build(source, table, fused, torch.device(device), mode)
    counts = {part: sum(name.startswith(f"{part}.") for name in checkpoint.names()) for part in PARTS}
    for part in (part for part, count in counts.items() if count):
        if text_only:
            model.left_out[part] = counts[part]
        else:
            setattr(model, part, build_part(part, source, table, draft_fused, torch.device(device), mode))
    return model


def build(source: Source, table: Arithmetic, fused: Sequence[bool], device: torch.device, mode: str) -> Model:
    """A text model whose weights come from `source`."""
    config = source.config
    with torch.device("meta"):
        model = Model(config, table, fused)
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
        part = MTP(config, fused) if name == "mtp" else VisionTower(VisionConfig.from_dict(vision, config.hidden_size))
    if mode == "stream":
        return StreamedPart(name, part, source, table, device)
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
                    value = source.weight(path).decode(dtype)
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
    if mode == "decoded":
        experts = moe.experts
        gate_up = torch.empty(experts.gate_up_proj.shape, dtype=dtype, device=device)
        down = torch.empty(experts.down_proj.shape, dtype=dtype, device=device)
        for e in range(count):
            slot = source.slot(path, e)
            gate_up[e], down[e] = slot[0].decode(dtype), slot[1].decode(dtype)
        experts.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
        experts.down_proj = nn.Parameter(down, requires_grad=False)
        experts.quantised = quantised
        return
    if mode == "packed":
        slots = [source.slot(path, e) for e in range(count)]
        read = slots.__getitem__
    else:

        def read(e: int) -> Slot:
            return source.slot(path, e)

    moe.experts = PackedExperts(count, F, read, dtype, quantised)


class StreamedLayers(Sequence[nn.Module]):
    """Layers that are read when it is their turn, and dropped after it. `empty`: the same on the meta device."""

    def __init__(
        self, prefix: str, empty: Sequence[nn.Module], source: Source, table: Arithmetic, device: torch.device
    ):
        self.prefix, self.empty, self.source, self.table, self.device = prefix, empty, source, table, device

    def __len__(self) -> int:
        return len(self.empty)

    def __getitem__(self, i: int) -> nn.Module:
        if not 0 <= i < len(self):
            raise IndexError(i)
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
        rows = [self.source.weight("embed_tokens", slice(i, i + 1)).decode(self.dtype) for i in unique.tolist()]
        return torch.cat(rows)[inverse]


class StreamedHead(nn.Module):
    """Multiplies with some rows of the head at a time."""

    def __init__(self, source: Source, table: Arithmetic):
        super().__init__()
        tied = source.config.tie_word_embeddings
        self.source, self.module = source, "embed_tokens" if tied else "lm_head"
        self.dtype = table.weight_dtype("lm_head.weight")

    def forward(self, name: str, x_BTD: Tensor) -> Tensor:
        V = self.source.config.vocab_size
        blocks = (slice(v, min(v + HEAD_ROWS, V)) for v in range(0, V, HEAD_ROWS))
        parts = [linear(f"{name}", x_BTD, self.source.weight(self.module, rows).decode(self.dtype)) for rows in blocks]
        return torch.cat(parts, -1)
