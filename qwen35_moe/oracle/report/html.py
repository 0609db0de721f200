"""A comparison as one page of HTML: no scripts, no network, readable without colour."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from ...numerics.tap_keys import base_name
from ..judge.records import Comparison, Record, ratio_text
from .page_parts import ADDED, COLOURS, FITTED, INHERITED, LEGAL_ERROR, LINES, ROUTING_NOTE, linked, page_head, say
from .text import GOOD_FIT, SYMBOLS, facts, grid, row_text, short, worst


def html(result: Comparison, title: str = "qwen35-moe compare", made: Mapping[str, str] | None = None) -> str:
    """The page. made: label -> text of more facts: version, command, date."""
    bad = result.exit_code != 0
    mark = "&#10007;" if bad else "&#10003;"
    where = worst(result.first) if result.first else ""
    parts = [page_head(title),
             f'<div class="verdict{" bad" if bad else ""}"><b>{mark} {escape(result.verdict)}</b>',
             *(f"<p>{linked(str(d))}</p>" for d in result.diagnoses[:1]), f"<p>{escape(where)}</p></div>"]  # fmt: skip
    parts += [part(result) for part in (_diagnoses, _heat, _growth, _routing, _rest)]
    parts.append(_facts(result, made or {}))
    return "".join(parts) + "</main></html>\n"


def _head(names: Mapping[str, str]) -> str:
    """A row of names of columns, each with its class."""
    return "<tr>" + "".join(f'<th class="{kind}">{name}</th>' for name, kind in names.items()) + "</tr>"


def _bar(share: float) -> str:
    return f'<span class="bar" style="width:{220 * max(min(share, 1), 0):.0f}px"></span>'


def _diagnoses(result: Comparison) -> str:
    out = []
    for d in result.diagnoses:
        rows = "".join(
            f'<tr><td>{escape(h.name)}</td><td class="num">{100 * max(h.explains, 0):.1f} %</td>'
            f'<td class="bars">{_bar(h.explains)}</td>'
            f"<td>{escape(h.doc)}</td><td>{linked(h.seen)}</td></tr>"
            for h in d.hypotheses[:6]
        )
        fit = ""
        if d.fit and d.fit_left < GOOD_FIT:
            a, b, c = d.fit
            fit = (f"<p>Least squares: engine = {a:.3f} routed + {b:.3f} gated shared + {c:.3f} ungated shared, "
                   f"{100 * d.fit_left:.2g} % of the error left.</p>{say(FITTED)}")  # fmt: skip
        head = _head({"hypothesis": "", "explains": "num", "": "bars", "what it is": "", "see": ""})
        out.append(f"<h2>Diagnosis</h2><section><p><b>{linked(str(d))}</b></p>"
                   f'<table class="plain">{head}{rows}</table>{fit}</section>')  # fmt: skip
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
    terms = "".join(map(say, (LEGAL_ERROR, ADDED, INHERITED)))
    what = "added by each block on the engine's own input" if result.layers else "inherited from all layers before"
    return (f"<h2>Errors {what}, in units of the legal error (limit {result.limit:g})</h2><section>"
            f'<div class="key">{key}<span>&#9655; first divergence</span></div>{terms}'
            f'<table class="heat"><tr><th>layer</th>{head}</tr>{"".join(rows)}</table></section>')  # fmt: skip


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
    streams = [(int(r.key.split(".")[1]), r.inherited_rel) for r in result.records
               if base_name(r.key) in ("layer_input", "layer_output_sum") and r.inherited_rel]  # fmt: skip
    blocks: dict[int, float] = {}
    for r in result.records:
        if base_name(r.key) in ("attn_output", "mlp_output") and None not in (r.layer, r.added) and r.rel > 0:
            blocks[int(r.layer or 0)] = max(blocks.get(int(r.layer or 0), 0), r.rel)
    lines = {"stream, against the truth (inherited)": sorted(dict(streams).items()),
             "blocks, on the engine's input (added)": sorted(blocks.items())}  # fmt: skip
    values = [v for points in lines.values() for _, v in points if math.isfinite(v) and v > 0]
    if len(values) < 2:
        return ""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    last = max(x for points in lines.values() for x, _ in points)
    W, H, left, top = 860, 220, 60, 12

    def at(x: float, v: float) -> tuple[float, float]:
        height = (math.log10(min(max(v, 10**low), 10**high)) - low) / max(high - low, 1)
        return left + (W - left - 20) * x / max(last, 1), top + (H - top - 30) * (1 - height)

    svg, legend = [f'<svg viewBox="0 0 {W} {H}" width="100%" role="img" aria-label="error by layer">'], []
    for p in range(low, high + 1):
        y = at(0, 10.0**p)[1]
        svg.append(f'<line x1="{left}" x2="{W - 20}" y1="{y:.1f}" y2="{y:.1f}"/>'
                   f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">1e{p}</text>')  # fmt: skip
    for layer in range(0, last + 1, max(1, last // 12)):
        svg.append(f'<text x="{at(layer, 1)[0]:.1f}" y="{H - 8}" text-anchor="middle">{layer}</text>')
    for (name, points), (colour, dash, shape, mark) in zip(lines.items(), LINES, strict=True):
        xy = [at(x, v) for x, v in points if math.isfinite(v)]
        if points:
            legend.append(f'<span style="color:{colour}">{mark} {name}</span>')
            svg.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}" '
                       f'points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in xy)}"/>')  # fmt: skip
        svg += [shape.format(x=x, y=y, colour=colour) for x, y in xy]
    said = " &nbsp; ".join(legend)
    return f"<h2>Relative error by layer</h2><section><p>{said}</p>{''.join(svg)}</svg></section>"


def _routing(result: Comparison) -> str:
    if not result.routing:
        return ""
    rows = []
    for r in result.routing:
        flip = max(r.flips, key=lambda f: f.margin - f.noise, default=None)
        detail = f"largest margin {flip.margin:.2g}, noise {flip.noise:.2g}" if flip else ""
        legal = len(r.flips) - len(r.illegal)
        rows.append(f'<tr><td class="num">{r.layer}</td><td class="num">{r.agree} of {r.tokens}</td>'
                    f'<td class="bars">{_bar(r.agree / max(r.tokens, 1))}</td>'
                    f'<td class="num">{legal}</td><td class="num">{len(r.illegal) + r.nonsense}</td>'
                    f"<td>{detail}</td></tr>")  # fmt: skip
    head = _head({"layer": "num", "agree": "num", "": "bars", "legal flips": "num", "illegal": "num"})
    return f'<h2>Routing</h2><section>{say(ROUTING_NOTE)}<table class="plain">{head}{"".join(rows)}</table></section>'


def _rest(result: Comparison) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(r.key)}</code></td>{_cell(r, result.first)}"
        f"<td>{'' if r.inherited is None else f'{ratio_text(r.inherited)} inherited'}</td>"
        f"<td>{escape(r.note)}</td></tr>"
        for r in result.records if not r.key.startswith("layers.") and r.cls != "missing"
    )  # fmt: skip
    return f"<h2>Outside of the layers</h2><section><table>{rows}</table></section>" if rows else ""


def _facts(result: Comparison, made: Mapping[str, str]) -> str:
    head = [("truth", result.truth), ("engine", result.engine), ("tokens", "{} of {}".format(*result.tokens)),
            ("envelope", ", ".join(result.members)), ("limit", f"{result.limit:g}"),
            ("checkpoint", result.checkpoint), *made.items()]  # fmt: skip
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(told)}</dd>" for name, told in (*head, *facts(result, most=10**6))
    )
    return f"<h2>What was compared</h2><section><dl>{rows}</dl></section>"
