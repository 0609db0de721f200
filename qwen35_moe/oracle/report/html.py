"""A comparison as one page of HTML: no scripts, no network, readable without colour."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from ...numerics.tap_keys import base_name
from ..judge.records import Comparison, Record, layer_of, ratio_text
from .page_parts import html_table, linked, page, say, section
from .text import GOOD_FIT, SYMBOLS, facts, grid, row_text, short, worst

# From bit-equal to wrong: light to dark in grey too.
COLOURS = {"bit-equal": "#eef3f8", "within rounding": "#d5e5f2", "suspicious": "#f6d58b", "wrong": "#ee9a80",
           "not comparable": "#e4e4e4"}  # fmt: skip

TERMS = (
    "Legal error: the largest error that the roundings of correct engines make at a tap. "
    "Bit-equal: equal to the truth, rounded once.",
    "Added: the error of one block. The block runs again in float64 on the engine's own input, "
    "so errors of earlier layers do not count.",
    "Inherited: the error against the truth. Errors of all earlier layers are in it.",
)
ROUTING_NOTE = (
    "A set agrees if float64 chooses the same experts on the engine's own input to that layer. "
    "The truth has other inputs, and may choose others. "
    "A flip is legal if the margin of the logits is within their noise."
)
FITTED = "The factors that bring the block's parts closest to the engine's output. Right factors are 1, 1 and 0."
# Of each line: its name, its colour, its dashes, a point of it, and its mark in the legend.
LINES = (
    ("stream, against the truth (inherited)", "var(--one)", "",
     '<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>', "&#9679;&mdash;"),
    ("blocks, on the engine's input (added)", "var(--two)", "6 4",
     '<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="var(--paper)" stroke="{colour}"/>', "&#9675;- -"),
)  # fmt: skip


def html(result: Comparison, title: str = "qwen35-moe compare", made: Mapping[str, str] | None = None) -> str:
    """The page. made: label -> text of more facts: version, command, date."""
    said = [linked(str(d)) for d in result.diagnoses[:1]] + [escape(worst(result.first) if result.first else "")]
    verdict = f"{'&#10007;' if result.exit_code else '&#10003;'} {escape(result.verdict)}"
    parts = [part(result) for part in (_diagnoses, _heat, _growth, _routing, _rest)]
    return page(title, verdict, said, bool(result.exit_code), *parts, _facts(result, made or {}))


def _bar(share: float) -> str:
    return f'<span class="bar" style="width:{220 * max(min(share, 1), 0):.0f}px"></span>'


def _diagnoses(result: Comparison) -> str:
    out = []
    for d in result.diagnoses:
        rows = [(escape(h.name), f"{100 * max(h.explains, 0):.1f} %", _bar(h.explains), escape(h.doc), linked(h.seen))
                for h in d.hypotheses[:6]]  # fmt: skip
        fit = ""
        if d.fit and d.fit_left < GOOD_FIT:
            a, b, c = d.fit
            fit = (f"<p>Least squares: engine = {a:.3f} routed + {b:.3f} gated shared + {c:.3f} ungated shared, "
                   f"{100 * d.fit_left:.2g} % of the error left.</p>{say(FITTED)}")  # fmt: skip
        columns = {"hypothesis": "", "explains": "num", "": "bars", "what it is": "", "see": ""}
        out.append(section("Diagnosis", f"<p><b>{linked(str(d))}</b></p>", html_table(columns, rows), fit))
    return "".join(out)


def _heat(result: Comparison) -> str:
    layers, taps, cells = grid(result)
    if not layers:
        return ""
    key = "".join(f'<span style="background-color:{colour}">{SYMBOLS[c]} {c}</span>' for c, colour in COLOURS.items())
    head = "".join(f'<th title="{t}">{escape(short(t)).replace("_", "<br>")}</th>' for t in taps)
    rows = []
    for layer in layers:
        kind = result.layers[layer] if layer < len(result.layers) else ""
        row = "".join(_cell(cells.get((layer, t)), result.first) for t in taps)
        rows.append(f"<tr><th>{layer} {kind}</th>{row}</tr>")
    what = "added by each block on the engine's own input" if result.layers else "inherited from all layers before"
    return section(f"Errors {what}, in units of the legal error (limit {result.limit:g})",
                   f'<div class="key">{key}<span>&#9655; first divergence</span></div>',
                   *map(say, TERMS),
                   f'<table class="heat"><tr><th>layer</th>{head}</tr>{"".join(rows)}</table>')  # fmt: skip


def _cell(r: Record | None, first: Record | None) -> str:
    if r is None:
        return "<td></td>"
    where = f", worst at {row_text(r)}" if r.worst else ""
    title = escape(f"{r.key}: {r.cls}{where}. {r.equal_to and 'equal to ' + r.equal_to} {r.note}".strip(), quote=True)
    mark = "&#9655; " if r is first else ""
    kind = f"c {r.cls.split()[0]}{' first' if r is first else ''}"
    return (f'<td class="{kind}" style="background-color:{COLOURS[r.cls]}" '
            f'title="{title}">{mark}{ratio_text(r.ratio)} <i>{SYMBOLS[r.cls]}</i></td>')  # fmt: skip


def _growth(result: Comparison) -> str:
    """Relative error of the stream by layer, and of what each layer's blocks add."""
    streams, blocks = dict[int, float](), dict[int, float]()
    for r in result.records:
        layer, name = layer_of(r.key), base_name(r.key)
        if layer is None:  # of a draft head, or in no layer
            continue
        if name in ("layer_input", "layer_output_sum") and r.inherited_rel:
            streams[layer] = r.inherited_rel
        elif name in ("attn_output", "mlp_output") and r.added is not None and r.rel > 0:
            blocks[layer] = max(blocks.get(layer, 0.0), r.rel)
    values = [v for v in (*streams.values(), *blocks.values()) if math.isfinite(v)]
    if len(values) < 2:
        return ""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    last = max((*streams, *blocks))
    W, H, left, top = 860, 220, 60, 12

    def at(x: float, v: float) -> tuple[float, float]:
        height = (math.log10(v) - low) / max(high - low, 1)
        return left + (W - left - 20) * x / max(last, 1), top + (H - top - 30) * (1 - height)

    svg, legend = [f'<svg viewBox="0 0 {W} {H}" width="100%" role="img" aria-label="error by layer">'], []
    for p in range(low, high + 1):
        y = at(0, 10.0**p)[1]
        svg.append(f'<line x1="{left}" x2="{W - 20}" y1="{y:.1f}" y2="{y:.1f}"/>'
                   f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">1e{p}</text>')  # fmt: skip
    for layer in range(0, last + 1, max(1, last // 12)):
        svg.append(f'<text x="{at(layer, 1)[0]:.1f}" y="{H - 8}" text-anchor="middle">{layer}</text>')
    for some, (name, colour, dash, shape, mark) in zip((streams, blocks), LINES, strict=True):
        xy = [at(x, v) for x, v in sorted(some.items()) if math.isfinite(v)]
        if some:
            legend.append(f'<span style="color:{colour}">{mark} {name}</span>')
            svg.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}" '
                       f'points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in xy)}"/>')  # fmt: skip
        svg += [shape.format(x=x, y=y, colour=colour) for x, y in xy]
    return section("Relative error by layer", f"<p>{' &nbsp; '.join(legend)}</p>", *svg, "</svg>")


def _routing(result: Comparison) -> str:
    if not result.routing:
        return ""
    rows = []
    for r in result.routing:
        flip = max(r.flips, key=lambda f: f.margin - f.noise, default=None)
        detail = f"largest margin {flip.margin:.2g}, noise {flip.noise:.2g}" if flip else ""
        legal, illegal = len(r.flips) - len(r.illegal), len(r.illegal) + r.nonsense
        rows.append((r.layer, f"{r.agree} of {r.tokens}", _bar(r.agree / max(r.tokens, 1)), legal, illegal, detail))
    columns = {"layer": "num", "agree": "num", "": "bars", "legal flips": "num", "illegal": "num"}
    return section("Routing", say(ROUTING_NOTE), html_table(columns, rows))


def _rest(result: Comparison) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(r.key)}</code></td>{_cell(r, result.first)}"
        f"<td>{'' if r.inherited is None else f'{ratio_text(r.inherited)} inherited'}</td>"
        f"<td>{escape(r.note)}</td></tr>"
        for r in result.records if not r.key.startswith("layers.") and r.cls != "missing"
    )  # fmt: skip
    return section("Outside of the layers", f"<table>{rows}</table>") if rows else ""


def _facts(result: Comparison, made: Mapping[str, str]) -> str:
    head = [("truth", result.truth), ("engine", result.engine), ("tokens", "{} of {}".format(*result.tokens)),
            ("envelope", ", ".join(result.members)), ("limit", f"{result.limit:g}"),
            ("checkpoint", result.checkpoint), *made.items()]  # fmt: skip
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(told)}</dd>" for name, told in (*head, *facts(result, most=10**6))
    )
    return section("What was compared", f"<dl>{rows}</dl>")
