"""A pytest plugin: `--qwen35-report PATH` writes all checks of a session, as a page, JSON, or SARIF by PATH's ending.

pytest loads it by its entry point, `qwen35_moe`.
"""

from __future__ import annotations

import json
import os
from html import escape
from pathlib import Path
from typing import Any


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
        path.write_text(FORMS[path.suffix](self.found), encoding="utf-8")


def as_page(found: list[dict[str, Any]]) -> str:
    """A page, failed checks first."""
    from . import __version__
    from .oracle.report.page_parts import page

    rows = []
    for check in sorted(found, key=lambda check: check["ok"]):
        cells = (check["test"], check["case"], check["verdict"], check["text"])
        kind = "" if check["ok"] else ' style="color:var(--bad)"'
        rows.append(f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>\n")
    bad = sum(not check["ok"] for check in found)
    said = [f"qwen35-moe {__version__}; limit: 3.0 times the largest legal error."]
    return page(
        "qwen35-moe checks", f"{bad} of {len(found)} checks failed", said, bool(bad),
        '<section style="overflow-wrap:anywhere"><table class="plain">'
        "<tr><th>test</th><th>case</th><th>verdict</th><th>what was found</th></tr>\n",
        *rows, "</table></section>",
    )  # fmt: skip


def as_json(found: list[dict[str, Any]]) -> str:
    """JSON, which has no infinity: null."""
    checks = [{key: None if value in (float("inf"), float("-inf")) or value != value else value
               for key, value in check.items()} for check in found]  # fmt: skip
    return json.dumps({"format": "qwen35-moe checks", "version": 1, "checks": checks})


def as_sarif(found: list[dict[str, Any]]) -> str:
    """SARIF 2.1.0, which code hosts show beside the lines: one result for each check that failed."""
    from .cli.sarif import sarif_log

    bad = ((check, check["test"].partition("::")[0] or "tests") for check in found if not check["ok"])
    results = ((check["output"], "error", f"{check['test']}: {check['text']}", file, None) for check, file in bad)
    return json.dumps(sarif_log("qwen35-moe", results))


FORMS = {".html": as_page, ".json": as_json, ".sarif": as_sarif}


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
