"""A comparison as text, as JSON lines and as a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from ...errors import Qwen35Error
from ..judge.records import Comparison
from . import html as page
from . import text as lines


def report(
    result: Comparison, form: str = "text", *, width: int = 80, title: str = "", made: Mapping[str, str] | None = None
) -> str:
    """A comparison in words: "text" for a terminal of `width` columns, "json" (one object a line) or "html" (one page
    with a `title`; made: version, command and date, shown among its facts)."""
    if form == "text":
        return lines.text(result, width)
    if form == "json":
        return jsonl(result)
    if form == "html":
        return page.html(result, title or "qwen35-moe compare", made)
    raise Qwen35Error("no such form of a report", where="report(form)", expected="text, json or html", found=form)


def jsonl(result: Comparison) -> str:
    """One JSON object a line; `type` says what it is. Infinity and NaN are strings."""
    return "\n".join(json.dumps(_plain(row)) for row in result.rows()) + "\n"


def _plain(x: object) -> object:
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    if isinstance(x, dict):
        return {str(k): _plain(v) for k, v in x.items()}
    return [_plain(v) for v in x] if isinstance(x, list | tuple) else x
