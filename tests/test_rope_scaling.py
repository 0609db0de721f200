"""Rotary embeddings for long contexts against transformers: frequencies of every `rope_type`, and whole models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peers.capture import capture
from peers.float64 import Widen, float64_clean
from peers.transformers_model import cached, load_transformers, new_cache, quiet
from tolerances import FLOAT64_CLEAN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTextRotaryEmbedding

import qwen35_moe as q
from qwen35_moe.model.config.rope_scaling import KEYS_OF_TYPE
from qwen35_moe.model.rope import rotary_angles
from qwen35_moe.numerics.metrics import compare_traces

FIXTURE = Path(__file__).parent / "data" / "fixtures" / "bf16-hub"
CONFIG = json.loads((FIXTURE / "config.json").read_text())
PAIRS = int(CONFIG["text_config"]["head_dim"] * 0.25) // 2

TYPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, all keys": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 48, "beta_fast": 16, "beta_slow": 2,
        "mscale": 1.1, "mscale_all_dim": 0.7, "truncate": False,
    },
    "yarn, attention_factor": {
        "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "attention_factor": 1.25,
    },
    "yarn by the ratio of lengths": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
    "longrope": {
        "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 40,
        "short_factor": [1.0 + 0.1 * j for j in range(PAIRS)], "long_factor": [1.0 + 0.7 * j for j in range(PAIRS)],
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 40,
    },
    "proportional": {"rope_type": "proportional", "factor": 2.0},
}  # fmt: skip


def scaled(name: str) -> dict[str, Any]:
    raw = json.loads(json.dumps(CONFIG))
    text = raw["text_config"]
    text["max_position_embeddings"] = 64
    kept = {key: text["rope_parameters"][key] for key in ("rope_theta", "mrope_section", "mrope_interleaved")}
    text["rope_parameters"] = {**kept, "partial_rotary_factor": 0.25, **TYPES[name]}
    return raw


def checkpoint(folder: Path, name: str) -> Path:
    for file in FIXTURE.iterdir():
        shutil.copy(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(scaled(name)))
    return folder


def theirs(name: str) -> Qwen3_5MoeTextRotaryEmbedding:
    with quiet():
        return Qwen3_5MoeTextRotaryEmbedding(Qwen3_5MoeTextConfig(**scaled(name)["text_config"]))


def test_every_type_of_transformers_is_compared() -> None:
    """transformers keeps "default" elsewhere; the other tests of this file run over `TYPES`."""
    assert {kind["rope_type"] for kind in TYPES.values()} == ROPE_INIT_FUNCTIONS.keys() == KEYS_OF_TYPE.keys()


@pytest.mark.parametrize("tokens", [20, 50, 90, 3000])
@pytest.mark.parametrize("name", TYPES)
def test_angles_have_the_same_bits_in_float32(name: str, tokens: int) -> None:
    """Image positions among them; lengths below and beyond those of training."""
    config = q.Config.from_dict(scaled(name))
    generator = torch.Generator().manual_seed(1)
    for positions in (torch.arange(tokens)[None], torch.randint(0, tokens, (3, 2, 30), generator=generator)):
        found = rotary_angles(config, positions, torch.bfloat16)
        for a, b in zip(found, theirs(name)(torch.empty(0), positions), strict=True):
            assert a.dtype == b.dtype == torch.float32
            assert torch.equal(a, b[..., : b.shape[-1] // 2])


@pytest.mark.parametrize("tokens", [50, 3000])
@pytest.mark.parametrize("name", TYPES)
def test_angles_in_float64(name: str, tokens: int) -> None:
    config, positions = q.Config.from_dict(scaled(name)), torch.arange(tokens)[None]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Widen():
            expected = theirs(name)(torch.empty(0), positions)
    finally:
        torch.set_default_dtype(default)
    for a, b in zip(rotary_angles(config, positions, torch.float64), expected, strict=True):
        assert b.dtype == torch.float64
        assert (a - b[..., : b.shape[-1] // 2]).abs().max() <= FLOAT64_CLEAN


@pytest.mark.parametrize("name", ["yarn", "dynamic", "longrope", "proportional"])
def test_models_have_the_same_bits_in_bf16(name: str, tmp_path: Path) -> None:
    """Prefill beyond the length of training, and two decode steps."""
    path = checkpoint(tmp_path, name)
    model, peer = q.load(path, "transformers-bf16", "unfused", text_only=True), load_transformers(path, torch.bfloat16)
    own_cache, peer_cache = q.Cache(), new_cache(peer)
    for ids in torch.randint(0, model.config.vocab_size, (1, 92), generator=torch.Generator().manual_seed(3)).split(
        (90, 1, 1), 1
    ):
        run = q.trace(model, ids, cache=own_cache, experts=True)
        rows = compare_traces(run, capture(peer, ids, **cached(peer_cache)))
        assert [row.key for row in rows if not row.equal] == []


@pytest.mark.parametrize("name", ["yarn", "llama3"])
def test_models_agree_in_float64(name: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, name)
    ids, peer = torch.arange(90)[None] * 7 % 250, load_transformers(path, torch.float64)
    with float64_clean(peer):
        truth = capture(peer, ids)["next_token_logits"]
    plain = q.load(FIXTURE, "exact", "unfused", text_only=True)(ids)
    ours = q.load(path, "exact", "unfused", text_only=True)(ids)
    assert (ours - truth).abs().max() <= FLOAT64_CLEAN
    assert (plain - truth).abs().max() > 1e4 * FLOAT64_CLEAN  # it makes a difference


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "linear"}, ["keys are missing", "factor"]),
        ({"rope_type": "llama3", "factor": 8}, ["low_freq_factor, high_freq_factor"]),
        ({"rope_type": "yarn", "factor": "4"}, ["bad value", "factor", "'4'"]),
        ({"rope_type": "yarn", "factor": -4.0}, ["bad value", "factor"]),
        ({"rope_type": "yarn", "facter": 4.0}, ["unknown keys", "facter"]),
        ({"rope_type": "yarn", "truncate": 1}, ["bad value", "truncate", "true or false"]),
        ({"rope_type": "yarn", "original_max_position_embeddings": 10.5}, ["bad value", "original_max"]),
        ({"rope_type": "su"}, ["unsupported rotary embedding", "su", "longrope"]),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, ["short_factor"]),
        ({"rope_type": "longrope", "short_factor": 1.0, "long_factor": [1.0]}, ["a list of positive numbers"]),
    ],
)
def test_what_cannot_be_computed_is_named(rope: dict[str, Any], words: list[str]) -> None:
    raw = scaled("linear")
    kept = {key: raw["text_config"]["rope_parameters"][key] for key in ("rope_theta", "mrope_section")}
    raw["text_config"]["rope_parameters"] = {**kept, "partial_rotary_factor": 0.25, **rope}
    with pytest.raises(q.Qwen35Error) as error:
        q.Config.from_dict(raw)
    for word in words:
        assert word in str(error.value)
