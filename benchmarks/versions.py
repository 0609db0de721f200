"""A short suite under other versions of torch and transformers, each in an environment of its own.

    python -m benchmarks.versions                                  the pairs that engines pin (PAIRS)
    python -m benchmarks.versions torch==2.9.1,transformers==5.17  one pair; `torch==2.14.1` alone: the core

Each environment is made in build/versions/, from the index that pip is set to (torch takes some GB of disk where that
index has CUDA builds), and kept: a second run installs nothing. Prints one line a pair. Exit code 1 if any failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
HERE = ROOT / "build/versions"
# What the engines pin: SGLang 0.5.23, vLLM 0.33, and both ends of what pyproject.toml accepts.
PAIRS = (
    "torch==2.14.1,transformers==5.19.*",
    "torch==2.14.0",
    "torch==2.9.1,transformers==5.17.*",
    "torch==2.15.*,transformers==5.23.*",
)
CORE = ("test_model.py", "test_mxfp4.py", "test_testing.py", "test_testing_golden.py", "test_load.py")
WITH_TRANSFORMERS = ("test_parity.py",)
TOOLS = ("pytest>=9", "hypothesis>=6.150", "ml_dtypes>=0.5", "mpmath>=1.3", "safetensors>=0.8", "numpy>=1.26")


def python_of(pair: str) -> Path:
    """The interpreter of the pair's environment, which is made where there is none."""
    folder = HERE / pair.replace("==", "-").replace(",", "_").replace("*", "x")
    python = folder / "bin/python"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        torch, *others = pair.split(",")
        for packages in ((torch,), (*TOOLS, *others)):  # torch alone: left to the resolver it may take another version
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "complete").touch()
    return python


def suite(pair: str) -> tuple[bool, str]:
    """Whether the suite passes, and pytest's last line."""
    files = (*CORE, *(WITH_TRANSFORMERS if "transformers" in pair else ()))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [python_of(pair), "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in files)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, "; ".join([lines[-1], *failed[:5]])


def main(pairs: list[str]) -> int:
    worst = 0
    for pair in pairs or PAIRS:
        start = time.perf_counter()
        try:
            passed, said = suite(pair)
        except subprocess.CalledProcessError as error:
            passed, said = False, f"cannot be installed: {error}"
        worst |= not passed
        print(f"{'pass' if passed else 'FAIL'}  {pair:45} {time.perf_counter() - start:5.0f} s  {said}", flush=True)
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
