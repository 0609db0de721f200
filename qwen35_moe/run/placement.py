"""Placing a model by a device map: over several GPUs, CPU and disk, as accelerate does it.

A map says where weights are kept, unit by unit: `embed_tokens`, `layers.0` .., `norm`, `lm_head`, `mtp`, `visual`, or
"layers" for all layers and "" for all. What is kept on "cpu" (where there is a GPU in the map) or on "disk" is put on
the main device by a hook when it is its turn, and dropped after it. Values do not depend on the place: a map gives the
bits that its devices give; on a GPU, packed experts that are kept elsewhere are multiplied one by one, which in float64
may change the last bits.

Two things are never moved: experts that stay packed, or mapped to memory, lie in the checkpoint's own files, on "disk"
as on "cpu"; the last norm stays on the main device, which is how a model says where it wants its input.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import Qwen35Error, extra
from ..model.moe import MoE
from .devices import usable
from .experts import PackedExperts, ViewedExperts
from .files import Claim
from .gpu.grouped_experts import ResidentExperts

if TYPE_CHECKING:
    from ..model.text import Model
    from ..numerics.arithmetics import Arithmetic
    from .source import WeightSource

DeviceName = int | str | torch.device
UNITS = ["Layer", "MTP", "VisionTower"]  # classes that are never split: each is loaded as a whole
AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's words
OFFLOADED = ("cpu", "disk")
OFFLOAD, MARK = "qwen35-moe-", ".qwen35-moe"  # how names of folders with offloaded weights begin; a file in them


def place_model(
    model: Model,
    source: WeightSource,
    table: Arithmetic,
    mode: str,
    device_map: str | Mapping[str, DeviceName],
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
) -> Model:
    """Fills a model of meta parameters, each unit where the map wants it, and dispatches it.

    device_map: unit -> GPU number, "cuda:1", "cpu" or "disk"; or "auto" (that is "balanced"): GPUs are filled evenly,
    then the CPU, then the disk, within `max_memory` ({0: "20GiB", "cpu": "60GiB"}; without it, what is free);
    "sequential" fills one GPU after the other. offload_folder: where decoded weights on "disk" are written; they are
    removed with the model. `model.hf_device_map` then says what is where.
    Error: a map that leaves out a unit, or names none; a disk without a folder.
    """
    with extra("placement"):
        from accelerate import dispatch_model
        from accelerate.utils import offload_weight, save_offload_index

    from .fill import fill

    if isinstance(device_map, str) and device_map in AUTOMATIC:
        places = _automatic(model, source, mode, device_map, max_memory)
    else:
        places = _by_unit(model, device_map)
    main = next((where for where in places.values() if where not in OFFLOADED), "cpu")
    places["norm"] = main
    folder = _folder(model, offload_folder) if "disk" in places.values() else None
    index: dict[str, Any] = {}
    for unit, where in places.items():
        shares = unit == "lm_head" and model.config.tie_word_embeddings
        if shares and where == places["embed_tokens"] != "disk":
            model.lm_head.weight = model.embed_tokens.weight
            continue
        module, device = model.get_submodule(unit), torch.device("cpu" if where in OFFLOADED else where)
        fill(module, "embed_tokens" if shares else unit, source, table, device, mode)
        if where in OFFLOADED and main != "cpu":
            _reach(module, torch.device(main))
        if where == "disk":
            for name, owner, parameter in _parameters(model.get_submodule(unit), unit):
                _check_room(str(folder), parameter.nbytes)
                index = offload_weight(parameter.detach(), name, folder, index)
                empty = nn.Parameter(parameter.to("meta"), requires_grad=False)
                owner.register_parameter(name.rpartition(".")[2], empty)
    if folder is not None:
        save_offload_index(index or {}, folder)
        if not index:
            Path(folder, "index.json").write_text("{}")  # all that is on disk is in the checkpoint
    dispatch_model(
        model, dict(places), main, offload_dir=folder, preload_module_classes=UNITS, force_hooks=True
    )  # which also says on stderr that parameters are offloaded
    return model


def units(model: Model) -> list[str]:
    """What a map places, in the order of computing."""
    ends = [name for name, part in (("mtp", model.mtp), ("visual", model.visual)) if part is not None]
    return ["embed_tokens", *(f"layers.{i}" for i in range(len(model.layers))), "norm", "lm_head", *ends]


def _by_unit(model: Model, device_map: str | Mapping[str, DeviceName]) -> dict[str, str]:
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


def _automatic(
    model: Model, source: WeightSource, mode: str, how: str, max_memory: Mapping[int | str, int | str] | None
) -> dict[str, str]:
    """accelerate's map, from the sizes that the weights will have."""
    with extra("placement"):
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory

    dtypes = {name: model.arithmetic.weight_dtype(name) for name, _ in model.named_parameters()}
    options = {"no_split_module_classes": UNITS, "special_dtypes": dtypes}
    with _packed_sizes(model, source, mode):
        memory = dict(max_memory) if max_memory else None
        try:
            if how != "sequential":
                memory = get_balanced_memory(model, memory, low_zero=how == "balanced_low_0", **options)
            places = infer_auto_device_map(model, memory, **options)
        except ValueError as error:
            expected = '{0: "20GiB", "cpu": "60GiB"}'
            raise Qwen35Error("accelerate makes no map", where="max_memory", expected=expected, found=error) from error
    return _by_unit(model, places)


@contextmanager
def _packed_sizes(model: Model, source: WeightSource, mode: str) -> Iterator[None]:
    """Puts, for a while, as many bytes as are stored into the place of experts that stay packed."""
    blocks = {path: m for path, m in model.named_modules() if isinstance(m, MoE)} if mode == "packed" else {}
    experts = {path: block.experts for path, block in blocks.items()}
    modules = source.checkpoint.modules
    for path, block in blocks.items():
        kept = [f"{path}.experts."] + [f"{path}.shared_expert."] * (block.shared_expert is None)
        nbytes = sum(
            x.nbytes for name, roles in modules.items() if name.startswith(tuple(kept)) for x in roles.values()
        )
        stand_in = nn.Module()
        stand_in.register_buffer("stored", torch.empty(nbytes, dtype=torch.uint8, device="meta"))
        block.experts = stand_in  # type: ignore[assignment]
    try:
        yield
    finally:
        for path, block in blocks.items():
            block.experts = experts[path]


def _reach(module: nn.Module, main: torch.device) -> None:
    """Experts that are no parameters, and so nothing that a hook moves, are handed out on the main device."""
    for block in (block for block in module.modules() if isinstance(block, MoE)):
        if isinstance(block.experts, PackedExperts):
            block.experts.device = main
        elif isinstance(block.experts, ViewedExperts):
            pairs = [block.experts.at(e) for e in range(block.experts.count)]
            gate_up, down = (torch.stack(matrices) for matrices in zip(*pairs, strict=True))
            block.experts = ResidentExperts(gate_up, down)


def _parameters(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(name, owner, parameter), each."""
    for path, owner in module.named_modules(prefix=prefix):
        for name, parameter in list(owner.named_parameters(recurse=False)):
            yield f"{path}.{name}", owner, parameter


def _folder(model: Model, offload_folder: str | Path | None) -> str:
    """A new folder in the one that was given: nobody else's weights are taken for ours. Those that processes which have
    ended left there, since they were killed, are removed."""
    if offload_folder is None:
        raise Qwen35Error("weights on disk need a place", where="device_map", do="give offload_folder, or more memory")
    for mark in Path(offload_folder).glob(f"{OFFLOAD}*/{MARK}"):
        with suppress(Qwen35Error):  # in use
            claim = Claim(mark.parent)
            if claim.locked:
                _remove(mark.parent, claim)
            claim.release()
    try:
        Path(offload_folder).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=OFFLOAD, dir=offload_folder))
    except OSError as error:
        raise Qwen35Error("cannot write here", where=offload_folder, found=error.strerror) from error
    claim = Claim(folder)
    (folder / MARK).touch()  # once it is claimed: what has no mark is nobody's to remove
    weakref.finalize(model, _remove, folder, claim)
    return str(folder)


def _check_room(folder: str, nbytes: int) -> None:
    """Error before a file is mapped that the disk cannot hold: to write to it would end the process (SIGBUS)."""
    if (free := shutil.disk_usage(folder).free) < nbytes:
        do = "give another offload_folder, or more memory"
        raise Qwen35Error("disk full", where=folder, expected=f"{nbytes} bytes", found=f"{free} free", do=do)


def _remove(folder: Path, claim: Claim) -> None:
    """What was offloaded there, and the folder if that was all."""
    for file in (*folder.glob("*.dat"), folder / "index.json", folder / MARK):
        with suppress(OSError):
            file.unlink()
    with suppress(OSError):
        folder.rmdir()
    claim.release()
