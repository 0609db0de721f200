"""Continuing a trace: the state of an unfinished one, a trace that is complete already, and what an error advises.

`OUT/partial/resume.safetensors` is written after each layer. Beside a trace of the first layers it stays in OUT.

    sum [B, T, D]     the residual stream after the last layer that is done, before it is rounded
    __metadata__      `State` as JSON
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..checkpoint import UsageReport
from ..errors import Qwen35Error
from ..model.text import Model
from ..run.files import read_checked
from ..run.origin import origin_of
from ..untrusted import parse_json
from .file import Trace
from .folder import finish, sweep
from .head import HEAD_FILE, PARTIAL, RESUME
from .writer import TraceWriter

START_ANEW = "leave out --resume to start anew"


def run_of(meta: dict[str, Any], device: str, **more: Any) -> str:
    """What must be the same for the bytes to be the same, as JSON: `meta_of`, the device and the number of threads."""
    return json.dumps({**meta, "device": device, "threads": torch.get_num_threads(), **more}, default=str)


def check_same(out: Path, then: str, now: str, what: str = "another run was begun here", do: str = "") -> None:
    """Error unless two runs are the same, each an object in JSON."""
    if then == now:
        return
    try:
        old, new = dict(parse_json(then.encode(), out)), json.loads(now)
    except (ValueError, TypeError) as error:
        raise Qwen35Error("cannot read the state", where=out, found=error, do=START_ANEW) from error
    differing = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if differing == ["threads"]:
        do = do or _on_threads(old.get("threads"))
    found = "differing: " + ", ".join(differing).replace("steps", "ids")
    expected, do = "the same checkpoint, ids and options", do or f"give the options of that run, or {START_ANEW}"
    raise Qwen35Error(what, where=out, expected=expected, found=found, do=do)


def check_threads(where: Path, then: int) -> None:
    """Error if a run was begun on another number of threads: the last bits of products depend on it."""
    if then != (now := torch.get_num_threads()):
        what = "begun on another number of threads"
        raise Qwen35Error(what, where=where, expected=then, found=now, do=_on_threads(then))


def _on_threads(then: object) -> str:
    return f"OMP_NUM_THREADS={then} goes on to the same bits; or {START_ANEW}"


def state_folder(out: Path) -> Path | None:
    """The folder of a state that a run of one pass can continue: OUT/partial, or OUT after the first layers alone."""
    return next((folder for folder in (out / PARTIAL, out) if (folder / RESUME).is_file()), None)


@dataclass
class State:
    """run     what must be the same (`run_of`)
    next    the layer to continue with
    files   finished files and their sha256
    nan     the first tap that held NaN
    unused  tensors that no layer read
    """

    run: str
    next: int = 0
    files: dict[str, str] = field(default_factory=dict)
    nan: str = ""
    unused: list[str] = field(default_factory=list)

    def write(self, writer: TraceWriter, sum_BTD: Tensor) -> None:
        writer.save_state({"sum": sum_BTD.cpu().contiguous()}, {"state": json.dumps(asdict(self))})

    def resumed(self, out: Path) -> tuple[State, Tensor | None, Path | None]:
        """The state of an earlier run, its residual stream, and the folder of both. Error: it was not the same run."""
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


@contextmanager
def resumable(out: Path, layer: int) -> Iterator[None]:
    """Adds to an error on the way how the run can be continued."""
    done = f" again and add --resume: layers below {layer} are done" if layer else ", and run again"
    do = f"make it work{done}"
    try:
        yield
    except Qwen35Error as error:
        do = f"{error.do}; {do}" if error.do else do
        raise Qwen35Error(error.what, where=error.where, expected=error.expected, found=error.found, do=do) from error
    except (OSError, SafetensorError) as error:
        raise Qwen35Error("cannot write the trace", where=out, found=error, do=do) from error


def complete_trace(out: Path, layers: int) -> Trace | None:
    """The complete trace in OUT; None for no trace, one of the first layers, or one beside an unfinished trace."""
    finish(out)
    if (out / PARTIAL / RESUME).is_file() or not (out / HEAD_FILE).is_file():
        return None
    trace = Trace.open(out)
    return trace if trace.meta.get("layers", layers) == layers else None


def resumed_complete(model: Model, trace: Trace, meta: dict[str, Any], aside: Sequence[str]) -> UsageReport:
    """The report of a run that was killed after its last layer. Error: the trace belongs to another run."""
    assert trace.path is not None
    what, do = "a complete trace of another run is here", "leave out --resume to write it anew"
    then = {key: value for key, value in trace.meta.items() if key not in ("layers", "draft_ids")}
    check_same(trace.path, json.dumps(then), json.dumps(meta, default=str), what, do)
    sweep(trace.path)
    (trace.path / RESUME).unlink(missing_ok=True)
    checkpoint = origin_of(model).checkpoint
    checkpoint.used.update(n for n in checkpoint.names() if not any(fnmatchcase(n, pattern) for pattern in aside))
    return checkpoint.report(aside)
