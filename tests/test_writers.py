"""The truth in other programs' formats, read back and looked at byte by byte."""

from __future__ import annotations

import ast
import re
import struct
from pathlib import Path

import pytest
import torch
from engine_like import padded_truth, tiny_model

from qwen35_moe import Qwen35Error
from qwen35_moe.cli.dump_config import ENGINES, SGLANG_PATCHES, dump_config
from qwen35_moe.oracle.dumps.align import align
from qwen35_moe.oracle.dumps.readers import read_dump
from qwen35_moe.oracle.dumps.readers.atom import MODULE_CLASSES
from qwen35_moe.oracle.dumps.writers import write_kl_base, write_sglang_dump

SEQUENCES = [[5, 9, 200, 7, 31, 8, 77], [5, 9, 4, 250, 3]]


@pytest.fixture(scope="module")
def truth():
    return padded_truth(tiny_model(), SEQUENCES)


@pytest.mark.parametrize("names", ["taps", "hooks"])
def test_sglang_dump_comes_back(truth, tmp_path: Path, names: str) -> None:
    """SGLang's own comparator accepts it (83 of 83 tensors; not run here): see the names and tags that it asks for."""
    count = write_sglang_dump(truth, tmp_path / "d", names=names)
    files = sorted(p.name for p in (tmp_path / "d").iterdir())
    assert count == len(files) and "step=0___rank=0___dump_index=1___name=input_ids.pt" in files
    dump = read_dump(tmp_path / "d", config=truth.meta["config"])
    alignment = align(dump, truth)
    assert alignment.matched == 12 and not dump.problems and not alignment.extra
    assert len(alignment.keys) > 80
    for pair in alignment:
        assert not pair.problem and torch.equal(pair.truth, pair.engine), pair.key
    with pytest.raises(Qwen35Error, match="not empty"):
        write_sglang_dump(truth, tmp_path / "d")


def test_sglang_file_is_what_the_comparator_reads(truth, tmp_path: Path) -> None:
    write_sglang_dump(truth, tmp_path / "d", names="hooks", dtype=torch.bfloat16)
    (file,) = (tmp_path / "d").glob("*name=non_intrusive__model.layers.3.q_norm.output___*")
    found = torch.load(file, weights_only=True)
    assert set(found) == {"value", "meta"} and found["meta"]["layer_id"] == 3
    assert found["value"].dtype == torch.bfloat16 and found["value"].shape == (12 * 4, 32)


@pytest.mark.parametrize("vocabulary", [256, 33])
def test_kl_base_round_trip(tmp_path: Path, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, vocabulary, (2, 8), generator=generator)
    logits = torch.randn(2, 8, vocabulary, generator=generator, dtype=torch.float64) * 9
    logits[0, 5] = 3.0  # all equal: the scale is zero
    write_kl_base(tmp_path / "base.kld", ids, logits)
    raw = (tmp_path / "base.kld").read_bytes()
    assert raw[:8] == b"_logits_" and struct.unpack("<3i", raw[8:20]) == (8, vocabulary, 2)
    assert len(raw) == 20 + 4 * 16 + 2 * 3 * 2 * (2 * ((vocabulary + 1) // 2) + 4)
    dump = read_dump(tmp_path / "base.kld")
    expected = logits.log_softmax(-1)
    for chunk in range(2):
        assert torch.equal(dump.tokens[chunk].ids, ids[chunk])
        found = dump.read("next_token_logprobs", chunk)
        rows = expected[chunk, 4:7]
        kept = logits[chunk, 4:7] > logits[chunk, 4:7].amax(-1, keepdim=True) - 16
        # Half a step of at most 16/65535, and float32's rounding of numbers up to 24.
        assert ((found - rows).abs()[kept] <= 8 / 65535 + 2e-6).all()
        assert (found[~kept] >= rows[~kept] - 1e-5).all()  # clipped from below


def test_kl_base_against_a_trace(tmp_path: Path) -> None:
    """A base file of the truth is the truth, as far as 16 bits go."""
    truth = padded_truth(tiny_model(), [SEQUENCES[0][:6], [5, 9, 4, 250, 3, 1]])
    write_kl_base(tmp_path / "base.kld", truth.ids, truth["next_token_logits"])
    alignment = align(read_dump(tmp_path / "base.kld"), truth)
    assert alignment.keys == ["next_token_logprobs"] and alignment.matched == 12
    (pair,) = alignment
    assert pair.rows.tolist() == [[0, 3], [0, 4], [1, 3], [1, 4]]
    likely = pair.truth > -12
    assert (pair.truth - pair.engine).abs()[likely].max() < 16 / 65535


def test_kl_base_refuses(tmp_path: Path) -> None:
    with pytest.raises(Qwen35Error, match="do not fit"):
        write_kl_base(tmp_path / "b", torch.zeros(2, 4), torch.zeros(2, 5, 8))
    with pytest.raises(Qwen35Error, match="not finite"):
        write_kl_base(tmp_path / "b", torch.zeros(1, 4), torch.full((1, 4, 8), torch.nan))


def test_dump_configs() -> None:
    assert set(ENGINES) == {"sglang", "vllm", "transformers", "llama.cpp", "atom"}
    assert SGLANG_PATCHES in dump_config("sglang") and "--disable-radix-cache" in dump_config("sglang")
    for engine in ENGINES:
        assert "qwen35-moe diagnose " in dump_config(engine), "the command to type next needs no truth"
    with pytest.raises(Qwen35Error, match="no dump settings(.|\n)*mlx"):
        dump_config("mlx")


def test_recipes_say_what_the_engines_take() -> None:
    """ATOM's classes as its model files define them, each with a rule of ours; vLLM's arguments, which its config check
    takes together: no routed experts with prefix caching or chunked prefill off."""
    text = dump_config("atom")
    named = re.search(r"CLASSES=(\S+)", text)
    assert named is not None and "Qwen3_5SparseMoeBlock" not in text
    rules = [
        next(path for pattern, path in MODULE_CLASSES if re.fullmatch(pattern, kind)) for kind in named[1].split(",")
    ]
    assert rules == ["output", "linear_attn.output", "o_proj.output", "mlp.output", "mlp.experts.output"]
    scripts = re.findall(r"<<'PY'\n(.*?)\nPY\n", dump_config("vllm"), re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        calls = [n for n in ast.walk(ast.parse(script)) if isinstance(n, ast.Call)]
        options = {k.arg for n in calls if isinstance(n.func, ast.Name) and n.func.id == "LLM" for k in n.keywords}
        refused = {"enable_prefix_caching", "enable_chunked_prefill", "kv_transfer_config"}
        assert "enable_return_routed_experts" not in options or not options & refused
