"""Weights by name, as a checkpoint stores them, and experts by number, the shared one among them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..checkpoint.weight import EXPERT_PROJECTIONS, StoredWeight
from ..errors import Qwen35Error
from ..gate.decide import slot_guard
from ..model.config import Config
from ..quant.mxfp4 import PackedMXFP4, encode
from ..quant.packed import Packed, concatenate
from ..quant.precision import ModuleSpec
from .experts import PackedExpert


class WeightSource:
    """Weights by name, as a checkpoint stores them. A fault wraps a source and changes its weights, so that they
    are not `as_stored`.

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

    def stored(self, mlp: str, e: int) -> tuple[StoredWeight, ...]:
        """Where the bytes of `slot` are; nowhere if they are not as stored."""
        if e < self.config.num_experts:
            return self.checkpoint.experts(f"{mlp}.experts").weights(e)
        return () if self._converts(mlp) else tuple(map(self.checkpoint.weight, _shared(mlp)))

    def spec(self, module: str) -> ModuleSpec:
        """What the bytes of a module, or of all experts of a layer, are."""
        spec = self.checkpoint.spec(module)
        if spec is None:
            experts = self.checkpoint.find_experts(module)
            first, *rest = (weight for e in range(experts.count) for weight in experts.weights(e))
            odd = next(weight for weight in rest if weight.spec != first.spec)
            where, expected = f"{self.checkpoint.path}: {odd.module}", f"{first.spec}, as {first.module}"
            what = "experts of one layer differ in their format"
            raise Qwen35Error(what, where=where, expected=expected, found=odd.spec)
        return spec

    def guard_slot(self, mlp: str) -> None:
        """Error unless the shared expert's bytes are what a slot of the routed experts holds (PR 22948)."""
        stored, slot = {name: self.checkpoint.spec(name) for name in _shared(mlp)}, self.config.num_experts
        slot_guard(f"{mlp}.experts[{slot}]", self.spec(f"{mlp}.experts"), stored, convert=self._converts(mlp))

    def _converts(self, mlp: str) -> bool:
        return self.online and self.spec(f"{mlp}.experts").kind == "mxfp4"

    def slot(self, mlp: str, e: int) -> PackedExpert:
        """Expert e of the MoE block `mlp`; number E is the shared one."""
        if e < self.config.num_experts:
            return self.checkpoint.experts(f"{mlp}.experts").read(e)
        parts = [self.weight(name) for name in _shared(mlp)]
        if self._converts(mlp):  # scale rule "even", as SGLang's online conversion
            converted: list[Packed] = [
                x if isinstance(x, PackedMXFP4) else PackedMXFP4(*encode(x.decode(torch.float32), "even"))
                for x in parts
            ]
            if mlp not in self.conversion:  # a streamed model comes here at every pass
                new, old = ([part.decode(torch.float64) for part in some] for some in (converted, parts))
                size = sum(float(x.square().sum()) for x in old)
                error = sum(float((a - b).square().sum()) for a, b in zip(new, old, strict=True))
                self.conversion[mlp] = (error / size) ** 0.5 if size else 0.0
            parts = converted
        return fuse(*parts)


def _shared(mlp: str) -> list[str]:
    return [f"{mlp}.shared_expert.{name}" for name in EXPERT_PROJECTIONS]


def fuse(gate_proj: Packed, up_proj: Packed, down_proj: Packed) -> PackedExpert:
    """The shared expert as one more routed expert: (rows of gate, then rows of up; down). Moves bits only."""
    return concatenate(gate_proj, up_proj), down_proj
