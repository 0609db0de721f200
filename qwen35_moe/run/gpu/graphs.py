"""A forward pass as one CUDA graph: the same kernels and bits, launched at once instead of one by one from Python.

A graph has fixed shapes and addresses, so that keys and values live in buffers of a fixed capacity. On a device without
graphs both classes run the same step directly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import Qwen35Error
from ...model.cache import Cache, LayerState
from ...model.moe import MoE
from ...model.ops import accumulation_dtype
from ...model.text import Model
from ...numerics import arithmetics as arithmetic
from .compiled import compiling
from .grouped import has_grouped_mm
from .grouped_experts import ResidentExperts, StackedExperts


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
        grouped = all(has_grouped_mm(accumulation_dtype(name, weight), device, columns) for name, columns in products)
    if not grouped or not isinstance(model.layers, nn.ModuleList) or "hf_device_map" in vars(model):
        return False
    experts = (module.experts for module in model.layers.modules() if isinstance(module, MoE))
    return all(isinstance(found, ResidentExperts | StackedExperts) for found in experts)


class PrefillGraph:
    """`model(ids)` of one shape [B, T], again and again. `cache` is that of the last call; clone it to go on.

    Passes over memory are compiled for long inputs, which takes seconds for each shape (`compiled.py`); the bits are
    those of `model(ids)`.
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
