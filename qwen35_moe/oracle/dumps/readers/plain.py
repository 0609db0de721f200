"""Plain safetensors, npz and npy files, with a name map.

The map says what each tensor is: {"engine's name": "our key"}, names being exact or regular expressions, whose groups
may be used in the key: {"blk\\.(\\d+)\\.ffn_out": "layers.\\1.mlp_output"}. Three keys are special: "input_ids",
"positions", "seq_lens". Without a map, names.json beside the files counts, and names that are keys already (or that an
engine's module has) need none.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ....checkpoint.untrusted import read_json
from ....errors import Qwen35Error
from ....gate.patterns import MAX_NAME, bounded_pattern
from ....numerics.tap_table import TAPS, base_name
from ..dump import Dump, Piece, Tokens
from ..engine_names import family_of
from .common import whole_numbers

SUFFIXES = (".safetensors", ".npz", ".npy")


def sniff(path: Path) -> bool:
    return path.suffix in SUFFIXES if path.is_file() else any(p.suffix in SUFFIXES for p in path.iterdir())


def read(path: Path, *, config: Mapping[str, Any] | None = None, name_map: Any = None, **_: Any) -> Dump:
    names = _load_map(path, name_map)
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
    pieces: list[Piece] = []
    problems: list[Qwen35Error] = []
    core: dict[str, Tensor] = {}
    for file in files:
        try:
            for raw, load in _tensors(file):
                key = _mapped(raw, names)
                if key in ("input_ids", "positions", "seq_lens"):
                    core[key] = load()
                elif base_name(key) in TAPS:
                    pieces.append(Piece.named(raw, load, where=str(file)))
                    layer = re.search(r"layers\.(\d+)\.", key)
                    pieces[-1].key, pieces[-1].layer = key, int(layer[1]) if layer else None
                else:
                    pieces.append(Piece.named(key, load, where=str(file)))
        except (OSError, ValueError, EOFError, SafetensorError, zipfile.BadZipFile) as error:
            do = "dump again; object arrays and pickles are not read"
            problems.append(Qwen35Error("file cannot be read", where=file, found=str(error)[:120], do=do))
    tokens = {0: _tokens(core)} if "input_ids" in core else {}
    family = family_of(piece.path for piece in pieces)
    return Dump("plain", path, pieces, tokens, problems, family=family, config=config)


def _load_map(path: Path, name_map: Any) -> dict[str, str]:
    if isinstance(name_map, Mapping):
        return dict(name_map)
    beside = (path if path.is_dir() else path.parent) / "names.json"
    source = Path(name_map) if name_map else beside if beside.is_file() else None
    if source is None:
        return {}
    found = read_json(source)
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise Qwen35Error("name map is not a map", where=source, expected='{"engine name": "our key"}')
    for pattern, key in found.items():
        compiled = bounded_pattern(pattern, "bad pattern in the name map", str(source))
        try:
            re.compile(f"(?:{pattern})|").fullmatch("").expand(key)  # type: ignore[union-attr]
        except (re.error, IndexError) as error:
            groups = f"references to at most {compiled.groups} groups"
            raise Qwen35Error("bad pattern in the name map", where=source, expected=groups, found=key) from error
    return found


def _mapped(raw: str, names: Mapping[str, str]) -> str:
    if raw in names:
        return names[raw]
    for pattern, key in names.items():
        if len(raw) <= MAX_NAME and (found := bounded_pattern(pattern).fullmatch(raw)):
            return found.expand(key)
    return raw


def _tensors(file: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    if file.suffix == ".npy":
        yield file.stem, partial(lambda f: torch.from_numpy(np.load(f, allow_pickle=False)), file)
    elif file.suffix == ".npz":
        with file.open("rb") as data, np.load(data, allow_pickle=False) as archive:  # numpy leaves bad files open
            for name in archive.files:
                yield name, partial(_from_npz, file, name)
    else:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                yield name, partial(_from_safetensors, file, name)


def _from_npz(file: Path, name: str) -> Tensor:
    with np.load(file, allow_pickle=False) as archive:
        return torch.from_numpy(archive[name])


def _from_safetensors(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def _tokens(core: Mapping[str, Tensor]) -> Tokens:
    ids = core["input_ids"]
    positions = core.get("positions")
    batch = (ids.shape[0], ids.shape[1]) if ids.dim() == 2 else None
    mask = torch.ones(ids.numel(), dtype=torch.bool) if batch else None
    return Tokens(ids.flatten().long(), None if positions is None else positions.flatten().long(),
                  whole_numbers(core.get("seq_lens")), batch=batch, mask=mask)  # fmt: skip
