"""A reference implementation of Qwen3.5 MoE: the model in exact arithmetic, and an oracle for engines."""

from . import arithmetic, quant, tables, tap_names, taps
from .arithmetic import KEEP, Arithmetic
from .cache import Cache
from .config import Config
from .errors import Qwen35Error
from .generate import Sampling, generate, score
from .load import load
from .model import Model
from .prompt import embed_prompt
from .quant.gate import can_fuse_shared_expert
from .trace import trace

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
    "embed_prompt",
    "generate",
    "load",
    "quant",
    "score",
    "tables",
    "tap_names",
    "taps",
    "trace",
]
__version__ = "0.1.0"
