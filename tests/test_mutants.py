"""The mutation score on a part of the catalogue; `python -m benchmarks.oracle_score` runs all of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks.oracle_score import mutants
from benchmarks.oracle_score.mutants import Bench
from benchmarks.oracle_score.variants import SMALL, UNLISTED, UNSEEN, Variant, variants
from qwen35_moe.oracle.diagnose.catalogue import FAULTS
from qwen35_moe.oracle.diagnose.faults import Fault
from qwen35_moe.oracle.diagnose.step_faults import STEP_FAULTS
from qwen35_moe.oracle.play import known_fault
from qwen35_moe.oracle.truth import open_checkpoint

IDS = (torch.arange(32) * 7919 % 251)[None]

# Every kind of fault once: scale, weights' bytes, one expert, norm, rotary, state, conv; the smallest ones.
CHOSEN = (
    "shared expert counted twice", "shared gate applied twice", "BF16 shared expert read as FP4", "nibbles swapped",
    "one expert's slot is stale", "final norm without 1 +", "rotary theta 10000", "recall term missing",
    "state in bf16", "A_log in bf16", "MTP shared expert dropped",
    # of norms, ranks and views
    "input norm with 1 + twice", "q norm with 1 + twice", "output gates of another rank",
    "shared expert sharded on 2 ranks and never reduced, the last share",
    "shared expert sharded on 4 ranks and never reduced, share 3", "attention sharded on 2 ranks and never reduced",
    "DeltaNet sharded on 4 ranks and never reduced, share 2", "context of another rank, the next of 4",
    "values of another rank in DeltaNet", "b, a strided view, read as contiguous",
)  # fmt: skip


@pytest.fixture(scope="module")
def benches(small: Callable[[str], Path]) -> dict[str, Bench]:
    source = open_checkpoint(small("tiny-mxfp4"))[1].source
    return {regime: Bench(source, regime, IDS) for regime in mutants.REGIMES[:2]}


@pytest.fixture(scope="module")
def stepped(small: Callable[..., Path]) -> Callable[[str], Bench]:
    return cache(lambda regime: Bench(open_checkpoint(small("tiny", 3))[1].source, regime, IDS[:, :30]))


@pytest.mark.parametrize("name", CHOSEN)
def test_fault_is_found_and_named(benches: dict[str, Bench], name: str) -> None:
    found = benches["gate 0.5"].planted(known_fault(name))
    assert found.found and found.named_right, found


@pytest.mark.parametrize(
    ("regime", "fault"), [*((mutants.REGIMES[1], fault) for fault in SMALL), (mutants.REGIMES[0], SMALL[2])]
)
def test_smallest_faults_are_found(benches: dict[str, Bench], fault: Fault, regime: str) -> None:
    """No row is beyond the limit where the gate is 0.05: it is all rows together that tell."""
    found = benches[regime].planted(fault)
    assert found.found and found.named_right, found


@pytest.mark.parametrize("fault", (*UNLISTED[2::3], *UNSEEN[::2]), ids=lambda f: f.name)
def test_unlisted_fault_is_unknown(benches: dict[str, Bench], fault: Fault) -> None:
    found = benches["gate 0.5"].planted(fault)
    assert found.found and found.named == "unknown", found


@pytest.mark.parametrize(
    ("regime", "name"),
    [
        ("padded", "KV rows of padding kept"),
        ("padded", "positions counted with padding"),
        ("prefix", "last KV row doubled"),
        ("speculative", "conv state not rolled back after rejected drafts"),
        ("speculative", "positions counted with rejected drafts"),
        ("prefix", "recurrent state of the last multiple of 4 tokens"),
    ],
)
def test_fault_between_steps_is_named_with_its_step(stepped: Callable[[str], Bench], regime: str, name: str) -> None:
    """Its layer, its step and its sequence are drawn."""
    found = stepped(regime).between_steps(next(f for f in STEP_FAULTS if f.name == name))
    assert found is not None and found.found and found.named_right, found


@pytest.mark.parametrize("variant", variants("", IDS.shape[1])[::2], ids=lambda v: v.name)
def test_clean_variant_passes(benches: dict[str, Bench], variant: Variant) -> None:
    found = benches["gate 0.5"].clean(variant)
    assert found.found, found


def test_w4a4_engine(small: Callable[[str], Path]) -> None:
    """The right rule of the activations' scales passes, another one is found and named."""
    bench = Bench(open_checkpoint(small("tiny-mxfp4"))[1].source, "gate 0.5", IDS, "+a4-round-up")
    for variant in variants("+a4-round-up", IDS.shape[1]):
        assert bench.clean(variant).found, variant.name
    for fault in [f for f in FAULTS if f.needs == "a4"]:
        found = bench.planted(fault)
        assert found.found and found.named_right, found


def test_a_shared_expert_of_another_width_is_never_taken_for_a_slot(small: Callable[[str], Path]) -> None:
    """tiny-odd's is 22 wide, its routed experts 18: what strikes a fused slot is neither planted nor tried."""
    bench = Bench(open_checkpoint(small("tiny-odd"))[1].source, "gate 0.5", IDS % 193)
    fault = next(f for f in FAULTS if f.fused)
    assert not fault.applies(bench.source, 0, False)
    found = bench.planted(known_fault("shared expert counted twice"))
    assert found.found and found.named_right, found
