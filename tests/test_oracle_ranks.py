"""From an engine's files to the verdict: two sequences in one batch, prefill and decode steps, TP and EP ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engine_like import Engine, Value, write_dumper, write_passes
from torch import Tensor

import qwen35_moe as q
from qwen35_moe.cli.main import main
from qwen35_moe.model.text import Model
from qwen35_moe.oracle.judge.patterns import wrong_columns

SEQUENCES = [[3, 7, 11, 5, 100, 17, 29, 31, 2, 90], [9, 8, 4, 4, 77, 12]]
STEPS = [[(0, 0, 8), (1, 0, 5)], [(1, 5, 6), (0, 8, 9)], [(0, 9, 10)]]


class FaultyRank(Engine):
    """Rank 1 has the rows of its down projections in another order, in layer 1."""

    def _moe(self, layer: int, rank: int, parts: list[tuple[int, int, int]], *rest) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
        weight = self.model.layers[layer].mlp.experts.down_proj
        kept = weight.data
        if (layer, rank) == (1, 1):
            weight.data = kept.roll(1, 1)
        try:
            return super()._moe(layer, rank, parts, *rest)
        finally:
            weight.data = kept


def in_bf16(values: Iterator[Value]) -> Iterator[Value]:
    """Partial sums too, as engines hand them to the all-reduce."""
    for value in values:
        value.x = value.x.to(torch.bfloat16) if value.x.is_floating_point() else value.x
        yield value


@pytest.fixture(scope="module")
def case(small: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    path, folder = small("tiny"), tmp_path_factory.mktemp("ranks")
    (folder / "ids.json").write_text(json.dumps(SEQUENCES))
    common = ["--ids", str(folder / "ids.json"), "--out", str(folder / "truth"), "--quiet"]
    assert main(["trace", str(path), *common]) == 0
    return folder / "truth", q.load(path, "exact", "unfused", text_only=True)


class FaultyQueries(Engine):
    """Rank 1 has the rows of its query, key and value projections in another order, in layer 1."""

    def values(self, steps: list[list[tuple[int, int, int]]]) -> Iterator[Value]:
        for value in super().values(steps):
            if value.rank == 1 and value.name.endswith("layers.1.qkv_proj.output"):
                value.x = value.x.roll(1, -1)
            yield value


SAID = "rows beyond the limit, in columns of rank 1 only"


@pytest.mark.parametrize(
    ("engine", "ep", "write", "code", "said"),
    [
        (Engine, 2, write_dumper, 0, ["AGREES"]),
        (Engine, 1, write_passes, 0, ["AGREES"]),
        (FaultyRank, 1, write_dumper, 1, ["first at layer 1, mlp, tap layers.1.moe_routed_output"]),
        (FaultyQueries, 1, write_dumper, 1, ["first at layer 1, attn", SAID]),
    ],
)
def test_two_ranks(
    case: tuple[Path, Model], tmp_path: Path, capsys, engine: type[Engine], ep: int, write, code: int, said: list[str]
) -> None:
    """test_readers has every split of a clean engine; here is the verdict."""
    truth, model = case
    values = in_bf16(engine(model, SEQUENCES, 2, ep).values(STEPS))
    write(tmp_path / "dump", values, *[2] * (write is write_dumper))
    assert main(["compare", str(truth), str(tmp_path / "dump")]) == code
    printed = " ".join(capsys.readouterr().out.split())
    assert all(words in printed for words in said), printed


def test_wrong_columns() -> None:
    truth = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    x = truth.clone()
    x[:, 8:20] += 1
    assert wrong_columns(x, truth) == "in columns 8 to 19 of 40"
    assert wrong_columns(x, truth, torch.arange(40) // 20) == "in columns of rank 0 only"
    x[2, 31] = torch.nan
    assert wrong_columns(x, truth) == "in column 31 of 40"
    assert wrong_columns(truth + 1, truth, torch.arange(40) // 20) == ""
