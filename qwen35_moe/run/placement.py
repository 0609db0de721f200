"""Placing a model by a device map, over several GPUs and the CPU, as accelerate does it.

A map says where weights are kept, unit by unit: `embed_tokens`, `layers.0` .., `norm`, `lm_head`, `mtp`, `visual`, or
"layers" for all layers and "" for all. A hook puts what is kept on "cpu" (where there is a GPU in the map) on the main
device when it is its turn, and drops it after it. Values do not depend on the place: a map gives the bits that its
devices give; on a GPU, packed experts that are kept elsewhere are multiplied one by one, which in float64 may change
the last bits.

Two things are never moved: experts that stay packed, or mapped to memory, lie in the checkpoint's own files; the last
norm stays on the main device, which is how a model says where it wants its input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import Qwen35Error, extra
from ..model.moe import MoE
from ..model.text import Model
from ..numerics.arithmetics import Arithmetic
from .experts import PackedExperts
from .fill import fill
from .origin import usable
from .source import WeightSource

DeviceName = int | str | torch.device
AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's words
NEVER_SPLIT = ["Layer", "MTP", "VisionTower"]  # classes, each loaded as a whole
STREAM = 'mode="stream" (--mode stream) reads each layer from disk at its turn'


def place_model(
    model: Model,
    source: WeightSource,
    table: Arithmetic,
    mode: str,
    device_map: str | Mapping[str, DeviceName],
    max_memory: Mapping[int | str, int | str] | None = None,
) -> None:
    """Fills a model of meta parameters, each unit where the map wants it, and dispatches it.

    device_map: unit -> GPU number, "cuda:1" or "cpu"; or "auto" (that is "balanced"): GPUs are filled evenly, then the
    CPU, within `max_memory` ({0: "20GiB", "cpu": "60GiB"}; without it, what is free); "balanced_low_0" leaves the first
    GPU empty if the others hold all; "sequential" fills one GPU after the other. `model.hf_device_map` then says what
    is where.
    Error: a map that leaves out a unit, or names none; a model that does not fit.
    """
    with extra("placement"):
        from accelerate import dispatch_model

    if isinstance(device_map, str) and device_map in AUTOMATIC:
        places = automatic_map(model, source, mode, device_map, max_memory)
    else:
        places = by_unit(model, device_map)
    main = next((where for where in places.values() if where != "cpu"), "cpu")
    places["norm"] = main
    for unit, where in places.items():
        shares = unit == "lm_head" and model.config.tie_word_embeddings
        if shares and where == places["embed_tokens"]:
            model.lm_head.weight = model.embed_tokens.weight
            continue
        module = model.get_submodule(unit)
        fill(module, "embed_tokens" if shares else unit, source, table, torch.device(where), mode)
        packed = [part for part in module.modules() if isinstance(part, PackedExperts)]
        for experts in packed if where == "cpu" != main else ():
            experts.device = torch.device(main)  # they are no parameters, and so nothing that a hook moves
    dispatch_model(model, dict(places), main, preload_module_classes=NEVER_SPLIT, force_hooks=True)


def units(model: Model) -> list[str]:
    """What a map places, in the order of computing."""
    ends = [name for name, part in (("mtp", model.mtp), ("visual", model.visual)) if part is not None]
    return ["embed_tokens", *(f"layers.{i}" for i in range(len(model.layers))), "norm", "lm_head", *ends]


def by_unit(model: Model, device_map: str | Mapping[str, DeviceName]) -> dict[str, str]:
    """The map with an entry for each unit: that of the longest name which the unit lies in."""
    known = units(model)
    if not isinstance(device_map, Mapping):
        expected = f'{" | ".join(AUTOMATIC)}, or unit -> device, as {{"": "cpu", "layers.3": 0}}'
        raise Qwen35Error("unknown device_map", where="load()", expected=expected, found=repr(device_map))
    unknown = sorted({*device_map} - {"", "layers", "mtp", "visual", *known})
    lost = [unit for unit in known if not any(_holds(name, unit) for name in device_map)]
    if unknown or lost:
        what, do, count = (
            "device_map does not fit the model",
            '{"": "cpu"} places all that is not named',
            len(model.layers),
        )
        expected = f"{known[0]}, layers.0 .. {count - 1}, {', '.join(known[count + 1 :])}"
        found = ", ".join([*(f"{name}: no such unit" for name in unknown), *(f"{unit}: no place" for unit in lost)])
        raise Qwen35Error(what, where="load()", expected=expected, found=found, do=do)
    return {unit: _name(device_map[max((n for n in device_map if _holds(n, unit)), key=len)]) for unit in known}


def _holds(name: str, unit: str) -> bool:
    return name in ("", unit) or unit.startswith(f"{name}.")


def _name(where: DeviceName) -> str:
    """As torch spells it."""
    if where == "disk":
        raise Qwen35Error("nothing is placed on disk", where="device_map", found=where, do=STREAM)
    try:
        device = torch.device(where)
        if device.type == "meta":
            raise TypeError
    except (RuntimeError, TypeError) as error:
        expected = '0, "cuda:0", "cpu"'
        raise Qwen35Error("no such device", where="device_map", expected=expected, found=where) from error
    usable(device, f"device_map: {where}")
    return f"{device.type}:{device.index or 0}" if device.type != "cpu" else "cpu"


def automatic_map(
    model: Model, source: WeightSource, mode: str, how: str, max_memory: Mapping[int | str, int | str] | None
) -> dict[str, str]:
    """The units fill the GPUs in the order of computing, then the CPU.

    Each GPU is filled to its limit ("sequential") or to the least share of the model with which the GPUs hold all of
    it. Where they cannot, the main device keeps room for the largest unit, which is brought there when it is its turn.
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
    if not (places := fill_devices(sizes, limits, how)):
        expected, found = f"{sum(sizes.values())} bytes in all", limits
        raise Qwen35Error("the model does not fit", where="max_memory", expected=expected, found=found, do=STREAM)
    return by_unit(model, places)


def fill_devices(sizes: Mapping[str, int], limits: Mapping[Any, int], how: str) -> dict[str, Any]:
    """unit -> device; empty if they do not fit. sizes: unit -> bytes, in the order of computing; limits: device ->
    bytes."""
    rooms = dict(sorted(limits.items(), key=lambda item: item[0] == "cpu"))
    gpus = [device for device in rooms if device != "cpu"]
    if how == "balanced_low_0" and len(gpus) > 1 and (places := _even(sizes, rooms, gpus[1:])):
        return places
    if how != "sequential" and (places := _even(sizes, rooms, gpus)):
        return places
    places = _in_order(sizes, rooms)
    if gpus and "cpu" in places.values():
        places = _in_order(sizes, {**rooms, gpus[0]: rooms[gpus[0]] - max(sizes.values())})
    return places


def _even(sizes: Mapping[str, int], rooms: Mapping[Any, int], gpus: list[Any]) -> dict[str, Any]:
    """Units on these GPUs, the fullest of which holds as little as can be; empty if they do not hold all."""
    low, high, best = 0, sum(sizes.values()), dict[str, Any]()
    while low <= high:
        share = (low + high) // 2
        if places := _in_order(sizes, {gpu: min(share, rooms[gpu]) for gpu in gpus}):
            best, high = places, share - 1
        else:
            low = share + 1
    return best


def _in_order(sizes: Mapping[str, int], rooms: Mapping[Any, int]) -> dict[str, Any]:
    """Each unit on the first device, from that of the unit before it on, that has room for it; empty if none has."""
    places, left = dict[str, Any](), list(rooms.items())
    for unit, size in sizes.items():
        while left and size > left[0][1]:
            left.pop(0)
        if not left:
            return {}
        device, room = left[0]
        places[unit], left[0] = device, (device, room - size)
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
