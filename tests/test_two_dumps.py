"""Two dumps without a truth: bit-equal, legally different, or one of them off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_like import Engine, Value, tiny_model, write_dumper

import qwen35_moe as q
from qwen35_moe.cli import main as cli
from qwen35_moe.oracle.dumps.readers import read_dump
from qwen35_moe.oracle.dumps.writers import DUMPED
from qwen35_moe.oracle.two_dumps import compare_dumps

IDS = torch.arange(30)[None] * 7919 % 251


@pytest.fixture(scope="module")
def runs(small: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same engine: in one pass, in steps, warm (a cached prefix is not dumped again), and in steps with a state
    that is lost at the second of them."""
    folder, model = tmp_path_factory.mktemp("runs"), q.load(small("tiny"), "sglang-bf16", "unfused", text_only=True)
    steps = {"cache": q.Cache(), "chunks": (18, 7, 1, 4)}
    q.trace(model, IDS, taps=DUMPED, out=folder / "cold")
    q.trace(model, IDS, taps=DUMPED, out=folder / "steps", **steps)
    cache = q.Cache()
    model(IDS[:, :18], cache=cache)
    q.trace(model, IDS[:, 18:], taps=DUMPED, out=folder / "warm", cache=cache)
    cache = q.Cache()
    model(IDS[:, :18], cache=cache)
    cache.layer(0).state = torch.zeros_like(cache.layer(0).state)
    q.trace(model, IDS[:, 18:], taps=DUMPED, out=folder / "lost", cache=cache)
    return {path.name: path for path in folder.iterdir()}


def test_the_same_dump_is_bit_equal(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare-dumps", str(runs["cold"]), str(runs["cold"])]) == 0
    assert "BIT-EQUAL" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["steps", "warm"])
def test_another_order_of_additions_is_legal(
    runs: dict[str, Path], small: Callable[..., Path], name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["compare-dumps", str(runs["cold"]), str(runs[name])]
    assert cli.main(arguments) == 1
    out = capsys.readouterr().out
    assert "DIFFER: first at layers.0." in out and ("12 of 30 are in both" in out) == (name == "warm")
    assert cli.main([*arguments, "--checkpoint", str(small("tiny")), "--json", str(tmp_path / "out.jsonl")]) == 0
    assert "LEGAL" in capsys.readouterr().out and "summary" in (tmp_path / "out.jsonl").read_text()


def test_the_dump_that_is_off_is_named(
    runs: dict[str, Path], small: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare-dumps", str(runs["cold"]), str(runs["lost"]), "--checkpoint", str(small("tiny"))]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "DIFFER: B is off the checkpoint" in out
    assert "B: layer 0, gdn: recurrent state not handed over at step 0 (token 18 on" in out


def test_ranks(tmp_path: Path) -> None:
    """Sums of partial sums of two ranks differ from the whole in the last bits; columns are joined, and are equal."""
    model, sequences = tiny_model(), [[5, 9, 2, 7, 1, 30], [8, 3, 3, 90]]
    for tp in (1, 2):
        steps = [[(0, 0, 6), (1, 0, 3)], [(1, 3, 4)]]
        write_dumper(tmp_path / f"tp{tp}", Engine(model, sequences, tp).values(steps), tp)
    config = {name: getattr(model.config, name) for name in model.config.__dataclass_fields__ if name != "raw"}
    a, b = (read_dump(tmp_path / f"tp{tp}", config=config) for tp in (1, 2))
    found = compare_dumps(a, b)
    assert found.tokens == (10, 10) and found.exit_code == 1
    first = found.first
    assert first is not None and first.key.startswith("layers.0.") and "_output" in first.key and first.rel < 1e-12
    assert not [tap for tap in found.taps if tap.key.endswith("gdn_qkv") and tap.differ]
    assert max(tap.rel for tap in found.taps) < 1e-10


def test_dumps_of_other_tokens(runs: dict[str, Path], small: Callable[..., Path], tmp_path: Path) -> None:
    q.trace(q.load(small("tiny"), text_only=True), IDS + 1, taps=DUMPED, out=tmp_path / "other")
    assert cli.main(["compare-dumps", str(runs["cold"]), str(tmp_path / "other")]) == 2


def test_fused_columns_need_no_sizes_and_ranks_say_so_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a checkpoint, a fused projection of one rank is compared whole; of two, nobody knows where it is cut."""
    model, sequences = tiny_model(), [[5, 9, 2, 7, 1, 30]]
    for name, tp in (("a", 1), ("b", 1), ("c", 2), ("d", 2)):
        write_dumper(tmp_path / name, Engine(model, sequences, tp).values([[(0, 0, 6)]]), tp)
    assert cli.main(["compare-dumps", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert "BIT-EQUAL" in out and "problem" not in out
    assert cli.main(["compare-dumps", str(tmp_path / "c"), str(tmp_path / "d")]) == 2
    assert capsys.readouterr().out.count("problem") == 1


def test_a_request_that_begins_is_another_sequence(tmp_path: Path) -> None:
    """Its ids are those that come next in an earlier one, of which the other dump holds the beginning only."""
    model, whole = tiny_model(), [5, 9, 2, 7, 1, 30, 8, 3]
    write_dumper(tmp_path / "whole", Engine(model, [whole]).values([[(0, 0, 8)]]))
    parts = Engine(model, [whole[:5], whole[5:]]).values([[(0, 0, 5), (1, 0, 3)]])
    write_dumper(tmp_path / "parts", (*parts, Value("req_pool_indices", torch.tensor([1, 2]), 0)))
    found = compare_dumps(*(read_dump(tmp_path / name) for name in ("whole", "parts")))
    assert found.tokens == (8, 5) and max(tap.rel for tap in found.taps) < 1e-12, found.verdict
