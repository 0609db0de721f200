"""The draft head through the oracle: its truth for the tokens of a run, right engines agree, faults are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import qwen35_moe as q
from qwen35_moe.cli import main as cli
from qwen35_moe.model.cache import Cache
from qwen35_moe.model.mtp import draft_chains, draft_head, with_hidden
from qwen35_moe.numerics.tap_keys import part_of
from qwen35_moe.numerics.taps import Site, attach
from qwen35_moe.oracle.compare import compare, diagnose
from qwen35_moe.oracle.dumps.align import align
from qwen35_moe.oracle.dumps.dump import Dump, Piece, StepTokens
from qwen35_moe.oracle.dumps.readers.own import from_trace
from qwen35_moe.oracle.dumps.writers import DUMPED
from qwen35_moe.oracle.judge.tokens import Acceptance, acceptance
from qwen35_moe.trace.drafts import draft_ids_of
from qwen35_moe.trace.file import Trace
from qwen35_moe.trace.head import Entry
from qwen35_moe.trace.recorder import record, sizes_of, step_record

IDS = torch.arange(20)[None] * 7919 % 251


@pytest.fixture(scope="module")
def truth(small: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Trace:
    out = str(tmp_path_factory.mktemp("truth") / "trace")
    ids = ",".join(map(str, IDS[0].tolist()))
    assert (
        cli.main(["trace", str(small("tiny")), "--ids", ids, "--drafts", "3", "--no-envelope", "--quiet", "--out", out])
        == 0
    )
    return Trace.open(out)


@pytest.mark.parametrize("taps", ["mtp_*", "mtp.layers.0.*", "final_norm,mtp_fc", "vis_*"])
def test_taps_of_parts_that_do_not_run_are_refused(
    small: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], taps: str
) -> None:
    assert cli.main(["trace", str(small("tiny")), "--ids", "1,2", "--taps", taps, "--out", str(tmp_path / "t")]) == 2
    assert "no tap that was asked for would be met" in capsys.readouterr().err
    assert not (tmp_path / "t" / "trace.json").exists()


def engine(path: Path, truth: Trace, how: str = "") -> Dump:
    """sglang-bf16, drafting from the truth's ids, right or not."""
    model, (next_ids, *more), stream = q.load(path, "sglang-bf16", "unfused"), draft_ids_of(truth), list[Tensor]()
    assert model.mtp is not None and len(more) == 2

    def keep(site: Site, x: Tensor) -> None:
        if site.key == "layers.1.layer_output_sum":
            stream.append(x)

    if how in SHIFTS:
        return stepped_engine(model, next_ids, how)
    if how == "zero":
        [p.data.zero_() for name, p in model.mtp.layers.named_parameters() if "norm" not in name]
    places = [torch.arange(20)[None]] * 3 if how == "chain in place" else None
    more = [next_ids, next_ids] if how == "first token" else more
    if how == "halves":
        weight = model.mtp.fc.weight
        weight.data = weight.data.roll(weight.shape[1] // 2, 1)
    with record("*", meta={"steps": [step_record(IDS, None, None, None)]}) as recorder, attach(keep):
        _, hidden = with_hidden(model, IDS)
        hidden = stream[0].to(hidden.dtype) if how == "pre-norm" else hidden
        hand_on = {"target's": lambda _, x: hidden, "row before": lambda _, x: x.roll(1, 1)}.get(how, lambda _, x: x)
        first = IDS if how == "same token" else next_ids
        draft_chains(model, model.mtp, [first, *more], hidden, None, places, hand_on)
    return from_trace(recorder.trace)


SHIFTS = {"in steps": 0, "positions high": 1, "cache lost": 0, "last row missing": 0}


def stepped_engine(model: q.Model, next_ids: Tensor, how: str) -> Dump:
    """The same in two steps, and without a chain."""
    assert model.mtp is not None
    cache, own = Cache(), Cache()
    with record(f"{DUMPED},mtp_*", meta={"config": sizes_of(model.config), "steps": []}) as recorder:
        for start, stop in ((0, 12), (12, 20)):
            if start:
                recorder.next_step()
            at = torch.arange(start, stop)[None]
            recorder.meta["steps"].append(step_record(IDS[:, start:stop], None, at, None))
            _, hidden = with_hidden(model, IDS[:, start:stop], cache=cache)
            own = Cache() if how == "cache lost" else own
            if how == "last row missing" and start:
                own.layer(0).k, own.layer(0).v = (x[:, :-1] for _, x in own.layer(0).tensors())
            places = at + (SHIFTS[how] if start else 0)
            draft_head(model, model.mtp, next_ids[:, start:stop], hidden, cache=own, position_ids=places)
    return from_trace(recorder.trace)


@pytest.mark.parametrize("how", ["", "in steps"])
def test_a_right_draft_head_agrees(small: Callable[..., Path], truth: Trace, how: str) -> None:
    found = compare(truth, engine(small("tiny"), truth, how))
    assert found.exit_code == 0, found.verdict
    for part in ("mtp",) if how else ("mtp", "mtp.2", "mtp.3"):
        assert sum(part_of(r.key) == part and r.added is not None for r in found.records) > (10 if how else 30)


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("pre-norm", "draft from hidden states before the final norm"),
        ("same token", "draft with the embedding of the same token"),
        ("halves", "halves of the draft's input swapped"),
        ("zero", "draft weights are zero"),
        ("chain in place", "positions of chained drafts do not move on"),
        ("positions high", "draft head: positions one too high at step 1"),
        ("target's", "chained drafts from the target's hidden states"),
        ("row before", "chained drafts from the hidden states of the row before"),
        ("first token", "chained drafts with the token of the first draft"),
        ("last row missing", "draft head: last KV row missing at step 1"),
        ("cache lost", "draft head: KV not handed over at step 1"),
    ],
)
def test_faults_of_the_draft_head_are_named(small: Callable[..., Path], truth: Trace, how: str, name: str) -> None:
    found = compare(truth, engine(small("tiny"), truth, how), diagnoses=1)
    assert found.exit_code == 1 and found.first is not None and found.first.block == "mtp", found.verdict
    assert found.diagnoses[0].name == name, str(found.diagnoses[0])


def test_a_truth_of_drafts_has_their_envelope(built: Callable[[str], Path], tmp_path: Path) -> None:
    """In bf16 some chains start from other ids; without the checkpoint, too, all taps are compared."""
    for name, options in (("truth", []), ("bf16", ["--arithmetic", "sglang-bf16", "--no-envelope"])):
        run = ["trace", str(built("tiny")), "--ids", "1,2,3,4,5,6,7,8", "--drafts", "2", "--quiet"]
        assert cli.main([*run, *options, "--out", str(tmp_path / name)]) == 0
    truth = Trace.open(tmp_path / "truth")
    truth.meta["checkpoint"]["path"] = str(tmp_path / "nowhere")
    found = compare(truth, tmp_path / "bf16")
    assert found.exit_code == 0, found.verdict
    assert sum(part_of(r.key) == "mtp.2" and r.inherited is not None for r in found.records) > 30


def test_drafts_start_from_an_engines_hidden_states(
    small: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its draft head then has no error that the target made; the target's truth is as before."""
    run = ["trace", str(small("tiny")), "--ids", "1,2,3,4,5,6,7,8", "--quiet", "--no-envelope", "--drafts", "2"]
    for name, more in (
        ("bf16", ["--arithmetic", "sglang-bf16"]),
        ("own", []),
        ("fed", ["--hidden", str(tmp_path / "bf16")]),
    ):
        assert cli.main([*run, *more, "--out", str(tmp_path / name)]) == 0
    bf16, own, fed = (Trace.open(tmp_path / name) for name in ("bf16", "own", "fed"))
    assert torch.equal(own["final_norm"], fed["final_norm"])
    error = [(x["mtp.mtp_hidden"] - bf16["mtp.mtp_hidden"]).norm() for x in (own, fed)]
    assert error[1] < error[0] / 2
    other = [*run[:3], "9,9,9", *run[4:], "--hidden", str(tmp_path / "bf16"), "--out", str(tmp_path / "other")]
    assert cli.main(other) == 2 and "no hidden states of these tokens" in capsys.readouterr().err


def test_rows_that_draft_other_tokens_are_not_compared(truth: Trace) -> None:
    """A trace as the dump, whose chain starts from other ids at three tokens, and from there on."""
    first, second, third = draft_ids_of(truth)
    dump = from_trace(truth)
    dump.draft_ids = [first, torch.where(torch.arange(20) < 3, second + 1, second), third]
    alignment = align(dump, truth)
    assert [len(alignment.pair(f"{part}.final_norm").rows) for part in ("mtp", "mtp.2", "mtp.3")] == [20, 17, 17]


@pytest.mark.parametrize(("shift", "told"), [(0, False), (1, True), (3, False)])
def test_rejected_drafts_are_compared_with_a_truth_of_theirs(
    small: Callable[..., Path], tmp_path: Path, shift: int, told: bool
) -> None:
    """A pass verifies a token and two drafts, which are rejected. The second draft stands at a wrong position, and the
    dump tells it or not."""
    path, cache = small("tiny"), Cache()
    model = q.load(path, "sglang-bf16", "unfused", text_only=True)
    drafts = torch.cat((IDS[:, 12:13], IDS[:, 13:15] + 1), 1)
    with record(DUMPED, meta={"config": sizes_of(model.config), "steps": []}) as recorder:
        for start, fed in ((0, IDS[:, :12]), (12, drafts), (13, IDS[:, 13:14])):
            if start:
                recorder.next_step()
            at, before = start + torch.arange(fed.shape[1])[None], cache.clone() if start else Cache()
            used = at + (torch.tensor([0, 0, shift]) if fed is drafts else 0)
            recorder.meta["steps"].append(step_record(fed, None, used if told else at, None))
            model(fed, cache=cache, position_ids=used)
            if fed is drafts:
                cache = before
                with attach(instead_of=recorder):
                    model(fed[:, :1], cache=cache, position_ids=at[:, :1])
    dump = from_trace(recorder.trace)
    found = diagnose(path, dump, tmp_path / "truth", diagnoses=1)
    assert found.tokens == (14, 14) and "2 rejected drafts were compared" in str(found.notes)
    if shift:
        first = (1, 14, "rejected draft of sequence 0")
        assert found.exit_code == 1 and found.first is not None and found.first.starts == [first], found.verdict
        assert found.first.key == ("positions" if told else "layers.1.attn_q") or found.first.block == "attn"
    else:
        assert found.exit_code == 0, found.verdict
        assert compare(tmp_path / "truth", dump).exit_code == 0
        other = q.write_truth(path, IDS[:, :14], tmp_path / "other", with_envelope=False)
        assert "2 tokens after the last right one of their run were not compared" in str(compare(other, dump).notes)


def test_acceptance_of_drafts() -> None:
    """Two drafts behind token 3: the first is right; of the second the truth's head knew better."""
    ids = [5, 6, 7, 8, 9, 1]

    def one_hot(said: dict[int, int]) -> Tensor:
        rows = torch.zeros(1, 6, 10)
        for t, token in said.items():
            rows[0, t, token] = 1.0
        return rows

    truth = Trace(meta={"steps": [step_record(torch.tensor([ids]), None, None, None)],
                        "draft_ids": [[[6, 7, 8, 9, 1, 2]], [[0, 0, 9, 0, 0, 0]]]})  # fmt: skip
    for part, said in (("", {t: ids[t + 1] for t in range(5)}), ("mtp", {2: 9}), ("mtp.2", {2: 1})):
        x = one_hot(said)
        truth.add(Entry.of(Site("next_token_logits", part=part), x, "b t v"), x)
    steps = [StepTokens(torch.tensor(some), torch.arange(at, at + len(some)))
             for some, at in (([5, 6, 7], 0), ([6, 7, 8], 0), ([9], 3), ([8, 9, 4], 3), ([9, 1, 0], 3))]  # fmt: skip
    pieces = [Piece("x", lambda n=t.count: torch.zeros(n, 10), s, path="next_token_logits", key="next_token_logits")
              for s, t in enumerate(steps)]  # fmt: skip
    dump = Dump("test", "test", pieces, dict(enumerate(steps)))
    dump.drafts = {1: 1, 2: 2, 4: 1}
    alignment = align(dump, truth)
    assert {step: table.tolist() for step, table in alignment.tokens_of.drafts.items()} == {
        1: [[0, 0, 0], [1, 0, 1], [2, 0, 2]], 2: [[0, 0, 2]], 4: [[0, 0, 3], [1, 0, 4]],
    }  # fmt: skip
    assert acceptance(alignment) == [Acceptance(1, 1, 1, 1, 1, 1), Acceptance(2, 1, 0, 0, 0, 1)]
    dump.accepted = {0: (3, [1, 1])}  # a server: twice verified, once one was accepted
    assert acceptance(alignment) == [Acceptance(1, 2, 1, None, None, 1), Acceptance(2, 2, 0, None, None, 1)]
