"""The tests whether an entry names a module, as pure functions of strings, and who makes which test: `SEMANTICS`.

Quark writes globs and exports exact names; SGLang and vLLM read exact names and `re:`; ATOM reads globs, parents and
`re:` anywhere in the name; lists of block FP8 are read segment by segment.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .names import is_plain
from .patterns import bounded_pattern


# A test: (entry, name) -> does the entry name the module?
def exact(entry: str, name: str) -> bool:
    """A pattern names nothing by its own text, by which ATOM may ask (`atom-first-entry`)."""
    return entry == name and is_plain(entry)


def regex_match(entry: str, name: str) -> bool:
    """`re:` entries, anchored at the start of the name only (Python's `re.match`)."""
    return entry.startswith("re:") and _compiled(entry[3:]).match(name) is not None


def regex_search(entry: str, name: str) -> bool:
    """`re:` entries that may match anywhere in the name (`re.search`)."""
    return entry.startswith("re:") and _compiled(entry[3:]).search(name) is not None


def glob(entry: str, name: str) -> bool:
    """Shell patterns over the whole name; `*` crosses dots."""
    if is_plain(entry):  # a pattern that is compiled for one comparison takes long
        return entry == name
    return not entry.startswith("re:") and fnmatchcase(name, entry)


def glob_or_below(entry: str, name: str) -> bool:
    """A glob that also covers everything below what it names: ATOM tries `entry` and `entry + ".*"`.

    Only `*` and `?` make a glob of an entry; brackets alone are read as they stand.
    """
    if "*" in entry or "?" in entry:
        return glob(entry, name) or glob(entry + ".*", name)
    return entry == name or parent(entry, name)


def parent(entry: str, name: str) -> bool:
    """The entry is an ancestor of the module: `a.b` covers `a.b.c`, but not `a.bc`."""
    return name.startswith(entry + ".")


def segments(entry: str, name: str) -> bool:
    """The entry is a run of the name's segments: `gate` covers `mlp.gate` and not `mlp.shared_expert_gate`."""
    return f".{entry}." in f".{name}."


def negative_rule(entry: str, name: str) -> bool:
    """GPTQModel's `dynamic`: a key `-:REGEX` leaves modules out."""
    return entry.startswith("-:") and _compiled(entry[2:]).match(name) is not None


def occurs_in_key(entry: str, name: str) -> bool:
    """With a star a glob; without one, the name occurs somewhere in the key: vLLM and ATOM read keys so."""
    return fnmatchcase(name, entry) if "*" in entry else name in entry


def layer_class(entry: str, name: str) -> bool:
    """A class of layers, as compressed-tensors targets them: these two cover every projection."""
    return entry in LAYER_CLASSES


LAYER_CLASSES = ("Linear", "FusedMoE")
Test = Callable[[str, str], bool]


@dataclass(frozen=True)
class Semantics:
    """A reading: the tests that an engine or a tool makes with entries of an exclude list, and where that was read.

    children: an entry below `….experts` excludes all experts of the layer. layer_tests: the tests of patterns that have
    a spec of their own, such as the keys of layer_quant_config.
    """

    name: str
    tests: tuple[Test, ...]
    source: str
    children: bool = False
    layer_tests: tuple[Test, ...] = (exact, glob)


SEMANTICS = {
    s.name: s
    for s in (
        Semantics("quark", (exact, glob, regex_match), "Quark 0.13: users' patterns are fnmatch", True),
        Semantics("sglang", (exact, regex_match), "SGLang 0.5.23 quark/utils.py: should_ignore_layer", True),
        Semantics("vllm", (exact, regex_match), "vLLM 0.33 quark/utils.py: should_ignore_layer; quark.py: "
                  "get_layer_quant_config_from_name", True, (occurs_in_key,)),
        Semantics("atom", (exact, regex_search, parent, glob_or_below), "ROCm/ATOM atom/config.py:483-493",
                  True, (occurs_in_key,)),
        Semantics("vllm-fp8", (exact,), "vLLM 0.33 utils/quant_utils.py: is_layer_skipped", True),
        Semantics("fp8", (exact, segments), "SGLang 0.5.23 quantization/utils.py: is_layer_skipped (since #23467)"),
        Semantics("compressed-tensors", (exact, regex_match), "compressed-tensors 0.20: ignore and targets",
                  layer_tests=(exact, regex_match, layer_class)),
        Semantics("modelopt", (exact, glob), "NVIDIA ModelOpt: exclude_modules, ignore; quantized_layers names experts "
                  "as one", layer_tests=(exact, glob, parent)),
        Semantics("gptq", (negative_rule,), "GPTQModel: quantization_config.dynamic"),
    )
}  # fmt: skip


def matched(entry: str, name: str, tests: Sequence[Test]) -> str:
    """The name of the first test that `entry` passes for `name`, or ""."""
    return next((test.__name__ for test in tests if test(entry, name)), "")


def _compiled(pattern: str) -> re.Pattern[str]:
    return bounded_pattern(pattern, "an exclude entry is not a valid regular expression")
