"""Stand-ins for the layers, embedding, head and other parts of a streamed model. They read when they are called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint import Checkpoint
from ..checkpoint.header import split_role
from ..checkpoint.weight import StoredWeight
from ..model.moe import MoE
from ..model.mtp import MTP
from ..model.ops import accumulation_dtype
from ..model.vision.tower import VisionTower
from ..numerics.arithmetics import Arithmetic
from ..numerics.taps import tap
from .experts import moved
from .fill import fill, fill_experts
from .gpu.passing import PassingExperts
from .gpu.prefetch import Fetch, Layout, PendingScaleCheck, one_ahead
from .source import WeightSource

LAYERS_OF_PART = {"mtp": "layers", "visual": "blocks"}  # what is not the text model, and what its layers are called
HEAD_ROWS = 4096  # rows of the head that a streamed model holds at a time
HEAD_ROWS_GPU = 16384  # the same on a GPU, whose host has more to do the more there are of them


class StreamedLayers(Sequence[nn.Module]):
    """Layers that are read at their turn and dropped after it. `empty`: the same layers on the meta device.

    With `ahead` (for a GPU) the next layer's dense weights are read while a layer computes, and its experts, too, if
    the layer before was hit in nearly all of its own.
    """

    def __init__(
        self, prefix: str, empty: Sequence[nn.Module], source: WeightSource, table: Arithmetic, device: torch.device
    ):
        self.prefix, self.empty, self.source, self.table, self.device = prefix, empty, source, table, device
        self.ahead = reads_ahead(source, device)
        self.dense: dict[int, Dense] = {}
        self.coming: dict[int, Fetch] = {}
        self.experts: list[PassingExperts] = []  # of the layer that was handed out last

    def __len__(self) -> int:
        return len(self.empty)

    def __getitem__(self, i: int) -> nn.Module:  # type: ignore[override]  # no slices
        if not 0 <= i < len(self):
            raise IndexError(i)
        if not self.ahead:
            layer = twin(self.empty[i])
            fill(layer, f"{self.prefix}.{i}", self.source, self.table, self.device, "stream")
            return layer
        return self._arrived(i, None)

    def __iter__(self) -> Iterator[nn.Module]:
        """One after the other. A broken scale of a layer is an error at the end, so that nobody waits for the device in
        between: go through to the end, or take single layers."""
        if not self.ahead:
            yield from map(self.__getitem__, range(len(self)))
            return
        checks = list[PendingScaleCheck]()
        try:
            for i in range(len(self)):
                yield self._arrived(i, checks)
            for check in checks:
                check.wait()
        finally:  # what an abandoned pass had asked for is forgotten
            self.coming = {}
            for experts in (experts for dense in self.dense.values() for experts in dense.experts):
                experts.coming, experts.later = [], None

    def _arrived(self, i: int, later: list[PendingScaleCheck] | None) -> nn.Module:
        """A layer. later: where checks of its scales go; None to wait for them."""
        fetch = self.coming.get(i) or self._begun(i)
        self._begin_experts(i)
        self.coming = {i + 1: self._begun(i + 1)} if i + 1 < len(self) else {}
        layer = twin(self.empty[i])
        self.dense[i].put(layer, fetch).settle(later)
        self.experts = self.dense[i].experts
        for experts in self.experts:
            experts.later = later
        return layer

    def _begun(self, i: int) -> Fetch:
        if i not in self.dense:
            prefix = f"{self.prefix}.{i}"
            fill_experts(self.empty[i], prefix, self.source, self.table, self.device, "stream")
            self.dense[i] = Dense(self.empty[i], prefix, self.source.checkpoint, self.table)
        fetch = Fetch(self.dense[i].layout, self.device)
        self._begin_experts(i)
        return fetch

    def _begin_experts(self, i: int) -> None:
        if any(experts.nearly_all for experts in self.experts):
            for experts in self.dense[i].experts:
                experts.begin()


def reads_ahead(source: WeightSource, device: torch.device) -> bool:
    """Whether the next weights are read while the present ones are computed with: for a GPU, unless a fault changes
    what the source gives. On a CPU reading would take the cores that compute."""
    return device.type == "cuda" and source.as_stored


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


class Dense:
    """All weights of a module but its experts, to be read at once. `module` is the same on the meta device, but for the
    experts, which hand themselves out."""

    def __init__(self, module: nn.Module, prefix: str, checkpoint: Checkpoint, table: Arithmetic):
        self.checkpoint = checkpoint
        self.wanted: list[tuple[str, str, StoredWeight, torch.dtype]] = []
        for path, owner in module.named_modules():
            for name, _ in owner.named_parameters(recurse=False):
                full = ".".join(part for part in (prefix, path, name) if part)
                weight = checkpoint.find(split_role(full)[0])
                self.wanted.append((path, name, weight, table.weight_dtype(full)))
        self.names = {stored.name for *_, weight, _ in self.wanted for stored in weight.tensors}
        for path, part in module.named_modules(prefix=prefix):
            self.names.update(checkpoint.expert_names(f"{path}.experts") if isinstance(part, MoE) else ())
        blocks = (m.experts for m in module.modules() if isinstance(m, MoE))
        self.experts = [experts for experts in blocks if isinstance(experts, PassingExperts)]
        self.layout = Layout(checkpoint.reader, [[rows for *_, weight, _ in self.wanted for rows in weight.parts]])

    def put(self, module: nn.Module, fetch: Fetch) -> PendingScaleCheck:
        """Into a copy of the module."""
        self.checkpoint.used.update(self.names)
        parts, doubts = (x[0] for x in fetch.result()), list[Tensor]()
        for path, name, weight, dtype in self.wanted:
            value = weight.of(islice(parts, len(weight.parts)), doubts).decode(dtype)
            owner = module.get_submodule(path)
            value = value.view(owner.get_parameter(name).shape)  # of a scalar
            owner.register_parameter(name, nn.Parameter(value, requires_grad=False))
        return PendingScaleCheck(doubts, (weight for *_, weight, _ in self.wanted))


def stream_layers(
    module: nn.Module, name: str, prefix: str, source: WeightSource, table: Arithmetic, device: torch.device
) -> StreamedLayers:
    """Puts `StreamedLayers` in the place of the list of modules `name`."""
    empty = list(module.get_submodule(name).children())
    delattr(module, name)  # modules; what takes their place is none
    layers = StreamedLayers(prefix, empty, source, table, device)
    setattr(module, name, layers)
    return layers


class StreamedPart(nn.Module):
    """The draft head or the vision tower: read when it is called, layer by layer, and dropped after it."""

    def __init__(
        self, name: str, empty: MTP | VisionTower, source: WeightSource, table: Arithmetic, device: torch.device
    ):
        super().__init__()
        self.name, self.config, self.read_from = name, empty.config, (source, table, device)
        self.empty = (empty,)  # in a tuple: its parameters, which are none, are not this module's

    def forward(self, *args: Any) -> Tensor:
        part = twin(self.empty[0])
        stream_layers(part, LAYERS_OF_PART[self.name], f"{self.name}.{LAYERS_OF_PART[self.name]}", *self.read_from)
        fill(part, self.name, *self.read_from, mode="stream")
        return part(*args)


class StreamedEmbedding(nn.Module):
    """Reads the rows of the tokens that occur."""

    def __init__(self, source: WeightSource, table: Arithmetic):
        super().__init__()
        self.source, self.dtype = source, table.weight_dtype("embed_tokens.weight")

    def forward(self, ids_BT: Tensor) -> Tensor:
        unique, inverse = ids_BT.unique(return_inverse=True)
        weight, wanted = self.source.checkpoint.weight("embed_tokens"), list(consecutive(unique.tolist()))
        if weight.kind == "float" and self.source.as_stored:
            rows = weight.values.gather(weight.reader, wanted).to(self.dtype)
        else:
            rows = torch.cat([self.source.weight("embed_tokens", run).decode(self.dtype) for run in wanted])
        return rows.to(ids_BT.device)[inverse]


def consecutive(ascending: Iterable[int]) -> Iterator[slice]:
    """Slices of consecutive numbers: 3, 4, 5, 9 are 3:6 and 9:10."""
    for _, group in groupby(enumerate(ascending), key=lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in group]
        yield slice(numbers[0], numbers[-1] + 1)


def in_steps(count: int, step: int) -> list[slice]:
    """Slices of at most `step` numbers that make up 0 to count."""
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


class StreamedHead(nn.Module):
    """Multiplies with some rows of the head at a time. With `ahead` (for a GPU) the next rows are read meanwhile."""

    def __init__(self, source: WeightSource, table: Arithmetic, device: torch.device):
        super().__init__()
        tied = source.config.tie_word_embeddings
        self.source, self.module, self.device = source, "embed_tokens" if tied else "lm_head", device
        self.dtype, self.ahead = table.weight_dtype("lm_head.weight"), reads_ahead(source, device)
        self.layouts: list[tuple[StoredWeight, Layout]] = []

    def blocks(self, name: str, x_BTD: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(which of the vocabulary, their logits [B, T, v] untapped), one block after another."""
        V, step = self.source.config.vocab_size, HEAD_ROWS_GPU if self.device.type == "cuda" else HEAD_ROWS
        blocks = in_steps(V, step)
        for rows, weight in zip(blocks, self._weights(blocks), strict=True):
            dtype = accumulation_dtype(name, x_BTD, weight)
            yield rows, F.linear(x_BTD.to(dtype), weight.to(dtype))

    def _weights(self, blocks: Sequence[slice]) -> Iterator[Tensor]:
        if not self.ahead:
            for rows in blocks:
                yield moved(self.source.weight(self.module, rows), self.device).decode(self.dtype)
            return
        if not self.layouts:
            parts = map(self.source.checkpoint.weight(self.module).some, blocks)
            self.layouts = [(part, Layout(part.reader, [part.parts])) for part in parts]
        doubts, fetches = list[Tensor](), (Fetch(layout, self.device) for _, layout in self.layouts)
        for (weight, _), fetch in zip(self.layouts, one_ahead(fetches), strict=True):
            yield weight.of([x[0] for x in fetch.result()], doubts).decode(self.dtype)
        PendingScaleCheck(doubts, (weight for weight, _ in self.layouts)).wait()

    def forward(self, name: str, x_BTD: Tensor) -> Tensor:
        logits_BTV = None
        for rows, part in self.blocks(name, x_BTD):
            if logits_BTV is None:
                logits_BTV = part.new_empty(*x_BTD.shape[:2], self.source.config.vocab_size)
            logits_BTV[..., rows] = part
        assert logits_BTV is not None
        return tap(name, logits_BTV)
