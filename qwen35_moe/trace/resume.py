"""The state of an unfinished trace, from which a later run continues if it is equal to the first.

`OUT/partial/resume.safetensors` is written after each layer; in OUT it stays beside a trace of the first layers.

    sum [B, T, D]     the residual stream after the last layer that is done, before it is rounded
    __metadata__      `State` as JSON
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..run.files import read_checked
from ..untrusted import parse_json
from .head import PARTIAL, RESUME
from .writer import TraceWriter


def run_of(meta: dict[str, Any], device: str, **more: Any) -> str:
    """What must be the same for the bytes to be, as JSON: what a trace says of its run (`meta_of`), and where it is."""
    return json.dumps({**meta, "device": device, "threads": torch.get_num_threads(), **more}, default=str)


def check_same(out: Path, then: str, now: str, what: str = "another run was begun here", do: str = "") -> None:
    """Error unless two runs are the same, each an object in JSON."""
    if then == now:
        return
    try:
        old, new = dict(parse_json(then.encode(), out)), json.loads(now)
    except (ValueError, TypeError) as error:
        raise Qwen35Error("cannot read the state", where=out, found=error, do="start without --resume") from error
    differing = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if differing == ["threads"]:
        do = do or _on_threads(old.get("threads"))
    found = "differing: " + ", ".join(differing).replace("steps", "ids")
    do = do or "give the options of that run, or leave out --resume to start anew"
    raise Qwen35Error(what, where=out, expected="the same checkpoint, ids and options", found=found, do=do)


def check_threads(where: Path, then: int) -> None:
    """Error if a run was begun on another number of threads, with which the last bits of products go."""
    if then != (now := torch.get_num_threads()):
        what = "begun on another number of threads"
        raise Qwen35Error(what, where=where, expected=then, found=now, do=_on_threads(then))


def _on_threads(then: object) -> str:
    return f"OMP_NUM_THREADS={then} goes on to the same bits; or leave out --resume to start anew"


def state_folder(out: Path) -> Path | None:
    """The folder of a state that a run of one pass can continue: OUT/partial, or OUT after the first layers alone."""
    return next((folder for folder in (out / PARTIAL, out) if (folder / RESUME).is_file()), None)


@dataclass
class State:
    """run: what must be equal for equal bytes (`run_of`). next: the layer to continue with. files: finished files and
    their sha256. nan: the first tap that held NaN. unused: tensors that no layer read."""

    run: str
    next: int = 0
    files: dict[str, str] = field(default_factory=dict)
    nan: str = ""
    unused: list[str] = field(default_factory=list)

    def write(self, writer: TraceWriter, sum_BTD: Tensor) -> None:
        writer.save_state({"sum": sum_BTD.cpu().contiguous()}, {"state": json.dumps(asdict(self))})

    def resumed(self, out: Path) -> tuple[State, Tensor | None, Path | None]:
        """The state of an earlier run, which must be equal to this one, its residual stream, and the folder of both."""
        if (folder := state_folder(out)) is None:
            return self, None, None  # killed before the first layer was done, or never begun
        do = "start without --resume"
        try:
            metadata, tensors = read_checked(folder / RESUME, do)
            then, sum_BTD = State(**parse_json(metadata["state"].encode(), folder / RESUME)), tensors["sum"]
            if any(type(value) is not type(getattr(self, name)) for name, value in asdict(then).items()):
                raise TypeError("values of wrong types")
        except (KeyError, TypeError) as error:
            raise Qwen35Error("cannot read the state", where=folder / RESUME, found=error, do=do) from error
        check_same(out, then.run, self.run)
        return then, sum_BTD, folder
