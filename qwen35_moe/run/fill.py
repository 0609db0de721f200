"""Fills modules on the meta device with a checkpoint's weights, in the dtypes of an arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..model.moe import Experts, MoE
from ..model.ops import Linear
from ..numerics.arithmetics import Arithmetic
from ..quant import mxfp4
from ..quant.mxfp4 import PackedMXFP4
from .experts import PackedExpert, PackedExperts, as_one, is_stored_as, moved
from .gpu.grouped_experts import ResidentExperts, stack_experts
from .gpu.passing import PassingExperts
from .source import WeightSource

NUMBERS_AT_ONCE = 2**26  # of decoded experts


def fill(
    module: nn.Module, prefix: str, source: WeightSource, table: Arithmetic, device: torch.device, mode: str = "decoded"
) -> None:
    """Replaces the meta parameters of `module` by the checkpoint's weights, in the arithmetic's dtypes."""
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
    module: nn.Module, prefix: str, source: WeightSource, table: Arithmetic, device: torch.device, mode: str
) -> None:
    """Replaces empty experts by real ones, and marks projections that take FP8 inputs."""
    for path, owner in list(module.named_modules(prefix=prefix)):
        if isinstance(owner, MoE):
            owner.experts = _experts(owner, path, source, table, device, mode)
        if isinstance(owner, Linear) and table.quantises("fp8"):
            owner.quantised = source.spec(path).kind.startswith("fp8")


def _experts(moe: MoE, path: str, source: WeightSource, table: Arithmetic, device: torch.device, mode: str) -> Experts:
    """Experts of one block, decoded or packed; a BF16 shared expert never reaches a slot of packed ones."""
    count, F, dtype = moe.experts.count, moe.experts.intermediate, table.weight_dtype(f"{path}.experts")
    quantised = table.quantises(source.spec(f"{path}.experts").kind)
    if moe.shared_expert is None:
        source.guard_slot(path)
    else:
        moe.shared_expert.quantised = table.quantises(source.spec(f"{path}.shared_expert.gate_proj").kind)
    read: Callable[[int], PackedExpert] = partial(source.slot, path)
    if mode != "stream":
        stored = [read(e) for e in range(count)]
        if mode == "decoded":
            return decoded_experts(stored, dtype, device, quantised)
        if device.type == "cuda" and (stacked := stack_experts(stored, dtype, device, quantised)) is not None:
            return stacked
        read = stored.__getitem__
    if device.type == "cuda" and source.as_stored:
        slot, weights = partial(source.slot, path), partial(source.stored, path)
        return PassingExperts(count, F, slot, dtype, quantised, device, stored=weights)
    return PackedExperts(count, F, read, dtype, quantised, device)


def decoded_experts(stored: list[PackedExpert], dtype: torch.dtype, device: torch.device, quantised: bool) -> Experts:
    """Experts in memory. Stored experts of this dtype and device are used without a copy."""
    if device.type == "cpu" and all(is_stored_as(weight, dtype) for one in stored for weight in one):
        gate_up, down = (as_one([one[i] for one in stored]) for i in (0, 1))
        if gate_up is None or down is None:
            return PackedExperts(len(stored), stored[0][1].shape[1], stored.__getitem__, dtype, quantised)
        return ResidentExperts(gate_up, down, quantised)
    first = stored[0]
    gate_up, down = (torch.empty(len(stored), *weight.shape, dtype=dtype, device=device) for weight in first)
    stacked = None if device.type == "cpu" else stack_experts(stored, dtype, device, quantised)
    if stacked is not None:
        decode_stacked(stacked.gate_up, gate_up)
        decode_stacked(stacked.down, down)
    for e, one in enumerate(stored if stacked is None else ()):
        gate_up[e], down[e] = (moved(weight, device).decode(dtype) for weight in one)
    return ResidentExperts(gate_up, down, quantised)


def decode_stacked(stacked: PackedMXFP4, out: Tensor) -> None:
    """Weights [E, O, I] into `out`, NUMBERS_AT_ONCE at a time."""
    step = max(1, NUMBERS_AT_ONCE // out[0].numel())
    for some in (slice(e, e + step) for e in range(0, len(out), step)):
        mxfp4.decode(stacked.codes[some], stacked.scales[some], out.dtype, out[some])
