"""A reference implementation of Qwen3.5 MoE: the model in exact arithmetic, and an oracle for engines.

Public names are imported when they are first used, so that `qwen35-moe --help` need not wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import Qwen35Error

if TYPE_CHECKING:
    from . import quant
    from .gate.decide import can_fuse_shared_expert
    from .model.cache import Cache
    from .model.config import Config
    from .model.text import Model
    from .numerics import arithmetics as arithmetic
    from .numerics import tables, taps
    from .numerics import tap_table as tap_names
    from .numerics.arithmetics import KEEP, Arithmetic
    from .oracle.compare import compare, diagnose
    from .oracle.dumps.readers import read_dump
    from .oracle.dumps.readers.transformers import capture_transformers
    from .oracle.play import fault_names, play_engine
    from .oracle.report import report
    from .oracle.truth import write_truth
    from .run.generate import Sampling, generate, score
    from .run.load import load
    from .run.origin import origin_of
    from .run.prompt import embed_prompt
    from .trace.recorder import trace

__version__ = "0.1.0"

# module -> the public names in it; and modules that are public, under the name that they have here
_NAMES_IN = {
    "gate.decide": "can_fuse_shared_expert", "model.cache": "Cache", "model.config": "Config", "model.text": "Model",
    "numerics.arithmetics": "KEEP Arithmetic", "oracle.compare": "compare diagnose", "oracle.report": "report",
    "oracle.dumps.readers": "read_dump", "oracle.dumps.readers.transformers": "capture_transformers",
    "oracle.play": "fault_names play_engine", "oracle.truth": "write_truth", "run.generate": "Sampling generate score",
    "run.load": "load", "run.origin": "origin_of", "run.prompt": "embed_prompt", "trace.recorder": "trace",
}  # fmt: skip
_MODULES = {"arithmetic": "numerics.arithmetics", "quant": "quant", "tables": "numerics.tables",
            "tap_names": "numerics.tap_table", "taps": "numerics.taps"}  # fmt: skip
_MODULE_OF = {name: module for module, names in _NAMES_IN.items() for name in names.split()}
__all__ = [
    "KEEP", "Arithmetic", "Cache", "Config", "Model", "Qwen35Error", "Sampling", "arithmetic", "can_fuse_shared_expert",
    "capture_transformers", "compare", "diagnose", "embed_prompt", "fault_names", "generate", "load", "origin_of",
    "play_engine", "quant", "read_dump", "report", "score", "tables", "tap_names", "taps", "trace", "write_truth",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name) or _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: Any = import_module(f"{__name__}.{module}")
    globals()[name] = value = getattr(value, name) if name in _MODULE_OF else value
    return value


class _Package(ModuleType):
    """The import system sets a subpackage as attribute of its package: `qwen35_moe.trace` must stay the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _MODULE_OF):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
