"""What people save of a model's output, read and compared: tensors, dicts, ModelOutputs, generate's, in any file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from distances import relative
from fixture_models import read as read_fixture
from safetensors.torch import save_file
from torch import Tensor

from qwen35_moe.errors import Qwen35Error
from qwen35_moe.oracle.dumps.align import align
from qwen35_moe.oracle.dumps.pair import fit
from qwen35_moe.oracle.dumps.readers import read_dump
from qwen35_moe.oracle.dumps.readers.saved import meaning, step_of, tensors
from qwen35_moe.run.prompt import padded
from qwen35_moe.trace.file import Trace
from qwen35_moe.trace.recorder import trace
from tests.peers.transformers_model import load_transformers, quiet

IDS = [[5, 9, 200, 7, 31, 8, 77], [5, 9, 4, 250, 3]]
TAPS = "embed_tokens,layer_input,final_norm,moe_router_logits,next_token_logits"


@pytest.fixture(scope="module")
def ours():
    return read_fixture("bf16-hub", torch.float64)[0]


@pytest.fixture(scope="module")
def theirs():
    return load_transformers(Path(__file__).parent / "data/fixtures/bf16-hub", torch.float32)


@pytest.fixture(scope="module")
def one(ours) -> Trace:
    return trace(ours, torch.tensor(IDS[:1]), taps=TAPS)


def agree(path: Path, truth: Trace, taps: int, tokens: int) -> None:
    alignment = align(read_dump(path, config=truth.meta["config"]), truth)
    assert (len(alignment.keys), alignment.matched) == (taps, tokens), (alignment.keys, alignment.notes)
    for pair in alignment:
        assert pair.engine is not None, (pair.key, pair.problem)
        assert relative(pair.engine, pair.truth) < tolerances.TRANSFORMERS_TAPS_FLOAT32, pair.key


def save(x: Any, path: Path) -> Path:
    if path.suffix == ".pt":
        torch.save(x, path)
    elif path.suffix == ".npy":
        np.save(path, x.numpy())
    else:
        save_file({path.stem: x}, path)
    return path


@pytest.mark.parametrize(
    "name", ["logits.npy", "logits.pt", "engine_logits.pt", "out.pt", "out.npy", "out.safetensors"]
)
def test_logits_alone(one: Trace, tmp_path: Path, name: str) -> None:
    """[1, T, V] and [T, V], with a padded vocabulary where the name says what it is; no ids."""
    x = one["next_token_logits"].to(torch.float32)
    agree(save(x, tmp_path / name), one, 1, 7)
    agree(save(x[0].clone(), tmp_path / name), one, 1, 7)
    if "logits" in name:
        agree(save(torch.nn.functional.pad(x, (0, 8)), tmp_path / name), one, 1, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_p_under_the_name_of_logits(one: Trace, tmp_path: Path, dtype: torch.dtype) -> None:
    x = one["next_token_logits"].log_softmax(-1).to(dtype)
    torch.save(x, tmp_path / "logits.pt")
    (pair,) = align(read_dump(tmp_path / "logits.pt"), one)
    assert pair.as_log_p and pair.engine is not None and "log p" in pair.notes[-1]
    assert (pair.engine.double() - pair.truth).abs().max() <= x.abs().max() * torch.finfo(dtype).eps
    torch.save(one["next_token_logits"].to(dtype), tmp_path / "logits.pt")
    (pair,) = align(read_dump(tmp_path / "logits.pt"), one)
    assert not pair.as_log_p


def outputs(theirs, **inputs: Any) -> Any:
    with quiet(), torch.no_grad():
        return theirs(**inputs, output_hidden_states=True, output_router_logits=True, use_cache=True)


def test_a_model_output(theirs, one: Trace, tmp_path: Path) -> None:
    """As it is, with its cache; as a dict; the parts as lists. transformers' last hidden state is after the norm."""
    found = outputs(theirs, input_ids=torch.tensor(IDS[:1]))
    torch.save(found, tmp_path / "output.pt")
    layers = len(found.hidden_states) - 1
    agree(tmp_path / "output.pt", one, layers + 1 + layers + 1, 7)  # streams, final norm, routers, logits
    torch.save({k: found[k] for k in ("logits", "hidden_states", "router_logits")}, tmp_path / "output.pt")
    agree(tmp_path / "output.pt", one, 2 * layers + 2, 7)
    torch.save(list(found.hidden_states), tmp_path / "hidden_states.pt")
    agree(tmp_path / "hidden_states.pt", one, layers + 1, 7)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_are_matched_by_their_embeddings(theirs, ours, tmp_path: Path, side: str) -> None:
    rows, mask = padded([torch.tensor(row) for row in IDS])
    assert mask is not None
    ids = rows if side == "right" else torch.tensor([IDS[0], [0, 0, *IDS[1]]])
    real = mask if side == "right" else mask.flip(1)
    found = outputs(theirs, input_ids=ids, attention_mask=real)
    states = {f"hidden_states.{i}": x.contiguous() for i, x in enumerate(found.hidden_states)}
    save_file(states, tmp_path / "states.safetensors")
    agree(tmp_path / "states.safetensors", trace(ours, rows, attention_mask=mask, taps=TAPS), len(states), 12)
    save_file({**states, "input_ids": ids, "attention_mask": real}, tmp_path / "states.safetensors")
    agree(tmp_path / "states.safetensors", trace(ours, rows, attention_mask=mask, taps=TAPS), len(states), 12)


def test_what_generate_returns(theirs, ours, tmp_path: Path) -> None:
    with quiet(), torch.no_grad():
        found = theirs.generate(torch.tensor(IDS[:1]), max_new_tokens=3, do_sample=False, return_dict_in_generate=True,
                                output_logits=True, output_scores=True, output_hidden_states=True)  # fmt: skip
    truth = trace(ours, found.sequences[:, :-1], taps=TAPS)
    torch.save(found, tmp_path / "generated.pt")
    agree(tmp_path / "generated.pt", truth, len(found.hidden_states[0]) + 1, 9)
    alignment = align(read_dump(tmp_path / "generated.pt", config=truth.meta["config"]), truth)
    assert alignment.pair("next_token_logits").rows.tolist() == [[0, 6], [0, 7], [0, 8]]
    torch.save({"scores": found.scores, "sequences": found.sequences}, tmp_path / "generated.pt")
    agree(tmp_path / "generated.pt", truth, 1, 9)


@pytest.mark.parametrize("name", ["step.{}.logits", "step_{}/logits", "logits_step{}"])
@pytest.mark.parametrize("form", ["npz", "safetensors", "files"])
def test_several_steps(one: Trace, tmp_path: Path, name: str, form: str) -> None:
    """A prefill and two decode steps, with one list of ids for all."""
    x = one["next_token_logits"][0].to(torch.float32)
    parts = [x[:5].clone(), x[5:6].clone(), x[6:].clone()]
    arrays: dict[str, Tensor] = {name.format(i): part for i, part in enumerate(parts)}
    ids = {"input_ids": torch.tensor(IDS[0])}
    path = tmp_path / f"a.{form}"
    if form == "npz":
        np.savez(path, **{k: v.numpy() for k, v in (arrays | ids).items()})
    elif form == "safetensors":
        save_file(arrays | ids, path)
    else:
        path.mkdir()
        for i, part in enumerate(parts):
            torch.save({"logits": part} | (ids if i == 0 else {}), path / f"step_{i}.pt")
    agree(path, one, 1, 7)


def test_names_that_people_give() -> None:
    assert [step_of(n) for n in ("step.2.logits", "hidden_states.3", "logits_step1", "step_4", "steps.x")] == [
        (2, "logits"), (None, "hidden_states.3"), (1, "logits"), (4, ""), (None, "steps.x")]  # fmt: skip
    assert meaning("hidden_states.4", 4) == (None, "final_norm")
    assert meaning("hidden_states.1.0", 4) == (1, "layers.0.layer_input")
    assert meaning("router_logits.2", 4) == (None, "layers.2.moe_router_logits")
    assert meaning("scores.3", None) == meaning("logits.3", None) == (3, "next_token_logits")
    assert meaning("router_logits", None) is None and meaning("weights", 4) is None


class Strange:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_nothing_of_a_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "a.pt").open("wb") as file:
        pickle.dump({"logits": Strange()}, file)
    torch.save({"logits": Strange()}, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        with pytest.raises(Qwen35Error, match="was not executed"):
            read_dump(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_what_holds_itself_ends_and_counts_once() -> None:
    held: dict[str, Any] = {"logits": torch.zeros(1, 3, 7)}
    held |= {str(i): held for i in range(200)}
    assert [name for name, _ in tensors(held, "a")] == ["logits"]


def test_steps_that_are_missing_keep_their_tokens(tmp_path: Path) -> None:
    ids = torch.arange(12)[None]
    torch.save({"logits.0": torch.zeros(1, 7), "logits.7": torch.ones(1, 7), "input_ids": ids}, tmp_path / "a.pt")
    tokens = read_dump(tmp_path).tokens
    assert tokens[0].ids.tolist() == [0, 1, 2, 3] and tokens[7].ids.tolist() == [10]
    torch.save({"logits.0": torch.zeros(1, 7), f"logits.{10**30}": torch.ones(1, 7)}, tmp_path / "a.pt")
    assert [error.what for error in read_dump(tmp_path).problems] == ["no such step"]


def test_a_vocabulary_is_padded_by_less_than_itself() -> None:
    assert fit("next_token_logits", torch.zeros(1, 7), torch.zeros(1, 8))[0].shape == (1, 7)
    with pytest.raises(Qwen35Error, match="misshapen"):
        fit("next_token_logits", torch.zeros(1, 7), torch.zeros(1, 14))


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_the_byte_order_of_another_machine(name: str, tmp_path: Path) -> None:
    x = np.arange(6, dtype=">f4").reshape(2, 3)
    np.save(tmp_path / name, x) if name == "a.npy" else np.savez(tmp_path / name, next_token_logits=x)
    (tmp_path / "names.json").write_text('{"a": "next_token_logits"}')
    assert read_dump(tmp_path)["next_token_logits"].tolist() == [[0, 1, 2], [3, 4, 5]]
