"""Probabilities of attention: one column a key, laid out as the engine's batches fed them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tolerances
import torch
from distances import relative
from engine_like import padded_truth, tiny_model
from fixture_models import read as read_fixture

from qwen35_moe.oracle.dumps.align import align
from qwen35_moe.oracle.dumps.dump import Dump, Piece, StepTokens
from qwen35_moe.oracle.dumps.readers.transformers import TransformersCapture
from qwen35_moe.oracle.dumps.sequences import sequences_of
from qwen35_moe.run.prompt import padded
from qwen35_moe.trace.file import Trace
from qwen35_moe.trace.recorder import trace
from tests.peers.transformers_model import load_transformers, quiet

SEQUENCES = [[5, 9, 200, 7, 31, 8, 77], [5, 9, 4, 250, 3]]
KEY = "layers.3.attn_probs"


@pytest.fixture(scope="module")
def truth() -> Trace:
    return padded_truth(tiny_model(), SEQUENCES, taps=KEY)


def dump_of(*steps: tuple[StepTokens, torch.Tensor]) -> Dump:
    pieces = [Piece(KEY, lambda x=x: x, s, layer=3, key=KEY) for s, (_, x) in enumerate(steps)]
    return Dump("test", "test", pieces, {s: tokens for s, (tokens, _) in enumerate(steps)})


def agree(dump: Dump, truth: Trace) -> bool:
    alignment = align(dump, truth)
    pair = alignment.pair(KEY)
    assert pair.engine is not None and not pair.problem and alignment.matched == 12
    return torch.equal(pair.engine, pair.truth)


@pytest.mark.parametrize("wrong", [False, True])
def test_padded_on_the_left_and_packed(truth: Trace, wrong: bool) -> None:
    """The same values in other columns; what lies in the columns of padding or of a neighbour is not compared."""
    B, N, T, S = truth[KEY].shape
    left, positions = torch.zeros(B, N, T, S).double(), torch.zeros(B, T, dtype=torch.long)
    packed = torch.zeros(1, N, 12, 12).double()
    ids, mask = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T, dtype=torch.bool)
    at = 0
    for b, row in enumerate(SEQUENCES):
        n, pad = len(row), T - len(row)
        x = truth[KEY][b, :, :n, :n].clone()
        x[0, 2, 1] += float(wrong)
        left[b, :, pad:, pad:] = x
        packed[0, :, at : at + n, at : at + n] = x
        ids[b, pad:], mask[b, pad:], positions[b, pad:] = torch.tensor(row), True, torch.arange(n)
        at += n
    tokens = StepTokens(ids.flatten(), positions.flatten(), batch=(B, T), mask=mask.flatten())
    assert agree(dump_of((tokens, left)), truth) is not wrong
    flat = torch.cat([torch.arange(len(row)) for row in SEQUENCES])
    tokens = StepTokens(torch.tensor(sum(SEQUENCES, [])), flat, batch=(1, 12), mask=torch.ones(12, dtype=torch.bool))
    assert agree(dump_of((tokens, packed)), truth) is not wrong


@pytest.mark.parametrize("places", [None, 16])
def test_a_cache_that_grows_and_one_that_was_made_at_once(truth: Trace, places: int | None) -> None:
    """Both sequences in chunks, the shorter one padded; or into a cache of 16 places."""
    steps = []
    for start, stop in ((0, 4), (4, 6), (6, 7)):
        ids = torch.tensor([(row + [0] * 7)[start:stop] for row in SEQUENCES])
        real = torch.tensor([[i < len(row) for i in range(start, stop)] for row in SEQUENCES])
        at = torch.arange(start, stop).expand(2, -1)
        x = torch.nn.functional.pad(truth[KEY][:, :, start:stop, :stop], (0, (places or stop) - stop))
        steps.append((StepTokens(ids.flatten(), at.flatten(), batch=(2, stop - start), mask=real.flatten()), x))
    assert agree(dump_of(*steps), truth)


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 3}])
def test_generate_of_transformers(options: dict[str, int]) -> None:
    """All that a clean generate() computes is compared: padded on the left, or its prompt in chunks."""
    ours = read_fixture("bf16-hub", torch.float64)[0]
    theirs = load_transformers(Path(__file__).parent / "data/fixtures/bf16-hub", torch.float32)
    ids = torch.tensor([SEQUENCES[0], [0, 0, *SEQUENCES[1]]][: 1 if options else 2])
    mask = torch.tensor([[1] * 7, [0] * 2 + [1] * 5][: len(ids)])
    with quiet(), TransformersCapture(theirs) as capture, torch.no_grad():
        theirs.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0, **options)
    rows, real = padded(sequences_of(capture.dump()))
    alignment = align(capture.dump(), trace(ours, rows, attention_mask=real))
    assert (alignment.matched, len(alignment.keys)) == (9 if options else 16, 98) and not alignment.tokens_of.absent
    for pair in alignment:
        assert pair.engine is not None, (pair.key, pair.problem)
        assert relative(pair.engine, pair.truth) < tolerances.TRANSFORMERS_TAPS_FLOAT32, pair.key
