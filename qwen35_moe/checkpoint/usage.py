"""Which tensors of a checkpoint a run has used."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .folder import Folder, few
from .recognise import CACHE_SCALES, ROLES_BESIDE


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
