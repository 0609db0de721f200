"""`qwen35-moe build RECIPE --out DIR`: a checkpoint with the structure of a real one, from an integer hash."""

from __future__ import annotations

import argparse

from ..weights.build import add_arguments
from ..weights.build import run as run


def configure(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Builds a checkpoint of real names, dtypes and sizes (or small ones). An integer hash draws its values."
    )
    add_arguments(p)
