"""Loading files that others wrote, without executing anything in them."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....errors import Qwen35Error
from ....untrusted import check_regular
from ..pieces import AGAIN, StepTokens, fence


def load_pt(path: str | Path) -> Any:
    """A torch file: tensors stay on disk until they are used. Pickles that hold more than data are refused."""
    path = Path(path)
    check_regular(path)
    if zipfile.is_zipfile(path):
        _check_stored(path)
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            with warnings.catch_warnings():  # about pickle protocols that it may refuse: then it does
                warnings.simplefilter("ignore")
                return torch.load(path, map_location="cpu", weights_only=True)  # as written before torch 1.6
    except Exception as error:  # a broken pickle may raise anything
        if isinstance(error, pickle.UnpicklingError) and _first_byte(path) in (b"\x80", b"P"):  # a pickle, or a zip
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            found, do = named[1] if named else "a pickle with code", "dump tensors only; never load strangers' pickles"
            raise Qwen35Error("file needs more than data to load, and was not executed", where=path, found=found,
                              do=do) from error  # fmt: skip
        first = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        size = path.stat().st_size if path.exists() else "absent"
        found = f"{size} bytes; {first}"
        raise Qwen35Error("file is truncated or not a torch file", where=path, found=found, do=AGAIN) from error


def _check_stored(path: Path) -> None:
    """Error if a record is compressed: torch writes none, and maps the packed bytes as if they were values."""
    try:
        with zipfile.ZipFile(path) as file:
            packed = next((entry for entry in file.infolist() if entry.compress_type != zipfile.ZIP_STORED), None)
    except Exception:  # what is wrong with the file, torch says
        return
    if packed is not None:
        raise Qwen35Error("a torch file with compressed records", where=path, found=packed.filename,
                          do="save it with torch.save")  # fmt: skip


@contextmanager
def costs_itself(problems: list[Qwen35Error], where: object) -> Iterator[None]:
    """Whatever fails inside is a problem of this file, and of no other."""
    try:
        with fence("file cannot be read", where):
            yield
    except Qwen35Error as error:
        problems.append(error)


def outputs(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of what a module returned, entries of lists one by one."""
    if not isinstance(value, (list, tuple)):
        yield f"{name}.output", value
        return
    yield from ((f"{name}.output.{index}", entry) for index, entry in enumerate(value))


def a_dict(found: Any) -> dict[Any, Any]:
    """A value of a stranger's file, if it is a dictionary; else {}."""
    return found if isinstance(found, dict) else {}


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1)


def load_tensor(path: str | Path, *keys: str | int) -> Tensor:
    """One tensor of a torch file, by the keys that lead to it."""
    found = load_pt(path)
    try:
        for key in keys:
            found = found[key]
    except (KeyError, IndexError, TypeError) as error:
        holds = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        wanted = ", ".join(map(str, keys))
        raise Qwen35Error("file holds something else", where=path, expected=wanted, found=holds, do=AGAIN) from error
    if not isinstance(found, Tensor):
        raise Qwen35Error("not a tensor", where=path, found=type(found).__name__)
    return found


def step_tokens(found: Mapping[str, Any]) -> StepTokens:
    """The tokens of a step from the fields of its batch, as engines name them. If positions are given in time, height
    and width, those in time count."""
    ids = found["input_ids"] if "input_ids" in found else found["sequences"]
    batch = (ids.shape[0], ids.shape[1]) if ids.dim() == 2 else None

    def row(name: str) -> Tensor | None:
        x = found.get(name)
        x = x[0] if isinstance(x, Tensor) and x.dim() == (2 if batch is None else 3) else x
        return x.flatten() if isinstance(x, Tensor) else None

    mask, given = torch.ones(ids.numel(), dtype=torch.bool) if batch else None, found.get("attention_mask")
    if batch and given is not None and given.numel() == ids.numel():
        mask = given.flatten().bool()
    positions = row("positions" if "positions" in found else "position_ids")
    requests = request_ids(found.get("rids", found.get("req_pool_indices")))
    return StepTokens(ids.flatten(), positions, lengths(found.get("seq_lens")), requests, batch, mask, row("rotary"))


def lengths(x: Any) -> list[int] | None:
    """A tensor or a list of counts as a list; None for anything else."""
    counts = request_ids(x)
    return None if counts is None or any(type(n) is not int or n < 0 for n in counts) else counts


def request_ids(x: Any) -> list[Any] | None:
    """A tensor or a list of numbers or words as a list; None for anything else."""
    items = x.flatten().tolist() if isinstance(x, Tensor) else x
    return list(items) if isinstance(items, (list, tuple)) and all(isinstance(i, (int, str)) for i in items) else None
