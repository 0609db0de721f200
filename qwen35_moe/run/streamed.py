"""What a streamed model has in the place of its layers, embedding, head and other parts: they read when called."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from itertools import groupby, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint import Checkpoint
from ..checkpoint.tensor_names import split_role
from ..checkpoint.weight import Verdict, Weight
from ..model.moe import MoE
from ..model.mtp import MTP
from ..model.ops import accumulation_dtype
from ..model.vision.tower import VisionTower
from ..numerics.arithmetics import Arithmetic
from ..numerics.taps import tap
from .experts import PassingExperts, moved
from .fill import fill, fill_experts
from .gpu.feed import Order, feed
from .gpu.plan import Plan
from .source import Source

PARTS = {"mtp": "layers", "visual": "blocks"}  # what is not the text model, and what its layers are called
HEAD_ROWS = 4096  # rows of the head that a streamed model holds at a time
LAYERS_AHEAD = 2  # layers that are asked for before it is their turn, as far as `ahead.AHEAD` lets them begin
HEAD_ROWS_GPU = 16384  # the same on a GPU, whose host has more to do the more there are of them


class StreamedLayers(Sequence[nn.Module]):
    """Layers that are read when it is their turn, and dropped after it. `empty`: the same on the meta device.

    Those for a GPU are read ahead: the dense weights of the next layers, and their experts, too, if the layer before
    was hit in nearly all of its own; after the last one `then` is called.
    """

    def __init__(
        self, prefix: str, empty: Sequence[nn.Module], source: Source, table: Arithmetic, device: torch.device
    ):
        self.prefix, self.empty, self.source, self.table, self.device = prefix, empty, source, table, device
        self.ahead = device.type == "cuda" and source.as_stored
        self.then: Callable[[], object] = lambda: None
        self.dense: dict[int, Dense] = {}
        self.coming: dict[int, Order] = {}
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
        return self._arrived(i, None)

    def __iter__(self) -> Iterator[nn.Module]:
        """One after the other. What is wrong with the weights of one is an error when the next has been begun, or at
        the end, so that nobody waits for the device in between: go through to the end, or take single layers."""
        if not self.ahead:
            yield from map(self.__getitem__, range(len(self)))
            return
        before = list[Verdict]()
        try:
            for i in range(len(self)):
                now = list[Verdict]()
                yield self._arrived(i, now)
                for verdict in before:
                    verdict.wait()
                before = now
            for verdict in before:
                verdict.wait()
        finally:  # what an abandoned pass had asked for is forgotten
            self.coming = {}
            for experts in (experts for dense in self.dense.values() for experts in dense.experts):
                experts.coming, experts.later = [], None

    def _arrived(self, i: int, later: list[Verdict] | None) -> nn.Module:
        """A layer. later: where verdicts on its weights go; None to wait for them."""
        order = self.coming.get(i) or self._order(i)
        self._begin_experts(i)
        soon = range(i + 1, min(i + 1 + LAYERS_AHEAD, len(self)))
        self.coming = {j: self.coming.get(j) or self._order(j) for j in soon}
        if i + 1 == len(self):
            self.then()
        layer = twin(self.empty[i])
        self.dense[i].put(layer, order).settle(later)
        self.experts = self.dense[i].experts
        for experts in self.experts:
            experts.later = later
        layer.forward = feed(self.device).beside(layer.forward)
        return layer

    def begin(self) -> None:
        """Has the first layer read, unless that has begun."""
        if self.ahead and 0 not in self.coming:
            self.coming = {0: self._order(0)}

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
            for experts in self.dense[i].experts:
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


class Dense:
    """All weights of a module but its experts, to be read at once. `module` is the same on the meta device, but for the
    experts, which hand themselves out."""

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
        blocks = (m.experts for m in module.modules() if isinstance(m, MoE))
        self.experts = [experts for experts in blocks if isinstance(experts, PassingExperts)]
        self.plan = Plan(checkpoint.reader, [[rows for *_, weight, _ in self.wanted for rows in weight.parts]])

    def put(self, module: nn.Module, order: Order) -> Verdict:
        """Into a copy of the module."""
        self.checkpoint.used.update(self.names)
        parts, doubts = (x[0] for x in order.result()), list[Tensor]()
        for path, name, weight, dtype in self.wanted:
            value = weight.of(islice(parts, len(weight.parts)), doubts).decode(dtype)
            owner = module.get_submodule(path)
            value = value.view(owner.get_parameter(name).shape)  # of a scalar
            owner.register_parameter(name, nn.Parameter(value, requires_grad=False))
        return Verdict(doubts, (weight for *_, weight, _ in self.wanted))


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
    """Reads the rows of the tokens that occur, then calls `then`."""

    def __init__(self, source: Source, table: Arithmetic):
        super().__init__()
        self.source, self.dtype = source, table.weight_dtype("embed_tokens.weight")
        self.then: Callable[[], object] = lambda: None

    def forward(self, ids_BT: Tensor) -> Tensor:
        unique, inverse = ids_BT.unique(return_inverse=True)
        weight, wanted = self.source.checkpoint.weight("embed_tokens"), list(runs(unique.tolist()))
        if weight.kind == "float" and self.source.as_stored:
            rows = weight.values.gather(weight.reader, wanted).to(self.dtype)
        else:
            rows = torch.cat([self.source.weight("embed_tokens", run).decode(self.dtype) for run in wanted])
        self.then()
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
        Verdict(doubts, (weight for weight, _ in self.plans)).wait()

    def forward(self, name: str, x_BTD: Tensor) -> Tensor:
        logits_BTV = None
        for rows, part in self.blocks(name, x_BTD):
            if logits_BTV is None:
                logits_BTV = part.new_empty(*x_BTD.shape[:2], self.source.config.vocab_size)
            logits_BTV[..., rows] = part
        assert logits_BTV is not None
        return tap(name, logits_BTV)
