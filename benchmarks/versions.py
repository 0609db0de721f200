"""A short suite under other versions of Python, torch and transformers, each in an environment of its own.

    python -m benchmarks.versions                          every row of ROWS
    python -m benchmarks.versions 3.14,2.15.0,5.24.*       one row: Python, torch, transformers
    python -m benchmarks.versions 3.12,2.14.0,-            without transformers: the core alone

It needs `uv` (pip install uv), which finds or installs each Python, and keeps the packages in its cache: some GB for
each torch, where the index has CUDA builds. `--no-cache` keeps nothing. Prints one line a row. Exit code 1 if any
failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Python, torch, transformers; what pins them.
ROWS = {
    "3.11,2.14.1,5.19.*": "SGLang 0.5.23",
    "3.12,2.14.0,5.20.*": "vLLM 0.33",
    "3.11,2.13.0,5.23.*": "CI",
    "3.11,2.9.1,5.17.*": "the oldest of each",
    "3.14,2.15.0,5.24.*": "the newest of each",
    "3.12,2.10.0,5.18.*": "",
    "3.13,2.11.0,5.21.*": "",
    "3.13,2.12.1,5.22.*": "",
}
CORE = ("test_model.py", "test_mxfp4.py", "test_testing.py", "test_testing_golden.py", "test_load.py")
WITH_TRANSFORMERS = ("test_parity.py",)
TOOLS = ("pytest>=9", "hypothesis>=6.150", "ml_dtypes>=0.5", "mpmath>=1.3", "safetensors>=0.8", "numpy>=1.26")


def suite(row: str, options: list[str]) -> tuple[bool, str]:
    """Whether the suite passes; the versions that ran, and pytest's last line."""
    python, torch, transformers = row.split(",")
    core = transformers == "-"
    packages = [f"torch=={torch}", *TOOLS, *([] if core else [f"transformers=={transformers}"])]
    command = ["uv", "run", *options, "--quiet", "--no-project", "--isolated", "--python", python]
    command += [part for package in packages for part in ("--with", package)]
    command += ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/{name}" for name in (*CORE, *(() if core else WITH_TRANSFORMERS))]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, "; ".join([lines[-1], *failed[:5]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="PYTHON,TORCH,TRANSFORMERS")
    parser.add_argument("--no-cache", action="store_true", help="keep no package: for small disks")
    args = parser.parse_args()
    worst = 0
    for row in args.rows or ROWS:
        start = time.perf_counter()
        passed, said = suite(row, ["--no-cache"] if args.no_cache else [])
        worst |= not passed
        about = f"{row:20} {ROWS.get(row, ''):18} {time.perf_counter() - start:5.0f} s"
        print(f"{'pass' if passed else 'FAIL'}  {about}  {said}", flush=True)
    return worst


if __name__ == "__main__":
    sys.exit(main())
