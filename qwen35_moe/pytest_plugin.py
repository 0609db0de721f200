"""A pytest plugin: `--qwen35-report PATH` writes all checks of a session, as a page, JSON, or SARIF by PATH's ending.

pytest loads it by its entry point, `qwen35_moe`.
"""

from __future__ import annotations

import html
import json
import os
from pathlib import Path
from typing import Any

FORMS = (".html", ".json", ".sarif")
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>qwen35-moe checks</title><style>
:root{{color-scheme:light dark;--bad:#b00020}}@media(prefers-color-scheme:dark){{:root{{--bad:#ff8a80}}}}
body{{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem}}
table{{border-collapse:collapse;width:100%}}td,th{{text-align:left;padding:.25rem .6rem;border-bottom:1px solid #8886}}
td{{overflow-wrap:anywhere}}.bad{{color:var(--bad);font-weight:600}}
@media(max-width:700px){{th{{display:none}}td,tr{{display:block}}td{{border:0}}tr{{border-bottom:1px solid #8886}}}}
</style>
<h1>{bad} of {count} checks failed</h1><p>qwen35-moe {version}; limit: 3.0 times the largest legal error.</p>
<table><tr><th>test</th><th>case</th><th>verdict</th><th>what was found</th></tr>
{rows}</table></html>
"""


class Report:
    """Collects the checks of a session, and the tests that made them."""

    def __init__(self, path: Path):
        self.path = path
        self.test = ""
        self.found: list[dict[str, Any]] = []

    def __call__(self, check: Any) -> None:
        self.found.append({"test": self.test, "text": str(check), **check.to_dict()})

    def pytest_runtest_setup(self, item: Any) -> None:
        self.test = item.nodeid

    def pytest_sessionfinish(self, session: Any) -> None:
        worker = os.environ.get("PYTEST_XDIST_WORKER")  # each process writes the checks that it made
        if worker is None and session.config.pluginmanager.hasplugin("dsession"):
            return
        path = self.path if worker is None else self.path.with_stem(f"{self.path.stem}-{worker}")
        path.write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """The report, in the form that the path's ending asks for."""
        if self.path.suffix == ".json":
            return json.dumps({"format": "qwen35-moe checks", "version": 1, "checks": [finite(c) for c in self.found]})
        return self.sarif() if self.path.suffix == ".sarif" else self.page()

    def page(self) -> str:
        from . import __version__

        rows = []
        for check in sorted(self.found, key=lambda check: check["ok"]):  # failed ones first
            cells = (check["test"], check["case"], check["verdict"], check["text"])
            kind = "" if check["ok"] else ' class="bad"'
            rows.append(f"<tr{kind}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>\n")
        bad = sum(not check["ok"] for check in self.found)
        return PAGE.format(bad=bad, count=len(self.found), version=__version__, rows="".join(rows))

    def sarif(self) -> str:
        """SARIF 2.1.0, which code hosts show beside the lines: one result for each check that failed."""
        from . import __version__

        results = []
        for check in self.found:
            if check["ok"]:
                continue
            place = {"artifactLocation": {"uri": check["test"].partition("::")[0] or "tests"}}
            results.append({
                "ruleId": check["output"], "level": "error", "message": {"text": f"{check['test']}: {check['text']}"},
                "locations": [{"physicalLocation": place}],
            })  # fmt: skip
        rules = [{"id": name} for name in sorted({check["output"] for check in self.found})]
        driver = {"name": "qwen35-moe", "version": __version__, "rules": rules}
        schema = "https://json.schemastore.org/sarif-2.1.0.json"
        return json.dumps(
            {"$schema": schema, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}
        )


def finite(check: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: null."""
    infinite = (float("inf"), float("-inf"))
    return {key: None if value in infinite or value != value else value for key, value in check.items()}


def pytest_addoption(parser: Any) -> None:
    text = "write all checks of qwen35_moe.testing to PATH (.html, .json or .sarif)"
    parser.getgroup("qwen35-moe").addoption("--qwen35-report", metavar="PATH", help=text)


def pytest_configure(config: Any) -> None:
    path = config.getoption("--qwen35-report")
    if path is None:
        return
    if Path(path).suffix not in FORMS:
        import pytest

        raise pytest.UsageError(f"--qwen35-report {path}: expected a path that ends in {', '.join(FORMS)}")
    from .testing.checks import LISTENERS  # here: sessions without a report need not wait for torch

    report = Report(Path(path).absolute())
    LISTENERS.append(report)
    config.add_cleanup(lambda: LISTENERS.remove(report))
    config.pluginmanager.register(report, "qwen35-moe-report")
