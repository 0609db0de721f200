"""The oracle's score on checkpoints that nothing was chosen by: other widths, seeds, patterns of layers and layouts.

    python -m benchmarks.oracle_score [a b c d] [--regime "gate 0.05"] [--function +a8] [--processes N]

Each is built; then every fault of the catalogue, faults that it lacks and clean variants are planted.
One regime of one checkpoint takes about two minutes of one core; --processes shares them out.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.oracle_score import mutants, score
from benchmarks.oracle_score.mutants import Found
from benchmarks.oracle_score.tasks import CHECKPOINTS, PARTS, Task, score_of
from qwen35_moe.numerics.tables import A8


def save(file: Path, task: Task, found: Found) -> None:
    head = {"checkpoint": task.name, "function": task.function, "seed": task.seed}
    with file.open("a", encoding="utf-8") as out:
        for kind, outcomes in zip(("planted", "foreign", "clean"), found, strict=True):
            out.writelines(json.dumps({**head, "kind": kind, **asdict(o)}) + "\n" for o in outcomes)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", choices=[*CHECKPOINTS, []], default=[])
    parser.add_argument("--regime", action="append", choices=mutants.REGIMES, help="default: all")
    parser.add_argument("--function", default="", choices=["", *A8], help="what the engine does to activations")
    parser.add_argument("--seed", type=int, default=0, help="added to the checkpoints' seeds: others of their kind")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--save", type=Path, help="append what became of each fault and variant, one JSON object a line"
    )
    options = parser.parse_args()
    wanted = [(name, regime) for regime in options.regime or mutants.REGIMES for name in options.names or CHECKPOINTS]
    everything: dict[tuple[str, str], Found] = {key: ([], [], []) for key in wanted}
    with TemporaryDirectory() as folder, get_context("spawn").Pool(options.processes) as pool:
        tasks = [
            Task(name, options.function, regime, options.seed, part, Path(folder))
            for name, regime in wanted for part in range(PARTS)
        ]  # fmt: skip
        for number, (task, found) in enumerate(pool.imap_unordered(score_of, tasks), 1):
            for all_of_kind, some in zip(everything[task.name, task.regime], found, strict=True):
                all_of_kind += some
            if options.save is not None:
                save(options.save, task, found)
            print(f"{number}/{len(tasks)}  {task.name}{task.function}, {task.regime}", file=sys.stderr, flush=True)
    for (name, regime), found in everything.items():
        recipe, sizes = CHECKPOINTS[name][1], CHECKPOINTS[name][3]
        what = f"{name}: {recipe}{options.function}, width {sizes['hidden_size']}, {regime}"
        print(f"{what}\n\n{score.table(*found)}\n")
    every = zip(*everything.values(), strict=True)
    print("\n".join(["All of them", "", *score.scores(*([o for some in kind for o in some] for kind in every))]))


if __name__ == "__main__":
    main()
