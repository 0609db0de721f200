"""What a sequence leaves behind: keys and values, convolution inputs, recurrent states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import Qwen35Error
from ..run.files import save_whole


@dataclass
class LayerState:
    """State of one layer; the tensors of the other kind of layer stay None."""

    k: Tensor | None = None  # [B, S, G, H], after RoPE
    v: Tensor | None = None  # [B, S, G, H]
    conv: Tensor | None = None  # [B, C, W-1]: the last inputs of the convolution, before it
    state: Tensor | None = None  # [B, J, K, P]: the associative memory of DeltaNet

    @property
    def at(self) -> Tensor | None:
        """Where new tokens stand among those that `append` returns; None: they are the last ones."""
        return None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for f in fields(self):
            if getattr(self, f.name) is not None:
                yield f.name, getattr(self, f.name)

    def append(self, k_BTGH: Tensor, v_BTGH: Tensor) -> tuple[Tensor, Tensor]:
        """Adds keys and values of new tokens; returns those of all tokens."""
        self.k = k_BTGH if self.k is None else torch.cat((self.k, k_BTGH), 1)
        self.v = v_BTGH if self.v is None else torch.cat((self.v, v_BTGH), 1)
        return self.k, self.v


@dataclass
class Cache:
    """State of a batch of sequences. Pass it to every call of the model; it is updated in place.

    `mask` [B, S] says which of the tokens so far were real (None: all of them), `next_position` [B] which position
    comes next (it differs from their number once an image has been seen).
    """

    layers: dict[str, LayerState] = field(default_factory=dict)
    length: int = 0  # S: tokens seen so far, padding included
    mask: Tensor | None = None
    next_position: Tensor | None = None

    def layer(self, key: str | int) -> LayerState:
        return self.layers.setdefault(str(key), LayerState())

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"length": torch.tensor(self.length), "mask": self.mask, "next_position": self.next_position}
        tensors |= {f"{key}.{name}": x for key, layer in self.layers.items() for name, x in layer.tensors()}
        return {name: x for name, x in tensors.items() if x is not None}

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor]) -> Cache:
        length, mask, position = (tensors.pop(name, None) for name in ("length", "mask", "next_position"))
        if length is None:
            raise Qwen35Error("not a cache file", expected="a tensor named length", found=sorted(tensors)[:3])
        cache = cls(length=int(length), mask=mask, next_position=position)
        for full_name, x in tensors.items():
            key, _, name = full_name.rpartition(".")
            if name not in {f.name for f in fields(LayerState)}:
                raise Qwen35Error("not a cache file", where=full_name, expected="a tensor of a layer's state")
            setattr(cache.layer(key), name, x)
        return cache

    def clone(self) -> Cache:
        """An independent copy, to branch a sequence."""
        return self._from_tensors({name: x.clone() for name, x in self._tensors().items()})

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, complete or not at all."""
        path = Path(path)
        save_whole({name: x.contiguous() for name, x in self._tensors().items()}, path)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Cache:
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                return cls._from_tensors({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise Qwen35Error("cannot read the cache", where=path, found=error) from error
