"""Which entry of an exclude list names a module, under one reading (`readings.SEMANTICS`).

Lists have up to 30,840 entries, which name single experts one by one. An entry that states a layer's number, or an
expert's, cannot match a name with another number. So `EntryIndex` keeps entries by these two numbers.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import merge
from itertools import islice, product

from ..errors import Qwen35Error
from .names import is_plain, parts_of
from .readings import LAYER_CLASSES, SEMANTICS, Test, matched, occurs_in_key

LAYER_PART, EXPERT = re.compile(r"(?:layers|blocks)\.\d+(?=\.|$)"), re.compile(r"experts\.(\d+)(?:\.|$)")
EXPERT_NUMBER = re.compile(r"(?<=experts\.)\d+|(?<=experts\\\.)\d+")
GLOB_CHARACTER = re.compile(r"\*|\?|\[[^\]]*\]")
# A regular expression made of letters, escaped dots, `.*` and anchors only: its literal runs occur in what it matches.
SIMPLE_REGEX = re.compile(r"\^?(?:[A-Za-z0-9_-]|\\\.|\.\*|\.(?=[A-Za-z]))*\$?")

FEW = 8  # so many entries are tried without asking first which of them fit
Numbers = tuple[str | None, int | None]  # "layers.3" or "blocks.3", and the expert; None where none is stated
Read = Callable[[str], Iterable[str]]
ANY_EXPERT = -1  # the place of an expert's number, for all entries of a layer


@lru_cache(maxsize=65536)
def numbers_of(name: str) -> Numbers:
    """The numbers of layer and expert in a module's name."""
    layer, expert = LAYER_PART.search(name), EXPERT.search(name)
    return (layer[0] if layer else None, int(expert[1]) if expert else None)


def runs_of(entry: str) -> tuple[str, ...]:
    """The texts between an entry's wildcards, which occur in whatever it matches; none where that cannot be told."""
    if is_plain(entry):
        return () if entry in LAYER_CLASSES else (entry,)
    if not entry.startswith(("re:", "-:", "+:")):
        return tuple(GLOB_CHARACTER.split(entry))
    text = entry.partition(":")[2]
    if not SIMPLE_REGEX.fullmatch(text):
        return ()
    return tuple(re.sub(r"\\\.|\.(?!\*)", ".", text.strip("^$")).split(".*"))


def numbers_required(entry: str) -> Numbers:
    """The numbers without which nothing matches an entry. (None, None) where that cannot be told."""
    if is_plain(entry):
        return numbers_of(entry)
    found = [numbers_of(run + "~") for run in runs_of(entry)]  # more digits may follow a run: its end is no boundary
    return next((n for n, _ in found if n is not None), None), next((n for _, n in found if n is not None), None)


def shape_of(text: str) -> str:
    """A name without its numbers: `layers.#.mlp.experts.#.up_proj`."""
    return re.sub(r"\d+", "#", text)


@lru_cache(maxsize=65536)
def shapes_of(entry: str) -> tuple[str, str]:
    """The shapes of an entry and of its longest run (`runs_of`)."""
    return shape_of(entry), shape_of(max(runs_of(entry), key=len, default=""))


class EntryIndex:
    """The entries of one list, by the numbers that they require.

    values: the spec that each entry gives; none of an exclude list.
    """

    def __init__(self, entries: Iterable[str], values: Sequence[Hashable] = ()):
        self.entries, self.values = tuple(entries), values
        self._by: dict[Numbers, list[int]] = defaultdict(list)
        self._fitting: dict[tuple[Numbers, str], list[int]] = {}
        for i, entry in enumerate(self.entries):
            layer, expert = numbers_required(entry)
            self._by[layer, expert].append(i)
            self._by[layer, ANY_EXPERT].append(i)

    def naming(self, name: str, tests: Sequence[Test]) -> Iterator[tuple[int, str]]:
        """(index, the test that it passed) in the list's order: the entries that name a module."""
        found = self.near(name) if occurs_in_key in tests else self._at(*numbers_of(name), name)
        return ((i, how) for i, entry in found if (how := matched(entry, name, tests)))

    def near(self, name: str) -> Iterator[tuple[int, str]]:
        """(index, entry) in the list's order: all that may match a name, begin with it, or contain it."""
        layer, expert = numbers_of(name)
        if layer is None:
            return iter(enumerate(self.entries))
        return self._at(layer, ANY_EXPERT if expert is None else expert, name)

    def below(self, name: str) -> Iterator[tuple[int, str]]:
        """(index, entry) in the list's order: those that begin with `name.`"""
        return ((i, entry) for i, entry in self.near(name) if entry.startswith(name + "."))

    def experts(self, name: str) -> dict[int, Hashable]:
        """Expert -> what the list says of it, for experts of the name's layer that an entry names by number.

        Two experts with equal values here are alike under every reading: the same entries but for the number name
        them, give them the same specs, and stand at the same place among the entries that name no expert.
        """
        layer, _ = numbers_of(name)
        others = [i for i, _ in self._merged(self._by.get(key, []) for key in _keys(layer, None))]
        found: dict[int, list[Hashable]] = defaultdict(list)
        for i, entry in self._merged(self._by.get(key, []) for key in _keys(layer, ANY_EXPERT)):
            if (number := numbers_required(entry)[1]) is not None:
                value = self.values[i] if self.values else None
                found[number].append((EXPERT_NUMBER.sub("", entry, count=1), value, bisect(others, i)))
        return {number: tuple(said) for number, said in found.items()}

    def _at(self, layer: str | None, expert: int | None, name: str) -> Iterator[tuple[int, str]]:
        return self._merged(self._fit(key, name) for key in _keys(layer, expert))

    def _fit(self, key: Numbers, name: str) -> list[int]:
        """The entries under a key that may match, begin with or contain names of this shape; all of a short list."""
        indices = self._by.get(key, [])
        if len(indices) < FEW:
            return indices
        shape = shape_of(name)
        if (key, shape) not in self._fitting:
            shapes = ((i, *shapes_of(self.entries[i])) for i in indices)
            self._fitting[key, shape] = [i for i, whole, run in shapes if run in shape or shape in whole]
        return self._fitting[key, shape]

    def _merged(self, lists: Iterable[list[int]]) -> Iterator[tuple[int, str]]:
        found = [indices for indices in lists if indices]
        return ((i, self.entries[i]) for i in (found[0] if len(found) == 1 else merge(*found)))


def _keys(layer: str | None, expert: int | None) -> Iterable[Numbers]:
    experts = (expert,) if expert == ANY_EXPERT else (expert, None)
    return dict.fromkeys(product((layer, None), experts))


@dataclass(frozen=True)
class Hit:
    """The entry that decided: its list, its index there (None for an object's key), its text, the test it passed."""

    list: str
    index: int | None
    entry: str
    how: str

    def __str__(self) -> str:
        where = self.list if self.index is None else f"{self.list}[{self.index}]"
        return f"{where} = {self.entry!r} ({self.how})" if self.entry else where


class ExcludeList:
    """An exclude list under one reading.

    written: as the file has it. read: what an engine makes of one entry before it compares (`entries`); None: itself.
    """

    def __init__(self, written: Iterable[str], semantics: str, key: str = "exclude", read: Read | None = None):
        self.written, self.semantics, self.key = tuple(written), SEMANTICS[semantics], key
        compared = [(i, e) for i, entry in enumerate(self.written) for e in (read(entry) if read else (entry,))]
        self._places, self.index = [i for i, _ in compared], EntryIndex(entry for _, entry in compared)
        self.entries = self.index.entries
        for entry in self.entries:
            if not is_plain(entry):
                matched(entry, "", self.semantics.tests)  # a bad regular expression is refused, whatever is asked first
        # The gate asks about the same few modules of a layer again and again, once for every rule.
        self._find = lru_cache(maxsize=8192)(self._search)

    def hit(self, names: str | Sequence[str]) -> Hit | None:
        """The entry that excludes a module, given by all spellings of its name; None if no entry does.

        Error: parts of a merged module disagree (engines refuse to load such a checkpoint).
        """
        return self._find((names,) if isinstance(names, str) else tuple(names))

    def direct(self, names: Sequence[str]) -> Hit | None:
        """As `hit`, by the names alone: no parts of a merged module, no entries for single experts."""
        return self._earliest(self.index.naming(name, self.semantics.tests) for name in names)

    def below(self, names: Sequence[str], how: str) -> Hit | None:
        """The first entry for a module below one of these; `how` goes into the answer."""
        return self._earliest(((i, how) for i, _ in self.index.below(name)) for name in names)

    def quoted(self, index: int, how: str) -> Hit:
        place = self._places[index]
        return Hit(self.key, place, self.written[place], how)

    def _earliest(self, found: Iterable[Iterator[tuple[int, str]]]) -> Hit | None:
        first = min((at for each in found for at in islice(each, 1)), key=lambda at: at[0], default=None)
        return self.quoted(*first) if first else None

    def _search(self, names: tuple[str, ...]) -> Hit | None:
        children = [name for name in names if name.endswith(".experts")] if self.semantics.children else []
        return self.direct(names) or self.below(children, "one expert excludes the module") or self._parts(names)

    def _parts(self, names: Sequence[str]) -> Hit | None:
        parts = parts_of(names[0])
        hits = [self.direct([f"{n.rpartition('.')[0]}.{p.rpartition('.')[2]}" for n in names]) for p in parts]
        if any(hits) and not all(hits):
            what, do = "an exclude list names some parts of a fused module and not others", "list every part"
            where, expected = f"{names[0]} ({self.semantics.name} semantics)", f"all or none of {', '.join(parts)}"
            raise Qwen35Error(what, where=where, expected=expected, found=", ".join(str(h) for h in hits if h), do=do)
        return hits[0] if hits else None
