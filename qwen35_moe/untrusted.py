"""Reading untrusted files: regular files of limited size, and JSON of limited depth, with every key once.

A FIFO or a device would hang the reader. Of a repeated key, programs take different values. Deeply nested JSON exhausts
the stack. Each is one clear error here.
"""

from __future__ import annotations

import io
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from .errors import Qwen35Error

JSON_LIMIT = 500_000_000  # bytes; the index of a 397B checkpoint stored expert by expert has 20 MB
MAX_DEPTH = 200  # of lists and objects in JSON; a config.json of the hub has 6, a debug tree of transformers 4 a layer
LFS = b"version https://git-lfs"  # how a text begins that stands in for a file


def check_regular(file: Path) -> int:
    """The size of a regular file in bytes. Error: not there, a folder, a FIFO, a device, a socket."""
    try:
        found = os.stat(file)
    except (OSError, ValueError) as error:  # a NUL in the name is a ValueError
        said = error.strerror if isinstance(error, OSError) else error
        raise Qwen35Error("cannot read the file", where=file, found=said or error) from error
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(found.st_mode), "a device")
        raise Qwen35Error("not a regular file", where=file, expected="a file with bytes in it", found=kind)
    return found.st_size


def read_bytes(file: Path, limit: int = JSON_LIMIT) -> bytes:
    """All bytes of a regular file of at most `limit` bytes."""
    size = check_regular(file)
    if size > limit:
        raise Qwen35Error("file too long", where=file, expected=f"at most {limit} bytes", found=size)
    try:
        with open(file, "rb") as handle:
            return handle.read(limit)
    except OSError as error:
        raise Qwen35Error("cannot read the file", where=file, found=error.strerror or error) from error


def parse_npy(held: bytes, where: object) -> np.ndarray:
    """The array of a .npy file's bytes. Error: an array of objects, or not as many bytes as the header says, which is
    found before anything is allocated."""
    stream = io.BytesIO(held)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if dtype.hasobject or (size := prod(shape) * dtype.itemsize) != len(held) - stream.tell():
            raise ValueError("an array of objects" if dtype.hasobject else f"{size} bytes announced, others are there")
        flat = np.frombuffer(held, dtype, offset=stream.tell())
        return native(flat.reshape(shape, order="F" if fortran else "C"))
    except Exception as error:  # a header is a literal of Python: a broken one may raise anything
        found = f"{len(held)} bytes; {error}"[:200]
        raise Qwen35Error("no whole .npy file", where=where, found=found) from error


def native(x: np.ndarray) -> np.ndarray:
    """A copy in the byte order of this machine, the only one that torch takes."""
    return x.astype(x.dtype.newbyteorder("="))


@contextmanager
def tensor_file(file: str | Path, do: str = "", what: str = "cannot read the file") -> Iterator[Any]:
    """An open safetensors file. Error: not a regular file, cut off, or without the tensor that is asked for."""
    check_regular(Path(file))
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise Qwen35Error(what, where=file, found=error, do=do) from error


def read_json(file: Path, limit: int = JSON_LIMIT) -> Any:
    """The value of a JSON file in UTF-8, with or without a byte order mark."""
    return parse_json(read_bytes(file, limit), file)


def parse_json(text: bytes, where: object) -> Any:
    """JSON in UTF-8 without repeated keys, at most MAX_DEPTH deep."""
    refuse_pointer(text, where)
    expected = f"JSON in UTF-8, at most {MAX_DEPTH} levels deep"
    try:
        value = json.loads(text.decode("utf-8-sig"), object_pairs_hook=lambda pairs: _unique(pairs, where))
        _check_depth(value)
        return value
    except Qwen35Error:
        raise
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
        raise Qwen35Error("not valid JSON", where=where, expected=expected, found=str(error)[:200]) from error


def refuse_pointer(first: bytes, where: object) -> None:
    """Error if these first bytes of a file say that it is elsewhere."""
    if first.startswith(LFS):
        do = "git lfs pull, or download the file itself"
        raise Qwen35Error("a git-lfs pointer instead of the file", where=where, do=do)


def _unique(pairs: list[tuple[str, Any]], where: object) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise Qwen35Error("a key is repeated", where=where, expected="every key once", found=repr(twice)[:200])
    return found


def _check_depth(value: Any, levels: int = MAX_DEPTH - 1) -> None:
    """Error where lists and objects are nested deeper than MAX_DEPTH. levels: how many may lie within this value."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(inner, dict | list):
            if not levels:
                raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
            _check_depth(inner, levels - 1)
