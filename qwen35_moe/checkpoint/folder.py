"""Which files belong to a checkpoint, which of them holds which tensor, and which tensors a run has used."""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import Qwen35Error
from ..gate.declared import with_hf_quant_config
from ..untrusted import read_json
from .header import Header, TensorEntry, canonical, read_header
from .recognise import CACHE_SCALES, ROLES_BESIDE

INDEX = "model.safetensors.index.json"
NUMBERED = re.compile(r"(.*?)(\d+)-of-(\d+)\.safetensors")


@dataclass
class Folder:
    """The tensors of a checkpoint by canonical name, read from headers alone.

    duplicated: copies that the index does not point at. ignored: files that it does not name.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    headers: list[Header] = field(default_factory=list)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    duplicated: list[TensorEntry] = field(default_factory=list)
    ignored: list[Path] = field(default_factory=list)


def open_folder(path: Path) -> Folder:
    """Reads the headers of a checkpoint folder, or of a single .safetensors file."""
    if not path.exists():
        raise Qwen35Error("no such checkpoint", where=path, do="name a folder with *.safetensors, or such a file")
    root = path if path.is_dir() else path.parent
    folder = Folder(path, read_config(root))
    index = find_index(path)
    weight_map = read_index(index) if index else None
    if weight_map is not None:
        files = [root / name for name in sorted(set(weight_map.values()))]
        folder.ignored = sorted(set(root.glob("*.safetensors")) - set(files))
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            what = "the index names files that are not there"
            raise Qwen35Error(what, where=index, expected=few(absent), found="absent")
    else:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if (path / "trace.json").is_file() and not (path / "config.json").is_file():
            raise Qwen35Error("not a checkpoint", where=path, found="a truth", do="name the checkpoint that was traced")
        if not files:
            raise Qwen35Error("no *.safetensors in this folder", where=path, do="give the folder of a checkpoint")
        groups: dict[tuple[str, int], set[int]] = {}  # without an index, only the numbers show that a shard is missing
        for match in filter(None, (NUMBERED.fullmatch(file.name) for file in files)):
            groups.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
        for (stem, count), numbers in groups.items():
            if len(numbers) != count:
                where, found = root / f"{stem}*-of-{count}.safetensors", f"numbers {few(sorted(numbers))}"
                raise Qwen35Error("shards are missing", where=where, expected=f"{count} files", found=found)
    copies: dict[str, list[TensorEntry]] = {}  # of names that are stored more than once
    for file in files:
        header = read_header(file)
        folder.headers.append(header)
        for raw, entry in header.entries.items():
            stored = TensorEntry(canonical(raw), file, raw, *entry)
            first = folder.tensors.setdefault(stored.name, stored)
            if first is not stored:
                copies.setdefault(stored.name, [first]).append(stored)
                if any(other.file is file for other in copies[stored.name][:-1]):
                    raise stored.wrong("two names for one tensor", "one prefix", first.raw_name)
        header.entries.clear()  # `tensors` has them; hundreds of thousands in a big checkpoint
    if weight_map is not None and index is not None:
        _obey_index(folder, copies, weight_map, index)
    elif copies:
        twice = next(iter(copies.values()))
        what, do = "a tensor is in two files, and no index says which one counts", f"or add {INDEX}"
        names = few(copy.file.name for copy in twice)
        raise twice[0].wrong(what, "one file", names, f"keep only the files of one checkpoint in the folder, {do}")
    return folder


def _obey_index(folder: Folder, copies: dict[str, list[TensorEntry]], weight_map: dict[str, str], index: Path) -> None:
    """Keeps the copy that the index names, if there are several. Error: index and files hold different tensors."""
    files = {header.file.name: header.file for header in folder.headers}
    known: set[str] = set()
    absent = []
    for raw, file in weight_map.items():
        name = canonical(raw)
        if name in known:
            where = f"{index}: {raw!r}"[:300]
            raise Qwen35Error("two names for one tensor", where=where, expected="one prefix", found=name)
        known.add(name)
        stored = folder.tensors.get(name)
        if name in copies:
            stored = next((copy for copy in copies[name] if copy.file is files[file]), None)
            folder.duplicated += [copy for copy in copies[name] if copy is not stored]
        if stored is None or stored.file is not files[file]:
            absent.append(f"{file}: {raw}")
        else:
            folder.tensors[name] = stored
    if absent:
        what = "the index names tensors that are not in their files"
        raise Qwen35Error(what, where=index, expected=few(absent), found="absent")
    if strays := [stored.where for name, stored in folder.tensors.items() if name not in known]:
        what = "tensors that the index does not know: a shard of another checkpoint?"
        expected, do = "every tensor of the files that it names", "download the shard again, or remove the index if"
        raise Qwen35Error(what, where=index, expected=expected, found=few(strays), do=f"{do} it is out of date")


def find_index(path: Path) -> Path | None:
    """The index of a folder: the usual name, else the only one that there is."""
    if not path.is_dir():
        return None
    if (path / INDEX).is_file():
        return path / INDEX
    found = sorted(path.glob("*.safetensors.index.json"))
    if len(found) > 1:
        raise Qwen35Error("several indexes", where=path, expected=INDEX, found=few(f.name for f in found))
    return found[0] if found else None


def read_index(index: Path) -> dict[str, str]:
    """The `weight_map`: raw tensor name -> file name, plain file names only."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        where, found = f"{index}: weight_map", repr(weight_map)[:200]
        raise Qwen35Error("bad index", where=where, expected="{tensor: file}", found=found)
    beside: set[str] = set()  # files beside the index, and nowhere else
    for raw, name in weight_map.items():
        if isinstance(name, str) and name in beside:
            continue
        plain = isinstance(name, str) and Path(name).name == name and name.isprintable()
        if not plain or not name.endswith(".safetensors"):
            where, expected = f"{index}: {raw!r}"[:300], "the name of a .safetensors file beside it"
            raise Qwen35Error("bad index", where=where, expected=expected, found=repr(name)[:200])
        beside.add(name)
    return weight_map


def read_config(root: Path) -> dict[str, Any]:
    """config.json, joined with ModelOpt's hf_quant_config.json if that file is there; {} if there is no config.json."""
    file = root / "config.json"
    if not file.is_file():
        return {}
    config = read_json(file)
    if not isinstance(config, dict):
        raise Qwen35Error("config.json must hold an object", where=file, expected="{...}", found=type(config).__name__)
    beside = root / "hf_quant_config.json"
    return with_hf_quant_config(config, read_json(beside)) if beside.is_file() else config


def few(items: Iterable[object]) -> str:
    """The first four of them, and how many more."""
    texts = [str(item)[:200] for item in items]
    more = f" and {len(texts) - 4} more" if len(texts) > 4 else ""
    return ", ".join(texts[:4]) + more


@dataclass(frozen=True)
class UsageReport:
    """What became of every tensor. `unused` should be empty; `aside` was left out on purpose."""

    used: int
    unused: list[str]
    aside: list[str]
    duplicated: list[str]
    ignored: list[str]

    @property
    def complete(self) -> bool:
        return not self.unused and not self.duplicated

    def __str__(self) -> str:
        lines = [f"{self.used} tensors used"]
        for label, names in (
            ("never used", self.unused),
            ("left out on purpose", self.aside),
            ("stored twice", self.duplicated),
            ("files in no index", self.ignored),
        ):
            if names:
                lines.append(f"{len(names)} {label}: {few(names)}")
        return "\n".join(lines)


def usage_report(folder: Folder, used: Set[str], aside: Iterable[str]) -> UsageReport:
    """aside: patterns of names that are left out on purpose."""
    unused = sorted(folder.tensors.keys() - used)
    patterns = (*aside, *CACHE_SCALES, *(f"*{role}" for role in ROLES_BESIDE if role != ".bias"))
    apart = [name for name in unused if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return UsageReport(
        used=len(folder.tensors) - len(unused),
        unused=sorted(set(unused) - set(apart)),
        aside=apart,
        duplicated=[s.where for s in folder.duplicated],
        ignored=[file.name for file in folder.ignored],
    )
