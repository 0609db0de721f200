"""Which device holds which part of a model: a map that a user gave, or one made from sizes and limits.

Parts are units: `embed_tokens`, `layers.0` .., `norm`, `lm_head`, `mtp`, `visual`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..errors import Qwen35Error, extra
from ..model.moe import MoE
from .devices import usable

if TYPE_CHECKING:
    from ..model.text import Model
    from .source import WeightSource

DeviceName = int | str | torch.device
AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's words


def units(model: Model) -> list[str]:
    """What a map places, in the order of computing."""
    ends = [name for name, part in (("mtp", model.mtp), ("visual", model.visual)) if part is not None]
    return ["embed_tokens", *(f"layers.{i}" for i in range(len(model.layers))), "norm", "lm_head", *ends]


def by_unit(model: Model, device_map: str | Mapping[str, DeviceName]) -> dict[str, str]:
    """The map with an entry for each unit: that of the longest name which the unit lies in."""
    known = units(model)
    if not isinstance(device_map, Mapping):
        expected = f'{" | ".join(AUTOMATIC)}, or unit -> device, as {{"": "cpu", "layers.3": "disk"}}'
        raise Qwen35Error("unknown device_map", where="load()", expected=expected, found=repr(device_map))
    unknown = sorted({*device_map} - {"", "layers", "mtp", "visual", *known})
    lost = [unit for unit in known if not any(_holds(name, unit) for name in device_map)]
    if unknown or lost:
        raise Qwen35Error(
            "device_map does not fit the model",
            where="load()",
            expected=f"{known[0]}, layers.0 .. {len(model.layers) - 1}, {', '.join(known[len(model.layers) + 1 :])}",
            found=", ".join([*(f"{name}: no such unit" for name in unknown), *(f"{unit}: no place" for unit in lost)]),
            do='{"": "cpu"} places all that is not named',
        )
    return {unit: _name(device_map[max((n for n in device_map if _holds(n, unit)), key=len)]) for unit in known}


def _holds(name: str, unit: str) -> bool:
    return name in ("", unit) or unit.startswith(f"{name}.")


def _name(where: DeviceName) -> str:
    """As torch spells it; "disk" is accelerate's word."""
    if where == "disk":
        return "disk"
    expected = '0, "cuda:0", "cpu", "disk"'
    try:
        device = torch.device(where)
        if device.type == "meta":
            raise TypeError
    except (RuntimeError, TypeError) as error:
        raise Qwen35Error("no such device", where="device_map", expected=expected, found=where) from error
    usable(device, f"device_map: {where}")
    return f"{device.type}:{device.index or 0}" if device.type != "cpu" else "cpu"


def automatic_map(
    model: Model, source: WeightSource, mode: str, how: str, max_memory: Mapping[int | str, int | str] | None
) -> dict[str, str]:
    """The units fill the GPUs in the order of computing, then the CPU, then the disk.

    Each GPU is filled to its limit ("sequential") or to the least share of the model with which the GPUs hold all of
    it. Where they cannot, or memory cannot, the main device keeps room for the largest unit, which is brought there
    when it is its turn.
    """
    with extra("placement"):
        from accelerate.utils import get_max_memory

    try:
        limits = get_max_memory(dict(max_memory) if max_memory else None)
    except ValueError as error:
        expected = '{0: "20GiB", "cpu": "60GiB"}'
        raise Qwen35Error("accelerate makes no map", where="max_memory", expected=expected, found=error) from error
    if not max_memory:  # a tenth is left for what is computed
        limits = {device: room if device == "cpu" else int(0.9 * room) for device, room in limits.items()}
    sizes = unit_sizes(model, source, mode)
    return by_unit(model, fill_devices(sizes, limits, how))


def fill_devices(sizes: Mapping[str, int], limits: Mapping[Any, int], how: str) -> dict[str, Any]:
    """unit -> device, a key of `limits` or "disk". sizes: unit -> bytes, in the order of computing; limits: device ->
    bytes."""
    rooms = dict(sorted(limits.items(), key=lambda item: item[0] == "cpu"))
    gpus = [device for device in rooms if device != "cpu"]
    if how == "balanced_low_0" and len(gpus) > 1 and (places := _even(sizes, rooms, gpus[1:])):
        return places
    if how != "sequential" and (places := _even(sizes, rooms, gpus)):
        return places
    places = _in_order(sizes, rooms)
    if {*places.values()} - {*(gpus or ["cpu"])}:
        main = next(iter(rooms))
        places = _in_order(sizes, {**rooms, main: rooms[main] - max(sizes.values())})
    return places


def _even(sizes: Mapping[str, int], rooms: Mapping[Any, int], gpus: list[Any]) -> dict[str, Any]:
    """Units on these GPUs, the fullest of which holds as little as can be; empty if they do not hold all."""
    low, high, best = 0, sum(sizes.values()), {}
    while low <= high:
        share = (low + high) // 2
        places = _in_order(sizes, {gpu: min(share, rooms[gpu]) for gpu in gpus})
        if "disk" in places.values():
            low = share + 1
        else:
            best, high = places, share - 1
    return best


def _in_order(sizes: Mapping[str, int], rooms: Mapping[Any, int]) -> dict[str, Any]:
    """Each unit on the first device, from that of the unit before it on, that has room for it; else on disk."""
    places, devices = {}, iter([*rooms.items(), ("disk", sum(sizes.values()))])
    device, room = next(devices)
    for unit, size in sizes.items():
        while size > room:
            device, room = next(devices)
        places[unit], room = device, room - size
    return places


def unit_sizes(model: Model, source: WeightSource, mode: str) -> dict[str, int]:
    """Bytes of each unit in memory; packed experts have the bytes that they are stored in."""
    blocks = {path: m for path, m in model.named_modules() if isinstance(m, MoE)} if mode == "packed" else {}
    packed = tuple(f"{path}.experts." for path in blocks)
    shared = tuple(f"{path}.shared_expert." for path, block in blocks.items() if block.shared_expert is None)
    sizes = dict.fromkeys(units(model), 0)
    for name, parameter in model.named_parameters():
        if not name.startswith(packed):
            sizes[_unit_of(name)] += parameter.numel() * model.arithmetic.weight_dtype(name).itemsize
    for name, roles in source.checkpoint.modules.items():
        if name.startswith(packed + shared):
            sizes[_unit_of(name)] += sum(weight.nbytes for weight in roles.values())
    return sizes


def _unit_of(name: str) -> str:
    """ "layers.3.mlp.gate" -> "layers.3"."""
    first, second, *_ = name.split(".")
    return f"{first}.{second}" if first == "layers" else first
