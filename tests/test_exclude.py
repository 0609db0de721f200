"""Exclude lists are read differently by everybody; each case names who was bitten by it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest

from qwen35_moe.errors import Qwen35Error
from qwen35_moe.gate.exclude import ExcludeList, Hit
from qwen35_moe.gate.names import (
    canonical_module,
    is_draft_entry,
    mentions_shared_body,
    parts_of,
    spellings,
    tells_experts_apart,
)
from qwen35_moe.gate.readings import SEMANTICS

L0 = "model.language_model.layers.0"
BODY = f"{L0}.mlp.shared_expert.down_proj"

# entry, module, readers that leave the module unquantised, source
ENTRIES = [
    (BODY, BODY, "quark sglang vllm vllm-fp8 atom fp8 compressed-tensors modelopt", "an exported list: all agree"),
    ("*shared_expert*", BODY, "quark atom modelopt", "SGLang 0.5.23: SGLang's gate reads it, its loader does not"),
    ("*.shared_expert.*", BODY, "quark atom modelopt", "Quark 0.13's template qwen3_5_moe"),
    (r"re:.*shared_expert", BODY, "quark sglang vllm atom compressed-tensors", "SGLang's online MXFP4 config"),
    (r"re:.*mlp\.shared", BODY, "quark sglang vllm atom compressed-tensors", "no word for SGLang's substring gate"),
    (r"re:mlp\.shared", BODY, "atom", "re.search against re.match"),
    (f"{L0}.mlp.shared_expert", BODY, "atom fp8", "parents: ATOM config.py, FP8 segments"),
    (f"{L0}.mlp.shared_expert_gate", BODY, "", "the gate vector is not the body (vLLM #53248)"),
    ("*shared_expert_gate*", BODY, "", "MoE-MXFP4's model card"),
    ("mtp.*", BODY, "", "the draft says nothing about the target"),
    ("mtp.*", "mtp.layers.0.mlp.shared_expert.up_proj", "quark atom modelopt", "globs are not for SGLang and vLLM"),
    ("*.mlp.*", f"{L0}.mlp.experts.3.up_proj", "quark atom modelopt", "SGLang 0.5.23: broad"),
    ("mlp.gate", f"{L0}.mlp.gate", "fp8", "sglang #23467: segments"),
    ("mlp.gate", f"{L0}.mlp.gate_up_proj", "", "sglang #23467: not a prefix of a segment"),
    ("in_proj_a", f"{L0}.linear_attn.in_proj_a", "fp8", "sglang #23467"),
    ("in_proj_a", f"{L0}.linear_attn.in_proj_ab", "", "sglang #23467: collided by substring"),
    ("-:.*shared_expert.*", BODY, "gptq", "official GPTQ-Int4: negative patterns"),
    ("lm_head", "lm_head", "quark sglang vllm vllm-fp8 atom fp8 compressed-tensors modelopt", "all agree"),
]


def find(name: str, entries: Sequence[str], semantics: str) -> Hit | None:
    return ExcludeList(entries, semantics).hit(name)


@pytest.mark.parametrize(("entry", "module", "readers", "source"), ENTRIES, ids=[f"{e[0]}|{e[1]}" for e in ENTRIES])
def test_who_reads_what(entry: str, module: str, readers: str, source: str) -> None:
    found = {name for name in SEMANTICS if find(module, ["other", entry], name)}
    assert found == set(readers.split()), source
    for name in found:
        hit = find(module, ["other", entry], name)
        assert hit and (hit.index, hit.entry) == (1, entry)


def test_every_reader_names_its_source() -> None:
    assert all(s.source and s.tests for s in SEMANTICS.values())


def test_merged_names() -> None:
    parts = ("a.q_proj", "a.k_proj", "a.v_proj")
    assert parts_of("a.qkv_proj") == parts and parts_of("qkv_proj") == ("q_proj", "k_proj", "v_proj")
    assert parts_of("a.gate_up_proj") == ("a.gate_proj", "a.up_proj")
    assert parts_of(f"{L0}.linear_attn.in_proj_qkvz")[1] == f"{L0}.linear_attn.in_proj_z"
    assert parts_of("a.down_proj") == ()
    for listed in (parts, ("a.qkv_proj",)):  # a merged name may itself be listed
        assert find("a.qkv_proj", listed, "sglang")
    with pytest.raises(Qwen35Error, match="some parts of a fused module"):
        find("a.qkv_proj", parts[:2], "sglang")


def test_one_expert_excludes_the_module_for_sglang() -> None:
    """quark/utils.py: excludes may name experts one by one (sglang #38748: 1,536 names)."""
    entries = ["lm_head", "mtp.layers.0.mlp.experts.7.up_proj"]
    for reader in ("sglang", "vllm"):  # since vLLM 0.33
        hit = find("mtp.layers.0.mlp.experts", entries, reader)
        assert hit and hit.index == 1
    assert find("mtp.layers.0.mlp.experts.8.up_proj", entries, "sglang") is None


def test_spellings_cover_prefixes_drafts_and_deepseek() -> None:
    assert {f"{L0}.mlp.gate", "model.layers.0.mlp.gate", "layers.0.mlp.gate"} <= set(spellings("layers.0.mlp.gate"))
    assert spellings(f"{L0}.mlp.gate") == spellings("layers.0.mlp.gate")
    assert "model.layers.78.mlp.shared_expert.up_proj" in spellings("mtp.layers.0.mlp.shared_expert.up_proj", 78)
    deepseek = spellings("mtp.layers.0.mlp.shared_expert.up_proj", 78, "shared_experts")
    assert "model.layers.78.mlp.shared_experts.up_proj" in deepseek
    assert spellings("mtp.fc") == ("mtp.fc",)
    assert "model.visual.merger.linear_fc1" in spellings("visual.merger.linear_fc1")
    assert canonical_module("model.language_model.embed_tokens") == "embed_tokens"


# entry, what SGLang 0.5.23 says with 78 layers and one draft layer, source
DRAFTS = [
    ("mtp.layers.0.mlp.shared_expert.up_proj", True, "Qwen3.5"),
    ("model.layers.78.mlp.shared_experts.up_proj", True, "GLM-5.2, sglang #36124"),
    ("model.layers.79.mlp.shared_experts.up_proj", False, "one draft layer only"),
    ("model.layers.77.mlp.shared_experts.up_proj", False, "the target's last layer"),
    ("model.language_model.layers.78.mlp.shared_expert.up_proj", False, "SGLang 0.5.23: not recognised"),
    ("re:mtp.*", False, "a pattern does not start with mtp."),
]


@pytest.mark.parametrize(("entry", "expected", "source"), DRAFTS, ids=[d[0] for d in DRAFTS])
def test_draft_entries(entry: str, expected: bool, source: str) -> None:
    assert is_draft_entry(entry, 78, 1) is expected, source
    assert is_draft_entry(entry) is entry.startswith("mtp."), "without a layer count only mtp. is known (PR 22948)"


def test_mentions_shared_body() -> None:
    assert mentions_shared_body(BODY) and mentions_shared_body("*shared_expert*")
    assert not mentions_shared_body(f"{L0}.mlp.shared_expert_gate"), "vLLM #53248"
    assert not mentions_shared_body(r"re:.*mlp\.shared"), "the hole in the substring gates"


ALIKE = ["*.mlp.*", "model.language_model.layers.5.mlp.*", r"re:.*mlp\.shared", r"re:model\.layers\.5\.mlp.*",
         r"re:.*\.(gate|up)_proj$", r"re:.*mlp+\.experts", r"re:.*experts\.\d+\.(gate|up)_proj",
         r"re:.+experts\.[0-9]+\.down_proj$"]  # fmt: skip
APART = ["*.experts.5.*", "*.experts.?.*", "*.experts.[0-7].*", r"re:.*experts\.\d\.", r"re:.*experts\..\..*",
         r"re:.*experts\.\d\.down_proj", r"re:.*experts\.1\d+\.down_proj",
         r"re:.*experts\.\d{2}\.down_proj"]  # fmt: skip


@pytest.mark.parametrize("entry", ALIKE + APART)
def test_tells_experts_apart(entry: str) -> None:
    """A pattern that cannot tell experts apart must really treat all experts alike."""
    expected = entry in APART
    assert tells_experts_apart(entry) is expected
    names = [f"model.language_model.layers.5.mlp.experts.{e}.up_proj" for e in (0, 5, 10, 255)]
    for reader in ("quark", "sglang", "atom"):
        hits = {find(name, [entry], reader) is not None for name in names}
        assert expected or len(hits) == 1


def test_the_dictionary_finds_what_a_scan_finds() -> None:
    """Real lists are looked up through a dictionary; the tests one by one must say the same."""
    entries = [e[0] for e in ENTRIES]
    for semantics, (_, module, _, _) in product(SEMANTICS.values(), ENTRIES):
        slow = any(test(entry, module) for entry in entries for test in semantics.tests)
        found = ExcludeList(entries, semantics.name).direct((module,))
        assert (found is not None) == slow, (semantics.name, module)
