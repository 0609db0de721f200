"""Keys of a trace: `step.2.layers.3.attn_q` has the tap name `attn_q`; and globs of them."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable
from functools import cache
from typing import NoReturn

from ..errors import Qwen35Error
from .tap_table import TAPS

_PART = re.compile(r"^(?:step\.\d+\.)?(mtp(?:\.\d+)?|visual)\.")


_PLACE = re.compile(r"^(?:(?:mtp(?:\.\d+)?|visual)\.)?(?:layers\.[^.]+\.)?")


def part_of(key: str) -> str:
    """ "mtp" of `mtp.layers.0.mlp_output`, "mtp.2" of `mtp.2.final_norm`, "visual", or "" for the text model."""
    found = _PART.match(key)
    return found[1] if found else ""


@cache
def base_name(key: str) -> str:
    """The tap name of a key: `layers.3.moe_expert_17_down` -> `moe_expert_down`.

    >>> base_name("step.2.layers.0.input_layernorm.gain")
    'input_layernorm.gain'
    """
    name = _PLACE.sub("", re.sub(r"^step\.\d+\.|\.\d+$", "", key))
    stem = re.sub(r"^moe_expert_\d+_", "", name)
    return name if stem == name else next((n for n in (f"moe_expert_{stem}", f"moe_{stem}") if n in TAPS), name)


def dims_of(name: str, rank: int) -> str:
    """The dims of a tap; names that the table does not hold get neutral ones (`d0 d1`).

    Raises Qwen35Error if the table says another rank: the tensor would be aligned along wrong dimensions.
    """
    if name.endswith(".gain"):
        return "d"
    if name not in TAPS or not TAPS[name].dims:
        return " ".join(f"d{i}" for i in range(rank))
    dims = TAPS[name].dims
    if len(dims.split()) != rank:
        where, do = "qwen35_moe/numerics/tap_table.py", "tap the shape that the table names, or mend the table"
        what, found = f"tap {name} has the wrong rank", f"{rank} dimensions"
        raise Qwen35Error(what, where=where, expected=dims, found=found, do=do)
    return dims


def per_token(key: str) -> bool:
    """Whether a tap has one row a token (scores have: those of one query)."""
    name = base_name(key)
    return name == "next_token_logprobs" or (name in TAPS and re.match(r"(b (n )?)?t ", TAPS[name].dims) is not None)


def is_vision(key: str) -> bool:
    """Whether a tap is of the vision tower: a row a patch, or a merge block."""
    return key.startswith("visual.")


def by_rows(key: str) -> bool:
    """Whether a tap has rows, of tokens or of patches, that engines may lay out otherwise."""
    return per_token(key) or is_vision(key)


def split_patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    """In a list, or separated by commas."""
    return tuple(p.strip() for p in (patterns.split(",") if isinstance(patterns, str) else patterns))


def matching(patterns: Iterable[str], name: str, key: str) -> list[str]:
    """Those of the patterns that a tap's name or key matches."""
    return [p for p in patterns if fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(key, p)]


def check_patterns(patterns: tuple[str, ...]) -> None:
    """Raise for a pattern that no tap can match, naming those that are close."""
    for pattern in patterns:
        name = base_name(pattern)
        if name.endswith(".gain") or re.match(r"^(mtp|visual)\.", pattern):
            continue
        if not any(fnmatch.fnmatchcase(known, name) for known in TAPS):
            refuse(pattern)


def refuse(name: str) -> NoReturn:
    """Error: no tap has this name, or matches this pattern."""
    close = ", ".join(difflib.get_close_matches(base_name(name), TAPS, n=3, cutoff=0.5)) or "a name in the tap table"
    do = "see qwen35_moe/numerics/tap_table.py, or list them with `qwen35-moe trace --list`"
    raise Qwen35Error("unknown tap name", found=name, expected=close, do=do)
