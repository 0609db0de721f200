"""The short run of the fuzzer. The long one is by hand: `python -m tests.fuzz.surfaces --cases 10000`."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .surfaces import NAMES, Surfaces, run


@pytest.fixture(scope="module")
def surfaces(tmp_path_factory: pytest.TempPathFactory) -> Surfaces:
    return Surfaces(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**9))
def test_nothing_but_our_own_errors(surfaces: Surfaces, name: str, seed: int) -> None:
    assert run(surfaces.all()[name], seed) < 10  # seconds: nothing hangs
