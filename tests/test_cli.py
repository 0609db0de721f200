"""What a newcomer types: help texts, layers, swapped arguments, names in another case, misspelt options."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen35_moe.cli.main import COMMANDS, main
from qwen35_moe.cli.parsing import layers
from qwen35_moe.cli.report_options import write_outputs
from qwen35_moe.errors import Qwen35Error
from qwen35_moe.gate.decide import rule_named
from qwen35_moe.numerics.arithmetics import get
from qwen35_moe.oracle.judge.records import Comparison

ROOT = Path(__file__).parent.parent


def said(capsys, *argv: str) -> tuple[int, str]:
    try:
        code = main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    shown = capsys.readouterr()
    return code, shown.out + shown.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example_exit_codes_and_formats(command, capsys):
    code, text = said(capsys, command, "-h")
    assert code == 0
    assert re.search(rf"^example: qwen35-moe {command} ?.*^exit codes: 0 .*^formats: ", text, re.M | re.S)


def test_layers():
    assert [layers(x) for x in ("3", "1,2", "1-3", "0,2-3")] == [[3], [1, 2], [1, 2, 3], [0, 2, 3]]
    for text in ("", "a", "3-", "1 to 3", "3-1"):
        with pytest.raises(Qwen35Error, match="layers"):
            layers(text)


def test_every_type_of_json_is_documented():
    page = (ROOT / "docs/json.md").read_text(encoding="utf-8")
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "qwen35_moe").rglob("*.py")]
    types = {name for text in sources for name in re.findall(r'\{"type": "([a-z ]+)", (?!"text": text)', text)}
    types |= set(re.findall(r'^ {12}"([a-z ]+)": ', inspect.getsource(Comparison.rows), re.M))
    assert len(types - {"image"}) > 10 and all(f"`{name}`" in page for name in types - {"image"})


def test_words_are_put_right(capsys):
    assert said(capsys, "Dump-Config", "SGLang")[0] == 0
    assert get("SGLang-BF16") is get("sglang-bf16")
    for argv, words in (
        (["dump-config", "sglan"], "did you mean 'sglang'?"),
        (["compar"], "did you mean 'compare'?"),
        (["compare", "a", "b", "--layr", "3"], "did you mean --layer?"),
        (["compare", "a", "b", "--lay", "3"], "did you mean --layer?"),
        (["generate", "a", "--ids", "1", "--arithmetic", "sglang"], "did you mean 'sglang-bf16'?)"),
        (["compare", "a"], "arguments are required: dump"),
    ):
        code, text = said(capsys, *argv)
        assert code == 2 and words in text, text
        assert "usage:" not in text and text.count("\n") == 2, "an error of arguments is two lines"
    with pytest.raises(Qwen35Error, match="did you mean 'sglang'?"):
        rule_named("sglng")


def test_swapped_arguments_and_a_checkpoint_as_output(built, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = str(built("tiny-mxfp4"))
    (tmp_path / "truth").mkdir()
    (tmp_path / "truth/trace.json").write_text("{}")
    (tmp_path / "dump").mkdir()
    code, text = said(capsys, "compare", "dump", "truth")
    assert code == 2 and "the two arguments are swapped" in text and "qwen35-moe compare truth dump" in text
    code, text = said(capsys, "diagnose", "dump", checkpoint)
    assert code == 2 and f"qwen35-moe diagnose {checkpoint} dump" in text
    code, text = said(capsys, "diagnose", "truth", "dump")
    assert code == 2 and "found: a truth" in text and "do: qwen35-moe compare truth dump" in text
    code, text = said(capsys, "compare", checkpoint, "dump")
    assert code == 2 and "found: a checkpoint" in text and f"do: qwen35-moe diagnose {checkpoint} dump" in text
    code, text = said(capsys, "trace", checkpoint, "--ids", "1,2", "--out", checkpoint)
    assert code == 2 and "this is a checkpoint: choose another folder" in text and "remove" not in text
    code, text = said(capsys, "trace", checkpoint, "--ids", "1,2", "--out", "out", "--layers", "1")
    assert code == 2 and "expected: 0-1: a layer needs those before it" in text
    code, text = said(capsys, "compare", "truth", "dump", "--layer-ids", "x")
    assert code == 2 and "not a list of layers\n  where: --layer-ids" in text
    code, text = said(capsys, "trace", checkpoint, "--ids", "1,2")
    assert code == 2 and "--out is missing" in text
    code, text = said(capsys, "info", "truth")
    assert code == 2 and "not a checkpoint" in text and "found: a truth" in text
    code, text = said(capsys, "diagnose", checkpoint, checkpoint)
    assert code == 2 and "name the engine's dump: this is a checkpoint" in text


def test_diagnose_keeps_its_truth(built, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = str(built("tiny-mxfp4"))
    assert said(capsys, "trace", checkpoint, "--ids", "1,2,3", "--out", "mine", "--no-envelope", "--quiet")[0] == 0
    code, text = said(capsys, "diagnose", checkpoint, "mine", "--layer", "0-1")
    assert code == 0 and "computed for the tokens of the dump, and not kept" in text
    assert re.search(r"layer 4/4  expert .* \d+ s left", text), "progress of the truth"
    code, text = said(capsys, "diagnose", checkpoint, "mine", "--out", "truth", "--quiet")
    assert " left" not in text
    assert code == 0 and (tmp_path / "truth/trace.json").is_file() and "truth" in text
    code, text = said(capsys, "compare", "truth", "mine", "--layer", "1,2")
    assert code == 0 and "judged only in layers: 1, 2" in text


@pytest.mark.parametrize(("outputs", "found"), [
    (["--html", "a", "--json", "./a"], "two outputs"), (["--html", "dump"], "what this command reads"),
    (["--json", "truth/trace.json"], "what this command reads")])  # fmt: skip
def test_an_output_replaces_nothing_that_is_needed(outputs, found, tmp_path, capsys, monkeypatch, built):
    monkeypatch.chdir(tmp_path)
    checkpoint = str(built("tiny"))
    assert said(capsys, "trace", checkpoint, "--ids", "1,2", "--out", "truth", "--no-envelope", "--quiet")[0] == 0
    save_file({"layers.0.mlp_output": torch.zeros(2, 64)}, "dump")
    code, text = said(capsys, "compare", "truth", "dump", *outputs)
    assert code == 2 and "this would be overwritten" in text and f"found: {found}" in text
    code, text = said(capsys, "diagnose", checkpoint, "truth", "--out", "truth", "--quiet")
    assert code == 2 and "this would be overwritten" in text
    assert said(capsys, "verify", "truth")[0] == 0


@pytest.mark.parametrize("argv", [
    ["compare", "a", "b", "--width", "19"], ["compare", "a", "b", "--limit", "nan"],
    ["compare-dumps", "a", "b", "--limit", "0"],
    ["trace", "a", "--ids", "1", "--out", "b", "--drafts", "1000000000"],
    ["trace", "a", "--ids", "1", "--out", "b", "--batch", "0"], ["probe", "a", "b", "--timeout", "inf"],
    ["probe", "a", "b", "--retries", "-1"], ["probe", "a", "b", "--timeout", "x"]])  # fmt: skip
def test_numbers_out_of_range_are_arguments_that_cannot_be_used(argv, capsys):
    code, text = said(capsys, *argv)
    assert code == 2 and "is no number from" in text


def test_a_million_million_prompts_are_not_drawn(built, capsys):
    code, text = said(capsys, "probe", str(built("tiny")), "http://127.0.0.1:9", "--prompts", str(10**12))
    assert code == 2 and "no number of prompts to ask" in text


def test_a_verdict_stands_where_a_file_cannot_be_written(capsys):
    full = {Path("/dev/full"): lambda: "x" * 100_000}
    assert [write_outputs(code, full) for code in (0, 1, 2)] == [2, 1, 2]
    assert "cannot write /dev/full" in capsys.readouterr().err
