"""What the process around a model may do to it: the same values, or one clear error."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from forked import Child
from torch import Tensor

import qwen35_moe as q

IDS = (torch.arange(20) * 7919 % 251)[None]
Build = Callable[[str], Path]


@pytest.fixture(scope="module")
def built(small: Build) -> Build:
    return small


def logits(path: Path, arithmetic: str) -> Tensor:
    return q.load(path, arithmetic, text_only=True)(IDS)


@contextmanager
def having(change: Callable[[Any], None], value: object, before: object) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(before)


HOSTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "autocast to bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "default float16": lambda: having(torch.set_default_dtype, torch.float16, torch.float32),
    "default float64": lambda: having(torch.set_default_dtype, torch.float64, torch.float32),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "deterministic": lambda: having(torch.use_deterministic_algorithms, True, False),
}


@pytest.mark.parametrize("host", HOSTS)
def test_the_same_values(host: str, built: Build) -> None:
    for arithmetic in ("float32", "sglang-bf16"):
        with HOSTS[host]():
            found = logits(built("tiny-mxfp4"), arithmetic)
        assert torch.equal(found, logits(built("tiny-mxfp4"), arithmetic))


@pytest.mark.parametrize("device", ["meta", "cuda:77"])
def test_no_values_by_default_is_one_error(device: str, built: Build, tmp_path: Path) -> None:
    model = q.load(built("tiny"), text_only=True)
    with having(torch.set_default_device, device, None):
        with pytest.raises(q.Qwen35Error, match="default device"):
            q.load(built("tiny"))
        with pytest.raises(q.Qwen35Error, match="default device"):
            q.write_truth(built("tiny"), [[1, 2]], tmp_path / "truth")
        with pytest.raises(q.Qwen35Error, match="default device"):
            model(IDS)


def test_every_module_can_be_imported_under_a_default_device_that_is_none() -> None:
    program = """
import importlib, pkgutil, torch
torch.set_default_device("cuda:77")
import qwen35_moe
for module in pkgutil.walk_packages(qwen35_moe.__path__, "qwen35_moe."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("mode", ["decoded", "packed", "stream"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same(mode: str, copied: Callable[[q.Model], q.Model], built: Build) -> None:
    model = q.load(built("tiny-mxfp4"), "sglang-bf16", mode=mode, text_only=True)
    assert torch.equal(copied(model)(IDS), model(IDS))


def test_compiled_models_compute_the_same(built: Build) -> None:
    """Nothing is traced, so that the back end says nothing about values; `eager` needs no C++ compiler."""
    for arithmetic, mode in (("sglang-bf16", "decoded"), ("float32", "stream")):
        model = q.load(built("tiny-mxfp4"), arithmetic, mode=mode, text_only=True)
        alone = model(IDS)
        assert torch.equal(torch.compile(model, backend="eager")(IDS), alone)
        assert torch.equal(torch.compile(lambda ids, m=model: m(ids) + 1, backend="eager")(IDS), alone + 1)
        model.compile()
        assert torch.equal(model(IDS), alone)


def test_threads_do_not_disturb_each_other(built: Build) -> None:
    models = [q.load(built("tiny-mxfp4"), name, text_only=True) for name in ("exact", "sglang-bf16", "float32")]
    alone, found = [m(IDS) for m in models], [torch.empty(0)] * 6

    def run(i: int) -> None:
        found[i] = models[i % 3](IDS)

    threads = [Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], alone[i % 3]) for i in range(6))


def forks(path: Path, threads: int) -> int:
    """What a forked process ends with: 0 if it computes the same, 3 if it says why it does not."""
    torch.set_num_threads(threads)
    model = q.load(path, "sglang-bf16", text_only=True)
    alone = model(IDS)
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        os._exit(0 if torch.equal(model(IDS), alone) else 1)
    except q.Qwen35Error as error:
        os._exit(3 if "forked" in str(error) else 4)


@pytest.mark.parametrize(("threads", "code"), [(1, 0), (2, 3)])
def test_a_forked_process_computes_the_same_or_says_why(threads: int, code: int, built: Build, tmp_path: Path) -> None:
    assert Child(tmp_path / "said", forks, built("tiny-mxfp4"), threads).wait() == code
