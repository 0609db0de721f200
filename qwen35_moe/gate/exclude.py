"""Which entry of an exclude list names a module, under a reading of `readings.SEMANTICS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from ..errors import Qwen35Error
from .entry_index import EntryIndex
from .module_names import expand_fused, is_plain
from .readings import SEMANTICS, Semantics, Test, matched, occurs_in_key, plain_matches


@dataclass(frozen=True)
class Hit:
    """The entry that decided: its list, its index there (None for an object's key), its text, the test it passed."""

    list: str
    index: int | None
    entry: str
    how: str
    name: str = ""

    def __str__(self) -> str:
        where = self.list if self.index is None else f"{self.list}[{self.index}]"
        return f"{where} = {self.entry!r} ({self.how})" if self.entry else where


@dataclass(frozen=True)
class ExcludeList:
    """An exclude list under one reading. Real lists have 1,700 entries, and up to 30,840: see `EntryIndex`.

    written: the entries as the file has them, where an engine has renamed them before it compares (`entries`).
    """

    entries: tuple[str, ...]
    semantics: Semantics
    list: str = "exclude"
    written: tuple[str, ...] = ()
    index: EntryIndex = field(init=False, repr=False, compare=False)
    _parents: dict[str, int] = field(init=False, repr=False, compare=False)
    _find: Callable[[tuple[str, ...]], Hit | None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parents: dict[str, int] = {}
        for i, entry in enumerate(self.entries):
            if not is_plain(entry):
                matched(entry, "", self.semantics.tests)  # a bad regular expression is refused, whoever asks for what
            at = -1 if entry.startswith("re:") else entry.find(".")  # readers of children compare how entries begin
            while at >= 0:
                parents.setdefault(entry[:at], i)
                at = entry.find(".", at + 1)
        # The gate asks about the same few modules of a layer again and again, once for every rule.
        cached = lru_cache(maxsize=8192)(self._search)
        for key, value in {"index": EntryIndex(self.entries), "_parents": parents, "_find": cached}.items():
            object.__setattr__(self, key, value)

    def hit(self, names: str | Sequence[str]) -> Hit | None:
        """The entry that excludes a module, given by all spellings of its name; None if no entry does.

        Error: parts of a fused module disagree (engines refuse to load such a checkpoint).
        """
        return self._find((names,) if isinstance(names, str) else tuple(names))

    def below(self, names: Sequence[str], how: str) -> Hit | None:
        """The first entry for a module below one of these."""
        found = [self._parents[name] for name in names if name in self._parents]
        return self._hit(min(found), how, "") if found else None

    def _search(self, names: tuple[str, ...]) -> Hit | None:
        children = [name for name in names if name.endswith(".experts")] if self.semantics.children else []
        return self.direct(names) or self.below(children, "one expert excludes the module") or self._parts(names)

    def direct(self, names: Sequence[str]) -> Hit | None:
        """As `hit`, by the names alone: neither parts nor children."""
        found = [hit for name in names if (hit := self._first(name))]
        return min(found, key=lambda hit: hit.index or 0, default=None)

    def _first(self, name: str) -> Hit | None:
        found = first_match(self.index, name, self.semantics.tests)
        return self._hit(*found, name) if found else None

    def _hit(self, index: int, how: str, name: str) -> Hit:
        return Hit(self.list, index, (self.written or self.entries)[index], how, name)

    def _parts(self, names: Sequence[str]) -> Hit | None:
        parts = expand_fused(names[0]) if self.semantics.fused else ()
        hits = [self.direct([f"{n.rpartition('.')[0]}.{p.rpartition('.')[2]}" for n in names]) for p in parts]
        if hits and any(h is None for h in hits) and any(hits):
            what, do = "an exclude list names some parts of a fused module and not others", "list every part"
            where, expected = f"{names[0]} ({self.semantics.name} semantics)", f"all or none of {', '.join(parts)}"
            raise Qwen35Error(what, where=where, expected=expected, found=", ".join(str(h) for h in hits if h), do=do)
        return hits[0] if hits else None


@lru_cache(maxsize=64)
def exclude_list(
    entries: tuple[str, ...], semantics: str, list: str = "exclude", written: tuple[str, ...] = ()
) -> ExcludeList:
    """An exclude list under a named reading; made once, as the gate asks for it layer by layer."""
    return ExcludeList(entries, SEMANTICS[semantics], list, written)


def first_match(index: EntryIndex, name: str, tests: Sequence[Test]) -> tuple[int, str] | None:
    """(index, the test that it passed) of the first entry that names a module."""
    found = [(index.plain[key], test.__name__) for key, test in plain_matches(name, tests) if key in index.plain]
    others = index.around(name) if occurs_in_key in tests else index.patterns(name)
    for i, entry in others:
        if how := matched(entry, name, tests):
            found.append((i, how))
            break
    return min(found, default=None)
