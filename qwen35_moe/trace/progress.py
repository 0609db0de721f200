"""Where a long run is, said on stderr."""

from __future__ import annotations

import sys
import time

from torch import Tensor

from ..model.text import Model
from ..numerics.taps import Handler, Site
from ..run.origin import origin_of


class Progress(Handler):
    """A tap handler that says on stderr where a run is: layer, experts done of those hit, GB read, time left."""

    sees_experts = False

    def __init__(self, model: Model, layers: range, quiet: bool = False, label: str = ""):
        self.reader, self.layers, self.quiet = origin_of(model).checkpoint.reader, layers, quiet
        self.label = f"{label}  " if label else ""
        self.begin, self.layer, self.hit, self.expert, self.said = time.monotonic(), layers.start, 0, 0, 0.0

    def __call__(self, site: Site, x: Tensor) -> None:
        if site.name in ("moe_topk_ids", "moe_slot_ids"):  # the latter where the shared expert is fused: a slot more
            self.hit, self.expert = len(x.unique()), 0
        if site.name == "moe_expert_down":
            self.expert += 1
            if sys.stderr.isatty() and time.monotonic() - self.said > 0.2:
                self.say(end="")

    def done(self, layer: int) -> None:
        self.layer = layer + 1
        self.say(end="" if sys.stderr.isatty() and self.layer < self.layers.stop else "\n")

    def say(self, end: str = "\n") -> None:
        self.said = time.monotonic()
        left = time_left(self.begin, self.layer - self.layers.start, len(self.layers))
        read = self.reader.bytes_read / 1e9
        text = f"layer {self.layer}/{self.layers.stop}  expert {self.expert}/{self.hit}  {read:.1f} GB read  {left}"
        if not self.quiet:
            show(f"{self.label}{text}", end)


def time_left(begin: float, done: int, of: int) -> str:
    """In words, from when a run began and how many of its layers are done."""
    return f"{(time.monotonic() - begin) / done * (of - done):.0f} s left" if done else "time left not known yet"


def show(text: str, end: str = "\n") -> None:
    """Writes a line to stderr; on a terminal, in the place of the line before."""
    print(f"\r\033[K{text}" if sys.stderr.isatty() else text, end=end, file=sys.stderr, flush=True)
