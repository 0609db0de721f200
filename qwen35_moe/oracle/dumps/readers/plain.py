"""Plain safetensors, npz, npy and torch files, with a name map.

The map says what each tensor is: {"engine's name": "our key"}, names being exact or regular expressions, whose groups
may be used in the key: {"blk\\.(\\d+)\\.ffn_out": "layers.\\1.mlp_output"}. TOKEN_KEYS say which tokens it is.
Without a map, names.json beside the files counts, and names that are keys already, that an engine's module has, or that
people give (saved.py) need none.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....errors import Qwen35Error
from ....gate.patterns import MAX_NAME, bounded_pattern
from ....numerics.tap_keys import base_name
from ....numerics.tap_table import TAPS
from ....untrusted import check_regular, native, parse_npy, read_json, tensor_file
from ..dump import Dump, Piece, StepTokens
from ..engine_names import family_of, rule_for, text_config
from ..pieces import itself, plain_values
from . import saved
from .common import costs_itself, step_tokens

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".pkl")
SUFFIXES = (".safetensors", ".npz", ".npy", *TORCH_SUFFIXES)
MOST_NAMES = 5000  # of a name map: each name of a dump is compared with each pattern
TOKEN_KEYS = ("input_ids", "sequences", "positions", "position_ids", "seq_lens", "attention_mask")


def known(file: Path) -> bool:
    return file.suffix in SUFFIXES


def sniff(path: Path) -> bool:
    return known(path) if path.is_file() else any(known(p) for p in path.iterdir() if p.is_file())


def read(path: Path, *, config: Mapping[str, Any] | None = None, name_map: Any = None, **_: Any) -> Dump:
    names = _load_map(path, name_map)
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if known(p))
    problems: list[Qwen35Error] = []
    mapped: dict[tuple[int | None, str], str] = {}
    entries: list[tuple[int | None, str, Any, str]] = []  # step, name, how to load it, file
    for file in files:
        with costs_itself(problems, file):
            check_regular(file)
            step = saved.step_of(file.stem)[0] if len(files) > 1 else None
            for raw, load in _tensors(file):
                name = _mapped(raw, names)
                if name != raw and (step, name) in mapped:
                    problems.append(Qwen35Error("the name map gives two tensors one key", where=file,
                                                found=f"{mapped[step, name]} and {raw}: {name}"))  # fmt: skip
                mapped.setdefault((step, name), raw)
                entries.append((step, name, load, str(file)))
    text = text_config(config)
    last = text.get("num_hidden_layers") or saved.layers_in([name for _, name, *_ in entries])
    pieces: list[Piece] = []
    core: dict[int, dict[str, Tensor]] = {}
    for step, name, load, where in entries:
        own, name = saved.step_of(name)
        at = step if own is None else own
        if name.rpartition(".")[2] in TOKEN_KEYS and "layers." not in name:
            with costs_itself(problems, where):
                core.setdefault(at or 0, {})[name.rpartition(".")[2]] = plain_values(load(), where)
        else:
            pieces.append(_piece(name, load, at, where, last, text.get("vocab_size")))
    family = family_of(piece.path for piece in pieces)
    tokens = tokens_of(core, pieces)
    return Dump("plain", path, pieces, tokens, problems, family=family, config=config)


def _piece(name: str, load: Any, step: int | None, where: str, last: int | None, vocabulary: int | None) -> Piece:
    """A key, a name that people give, or an engine's module."""
    found = (None, name) if base_name(name) in TAPS else saved.meaning(name, last)
    path = Piece.named(name, load).path
    unnamed = found is None and not any(rule_for(path, family) for family in ("sglang", "transformers", "vision"))
    if unnamed and _is_wide(load, vocabulary):
        found = (None, "next_token_logits")
    if found is None:
        return Piece.named(name, load, step=step or 0, where=where)
    key = found[1]
    layer = re.search(r"layers\.(\d+)\.", key)
    number = found[0] if step is None else step
    return Piece(name, load, number or 0, layer=int(layer[1]) if layer else None, path=key, where=where, key=key)


def _is_wide(load: Any, vocabulary: int | None) -> bool:
    """Whether a tensor without a known name has as many columns as there are tokens to choose from."""
    try:
        x = load() if vocabulary else None
    except (OSError, ValueError):
        return False
    return x is not None and x.dim() > 1 and x.is_floating_point() and x.shape[-1] == vocabulary


def _load_map(path: Path, name_map: Any) -> dict[str, str]:
    beside = (path if path.is_dir() else path.parent) / "names.json"
    source: Any = name_map or (beside if beside.is_file() else {})
    found = dict(source) if isinstance(source, Mapping) else read_json(Path(source))
    where = "name_map" if isinstance(source, Mapping) else str(source)
    words = [*found, *found.values()] if isinstance(found, dict) else [None]
    if not all(isinstance(word, str) for word in words):
        raise Qwen35Error("name map is not a map", where=where, expected='{"engine name": "our key"}')
    if len(found) > MOST_NAMES:
        raise Qwen35Error("name map is too long", where=where, expected=f"at most {MOST_NAMES} names, or patterns "
                          "that stand for many", found=len(found))  # fmt: skip
    for pattern, key in found.items():
        compiled = bounded_pattern(pattern, "bad pattern in the name map", where)
        try:
            re.compile(f"(?:{pattern})|").fullmatch("").expand(key)  # type: ignore[union-attr]
        except (re.error, IndexError) as error:
            groups = f"references to at most {compiled.groups} groups"
            raise Qwen35Error("bad pattern in the name map", where=where, expected=groups, found=key) from error
    return found


def _mapped(raw: str, names: Mapping[str, str]) -> str:
    if raw in names:
        return names[raw]
    for pattern, key in names.items():
        if len(raw) <= MAX_NAME and (found := bounded_pattern(pattern).fullmatch(raw)):
            return found.expand(key)
    return raw


def _tensors(file: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    if file.suffix in TORCH_SUFFIXES:
        for name, x in saved.tensors(saved.load_torch_file(file), file.stem):
            yield name, partial(itself, x)
    elif file.suffix == ".npy":
        yield file.stem, partial(_from_npy, file)
    elif file.suffix == ".npz":
        for name in _archive(file, file.stat().st_mtime_ns).namelist():
            yield name.removesuffix(".npy"), partial(_from_npz, file, name)
    else:
        with tensor_file(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                yield name, partial(_from_safetensors, file, name)


def _from_npy(file: Path) -> Tensor:
    """Mapped first, which fails where the file is shorter than its header says, before anything is allocated."""
    return torch.from_numpy(native(np.load(file, allow_pickle=False, mmap_mode="r")))


MOST_RATIO, FREE_BYTES = 64, 1 << 26  # an array of an .npz that is packed better than that is a bomb, or all alike


def _from_npz(file: Path, name: str) -> Tensor:
    packed = _archive(file, file.stat().st_mtime_ns)
    entry = packed.getinfo(name)
    if entry.file_size > max(FREE_BYTES, MOST_RATIO * entry.compress_size):
        expected = f"at most {MOST_RATIO} times its {entry.compress_size} bytes"
        raise Qwen35Error("an array would expand too far", where=file, expected=expected,
                          found=f"{name}: {entry.file_size} bytes", do="save it as .npy")  # fmt: skip
    with packed.open(entry) as held:
        return torch.from_numpy(parse_npy(held.read(entry.file_size), f"{file}: {name}"))


@lru_cache(maxsize=1)
def _archive(file: Path, changed_ns: int) -> zipfile.ZipFile:
    """An archive with its list of names, which takes a time that grows with their number to read. Left open."""
    return zipfile.ZipFile(file)


def _from_safetensors(file: Path, name: str) -> Tensor:
    with tensor_file(file) as opened:
        return opened.get_tensor(name)


def tokens_of(core: Mapping[int, Mapping[str, Tensor]], pieces: Sequence[Piece]) -> dict[int, StepTokens]:
    """The tokens of each step that has ids. One list of ids is shared out among several steps, in their order: what
    `generate` returns has all ids, and one row of logits a step."""
    steps = sorted({piece.step for piece in pieces})
    some = {step: found for step, found in core.items() if {"input_ids", "sequences"} & set(found)}
    if len(some) != 1 or len(steps) < 2:
        return {step: step_tokens(found) for step, found in some.items()}
    found = next(iter(some.values()))
    whole = step_tokens(found)
    if whole.ids is None or whole.batch is None and whole.ids.dim() != 1:
        return {steps[0]: whole}
    B, T = whole.batch or (1, whole.ids.numel())
    ids, real = whole.ids.view(B, T), None if whole.mask is None else whole.mask.view(B, T)
    held = {step: max(_rows(p, B) for p in pieces if p.step == step) for step in steps}
    every = range(steps[0], steps[-1] + 1) if steps[-1] - steps[0] < T else steps
    rows = {step: held.get(step, 1) for step in every}  # a step that is not there had one token
    if "sequences" in found or all(n == 1 for n in rows.values()):  # the last token was sampled, and never run
        rows[steps[0]] = T - len(rows)
    shared, start = {}, 0
    for step, count in rows.items():
        stop = min(T, start + count)
        mask = torch.ones(B, stop - start, dtype=torch.bool) if real is None else real[:, start:stop]
        if step in held and stop > start:
            shared[step] = StepTokens(ids[:, start:stop].flatten(), batch=(B, stop - start), mask=mask.flatten())
        start = stop
    return shared


def _rows(piece: Piece, B: int) -> int:
    """Tokens a sequence that a tensor is of."""
    x = piece.load()
    return x.shape[1] if x.dim() > 2 and x.shape[0] == B else max(1, x.shape[0] // B)
