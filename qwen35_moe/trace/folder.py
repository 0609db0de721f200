"""The folder of a trace, OUT: what may lie in it, how a run goes on there, and how it takes the place of an older one.

OUT/trace.json, 00000.safetensors, ..., envelope*.safetensors   the trace (file.py), its envelope
OUT/partial/                    the same files of a trace that is being written, and `resume.safetensors`, its `State`:
                                sum [B, T, D], the residual stream after the last layer that is done, not yet rounded
OUT/groups/run.json, 00000/, ...                                traces of groups of prompts, until they are joined

A trace of the first layers alone leaves its files in OUT/partial as well, for a run that goes on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
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
from ..run.files import check_claim, claim, read_checked
from ..run.origin import origin_of
from ..untrusted import parse_json, tensor_file
from .file import Trace
from .head import FORMAT, HEAD_FILE, PARTIAL, RESUME

GROUPS, GROUPS_RUN = "groups", "run.json"
START_ANEW = "leave out --resume to start anew"
_OURS = re.compile(r"(\d{5}|envelope|envelope-state|resume)\.safetensors")  # envelope: envelope_file.py
# What a kill leaves of a file that was being written: ours, and those that safetensors writes first, with random names.
_LEFT = re.compile(rf"({_OURS.pattern}|{HEAD_FILE}|{GROUPS_RUN})(\.\d+)?\.tmp|\.tmp\w{{6}}")


def check_ours(path: Path) -> None:
    """Error if a directory holds anything that no trace has, or a file that only has such a name."""
    for there in path.iterdir() if path.is_dir() else ():
        group = path.name == GROUPS and re.fullmatch(r"\d{5}", there.name)
        if there.is_dir() and not there.is_symlink() and (group or there.name in (PARTIAL, GROUPS)):
            check_ours(there)
        elif there.is_symlink() or not there.is_file() or not _is_ours(there):
            is_checkpoint = (path / "config.json").is_file()
            do = "this is a checkpoint: choose another folder" if is_checkpoint else "choose an empty folder"
            raise Qwen35Error("the folder is not a trace", where=path, found=there.name, do=do)


def _is_ours(file: Path) -> bool:
    """Whether a file of one of our names holds what the name says."""
    try:
        if file.name == HEAD_FILE:
            with open(file, "rb") as head:
                return FORMAT.encode() in head.read(64)
        if not _OURS.fullmatch(file.name):
            return bool(_LEFT.fullmatch(file.name)) or file.parent.name == GROUPS and file.name == GROUPS_RUN
        with tensor_file(file) as opened:
            return bool({"tensors", "sha256"} & (opened.metadata() or {}).keys())
    except (OSError, Qwen35Error):
        return False


def remove_groups(out: Path) -> None:
    """Removes the groups of a run, `run.json` first, so that no run continues the rest. Error: one is being written."""
    if (out / GROUPS).is_dir():
        check_ours(out)
        check_claim(out)
        (out / GROUPS / GROUPS_RUN).unlink(missing_ok=True)
        for group in sorted((out / GROUPS).iterdir()):
            with claim(group):
                shutil.rmtree(group)
        (out / GROUPS).rmdir()


def sweep(path: Path) -> None:
    """Removes what a kill has left of files that were being written."""
    for left in [p for p in path.iterdir() if _LEFT.fullmatch(p.name)]:
        left.unlink()


def remove_older(out: Path) -> None:
    """Removes the older trace in OUT, with its envelope; its `trace.json` first."""
    check_claim(out)
    for old in sorted(out.iterdir(), key=lambda file: file.name != HEAD_FILE):
        if not old.is_dir():
            old.unlink()


def finish(out: Path) -> None:
    """Moves a complete trace from OUT/partial to OUT, `trace.json` last. After a kill, the next call does the rest.
    Beside a state, the other files are linked, or copied where the file system has no links."""
    partial = out / PARTIAL
    if not (partial / HEAD_FILE).is_file():
        return
    sweep(partial)
    goes_on = (partial / RESUME).is_file()
    for file in sorted(partial.iterdir(), key=lambda file: file.name == HEAD_FILE):
        if file.name == HEAD_FILE or not goes_on:
            file.replace(out / file.name)
        elif file.name != RESUME:
            (out / file.name).unlink(missing_ok=True)
            try:
                os.link(file, out / file.name)
            except OSError:
                shutil.copy2(file, out / file.name)
    if not goes_on:
        partial.rmdir()


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
    do = do or f"give the options of that run, or {START_ANEW}"
    if differing == ["threads"]:
        do = _on_threads(old.get("threads"))
    found = "differing: " + ", ".join(differing).replace("steps", "ids")
    raise Qwen35Error(what, where=out, expected="the same checkpoint, ids and options", found=found, do=do)


def check_threads(where: Path, then: int) -> None:
    """Error if a run was begun on another number of threads: the last bits of products depend on it."""
    if then != (now := torch.get_num_threads()):
        what = "begun on another number of threads"
        raise Qwen35Error(what, where=where, expected=then, found=now, do=_on_threads(then))


def _on_threads(then: object) -> str:
    return f"OMP_NUM_THREADS={then} goes on to the same bits; or {START_ANEW}"


def has_state(out: Path) -> bool:
    """Whether a run of one pass can go on here."""
    return (out / PARTIAL / RESUME).is_file()


@dataclass
class State:
    """run     what must be the same (`run_of`)
    next    the layer to continue with
    files   finished files and their sha256
    nan     the first tap that held NaN
    """

    run: str
    next: int = 0
    files: dict[str, str] = field(default_factory=dict)
    nan: str = ""

    def resumed(self, out: Path) -> tuple[State, Tensor | None]:
        """The state of an earlier run, and its residual stream. Error: it was not the same run."""
        if not has_state(out):
            return self, None  # killed before the first layer was done, or never begun
        file, do = out / PARTIAL / RESUME, "start without --resume"
        try:
            metadata, tensors = read_checked(file, do)
            then, sum_BTD = State(**parse_json(metadata["state"].encode(), file)), tensors["sum"]
            if any(type(value) is not type(vars(self)[name]) for name, value in asdict(then).items()):
                raise TypeError("values of wrong types")
        except (KeyError, TypeError) as error:
            raise Qwen35Error("cannot read the state", where=file, found=error, do=do) from error
        check_same(out, then.run, self.run)
        return then, sum_BTD


@contextmanager
def resumable(out: Path, layer: int) -> Iterator[None]:
    """Adds to an error on the way how the run can be continued."""
    done = f" again and add --resume: layers below {layer} are done" if layer else ", and run again"
    do = f"make it work{done}"
    try:
        yield
    except Qwen35Error as error:
        raise error.but(do=f"{error.do}; {do}" if error.do else do) from error
    except (OSError, SafetensorError) as error:
        raise Qwen35Error("cannot write the trace", where=out, found=error, do=do) from error


def complete_trace(out: Path, layers: int) -> Trace | None:
    """The complete trace in OUT; None for no trace, one of the first layers, or one beside an unfinished trace."""
    finish(out)
    if has_state(out) or not (out / HEAD_FILE).is_file():
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
    checkpoint = origin_of(model).checkpoint
    checkpoint.used.update(n for n in checkpoint.names() if not any(fnmatchcase(n, pattern) for pattern in aside))
    return checkpoint.report(aside)
