"""The records of a wrong block and of a wrong weight."""

from __future__ import annotations

from dataclasses import dataclass

LITTLE = 0.01  # of an error: what explains less is no guess


@dataclass(frozen=True)
class Hypothesis:
    """A fault, and the share of the squared error that it explains (1: all of it; below 0: it makes the error
    worse)."""

    name: str
    explains: float
    seen: str = ""
    doc: str = ""
    where: str = ""  # from which token on, where it is a fault between steps


@dataclass
class Diagnosis:
    """The diagnosis of one wrong block. `named`: the first hypothesis explains enough to be the answer."""

    layer: int | None
    block: str
    key: str
    hypotheses: list[Hypothesis]
    named: bool
    fit: tuple[float, float, float] | None = None  # routed, gated shared, ungated shared
    fit_left: float = 1.0
    note: str = ""

    @property
    def name(self) -> str:
        return self.hypotheses[0].name if self.named else "unknown"

    def __str__(self) -> str:
        where = f"layer {self.layer}, {self.block}" if self.layer is not None else self.block
        if not self.hypotheses:
            return f"{where}: unknown. {self.note or 'No hypothesis could be tried'}"
        first, rest = self.hypotheses[0], self.hypotheses[1:]
        if self.named and self.note:
            return f"{where}: {first.name} ({self.note}); see {first.seen}"
        shown = "" if self.named or not self.note else f"{self.note}; "
        if not self.named and first.explains < LITTLE:
            return f"{where}: unknown ({shown}no known bug explains any of it)"
        start = f"{first.where}; " if first.where else ""
        best = f"{start}explains {_percent(first.explains)} of the error"
        after = f"; next best {_percent(rest[0].explains)}" if rest else ""
        seen = f"; see {first.seen}" if first.seen and self.named else ""
        if self.named:
            return f"{where}: {first.name} ({best}{after}){seen}"
        return f"{where}: unknown ({shown}the best guess, {first.name!r}, {best})"


def _percent(share: float) -> str:
    text = f"{100 * max(share, 0):.1f}"
    return f"{'> 99.9' if text == '100.0' and share < 1 else text} %"


@dataclass
class Weight:
    """One parameter of a dump against the checkpoint's bytes. `state`: equal, reordered (a known layout), wrong, ..."""

    name: str
    state: str
    detail: str = ""

    @property
    def bad(self) -> bool:
        return self.state == "wrong"

    @property
    def good(self) -> bool:
        return self.state in ("equal", "reordered")
