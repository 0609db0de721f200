"""The header of a safetensors file: read within bounds, and checked against the file before it is used.

    8 bytes      length N of the header, little endian
    N bytes      JSON: {name: {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}, "__metadata__": {...}}
    the rest     the tensors' bytes; offsets count from here, cover all of it, and do not overlap

Source: the format's README (github.com/huggingface/safetensors). What a header can tell is checked in the first second,
not in the last layer of a long run.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..errors import Qwen35Error
from ..untrusted import check_regular, parse_json, refuse_pointer

# The format's own limit. The header of a whole 397B checkpoint in one file would have 25 MB.
LONGEST_HEADER = 100_000_000
MAX_DIMENSIONS = 8
HEADER_KEYS = frozenset(("dtype", "shape", "data_offsets"))
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: bytes begin..end of `file`. `name` is canonical, `raw_name` as the file has it."""

    name: str
    file: Path
    raw_name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def where(self) -> str:
        return f"{self.file.name}: {self.raw_name}"

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"

    def wrong(self, what: str, expected: object, found: object = None, do: str = "") -> Qwen35Error:
        """An error about this tensor. found: what is stored, if nothing else is given."""
        return Qwen35Error(what, where=self.where, expected=expected, found=self if found is None else found, do=do)


@dataclass(frozen=True)
class Header:
    """A file's size, the sha256 of its header (length and JSON), and its entries."""

    file: Path
    size: int
    sha256: str
    entries: dict[str, tuple[str, tuple[int, ...], int, int]]  # raw name -> dtype, shape, begin, end in the file
    state: tuple[int, int]  # size and time of the last change, as it was read


def read_header(file: Path) -> Header:
    """Reads and checks the header; allocates no more than the file is long, and at most LIMIT bytes."""
    check_regular(file)
    try:
        with open(file, "rb") as handle:
            size, _ = state = file_state(handle.fileno())
            first = handle.read(8)
            length = int.from_bytes(first, "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                refuse_pointer(first + handle.read(64), file)
                what, do = "not a safetensors file, or cut off within its header", "download the file again"
                expected = f"a header of at most {max(min(size - 8, LONGEST_HEADER), 0)} bytes"
                found = f"{length} announced, file of {size} bytes" if size >= 8 else f"a file of {size} bytes"
                raise Qwen35Error(what, where=file, expected=expected, found=found, do=do)
            text = handle.read(length)
    except OSError as error:
        raise Qwen35Error("cannot read the file", where=file, found=error.strerror or error) from error
    header = parse_json(text, f"header of {file}")
    if not isinstance(header, dict):
        raise Qwen35Error("bad header", where=file, expected="an object", found=type(header).__name__)
    start = 8 + length
    entries = {name: _entry(entry, file, name, start) for name, entry in header.items() if name != "__metadata__"}
    at, before = start, "the header"  # the tensors fill the file: none overlaps another, no gap, nothing after the last
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != at:
            what = "the header lies about offsets: "
            what += "tensors overlap" if begin < at else "bytes that belong to none"
            expected = f"begin at byte {at - start} of the data, where {before!r:.100} ends"
            raise Qwen35Error(what, where=f"{file}: {name!r:.200}", expected=expected, found=begin - start)
        at, before = end, name
    if at != size:
        what = "the file is cut off" if at > size else "the file has bytes that its header does not know"
        where, do = file if at <= size else f"{file}: {before!r:.200}", "download the file again"
        raise Qwen35Error(what, where=where, expected=f"{at} bytes", found=f"{size} bytes", do=do)
    return Header(file, size, hashlib.sha256(first + text).hexdigest(), entries, state)


def file_state(descriptor: int) -> tuple[int, int]:
    """Size and time of the last change."""
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


def _entry(entry: Any, file: Path, name: str, start: int) -> tuple[str, tuple[int, ...], int, int]:
    """One tensor's dtype, shape, and bytes in the file."""

    def bad(what: str, expected: object, found: object) -> Qwen35Error:
        where = f"{file}: {name!r:.200}"
        return Qwen35Error(f"bad header: {what}", where=where, expected=expected, found=repr(found)[:200])

    if not name.isprintable() or not name:
        raise bad("name of a tensor", "printable text", name)
    if not isinstance(entry, dict) or not entry.keys() >= HEADER_KEYS:
        raise bad("a tensor's entry", ", ".join(sorted(HEADER_KEYS)), entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise bad("dtype", ", ".join(BITS), dtype)
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise bad("shape", f"at most {MAX_DIMENSIONS} sizes below 2^63", shape)
    if not _naturals(offsets) or len(offsets) != 2:
        raise bad("data_offsets", "[begin, end]", offsets)
    begin, end = offsets
    if end - begin != prod(shape) * BITS[dtype] // 8:
        raise bad("size in bytes", f"{prod(shape) * BITS[dtype] // 8} for {dtype} {shape}", [begin, end])
    return sys.intern(dtype), tuple(shape), start + begin, start + end


def _naturals(values: Any) -> bool:
    ints = isinstance(values, list) and set(map(type, values)) <= {int}
    return ints and (not values or min(values) >= 0 and max(values) < 2**63)


# The hub's `model.language_model.`, older `language_model.model.`, text-only `model.`, and repetitions of these.
PREFIX = re.compile(r"(?:(?:model|language_model)\.)+")


def canonical(raw: str) -> str:
    """The name without the checkpoint's prefix.

    >>> canonical("model.language_model.layers.0.mlp.gate.weight"), canonical("model.visual.pos_embed.weight")
    ('layers.0.mlp.gate.weight', 'visual.pos_embed.weight')
    >>> canonical("language_model.lm_head.weight"), canonical("mtp.fc.weight")
    ('lm_head.weight', 'mtp.fc.weight')

    transformers 5.4 and 5.5 repeat a part when they save again what they have loaded (transformers 45216).
    >>> canonical("model.language_model.language_model.language_model.layers.0.mlp.gate.weight")
    'layers.0.mlp.gate.weight'
    """
    return raw[match.end() :] if (match := PREFIX.match(raw)) else raw


# What a quantised module's tensors are called. Those with an underscore in front go with 3-D experts, which have no
# `.weight`: gpt-oss `gate_up_proj_blocks`, transformers' FP8 `gate_up_proj_scale_inv`, ModelOpt's
# `gate_up_proj_weight_scale`.
ROLE = re.compile(
    r"(?P<module>.+?)(?P<role>"
    r"\.(weight|bias|weight_packed|weight_scale|weight_scale_inv|weight_scale_2|weight_global_scale|weight_zero_point"
    r"|weight_shape|weight_g_idx|input_scale|input_global_scale|output_scale|qweight|qzeros|scales|g_idx|qscales|SCB"
    r"|weight_format|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+))"
    r"|(?<=_proj)_(blocks|scales|packed|bias|(weight_|input_|output_)?scale|(weight_)?scale_(inv|2)))"
)


def split_role(name: str) -> tuple[str, str]:
    """(module, role): all tensors of one weight have one module.

    >>> split_role("layers.0.mlp.experts.3.up_proj.weight_scale"), split_role("layers.0.linear_attn.A_log")
    (('layers.0.mlp.experts.3.up_proj', '.weight_scale'), ('layers.0.linear_attn.A_log', ''))
    """
    match = ROLE.fullmatch(name)
    return (match["module"], match["role"]) if match else (name, "")
