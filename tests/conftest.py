"""What makes a test run count: nothing skipped, nothing expected to fail, nothing left out.

A parity test that did not run proves nothing, so a skip or an xfail makes the session red wherever it comes from, and
`--complete` (which `make test` passes) also refuses a run that selects among the tests, by path or by option. The one
exception is stated in the output: tests marked `gpu` are collected only where torch sees a GPU.
"""

from __future__ import annotations

import os

# The last bits of a product go with the number of threads, and the workers of one run share the cores. This must be set
# before torch is first imported.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

_not_run: list[str] = []
_gpu_left_out: list[int] = []


def has_gpu() -> bool:
    import torch  # here, because importing it takes seconds that a run without GPU tests need not pay

    return torch.cuda.is_available()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--complete", action="store_true", help="refuse a run that leaves out any test")


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if option.complete and (
        option.keyword or option.markexpr or option.deselect or option.ignore or option.ignore_glob
    ):
        raise pytest.UsageError("--complete runs every test: drop -k, -m, --deselect and --ignore")
    everything = hasattr(config, "workerinput") or config.args_source is config.ArgsSource.TESTPATHS
    if option.complete and not everything:  # workers are told by paths what their controller found out
        raise pytest.UsageError("--complete runs every test: drop the paths, and start it in the repository's root")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if item.get_closest_marker("gpu") is None]
    left_out = len(items) - len(kept)
    if not left_out or has_gpu():
        return
    items[:] = kept
    if hasattr(config, "workeroutput"):  # under xdist only the controller prints
        config.workeroutput["gpu_left_out"] = left_out
    else:
        _gpu_left_out.append(left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    _gpu_left_out.append(getattr(node, "workeroutput", {}).get("gpu_left_out", 0))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if hasattr(report, "wasxfail"):
        _not_run.append(f"{report.nodeid}: expected to fail")
    elif report.skipped:
        _not_run.append(f"{report.nodeid}: skipped")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _not_run.append(f"{report.nodeid}: skipped whole")


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items and items[0].config.option.complete:
        _not_run.extend(f"{item.nodeid}: deselected" for item in items)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if _not_run and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if max(_gpu_left_out, default=0):
        terminalreporter.write_line(f"no GPU here: {max(_gpu_left_out)} tests marked gpu were not collected")
    if _not_run:
        terminalreporter.section("red: a test that does not run proves nothing", red=True)
        for line in _not_run:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """built("tiny") is the folder of that recipe's checkpoint, built once in a session. Tests must not change it."""
    from weights.build import build

    root = tmp_path_factory.mktemp("weights")
    return cache(lambda recipe: build(recipe, root / recipe))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """small("tiny") is that recipe with one layer of each kind and six experts; small("tiny", 4) has all layers.

    For tests in which neither number matters: an oracle that runs layers again takes a third of the time, or two.
    """
    from weights.build import build

    root = tmp_path_factory.mktemp("small")

    def of(recipe: str, layers: int = 2) -> Path:
        kinds = ["linear_attention"] * (layers - 1) + ["full_attention"]
        return build(recipe, root / f"{recipe}-{layers}", text_config={"layer_types": kinds, "num_experts": 6})

    return cache(of)


@pytest.fixture(scope="session")
def expected():
    """What engines computed of tests/data/fixtures: `checkpoint/what.engine` -> tensor. Tests must not change it."""
    from safetensors.torch import load_file

    return load_file(Path(__file__).parent / "data/fixtures/expected.safetensors")
