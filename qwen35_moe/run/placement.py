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
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import Qwen35Error, extra
from ..model.moe import MoE
from .device_map import AUTOMATIC, DeviceName, automatic_map, by_unit
from .experts import PackedExperts, ViewedExperts
from .files import Claim
from .gpu.grouped_experts import ResidentExperts

if TYPE_CHECKING:
    from ..model.text import Model
    from ..numerics.arithmetics import Arithmetic
    from .source import WeightSource

UNITS = ["Layer", "MTP", "VisionTower"]  # classes that are never split: each is loaded as a whole
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
    "balanced_low_0" leaves the first GPU empty if the others hold all; "sequential" fills one GPU after the other.
    offload_folder: where decoded weights on "disk" are written; they are removed with the model. `model.hf_device_map`
    then says what is where.
    Error: a map that leaves out a unit, or names none; a disk without a folder.
    """
    with extra("placement"):
        from accelerate import dispatch_model
        from accelerate.utils import offload_weight, save_offload_index

    from .fill import fill

    if isinstance(device_map, str) and device_map in AUTOMATIC:
        places = automatic_map(model, source, mode, device_map, max_memory)
    else:
        places = by_unit(model, device_map)
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
