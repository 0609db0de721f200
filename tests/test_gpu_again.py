"""Tests of the model, the draft head, the vision tower and the kernels' data once more, on a GPU.

The very functions, with their tolerances: only the device differs on which models, fixtures and new tensors are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_golden
import test_mtp
import torch
from fixture_models import read
from test_golden import (  # noqa: F401 - collected here, too
    test_append_kernel,
    test_conv_kernel_is_reproduced_bit_for_bit,
    test_delta_rule_kernels_are_as_far_from_exact_as_their_rounding,
    test_exact_with_activation_quantiser_is_the_function_that_the_kernel_rounds,
    test_fused_moe_kernel,
    test_gated_norm_kernel,
    test_gating_kernel,
)
from test_model import (  # noqa: F401
    test_a_padded_batch_goes_on_through_its_cache,
    test_a_sequence_does_not_depend_on_its_neighbours,
    test_an_arithmetic_of_ones_own,
    test_blocks_of_queries,
    test_cache_is_cloned,
    test_cached_decode_equals_prefill,
    test_chunked_equals_recurrent,
    test_eps_of_the_l2_norm_shows,
    test_float64_at_every_tap,
    test_padding_changes_nothing,
    test_spans_of_the_chunked_rule_carry_the_state,
    test_unfused_equals_fused,
)
from test_mtp import (  # noqa: F401
    test_a_chain_is_the_head_fed_with_itself,
    test_fixtures,
    test_fused_equals_unfused,
    test_the_cache_carries_the_head_on,
)
from test_vision import test_fixture  # noqa: F401
from torch import Tensor

import qwen35_moe as q

GPU = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")]

load, golden = q.load, test_golden.golden


def load_on_gpu(*args: Any, **options: Any) -> q.Model:
    with torch.device("cpu"):
        return load(*args, **{"device": GPU, **options})


def read_on_gpu(name: str, dtype: torch.dtype) -> tuple[Any, ...]:
    with torch.device("cpu"):
        return tuple(module.to(GPU) for module in read(name, dtype))


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(q, "load", load_on_gpu)
    monkeypatch.setattr(test_mtp, "read", read_on_gpu)
    monkeypatch.setattr(test_golden, "golden", lambda name: {k: x.to(GPU) for k, x in golden(name).items()})
    with torch.device(GPU):
        yield


@pytest.fixture(scope="module")
def tiny(built: Callable[[str], Path]) -> Path:
    return built("tiny")


@pytest.fixture(scope="module")
def model(tiny: Path) -> q.Model:
    return load_on_gpu(tiny, shared_expert="unfused")


@pytest.fixture(scope="module")
def expected(expected: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(GPU) for name, x in expected.items()}


@pytest.fixture(scope="module")
def exact() -> tuple[Any, ...]:
    return read_on_gpu("bf16-hub", torch.float64)[:2]


@pytest.fixture(scope="module")
def ids(expected: dict[str, Tensor]) -> Tensor:
    return expected["ids"].long()


@pytest.fixture(scope="module")
def fixture_tower() -> Any:
    return read_on_gpu("bf16-hub", torch.float32)[2]
