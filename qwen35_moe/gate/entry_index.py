"""Finds which entries of a list could match a module's name, without trying them all.

Lists name single experts one by one: 30,840 entries in a public file. An entry that states a layer's number, or an
expert's, cannot match a name with another number, so entries are kept by these two numbers.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from heapq import merge

from .module_names import is_plain

LAYER_PART, EXPERT = re.compile(r"(?:layers|blocks)\.\d+(?=\.|$)"), re.compile(r"experts\.(\d+)(?:\.|$)")
EXPERT_NUMBER = re.compile(r"(?<=experts\.)\d+|(?<=experts\\\.)\d+")
GLOB_CHARACTER = re.compile(r"\*|\?|\[[^\]]*\]")
# A regular expression made of letters, escaped dots, `.*` and anchors only: its literal runs occur in what it matches.
SIMPLE_REGEX = re.compile(r"\^?(?:[A-Za-z0-9_-]|\\\.|\.\*|\.(?=[A-Za-z]))*\$?")

Numbers = tuple[str | None, int | None]  # "layers.3" or "blocks.3", and the expert; None where none is stated


@lru_cache(maxsize=65536)
def numbers_of(name: str) -> Numbers:
    """The numbers of layer and expert in a module's name."""
    layer, expert = LAYER_PART.search(name), EXPERT.search(name)
    return (layer[0] if layer else None, int(expert[1]) if expert else None)


def numbers_required(entry: str) -> Numbers:
    """The numbers without which nothing matches an entry. (None, None) where that cannot be told."""
    if is_plain(entry):
        return numbers_of(entry)
    if entry.startswith(("re:", "-:", "+:")):
        text = entry[3:] if entry.startswith("re:") else entry[2:]
        if not SIMPLE_REGEX.fullmatch(text):
            return None, None
        runs = re.sub(r"\\\.|\.(?!\*)", ".", text.strip("^$")).split(".*")
    else:
        runs = GLOB_CHARACTER.split(entry)
    layer = expert = None
    for run in runs:  # what follows a run may be more digits, so its end is no boundary
        found = numbers_of(run + "~")
        layer, expert = found[0] if layer is None else layer, found[1] if expert is None else expert
    return layer, expert


class EntryIndex:
    """The entries of one list: plain ones by name, and all by the numbers that they require.

    values: what each entry stands for, where that is more than "excluded".
    """

    def __init__(self, entries: Sequence[str], values: Sequence[Hashable] = ()):
        self.entries, self.values = tuple(entries), values
        self.plain: dict[str, int] = {}  # the first index of each
        self._patterns: dict[Numbers, list[int]] = {}
        self._kept: dict[Numbers, list[int]] = {}
        self._layers: dict[str | None, list[int]] = {}
        self._experts: dict[str | None, set[int]] = {}  # layer -> the experts that entries of it name
        for i, entry in enumerate(self.entries):
            layer, expert = numbers = numbers_required(entry)
            self._kept.setdefault(numbers, []).append(i)
            self._layers.setdefault(layer, []).append(i)
            if is_plain(entry):
                self.plain.setdefault(entry, i)
            else:
                self._patterns.setdefault(numbers, []).append(i)
            if expert is not None:
                self._experts.setdefault(layer, set()).add(expert)

    def patterns(self, name: str) -> Iterator[tuple[int, str]]:
        """(index, entry) of patterns, in the list's order: those that require no other numbers than the name has."""
        return self._found(self._patterns, numbers_of(name)) if self._patterns else iter(())

    def around(self, name: str) -> Iterator[tuple[int, str]]:
        """(index, entry) in the list's order: those of the name's layer, and of its expert where it names one."""
        layer, expert = numbers_of(name)
        if layer is None:
            return iter(enumerate(self.entries))
        if expert is not None:
            return self._found(self._kept, (layer, expert))
        return ((i, self.entries[i]) for i in merge(*(self._layers.get(key, ()) for key in (layer, None))))

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
        others = [i for i, _ in self._found(self._kept, (layer, None))]
        return {number: self._said(layer, number, others) for number in numbers}

    def _said(self, layer: str | None, expert: int, others: Sequence[int]) -> Hashable:
        return tuple(
            (
                EXPERT_NUMBER.sub("", self.entries[i], count=1),
                self.values[i] if self.values else None,
                bisect(others, i),
            )
            for i in merge(self._kept.get((layer, expert), ()), self._kept.get((None, expert), ()))
        )

    def _found(self, kept: dict[Numbers, list[int]], numbers: Numbers) -> Iterator[tuple[int, str]]:
        layer, expert = numbers
        keys = dict.fromkeys(((layer, expert), (layer, None), (None, expert), (None, None)))
        found = [indices for key in keys if (indices := kept.get(key))]
        return ((i, self.entries[i]) for i in (found[0] if len(found) == 1 else merge(*found)))
