"""A picture of the margin: ratios of clean engines and of faults, on both sides of the limit.

    python -m benchmarks.oracle_score a c --regime "gate 0.5" --save scores.jsonl
    python -m benchmarks.oracle_score c --regime "gate 0.5" --function +a8 --save scores.jsonl
    python -m benchmarks.oracle_score.plot scores.jsonl docs/margin.png

Faults that are seen otherwise (weights, digits, factors) have no ratio, or one that does not decide; they are left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.oracle_score.mutants import IN_STEPS
from qwen35_moe.oracle.judge.envelope import LIMIT

MOST = 1e4  # what is further off is drawn there
ELSEWHERE = ("state in bf16", *IN_STEPS)  # seen by its digits; nothing in one step


def ratios(path: Path) -> dict[str, list[float]]:
    """ "clean" and "fault" -> ratios, in ascending order."""
    found: dict[str, list[float]] = {"clean": [], "fault": []}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["ratio"] and row["name"] not in ELSEWHERE:
            found["clean" if row["kind"] == "clean" else "fault"].append(min(float(row["ratio"]), MOST))
    return {kind: sorted(values) for kind, values in found.items()}


def main() -> None:
    found, out = ratios(Path(sys.argv[1])), Path(sys.argv[2])
    clean, faults = found["clean"], found["fault"]
    figure, axes = plt.subplots(figsize=(6.4, 3.2))
    below = [(i + 1) / len(clean) for i in range(len(clean))]
    beyond = [1 - i / len(faults) for i in range(len(faults))]
    axes.step(clean, below, where="post", color="#2a7f62", label=f"{len(clean)} clean engines: at most this")
    axes.step(faults, beyond, where="pre", color="#b3382c", label=f"{len(faults)} faults: at least this")
    axes.axvline(LIMIT, color="black", linewidth=1, linestyle="--")
    axes.set(xscale="log", ylabel="share", ylim=(0, 1.02))
    axes.set_xlabel(f"ratio, in legal errors (dashed: the limit, {LIMIT:g})")
    axes.legend(loc="center left", frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=100)
    left, right = LIMIT / max(clean), min(faults) / LIMIT
    print(
        f"worst clean {max(clean):.2f}, limit {LIMIT:g} (x {left:.2f}), least fault {min(faults):.2f} (x {right:.2f})"
    )


if __name__ == "__main__":
    main()
