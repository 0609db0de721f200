"""The folder of a trace, OUT: what may lie in it, and how a complete trace takes the place of an older one.

OUT/trace.json, 00000.safetensors, ..., envelope*.safetensors   the trace (file.py), its envelope
OUT/partial/                                                    the same files of a trace that is being written
OUT/groups/run.json, 00000/, ...                                traces of groups of prompts, until they are joined
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from ..errors import Qwen35Error
from ..run.files import Claim, check_claim
from ..untrusted import tensor_file
from .head import FORMAT, HEAD_FILE, PARTIAL

GROUPS, GROUPS_RUN = "groups", "run.json"
_OURS = re.compile(r"(\d{5}|envelope|envelope-state|resume)\.safetensors")  # envelope: envelope_file.py
# What a kill leaves of a file that was being written: ours, and those that safetensors writes first, with random names.
_LEFT = re.compile(rf"({_OURS.pattern}|{HEAD_FILE}|{GROUPS_RUN})(\.\d+)?\.tmp|\.tmp\w{{6}}")


def check_ours(path: Path) -> None:
    """Error if a directory holds anything that no trace has, or a file that only has such a name."""
    for there in path.iterdir() if path.is_dir() else ():
        folder = there.is_dir() and not there.is_symlink()
        group = path.name == GROUPS and re.fullmatch(r"\d{5}", there.name)
        if folder and (group or there.name in (PARTIAL, GROUPS)):
            check_ours(there)
        elif there.is_file() and not there.is_symlink():
            _need(_is_ours(there), there)
        else:
            _need(False, there)


def _is_ours(file: Path) -> bool:
    """Whether a file of one of our names holds what the name says: an envelope has six numbers for each row."""
    try:
        if file.name == HEAD_FILE:
            with open(file, "rb") as head:
                return FORMAT.encode() in head.read(64)
        if not _OURS.fullmatch(file.name):
            return bool(_LEFT.fullmatch(file.name)) or file.parent.name == GROUPS and file.name == GROUPS_RUN
        with tensor_file(file) as opened:
            if file.stem != "envelope":
                return bool({"tensors", "state", "done", "run"} & (opened.metadata() or {}).keys())
            first = next(iter(opened.keys()), None)
            return first is not None and opened.get_slice(first).get_shape()[-1:] == [6]
    except (OSError, Qwen35Error):
        return False


def _need(known: object, there: Path) -> None:
    if not known:
        is_checkpoint = (there.parent / "config.json").is_file()
        do = "this is a checkpoint: choose another folder" if is_checkpoint else "choose an empty folder"
        raise Qwen35Error("the folder is not a trace", where=there.parent, found=there.name, do=do)


def remove_groups(out: Path) -> None:
    """Removes the groups of a run, `run.json` first, so that no run continues the rest. Error: one is being written."""
    if (out / GROUPS).is_dir():
        check_ours(out)
        check_claim(out)
        (out / GROUPS / GROUPS_RUN).unlink(missing_ok=True)
        for group in sorted((out / GROUPS).iterdir()):
            with Claim(group):
                shutil.rmtree(group)
        (out / GROUPS).rmdir()


def sweep(path: Path) -> None:
    """Removes what a kill has left of files that were being written."""
    for left in [p for p in path.iterdir() if _LEFT.fullmatch(p.name)]:
        left.unlink()


def finish(out: Path) -> None:
    """Moves a complete trace from OUT/partial to OUT, `trace.json` last. After a kill, the next call moves the rest."""
    partial = out / PARTIAL
    if not (partial / HEAD_FILE).is_file():
        return
    sweep(partial)
    for file in sorted(partial.iterdir(), key=lambda file: file.name == HEAD_FILE):
        file.replace(out / file.name)
    partial.rmdir()


def remove_older(out: Path) -> None:
    """Removes the older trace in OUT, with its envelope and state; its `trace.json` first."""
    check_claim(out)
    for old in sorted(out.iterdir(), key=lambda file: file.name != HEAD_FILE):
        if not old.is_dir():
            old.unlink()


def link(file: Path, to: Path) -> None:
    """The same file under a second name, or a copy where the file system has no links."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copy2(file, to)
