"""The verdict on a server, as text and as one page of HTML."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from html import escape

from ..servers.verdict import Verdict
from .html import STYLE

WIDTH = 100


def listed(label: str, names: Sequence[str], most: int = 12) -> str:
    """`label` and the names, wrapped; beyond `most` they are counted."""
    rest = f", and {len(names) - most} more" if len(names) > most else ""
    words = f"{len(names)}: {'; '.join(names[:most])}{rest}" if names else "none"
    return textwrap.fill(f"{label:<9}{words}", WIDTH, subsequent_indent=" " * 9)


def verdict_text(v: Verdict) -> str:
    lines = [f"judged   {v.positions} positions of {v.sequences} prompts"]
    lines += [textwrap.fill(f"evidence {line}", WIDTH, subsequent_indent=" " * 9) for line in v.evidence]
    lines += [textwrap.fill(f"note     {line}", WIDTH, subsequent_indent=" " * 9) for line in v.notes]
    lines += [listed("blind to", v.unseen)] if v.unseen else []
    lines += ["", textwrap.fill(f"{v.finding.upper()}: {v.why}", WIDTH)]
    if looks := _looks(v):
        lines += ["", textwrap.fill(looks, WIDTH)]
    if len(v.alike) > 1:
        lines.append(listed("no less", [f"{e.name} ({e.gain:+.0f} nats)" for e in v.alike[1:]]))
    return "\n".join(lines)


def _looks(v: Verdict) -> str:
    if v.finding == "agrees":
        return ""
    if v.alike:
        best = v.alike[0]
        return f"it looks like: {best.name} ({best.gain:+.0f} nats; leaves {best.left:.2f} x the legal differences)"
    if v.nearest is not None and v.finding == "diverges":
        return (f"it looks like no fault of the catalogue; the nearest, {v.nearest.name}, leaves {v.nearest.left:.3g} "
                "x the legal differences")  # fmt: skip
    return ""


def verdict_page(v: Verdict, buckets: Sequence[str] = ()) -> str:
    """The page: no scripts, no network."""
    bad = "" if v.finding == "agrees" else " bad"
    rows = "".join(
        f'<tr><td>{escape(e.name)}</td><td class="num">{e.gain:+.0f}</td><td class="num">{e.left:.2f}</td></tr>'
        for e in v.alike
    )
    head = "<tr><th>fault</th><th>nats over clean</th><th>left, x legal</th></tr>"
    found = f'<h2>What explains it</h2><section><table class="plain">{head}{rows}</table></section>' if rows else ""
    unseen = [listed("blind to", v.unseen)] if v.unseen else []
    lines = "".join(f"<p>{escape(line)}</p>" for line in (*v.evidence, *v.notes, *unseen, *buckets))
    title = '<!doctype html><html lang="en"><meta charset="utf-8"><title>qwen35-moe probe</title>'
    return (f'{title}<style>{STYLE}</style><main>'
            f'<h1>qwen35-moe probe</h1><div class="verdict{bad}"><b>{escape(v.finding)}</b><p>{escape(v.why)}</p>'
            f"<p>{escape(_looks(v))}</p></div><h2>Evidence, {v.positions} positions of {v.sequences} prompts</h2>"
            f"<section>{lines}</section>{found}</main></html>\n")  # fmt: skip
