"""A forward pass as one CUDA graph: the same kernels and bits, launched at once instead of one by one from Python.

A graph has fixed shapes and addresses, so that keys and values live in buffers of a fixed capacity. On a device without
graphs both classes run the same step directly. In a long prefill, chains of elementwise operations are compiled
to one pass over memory, which takes seconds for each shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import Qwen35Error
from ...model import deltanet, norms
from ...model.cache import Cache, LayerState
from ...model.moe import MoE
from ...model.ops import accumulation_dtype
from ...model.text import Model
from ...numerics import arithmetics as arithmetic
from . import grouped
from .grouped import has_grouped_mm
from .grouped_experts import ResidentExperts, StackedExperts

# With fewer elements a launch costs more than the memory that is saved.
LARGE = 2**20

# Functions of tensors that may be compiled to the bits of plain torch: each operation rounds for itself and no product
# is fused with a sum. They hold nothing but products, sums of two and moves: how a compiler adds up a row, or computes
# exp, is its own affair. And no taps, which a compiled function would not call.
ONE_PASS: tuple[tuple[ModuleType, str], ...] = (
    (norms, "squares"),
    (norms, "normalised"),
    (deltanet, "chunk_operands"),
    (deltanet, "weighted_sum"),
    (grouped, "sum_of_slots"),
)


@dataclass
class StaticState(LayerState):
    """Keys and values in buffers [B, capacity, G, H]; new ones are written at `index` [T]."""

    index: Tensor | None = None

    @property
    def at(self) -> Tensor | None:
        return self.index

    def append(self, k_BTGH: Tensor, v_BTGH: Tensor) -> tuple[Tensor, Tensor]:
        assert self.k is not None and self.v is not None and self.index is not None
        self.k.index_copy_(1, self.index, k_BTGH)
        self.v.index_copy_(1, self.index, v_BTGH)
        return self.k, self.v


class DecodeGraph:
    """One token after another: `step(ids [B, 1])` gives logits [B, 1, V].

    Starts from a copy of `cache` (without padding) and holds at most `capacity` tokens. Attention runs over the whole
    capacity with a mask, so that sums have more terms (all zero) than those of the growing cache: the same function,
    the last bits of a library's product may differ. Without `capture` the same step runs directly, to the same bits,
    and calls its taps.
    """

    @torch.inference_mode()
    def __init__(self, model: Model, cache: Cache, capacity: int, capture: bool = True):
        if cache.mask is not None or cache.next_position is None or capacity <= cache.length:
            found = "padding" if cache.mask is not None else f"{cache.length} tokens"
            expected = f"1 to {capacity - 1} tokens, none of them padding"
            raise Qwen35Error("cannot go on from this cache", where="DecodeGraph", expected=expected, found=found)
        self.model, self.capacity, self.length, self.capture = model, capacity, cache.length, capture
        self.position_B = cache.next_position.clone()
        device = self.position_B.device
        self.index = torch.tensor([cache.length], device=device)
        self.ids_B1 = torch.zeros(len(self.position_B), 1, dtype=torch.long, device=device)
        self.buffers = {key: dict(map(self._buffer, layer.tensors())) for key, layer in cache.layers.items()}
        self._replay: Callable[[], Tensor] = self._step
        if capture:  # what a step overwrites is restored; a key or value that is written early is written again
            states = [x for found in self.buffers.values() for name, x in found.items() if name not in ("k", "v")]
            self._replay = captured(self._step, [self.position_B, self.index, *states])

    def _buffer(self, state: tuple[str, Tensor]) -> tuple[str, Tensor]:
        name, x = state
        if name not in ("k", "v"):
            return name, x.clone()
        buffer = x.new_zeros(x.shape[0], self.capacity, *x.shape[2:])
        buffer[:, : x.shape[1]] = x
        return name, buffer

    def _step(self) -> Tensor:
        layers: dict[str, LayerState] = {
            key: StaticState(**buffers, index=self.index) for key, buffers in self.buffers.items()
        }
        cache = Cache(layers=layers, length=self.length, next_position=self.position_B)
        logits_B1V = self.model(inputs_embeds=self.model.embed_tokens(self.ids_B1), cache=cache)
        for key, buffers in self.buffers.items():
            for name, buffer in buffers.items():
                if (x := vars(layers[key])[name]) is not buffer:
                    buffer.copy_(x)
        assert cache.next_position is not None
        self.position_B.copy_(cache.next_position)
        self.index.add_(1)
        return logits_B1V

    @torch.inference_mode()
    def step(self, ids_B1: Tensor) -> Tensor:
        """Logits after one more token. The ids must be in the vocabulary; on a GPU that is not checked here."""
        if self.full:
            expected = f"at most {self.capacity} tokens"
            raise Qwen35Error("no room for another token", where="DecodeGraph", expected=expected, do="more capacity")
        self.length += 1
        self.ids_B1.copy_(ids_B1)
        return self._replay().clone()

    @property
    def full(self) -> bool:
        return self.length >= self.capacity

    def cache(self) -> Cache:
        """A growing cache that goes on from here, a copy."""
        layers = {
            key: LayerState(**{n: (x[:, : self.length] if n in ("k", "v") else x).clone() for n, x in buffers.items()})
            for key, buffers in self.buffers.items()
        }
        return Cache(layers=layers, length=self.length, next_position=self.position_B.clone())


def can_capture(model: Model) -> bool:
    """Whether a pass on this model never makes the host wait for the device, so that a graph can hold it.

    On a GPU, with all layers in memory and experts in stacks, in an arithmetic whose products of experts PyTorch groups
    (bf16 results): `transformers-bf16` can be captured; `exact`, and tables that keep those products in fp32, cannot.
    """
    device, config = model.norm.weight.device, model.config
    weight = torch.empty(0, dtype=model.arithmetic.weight_dtype("experts"), device=device)
    products = (("moe_expert_gate_up", config.hidden_size), ("moe_expert_down", config.moe_intermediate_size))
    with arithmetic.using(model.arithmetic):
        groups = all(has_grouped_mm(accumulation_dtype(name, weight), device, columns) for name, columns in products)
    if not groups or not isinstance(model.layers, nn.ModuleList) or "hf_device_map" in vars(model):
        return False
    experts = (module.experts for module in model.layers.modules() if isinstance(module, MoE))
    return all(isinstance(found, ResidentExperts | StackedExperts) for found in experts)


class PrefillGraph:
    """`model(ids)` of one shape [B, T], again and again. `cache` is that of the last call; clone it to go on.

    Passes over memory are compiled for long inputs; the bits are those of `model(ids)`.
    """

    @torch.inference_mode()
    def __init__(self, model: Model, ids_BT: Tensor, logits_to_keep: int | None = None):
        self.model, self.ids_BT, self.keep = model, ids_BT.clone(), logits_to_keep
        self.cache = Cache()
        with compiling():
            self._replay = captured(self._run, [])

    def _run(self) -> Tensor:
        self.cache = Cache()
        embeds_BTD = self.model.embed_tokens(self.ids_BT)
        return self.model(inputs_embeds=embeds_BTD, cache=self.cache, logits_to_keep=self.keep)

    @torch.inference_mode()
    def __call__(self, ids_BT: Tensor) -> Tensor:
        self.ids_BT.copy_(ids_BT)
        return self._replay().clone()


def captured(run: Callable[[], Tensor], changed: list[Tensor]) -> Callable[[], Tensor]:
    """`run` as a graph whose replay returns the same tensor each time. `changed` is restored after the warm-up."""
    if not torch.cuda.is_available() or (changed and not changed[0].is_cuda):
        return run
    before = [x.clone() for x in changed]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up in the first run, which cannot be captured
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for x, old in zip(changed, before, strict=True):
        x.copy_(old)

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


@contextmanager
def compiling() -> Iterator[None]:
    """Inside of the block, in all threads, the functions in ONE_PASS are compiled for large tensors on a GPU."""
    # Each shape is a compilation of its own; beyond the limit, calls would run uncompiled.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    plain = [(module, name, vars(module)[name]) for module, name in ONE_PASS]
    for module, name, function in plain:
        setattr(module, name, one_pass(function))
    try:
        yield
    finally:
        for module, name, function in plain:
            setattr(module, name, function)


@cache
def one_pass(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, compiled where its first tensor is large, on a GPU and no float64."""

    @cache
    def compiled() -> Callable[..., Any]:
        # The pattern matcher takes a value that is rounded and widened again for one that need not be rounded.
        options: dict[str, Any] = {"emulate_precision_casts": True, "pattern_matcher": False}
        return torch.compile(function, dynamic=False, options=options)

    @wraps(function)
    def run(x: Tensor, *rest: Any) -> Any:
        large = x.is_cuda and x.numel() >= LARGE and x.dtype != torch.float64
        return (compiled() if large else function)(x, *rest)

    return run
