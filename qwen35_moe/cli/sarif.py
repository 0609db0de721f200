"""SARIF 2.1.0, the form of findings that code hosts show beside the lines: required fields only.

Validated by Microsoft's Sarif.Multitool 5.7.0 (`validate`): no errors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .. import __version__

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif_log(tool: str, found: Iterable[tuple[str, str, str, str, str | None]]) -> dict[str, Any]:
    """One run of a tool. found: (rule, level, text, URI of a file or folder, what in it is meant or None)."""
    rules, results = set[str](), []
    for rule, level, text, uri, inner in found:
        rules.add(rule)
        place: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": uri}}}
        place |= {} if inner is None else {"logicalLocations": [{"fullyQualifiedName": inner}]}
        results.append({"ruleId": rule, "level": level, "message": {"text": text}, "locations": [place]})
    driver = {"name": tool, "version": __version__, "rules": [{"id": rule} for rule in sorted(rules)]}
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}
