"""Runs inside of SGLang's scheduler: reads before each forward pass which bug is wanted, and plants it.

SGLang calls `factory` for its `forward_hooks` argument, once a model. The wish is a file, `control.json`
{"run": folder name of the dump, "bug": a name}: so one engine, which takes two minutes to start, serves many bugs.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from . import sglang_images
from .sglang_bugs import PLANT


class Site:
    """A running engine, and how to take back what was done to it."""

    def __init__(self, runner: Any):
        self.runner, self.undo = runner, list[Callable[[], None]]()
        self.passes = 0  # forward passes since the bug was planted
        self.before: list[Callable[[Any], None]] = []  # run before each of them, on the batch

    @property
    def model(self) -> Any:
        return self.runner.model.model

    @property
    def rank(self) -> int:
        return int(self.runner.ps.tp_rank)

    def set(self, weight: Tensor, new: Tensor) -> None:
        """Other bytes in the same memory, which kernels may hold on to."""
        old = weight.detach().clone()
        weight.data.copy_(new)
        self.undo.append(lambda: weight.data.copy_(old))

    def patch(self, owner: Any, name: str, value: Any) -> None:
        own, old = name in vars(owner), getattr(owner, name)
        setattr(owner, name, value)
        self.undo.append(lambda: setattr(owner, name, old) if own else delattr(owner, name))

    def wrap(self, module: Any, around: Callable[..., Any]) -> None:
        """`around(forward, *args, **kwargs)` in place of a module's forward; hooks see what it returns."""
        forward = module.forward
        self.patch(module, "forward", lambda *a, **k: around(forward, *a, **k))

    def clear(self) -> None:
        while self.undo:
            self.undo.pop()()


class Planter:
    def __init__(self, folder: Path):
        self.folder, self.text = folder, ""
        self.site: Site | None = None

    def prepare(self, runner: Any, batch: Any) -> None:
        text = (self.folder / "control.json").read_text()
        if text != self.text:
            self.text = text
            self._plant(runner, json.loads(text))
        if self.site is not None:
            for act in self.site.before:
                act(batch)

    def _plant(self, runner: Any, wish: dict[str, str]) -> None:
        from sglang.srt.debug_utils.dumper import dumper

        if self.site is not None:
            self.site.clear()
        self.site = Site(runner)
        dumper.configure(enable=bool(wish["run"]), exp_name=wish["run"] or "none")
        dumper._state.step = dumper._state.dump_index = 0
        try:
            plant = (sglang_images.PLANT if runner.model_config.is_multimodal else PLANT).get(wish["bug"])
            if plant is not None:
                plant(self.site)
        except Exception:
            (self.folder / f"not-planted-{wish['bug']}.txt").write_text(traceback.format_exc())


def factory(config: dict[str, str]) -> Callable[..., None]:
    from sglang.srt.model_executor.model_runner import ModelRunner

    if "planter" not in vars(ModelRunner):
        forward, planter = ModelRunner.forward, Planter(Path(config["folder"]))

        def planted(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.is_draft_worker:
                planter.prepare(self, batch)
            out = forward(self, batch, *args, **kwargs)
            if not self.is_draft_worker and planter.site is not None:
                planter.site.passes += 1
            return out

        ModelRunner.planter, ModelRunner.forward = planter, planted
    return lambda module, inputs, output: None
