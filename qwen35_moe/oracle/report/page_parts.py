"""What pages are made of: style, sections, tables, and links to the issues that they cite."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import zip_longest

STYLE = """
:root{--ink:#1b1f24;--soft:#5d6670;--line:#d8dde3;--paper:#fff;--wash:#f5f7f9;--bad:#b3261e;--good:#1a6b3c}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;color:var(--ink);background:var(--wash);margin:0}
main{max-width:1320px;margin:0 auto;padding:28px 24px 60px}
h1{font-size:15px;font-weight:600;color:var(--soft);margin:0 0 10px}h2{font-size:17px;margin:34px 0 10px}
ul{margin:0;padding-left:18px}
section,.verdict{background:var(--paper);border:1px solid var(--line);border-radius:8px;padding:16px 20px}
section{overflow-x:auto}
.verdict{border-left:8px solid var(--good)}.verdict.bad{border-left-color:var(--bad)}
.verdict b{font-size:21px;display:block;overflow-wrap:anywhere}
.verdict p{margin:4px 0 0;color:var(--soft)}
table{border-collapse:separate;border-spacing:2px;font-variant-numeric:tabular-nums}
th{font-weight:500;color:var(--soft);text-align:right;padding:2px 8px;font-size:13px;white-space:nowrap}
td.c{text-align:right;padding:2px 1px 2px 3px;border:2px solid transparent;border-radius:4px;white-space:nowrap}
td.c,.heat th{font-size:12px}td.c i{font-style:normal;font-weight:700;display:inline-block;width:1em;text-align:center}
.heat th{padding:2px 3px;vertical-align:bottom}.heat th:first-child{position:sticky;left:0;background:var(--paper)}
td.suspicious{background-image:repeating-linear-gradient(45deg,#0000 0 12px,#0001 12px 14px)}
td.wrong{background-image:repeating-linear-gradient(45deg,#0000 0 6px,#0001 6px 8px);font-weight:700}
td.first{border-color:#000}
.key span{display:inline-block;padding:2px 9px;margin:0 8px 6px 0;border-radius:4px;font-size:13px}
.bar{height:14px;background:#456b9c;border-radius:3px;display:block;min-width:1px}
.plain td{padding:3px 14px 3px 0;vertical-align:top}.num{text-align:right;white-space:nowrap}
.plain th{text-align:left;padding-left:0}.plain th.num{text-align:right}
dl{display:grid;grid-template-columns:130px 1fr;gap:4px 12px;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
code{font-size:13px;overflow-wrap:anywhere}
svg text{font:12px system-ui,sans-serif;fill:var(--soft)}svg line{stroke:var(--line)}
td.c,.key span[style]{color:#1b1f24}.say{color:var(--soft);margin:6px 0 10px}a{color:inherit}
:root{color-scheme:light dark;--one:#2b5c94;--two:#a8501f}
@media(prefers-color-scheme:dark){
:root{--ink:#e6e8eb;--soft:#a3acb5;--line:#3a4149;--paper:#1d2126;--wash:#14171a;--bad:#ff8a7a;--good:#6fd39a}
:root{--one:#8ab4e8;--two:#f0a878}td.first{border-color:#fff}}
@media(max-width:700px){svg{min-width:560px}
main{padding:12px 8px 30px}section,.verdict{padding:10px}.verdict b{font-size:17px}
dl{grid-template-columns:1fr}dt{margin-top:6px}.bars{display:none}
.plain td{overflow-wrap:anywhere;padding:3px 6px 3px 0;font-size:13px}}
@media print{body{font-size:10px;background:#fff}main{padding:0;max-width:none}section,.verdict{padding:6px;border:0}
h1,h2{font-size:12px;margin:8px 0 2px;break-after:avoid}
.verdict b{font-size:15px}th{font-size:10px}
td.c,.heat th,.key span{font-size:8px;padding:0 1px}
.plain td{padding:0 6px 0 0}svg{max-height:120px}*{print-color-adjust:exact}}
"""
# An issue in which a fault was seen is cited as "sglang 22948"; this is the repository on GitHub.
REPOSITORIES = {
    "sglang": "sgl-project/sglang", "vllm": "vllm-project/vllm", "llama.cpp": "ggml-org/llama.cpp",
    "ollama": "ollama/ollama", "flashinfer": "flashinfer-ai/flashinfer", "ATOM": "ROCm/ATOM", "aiter": "ROCm/aiter",
    "TensorRT-LLM": "NVIDIA/TensorRT-LLM", "transformers": "huggingface/transformers",
    "Automodel": "NVIDIA-NeMo/Automodel", "FlyDSL": "ROCm/FlyDSL",
}  # fmt: skip


def page(title: str, verdict: str, said: Sequence[str], bad: bool, *parts: str) -> str:
    """A page: a verdict, which is `bad` or not, what is said of it, a paragraph each, and the parts. All but the title
    is HTML."""
    head = escape(title)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{head}</title><style>{STYLE}</style><main><h1>{head}</h1>"
        f'<div class="verdict{" bad" * bad}"><b>{verdict}</b>{"".join(f"<p>{line}</p>" for line in said)}</div>'
        f"{''.join(parts)}</main></html>\n"
    )


def section(title: str, *content: str) -> str:
    return f"<h2>{escape(title, quote=False)}</h2><section>{''.join(content)}</section>"


def html_table(columns: Mapping[str, str], rows: Sequence[Sequence[object]]) -> str:
    """columns: name -> class of its cells; cells beyond them have none."""
    kinds = [f' class="{kind}"' if kind else "" for kind in columns.values()]
    lines = ["".join(f"<th{kind}>{name}</th>" for kind, name in zip(kinds, columns, strict=True))]
    lines += ["".join(f"<td{k}>{cell}</td>" for k, cell in zip_longest(kinds, row, fillvalue="")) for row in rows]
    return f'<table class="plain">{"".join(f"<tr>{line}</tr>" for line in lines)}</table>'


def say(text: str) -> str:
    return f'<p class="say">{escape(text)}</p>'


def linked(text: str) -> str:
    """The text as HTML, with a link at each number of an issue."""
    names = "|".join(map(re.escape, REPOSITORIES))
    owners = {name.lower(): path for name, path in REPOSITORIES.items()}

    def links(match: re.Match[str]) -> str:
        where = f"https://github.com/{owners[match[1].lower()]}/issues/"
        return match[1] + re.sub(r"\d+", lambda n: f'<a href="{where}{n[0]}">{n[0]}</a>', match[2])

    return re.sub(rf"\b({names})((?:,? #?\d{{2,6}}\b)+)", links, escape(text), flags=re.I)
