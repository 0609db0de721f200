"""Which token is which: by ids and the order of steps. Positions are a value like others, and coverage is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engine_like import Engine, Value, padded_truth, tiny_model, write_dumper

from qwen35_moe.errors import Qwen35Error
from qwen35_moe.oracle.dumps.align import Alignment, align
from qwen35_moe.oracle.dumps.draft_rows import branches_of
from qwen35_moe.oracle.dumps.dump import Dump, Piece, StepTokens
from qwen35_moe.oracle.dumps.match import Matching, match
from qwen35_moe.oracle.dumps.matched import Matched
from qwen35_moe.oracle.dumps.readers import read_dump
from qwen35_moe.oracle.dumps.runs import Run
from qwen35_moe.oracle.dumps.sequences import sequences_of
from qwen35_moe.oracle.judge.records import Comparison, Record
from qwen35_moe.oracle.judge.tokens import engine_positions, judge_positions
from qwen35_moe.oracle.report import report
from qwen35_moe.trace.file import Trace

SEQUENCES = [[5, 9, 200, 7, 31, 8, 77], [5, 9, 4, 250, 3]]
STEPS = [[(0, 0, 4), (1, 0, 3)], [(1, 3, 4), (0, 4, 6)], [(0, 6, 7), (1, 4, 5)]]


@pytest.fixture(scope="module")
def truth() -> Trace:
    return padded_truth(tiny_model(), SEQUENCES, taps="final_norm")


def dump_of(steps: list[StepTokens]) -> Dump:
    """Rows that say which they are: final_norm holds [step, row]."""
    pieces = [
        Piece("final_norm", lambda s=s, t=t: torch.tensor([[s, r] for r in range(t.count or 0)]).float(), s,
              path="final_norm", key="final_norm")
        for s, t in enumerate(steps)
    ]  # fmt: skip
    return Dump("test", "test", pieces, dict(enumerate(steps)))


def flat(*runs: tuple[int, list[int]], **fields: object) -> StepTokens:
    """(first position, ids) one after another in a flat step."""
    ids = [i for _, some in runs for i in some]
    positions = [start + i for start, some in runs for i in range(len(some))]
    return StepTokens(torch.tensor(ids), torch.tensor(positions), **fields)  # type: ignore[arg-type]


def matched(truth: Trace, *steps: StepTokens) -> Matched:
    return match(dump_of(list(steps)), truth)


def ends(truth: Trace, *steps: StepTokens) -> list[list[list[int]]]:
    """Of each step: run, and b, t of its last token."""
    dump = dump_of(list(steps))
    return [match(dump, truth).ends(dump, step).tolist() for step in range(len(steps))]


def test_decode_positions_that_are_one_too_high(truth: Trace) -> None:
    """The ids go on where the sequence was: all tokens are compared, and the positions are wrong."""
    a, b = SEQUENCES
    found = matched(truth, flat((0, a[:5]), (0, b)), flat((6, a[5:6])), flat((7, a[6:])))
    assert not found.absent and found.where[2].tolist() == [[0, 0, 6]]
    assert [row for row in found.positions.tolist() if row[2] != row[3]] == [[0, 5, 5, 6, 6], [0, 6, 6, 7, 7]]


def test_a_sequence_that_is_moved_as_a_whole(truth: Trace) -> None:
    dump = dump_of([flat((5, SEQUENCES[0]), (0, SEQUENCES[1]))])
    alignment = align(dump, truth)
    assert alignment.matched == 12 and not alignment.tokens_of.absent
    record = judge_positions(alignment)
    assert record is not None and record.bad and record.worst == (0, 0) and record.bad_rows == 7
    assert "all of sequence 0 are 5 too high" in record.note
    assert engine_positions(alignment)[0].tolist() == list(range(5, 12))
    assert judge_positions(align(dump_of([flat((0, SEQUENCES[0]), (0, SEQUENCES[1]))]), truth)) is None


def test_a_window_of_drafts_counts_up_to_its_last_right_token(truth: Trace) -> None:
    """Two drafts are rejected; the next run begins where the right ones ended."""
    a, b = SEQUENCES
    steps = [flat((0, a[:3]), (0, b)), flat((3, [a[3], 99, 98])), flat((4, [a[4], a[5], 97])), flat((6, a[6:]))]
    found = matched(truth, *steps)
    assert not found.absent and "3 tokens after the last right one" in found.notes[0]
    assert [len(found.where[s]) for s in range(4)] == [8, 1, 2, 1]
    assert found.starts(torch.tensor([[0, 6], [0, 4], [1, 2]])) == [(0, 4, "first after a rejected draft"), (1, 2, "")]
    assert found.firsts[0, 3] == "first of a step" and found.firsts[1, 0] == "first of its sequence"
    assert ends(truth, *steps)[1::2] == [[[0, -1, -1]], [[0, 0, 6]]]
    assert [row.tolist() for row in sequences_of(dump_of(steps))][1] == b


def test_a_verification_step_of_several_requests(truth: Trace) -> None:
    """seq_lens count what was cached; positions of the two happen to follow one another."""
    a, b = SEQUENCES
    both = {"requests": ["a", "b"]}
    steps = [
        flat((0, a[:2]), (0, b[:4]), seq_lens=[2, 4], **both),
        flat((2, [a[2], 99]), (4, [b[4], 98]), seq_lens=[2, 4], **both),
        flat((3, [a[3], a[4]]), seq_lens=[3], requests=["a"]),
        flat((5, a[5:]), seq_lens=[5], requests=["a"]),
    ]
    found = matched(truth, *steps)
    assert not found.absent and found.where[1].tolist() == [[0, 0, 2], [2, 1, 4]]


def test_a_tree_of_drafts(truth: Trace) -> None:
    """Two drafts after a token, and two after one of those, which the dump does not say. The next step tells whether
    one of them was accepted."""
    a, b = SEQUENCES

    def tree(root: int, ids: list[int]) -> StepTokens:
        at = torch.tensor([root, root + 1, root + 1, root + 2, root + 2])
        return StepTokens(torch.tensor(ids), at, seq_lens=[root], requests=["a"])

    begun = flat((0, a[:3]), (0, b), seq_lens=[3, 5], requests=["a", "b"])
    ended = [flat((5, a[5:6]), seq_lens=[6], requests=["a"]), flat((6, a[6:]), seq_lens=[7], requests=["a"])]
    for ids in ([a[3], a[4], 99, 97, 96], [a[3], 99, a[4], 97, 96]):
        steps = [begun, tree(3, ids), *ended]
        dump, (first, *more) = dump_of(steps), branches_of(dump_of(steps), [torch.tensor(a), torch.tensor(b)])
        assert (first.of, first.at, first.ids) == (0, 4, (99,)) and not more
    found = matched(truth, *steps)
    assert found.where[1].tolist() == [[0, 0, 3], [2, 0, 4]] and not found.absent
    assert "2 rows of trees of drafts were not compared" in str(found.notes)
    assert [x.tolist() for x in sequences_of(dump)] == [a, b]
    deeper = [begun, tree(3, [a[3], 99, a[4], a[5], 96]), ended[1]]
    assert matched(truth, *deeper).absent == ["1 tokens of sequence 0, from token 5 on"]
    with pytest.raises(Qwen35Error, match="which drafts of a tree were accepted"):
        sequences_of(dump_of(deeper))


def test_what_is_absent_is_named(truth: Trace) -> None:
    a, b = SEQUENCES
    assert matched(truth, flat((0, a))).absent == ["all of sequence 1 (5 tokens)"]
    assert matched(truth, flat((0, a[:5]), (0, b))).absent == ["the last 2 tokens of sequence 0"]
    gap = matched(truth, flat((0, a[:3]), (0, b)), flat((5, a[5:])))
    assert gap.absent == ["2 tokens of sequence 0, from token 3 on"]
    cached = matched(truth, flat((3, a[3:]), (0, b)))
    assert not cached.absent and "first 3 tokens of sequence 0 were cached" in cached.notes[-1]
    wrong = matched(truth, flat((0, [*a[:4], 1, 2, 3]), (0, b)))  # a run that is right up to its fourth token
    assert wrong.absent == ["the last 3 tokens of sequence 0"] and len(wrong.where[0]) == 9
    wrong = matched(truth, flat((0, [1, 2, 3]), (0, [*a[:4], 1, 2, 3])))  # behind another request
    assert wrong.where[0].tolist() == [[3 + i, 0, i] for i in range(4)] and "1 runs of other tokens" in wrong.notes[0]


def test_packed_rows_are_split_where_positions_go_back(truth: Trace) -> None:
    a, b = SEQUENCES
    packed = flat((0, a), (0, b), batch=(1, 12), mask=torch.ones(12, dtype=torch.bool))
    found = matched(truth, packed)
    assert not found.absent and found.where[0][:, 1].tolist() == [0] * 7 + [1] * 5
    assert [row.tolist() for row in sequences_of(dump_of([packed]))] == SEQUENCES


def test_the_first_bad_row_is_told(truth: Trace) -> None:
    """Text, page and JSON say where in each sequence a tap begins to be wrong, and what that token is the first of."""
    rows = torch.tensor([[0, *SEQUENCES[1]], [*SEQUENCES[0][:6]]])
    mask = torch.tensor([[False] + [True] * 5, [True] * 6])
    positions = torch.tensor([[0, 0, 1, 2, 3, 4], list(range(6))])
    left = StepTokens(rows.flatten(), positions.flatten(), batch=(2, 6), mask=mask.flatten())
    found = matched(truth, left, StepTokens(torch.tensor([77]), torch.tensor([6])))
    assert found.firsts == {(1, 0): "first after padding", (0, 0): "first of its sequence", (0, 6): "first of a step"}
    cached = matched(truth, flat((3, SEQUENCES[0][3:]), (0, SEQUENCES[1])))
    assert cached.firsts[0, 3] == "first after a cached prefix"
    starts = found.starts(torch.tensor([[1, 0], [1, 1], [0, 6]]))
    record = Record("layers.0.mlp_output", "wrong", "mlp", 0, 9.0, bad_rows=3, rows=12, worst=(1, 1), starts=starts)
    result = Comparison([record])
    said = "first bad row: sequence 0, token 6 (first of a step), sequence 1, token 0 (first after padding); worst row"
    assert said in " ".join(report(result).split()) and said in report(result, "html")
    assert '"starts": [[0, 6, "first of a step"]' in report(result, "json")


def test_a_step_that_nothing_divides(truth: Trace) -> None:
    """Ids alone, without positions or requests."""
    a, b = SEQUENCES
    steps = [StepTokens(torch.tensor(ids)) for ids in (a[:4] + b[:3], a[4:], b[3:])]
    assert not matched(truth, *steps).absent and ends(truth, *steps)[0] == [[0, 0, 3], [1, 1, 2]]
    assert ends(truth, StepTokens(torch.tensor([*a, 1, 2, 3])))[0] == [[0, 0, 6], [1, -1, -1]]


def test_a_chunk_goes_on_where_its_sequence_stopped() -> None:
    """Of two sequences that hold these tokens there, the one of which the dump has had all before them."""
    truth = Trace(meta={"steps": [{"ids": [[1, 2, 3, 7, 8], [4, 5, 6, 7, 8]], "positions": [list(range(5))] * 2,
                                   "mask": [[1] * 5] * 2}]})  # fmt: skip
    run = Run(1, torch.arange(2), torch.tensor([7, 8]), torch.tensor([3, 4]), None)
    for filled, expected in (([0, 3], (1, 3, 2)), ([0, 0], (0, 3, 2))):  # the second: a cached prefix
        matching = Matching(dump_of([]), list(truth.ids))
        matching.filled = filled
        assert matching._find(run) == expected


# Without ids: what the embeddings are of, or by number.


def without_ids(values: Iterator[Value], embeddings: Callable[[Value], torch.Tensor] | None) -> Iterator[Value]:
    for v in values:
        if v.name == "input_ids" and embeddings is not None:
            yield Value("non_intrusive__model.embed_tokens.output", embeddings(v), v.step)
        if v.name not in ("input_ids", "positions", "seq_lens", "next_token_logits"):
            yield v


@pytest.mark.parametrize("with_embeddings", [True, False])
def test_dumps_without_ids(tmp_path: Path, with_embeddings: bool) -> None:
    """Two requests, prefill and decode, neither ids nor positions; also in chunks, where embeddings are there."""
    model = tiny_model()
    truth = padded_truth(model, SEQUENCES)
    steps = STEPS if with_embeddings else [[(0, 0, 5), (1, 0, 3)], [(0, 5, 6), (1, 3, 4)], [(0, 6, 7), (1, 4, 5)]]
    embeddings = (lambda v: model.embed_tokens.weight[v.x]) if with_embeddings else None
    write_dumper(tmp_path / "d", without_ids(Engine(model, SEQUENCES).values(steps), embeddings))
    alignment: Alignment = align(read_dump(tmp_path / "d", config=truth.meta["config"]), truth)
    assert alignment.matched == 12 and not alignment.tokens_of.absent
    for name in ("layers.0.mlp_output", "layers.3.attn_output", "final_norm"):
        pair = alignment.pair(name)
        torch.testing.assert_close(pair.engine, pair.truth, rtol=0, atol=1e-11)


def test_a_dump_that_says_nothing_of_its_tokens() -> None:
    with pytest.raises(Qwen35Error, match="which tokens it is of(.|\n)*--ids"):
        sequences_of(Dump("test", "test", [], {}))


def test_a_sequence_whose_first_tokens_were_cached_elsewhere_is_absent(truth: Trace) -> None:
    """Its ids are not in the dump: what was compared is not all that there is, unless they are given."""
    a, b = SEQUENCES
    dump = dump_of([flat((0, a), (2, b[2:]), requests=["a", "b"], seq_lens=[7, 5])])
    assert [row.tolist() for row in sequences_of(dump)] == [a]
    alone = padded_truth(tiny_model(), [a], taps="final_norm")
    absent = align(dump, alone).tokens_of.absent
    assert absent == ["a sequence from token 2 on, whose first were cached: give --ids"]
    record = Record("final_norm", "bit-equal", "final_norm", None, 0.0)
    result = Comparison(records=[record], tokens=(7, 7), absent=absent)
    assert result.exit_code == 2 and "AGREES on 7 of 7 tokens" in result.verdict
    result.partial = True
    assert result.exit_code == 0
    assert not align(dump, truth).tokens_of.absent  # a truth of both: the ids are known
