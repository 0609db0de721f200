"""Experts side by side: results in order, the caller's context, and the same bits whether they overlap or not."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Barrier

import pytest
import torch

from qwen35_moe.numerics.taps import Site, attach, scope, tap
from qwen35_moe.oracle.judge.split_k import SplitK
from qwen35_moe.run.experts import WORKERS, side_by_side


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Two, however many a run of all tests has, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_calls_overlap_and_results_are_in_order() -> None:
    both = Barrier(2, timeout=60)

    def work(i: int) -> tuple[int, int, bool]:
        both.wait()  # which one call alone would never pass
        return i, torch.get_num_threads(), torch.is_inference_mode_enabled()

    with torch.inference_mode():
        assert list(side_by_side(work, range(10))) == [(i, 1, True) for i in range(10)]


def test_one_by_one_has_as_many_threads() -> None:
    running: list[int] = []

    def work(i: int) -> int:
        running.append(i)
        assert len(running) == 1
        running.pop()
        return torch.get_num_threads()

    assert list(side_by_side(work, range(20), one_by_one=True)) == [1] * 20


def test_more_threads_than_workers_are_divided() -> None:
    torch.set_num_threads(2 * WORKERS)
    assert set(side_by_side(lambda _: torch.get_num_threads(), range(20))) == {2}
    torch.set_num_threads(2)


def test_a_call_stands_where_it_was_made() -> None:
    seen: dict[float, Site] = {}

    def note(site: Site, x: torch.Tensor) -> None:
        seen[float(x)] = site

    with attach(note), scope(layer=3):
        list(side_by_side(lambda i: tap("moe_a1", torch.tensor(float(i))), range(6)))
    assert seen == {float(i): Site("moe_a1", layer=3) for i in range(6)}


def test_an_error_comes_out_and_threads_are_as_before() -> None:
    def work(i: int) -> int:
        if i == 3:
            raise ValueError("three")
        return i

    results = side_by_side(work, range(1000))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)


def test_calls_run_under_the_function_modes_of_the_caller() -> None:
    x, w = torch.randn(3, 64), torch.randn(8, 64)
    with SplitK(4):
        expected = torch.nn.functional.linear(x, w)
        assert all(torch.equal(y, expected) for y in side_by_side(lambda _: torch.nn.functional.linear(x, w), range(4)))
    assert not torch.equal(expected, torch.nn.functional.linear(x, w))
