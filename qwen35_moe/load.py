"""From a checkpoint to a model: `load(path)`.

A mode says how much of it is held decoded:

    decoded   everything, in the arithmetic's dtype: fastest, largest
    packed    experts as they are stored, decoded when hit; the rest decoded
    stream    nothing: a layer is read from disk when it is its turn, an expert when it is hit
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from . import arithmetic as arithmetics
from .arithmetic import Arithmetic
from .checkpoint import Checkpoint
from .config import Config
from .errors import Qwen35Error
from .experts import PackedExperts, Slot
from .model import Layer, Model
from .moe import MoE
from .ops import Linear, linear
from .quant.gate import decide_layers, slot_guard
from .quant.packed import Packed, concatenate
from .quant.precision import ModuleSpec

MODES = ("decoded", "packed", "stream")
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
) -> Model:
    """The text model of a checkpoint folder.

    shared_expert: "unfused", "fused" (slot E of E+1), or "auto": what the gate (`strict`) decides, layer by layer.
    mode: "decoded", "packed" or "stream", see above; all three compute the same bits.
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
        fused = [bool(d) for d in decisions if not d.draft]
    else:
        fused = [shared_expert == "fused"] * config.num_hidden_layers
    return build(Source(checkpoint, config), table, fused, torch.device(device), mode)


def build(source: Source, table: Arithmetic, fused: Sequence[bool], device: torch.device, mode: str) -> Model:
    """A model whose weights come from `source`."""
    config = source.config
    with torch.device("meta"):
        model = Model(config, table, fused)
    if mode == "stream":
        del model.layers  # modules; what takes their place is none
        model.layers = StreamedLayers(source, table, fused, device)
        model.embed_tokens, model.lm_head = StreamedEmbedding(source, table), StreamedHead(source, table)
        fill(model.norm, "norm", source, table, device)
    else:
        for name, module in model.named_children():
            if name == "lm_head" and config.tie_word_embeddings:
                module.weight = model.embed_tokens.weight
            else:
                fill(module, name, source, table, device, mode)
    return model


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


class StreamedLayers(Sequence[Layer]):
    """Layers that are read when it is their turn, and dropped after it."""

    def __init__(self, source: Source, table: Arithmetic, fused: Sequence[bool], device: torch.device):
        self.source, self.table, self.fused, self.device = source, table, fused, device

    def __len__(self) -> int:
        return len(self.fused)

    def __getitem__(self, i: int) -> Layer:
        if not 0 <= i < len(self):
            raise IndexError(i)
        with torch.device("meta"):
            layer = Layer(self.source.config, self.source.config.layer_types[i], self.fused[i])
        fill(layer, f"layers.{i}", self.source, self.table, self.device, "stream")
        return layer


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
