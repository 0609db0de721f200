"""Finds which entries of a list could match a module's name, without trying them all.

Lists name single experts one by one: 30,840 entries in a public file. An entry that states a layer's number, or an
expert's, cannot match a name with another number, so entries are kept by these two numbers.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from heapq import merge
from typing import Any

from .module_names import is_plain

LAYER_PART, EXPERT = re.compile(r"(?:layers|blocks)\.\d+(?=\.|$)"), re.compile(r"experts\.(\d+)(?:\.|$)")
EXPERT_NUMBER = re.compile(r"(?<=experts\.)\d+|(?<=experts\\\.)\d+")
DIGITS = re.compile(r"\d+")
GLOB_CHARACTER = re.compile(r"\*|\?|\[[^\]]*\]")
# A regular expression made of letters, escaped dots, `.*` and anchors only: its literal runs occur in what it matches.
SIMPLE_REGEX = re.compile(r"\^?(?:[A-Za-z0-9_-]|\\\.|\.\*|\.(?=[A-Za-z]))*\$?")

FEW = 8
Numbers = tuple[str | None, int | None]  # "layers.3" or "blocks.3", and the expert; None where none is stated


@lru_cache(maxsize=65536)
def numbers_of(name: str) -> Numbers:
    """The numbers of layer and expert in a module's name."""
    layer, expert = LAYER_PART.search(name), EXPERT.search(name)
    return (layer[0] if layer else None, int(expert[1]) if expert else None)


def runs_of(entry: str) -> tuple[str, ...]:
    """The literal runs of a pattern, all of which occur in whatever it matches; none where that cannot be told."""
    if not entry.startswith(("re:", "-:", "+:")):
        return tuple(GLOB_CHARACTER.split(entry))
    text = entry[3:] if entry.startswith("re:") else entry[2:]
    if not SIMPLE_REGEX.fullmatch(text):
        return ()
    return tuple(re.sub(r"\\\.|\.(?!\*)", ".", text.strip("^$")).split(".*"))


def numbers_required(entry: str) -> Numbers:
    """The numbers without which nothing matches an entry. (None, None) where that cannot be told."""
    if is_plain(entry):
        return numbers_of(entry)
    layer = expert = None
    for run in runs_of(entry):  # what follows a run may be more digits, so its end is no boundary
        found = numbers_of(run + "~")
        layer, expert = found[0] if layer is None else layer, found[1] if expert is None else expert
    return layer, expert


def shape_of(text: str) -> str:
    """A name without its numbers: `layers.#.mlp.experts.#.up_proj`. The runs of what matches occur in it, too."""
    return DIGITS.sub("#", text)


class EntryIndex:
    """The entries of one list: plain ones by name, and all by the numbers that they require.

    values: what each entry stands for, where that is more than "excluded".
    """

    def __init__(self, entries: Sequence[str], values: Sequence[Hashable] = ()):
        self.entries, self.values = tuple(entries), values
        self.plain: dict[str, int] = {}  # the first index of each
        # Indices of names and of patterns, by the numbers that they require, and by the layer alone.
        self._names: dict[Numbers, list[int]] = {}
        self._patterns: dict[Numbers, list[int]] = {}
        self._names_in: dict[str | None, list[int]] = {}
        self._patterns_in: dict[str | None, list[int]] = {}
        self._experts: dict[str | None, set[int]] = {}  # layer -> the experts that entries of it name
        self._runs: dict[int, tuple[str, ...]] = {}
        self._fitting: dict[tuple[int, object, str], list[int]] = {}
        for i, entry in enumerate(self.entries):
            layer, expert = numbers = numbers_required(entry)
            plain = is_plain(entry)
            (self._names if plain else self._patterns).setdefault(numbers, []).append(i)
            (self._names_in if plain else self._patterns_in).setdefault(layer, []).append(i)
            if plain:
                self.plain.setdefault(entry, i)
            if expert is not None:
                self._experts.setdefault(layer, set()).add(expert)

    def patterns(self, name: str) -> Iterator[tuple[int, str]]:
        """(index, entry) of patterns, in the list's order: those that could match a name."""
        return self._merged(self._fit(self._patterns, key, name) for key in _keys(numbers_of(name)))

    def for_any_expert(self, name: str) -> Iterator[tuple[int, str]]:
        """(index, entry) of patterns that could match the name of an expert, and state no expert's number."""
        return self._merged(self._fit(self._patterns, key, name) for key in _keys((numbers_of(name)[0], None)))

    def around(self, name: str) -> Iterator[tuple[int, str]]:
        """(index, entry) in the list's order: those of the name's layer, and of its expert where it names one."""
        layer, expert = numbers_of(name)
        if layer is None:
            return iter(enumerate(self.entries))
        if expert is None:
            names = (self._names_in.get(key, []) for key in (layer, None))
            return self._merged((*names, *(self._fit(self._patterns_in, key, name) for key in (layer, None))))
        keys = _keys((layer, expert))
        names = (self._names.get(key, []) for key in keys)
        return self._merged((*names, *(self._fit(self._patterns, key, name) for key in keys)))

    def _fit(self, lists: Mapping[Any, list[int]], key: object, name: str) -> list[int]:
        """The patterns of a list whose runs occur in the shape of a name; all patterns of a short list."""
        patterns = lists.get(key, [])
        if len(patterns) < FEW:
            return patterns
        shape = shape_of(name)
        known = id(lists), key, shape
        if known not in self._fitting:
            for i in patterns:
                self._runs.setdefault(i, tuple(map(shape_of, runs_of(self.entries[i]))))
            # Without a star some readers ask whether the name occurs in the entry.
            fits = (i for i in patterns if "*" not in self.entries[i] or all(run in shape for run in self._runs[i]))
            self._fitting[known] = list(fits)
        return self._fitting[known]

    def _merged(self, lists: Iterable[list[int]]) -> Iterator[tuple[int, str]]:
        found = [indices for indices in lists if indices]
        return ((i, self.entries[i]) for i in (found[0] if len(found) == 1 else merge(*found)))

    def below(self, name: str) -> Iterator[tuple[int, str]]:
        """(index, entry) in the list's order: those that continue `name.`"""
        return ((i, entry) for i, entry in self.around(name) if entry.startswith(name + "."))

    def experts(self, name: str) -> dict[int, Hashable]:
        """The experts of the name's layer that some entry names by number, and what is said of each.

        Entries are read alike for two experts of whom the same is said: the same entries but for the number, with the
        same values, at the same place among the entries that name no expert.
        """
        layer, _ = numbers_of(name)
        numbers = self._experts.get(layer, set()) | self._experts.get(None, set())
        others = sorted(
            i for kept in (self._names, self._patterns) for key in _keys((layer, None)) for i in kept.get(key, ())
        )
        return {number: self._said(layer, number, others) for number in numbers}

    def _said(self, layer: str | None, expert: int, others: Sequence[int]) -> Hashable:
        keys, kinds = dict.fromkeys(((layer, expert), (None, expert))), (self._names, self._patterns)
        at = merge(*(kept.get(key, ()) for kept in kinds for key in keys))
        bare, values = EXPERT_NUMBER.sub, self.values
        return tuple((bare("", self.entries[i], count=1), values[i] if values else None, bisect(others, i)) for i in at)


def _keys(numbers: Numbers) -> Iterable[Numbers]:
    layer, expert = numbers
    return dict.fromkeys(((layer, expert), (layer, None), (None, expert), (None, None)))
