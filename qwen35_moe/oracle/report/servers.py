"""The verdict on a server, as text and as one page of HTML."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from html import escape

from ..servers.verdict import Verdict
from .page_parts import html_table, page, section

WIDTH = 100


def listed(label: str, names: Sequence[str]) -> str:
    """A label and some names, wrapped; those beyond 12 are counted."""
    rest = f", and {len(names) - 12} more" if len(names) > 12 else ""
    words = f"{len(names)}: {'; '.join(names[:12])}{rest}" if names else "none"
    return textwrap.fill(f"{label:<9}{words}", WIDTH, subsequent_indent=" " * 9)


def grouped(v: Verdict) -> dict[str, list[str]]:
    """Lines of evidence by the positions that they are of: of the prompts, then those that `Verdict.add` added."""
    groups: dict[str, list[str]] = {f"{v.positions} positions of {v.sequences} prompts": []}
    first = groups[next(iter(groups))]
    for line in v.evidence:
        where, added, what = line.partition(" positions: ")
        (groups.setdefault(f"{where} positions", []) if added else first).append(what or line)
    return groups


def verdict_text(v: Verdict) -> str:
    lines = ["", textwrap.fill(f"{v.finding.upper()}: {v.why}", WIDTH)]
    if looks := _looks(v):
        lines.append(textwrap.fill(looks, WIDTH))
    if len(v.alike) > 1:
        lines.append(listed("or", [f"{e.name} ({e.gain:+.0f} nats)" for e in v.alike[1:]]))
    for where, evidence in grouped(v).items():
        lines += ["", f"evidence {where}"]
        lines += [textwrap.fill(line, WIDTH, initial_indent=" " * 9, subsequent_indent=" " * 11) for line in evidence]
    lines += [textwrap.fill(f"note     {line}", WIDTH, subsequent_indent=" " * 9) for line in v.notes]
    return "\n".join([*lines, *([listed("blind to", v.unseen)] if v.unseen else [])])


def _looks(v: Verdict) -> str:
    if v.finding == "agrees":
        return ""
    if v.alike:
        best = v.alike[0]
        return (f"it looks like: {best.name} ({best.gain:+.0f} nats over rounding; the truth with this fault differs "
                f"by {best.left:.2f} x the legal one)")  # fmt: skip
    if v.experts:
        what = "a fault of one expert" if len(v.experts) == 1 else "faults of single experts"
        return f"it looks like {what}: {', '.join(map(str, v.experts[:8]))}"
    if v.nearest is not None and v.finding == "diverges":
        return (f"it looks like no fault of the catalogue; the truth with the nearest one, {v.nearest.name}, differs "
                f"by {v.nearest.left:.3g} x the legal one")  # fmt: skip
    return ""


def verdict_page(v: Verdict, buckets: Sequence[str] = ()) -> str:
    """The page: no scripts, no network."""
    columns = {"fault": "", "nats over rounding": "num", "difference left, x legal": "num"}
    rows = [(escape(e.name), f"{e.gain:+.0f}", f"{e.left:.2f}") for e in v.alike]
    found = section("What explains it", html_table(columns, rows)) if rows else ""
    unseen = [listed("blind to", v.unseen)] if v.unseen else []
    groups = {**grouped(v), "Other batches": list(buckets), "Notes": [*v.notes, *unseen]}
    lists = [section(where, "<ul>", *(f"<li>{escape(line)}</li>" for line in said), "</ul>")
             for where, said in groups.items() if said]  # fmt: skip
    mark = "&#10003;" if v.finding == "agrees" else "&#10007;" if v.finding == "diverges" else "?"
    said = [escape(v.why), escape(_looks(v))]
    verdict, bad = f"{mark} {escape(v.finding.upper())}", v.finding != "agrees"
    return page(f"qwen35-moe probe: {v.finding}", verdict, said, bad, found, *lists)
