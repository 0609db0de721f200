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

# public name -> (module, name in it; "" for the module itself)
_PUBLIC = {
    "KEEP": ("numerics.arithmetics", "KEEP"),
    "Arithmetic": ("numerics.arithmetics", "Arithmetic"),
    "Cache": ("model.cache", "Cache"),
    "Config": ("model.config", "Config"),
    "Model": ("model.text", "Model"),
    "Sampling": ("run.generate", "Sampling"),
    "arithmetic": ("numerics.arithmetics", ""),
    "can_fuse_shared_expert": ("gate.decide", "can_fuse_shared_expert"),
    "capture_transformers": ("oracle.dumps.readers.transformers", "capture_transformers"),
    "compare": ("oracle.compare", "compare"),
    "diagnose": ("oracle.compare", "diagnose"),
    "embed_prompt": ("run.prompt", "embed_prompt"),
    "fault_names": ("oracle.play", "fault_names"),
    "generate": ("run.generate", "generate"),
    "load": ("run.load", "load"),
    "origin_of": ("run.origin", "origin_of"),
    "play_engine": ("oracle.play", "play_engine"),
    "quant": ("quant", ""),
    "read_dump": ("oracle.dumps.readers", "read_dump"),
    "report": ("oracle.report", "report"),
    "score": ("run.generate", "score"),
    "tables": ("numerics.tables", ""),
    "tap_names": ("numerics.tap_table", ""),
    "taps": ("numerics.taps", ""),
    "trace": ("trace.recorder", "trace"),
    "write_truth": ("oracle.truth", "write_truth"),
}
__all__ = [
    "KEEP",
    "Arithmetic",
    "Cache",
    "Config",
    "Model",
    "Qwen35Error",
    "Sampling",
    "arithmetic",
    "can_fuse_shared_expert",
    "capture_transformers",
    "compare",
    "diagnose",
    "embed_prompt",
    "fault_names",
    "generate",
    "load",
    "origin_of",
    "play_engine",
    "quant",
    "read_dump",
    "report",
    "score",
    "tables",
    "tap_names",
    "taps",
    "trace",
    "write_truth",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, attribute = _PUBLIC[name]
    module = import_module(f"{__name__}.{module_name}")
    value = getattr(module, attribute) if attribute else module
    globals()[name] = value
    return value


class _Package(ModuleType):
    """The import system sets a subpackage as attribute of its package: `qwen35_moe.trace` must stay the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and _PUBLIC.get(name, ("", ""))[1]):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
