"""What became of planted faults and clean variants (mutants.py), as tables and as a score."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qwen35_moe.oracle.judge.envelope import LIMIT
from qwen35_moe.oracle.judge.records import ratio_text


@dataclass(frozen=True)
class Outcome:
    """What became of one planted fault, or one clean variant."""

    regime: str
    name: str
    block: str
    layer: int | None
    ratio: float  # the largest of the block's first bad tap; of a clean variant, the largest of all
    found: bool  # for a clean variant: passed
    where: str
    named: str
    explains: float = 0.0
    next_best: float = 0.0
    right: tuple[str, ...] = ()  # of a fault between steps: the names of all that hand over the same, with their step

    @property
    def named_right(self) -> bool:
        """The same fault; a factor that was fitted may be off by 2 %."""
        if self.right:
            return re.sub(r" \(\d+\)", "", self.named) in self.right  # without the other sequence
        kind, _, factor = self.name.rpartition(" times ")
        said, _, fitted = self.named.rpartition(" times ")
        if kind and kind == said and all(re.fullmatch(r"[\d.]+", x) for x in (factor, fitted)):
            return abs(float(fitted) / float(factor) - 1) <= 0.02
        return self.named.startswith(self.name)


def table(planted: Sequence[Outcome], foreign: Sequence[Outcome], clean: Sequence[Outcome]) -> str:
    """The three tables and the scores."""
    lines = ["Faults planted: found in the right layer and block; ratio of its first tap; what the diagnosis says", ""]
    for o in planted:
        mark = "ok " if o.found and o.named_right else "-- "
        share = f"{100 * o.explains:.1f}/{100 * max(o.next_best, 0):.1f} %" if o.explains else ""
        said = "" if o.named_right else f" SAID {o.named}"
        lines.append(f"{mark}{o.regime:<14}{o.name:<48.48}{ratio_text(o.ratio):>6} {o.where:<28.28}{share:>14}{said}")
    lines += ["", "Faults that the catalogue lacks: found, and the diagnosis says unknown", ""]
    for o in foreign:
        mark = "ok " if o.found and o.named == "unknown" else "-- "
        lines.append(f"{mark}{o.regime:<14}{o.name:<48.48}{ratio_text(o.ratio):>6} {o.where:<28.28} {o.named}")
    lines += ["", f"Clean variants: the largest ratio of all taps (limit {LIMIT:g})", ""]
    for o in clean:
        lines.append(f"{'ok ' if o.found else '-- '}{o.regime:<14}{o.name:<48.48}{ratio_text(o.ratio):>6} {o.where}")
    lines += ["", *scores(planted, foreign, clean)]
    return "\n".join(lines)


def scores(planted: Sequence[Outcome], foreign: Sequence[Outcome], clean: Sequence[Outcome]) -> list[str]:
    seen = [o for o in (*planted, *foreign) if o.ratio and o.name != "state in bf16"]  # that one is seen by its digits
    least = min(seen, key=lambda o: o.ratio, default=None)
    most = max(clean, key=lambda o: o.ratio, default=None)
    lines = [
        f"found      {sum(o.found for o in planted)} of {len(planted)} faults in the right layer and block",
        f"named      {sum(o.named_right for o in planted)} of {len(planted)} by the diagnosis, first",
        f"unknown    {sum(o.named == 'unknown' for o in foreign)} of {len(foreign)} faults that the catalogue lacks",
        f"clean      {sum(o.found for o in clean)} of {len(clean)} variants pass",
    ]
    if least and most:
        smallest = f"smallest fault {ratio_text(least.ratio)} ({least.name})"
        lines.append(f"margin     worst clean {most.ratio:.2f} ({most.name}), limit {LIMIT:g}, {smallest}")
    return lines
