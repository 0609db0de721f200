"""The devices of a rerun, and the messages of its progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...run.load import usable
from ...trace.progress import show, time_left

SECONDS_BETWEEN_LINES = 10.0  # seconds between two lines of progress in a file


@dataclass(frozen=True)
class Where:
    """device, device_map, mode and ignore_config_keys are as of `load`: a map gives each layer's device, "auto" and
    other words spread the layers evenly over all GPUs. quiet: print nothing to stderr."""

    device: str = "cpu"
    device_map: str | Mapping[str, Any] | None = None
    mode: str | None = None
    quiet: bool = True
    ignore_config_keys: tuple[str, ...] = ()

    def of(self, part: str, layers: int) -> torch.device:
        """The device of "layers.3", "embed_tokens", "norm" or "lm_head"."""
        if self.device_map is None:
            return usable(self.device, f"device {self.device}")
        if isinstance(self.device_map, Mapping):
            found = [key for key in self.device_map if key in ("", part) or part.startswith(f"{key}.")]
            name = self.device_map[max(found, key=len)] if found else "cpu"
            name = f"cuda:{name}" if isinstance(name, int) else "cpu" if name == "disk" else str(name)
            return usable(name, f"device_map {part}")
        if not (count := torch.cuda.device_count()):
            return torch.device("cpu")
        layer = int(part.rpartition(".")[2]) if part.startswith("layers.") else layers - 1
        return torch.device("cuda", layer * count // layers)

    def progress(self, done: int, layers: int, arithmetics: int, begin: float, said: float) -> float:
        """Print that `done` layers are done, unless the last message is recent. Returns the time of the last
        message."""
        now, tty = time.monotonic(), sys.stderr.isatty()
        if self.quiet or (not tty and now - said < SECONDS_BETWEEN_LINES):
            return said
        text = f"layer {done}/{layers}  run again under {arithmetics} arithmetics  {time_left(begin, done, layers)}"
        show(text, end="" if tty and done < layers else "\n")
        return now


HERE = Where()
