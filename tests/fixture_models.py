"""The checkpoints of tests/data/fixtures as modules."""

from __future__ import annotations

from pathlib import Path

import torch

import qwen35_moe as q
from qwen35_moe.model.mtp import MTP
from qwen35_moe.model.vision.tower import VisionTower

FIXTURES = Path(__file__).parent / "data" / "fixtures"


def read(name: str, dtype: torch.dtype) -> tuple[q.Model, MTP, VisionTower]:
    """Main model, draft head and vision tower of a fixture, decoded to `dtype` (float64: arithmetic exact)."""
    model = q.load(FIXTURES / name, "exact" if dtype == torch.float64 else "float32", "unfused")
    assert model.mtp is not None and model.visual is not None
    return model, model.mtp, model.visual
