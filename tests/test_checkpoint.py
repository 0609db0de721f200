"""Checkpoints of every layout decode to the same values, from whole files or slices, and say what they are."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from layouts import CONFIG, LAYOUTS, D, E, F, config_with, tensors, write

from qwen35_moe.checkpoint import Checkpoint
from qwen35_moe.errors import Qwen35Error
from qwen35_moe.model.config import Config
from qwen35_moe.run.validate import validate

EXPERTS = "layers.0.mlp.experts"


@pytest.fixture(scope="module")
def stored_as(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a layout, written once."""
    folder = tmp_path_factory.mktemp("layouts")

    @cache
    def build(layout: str) -> Path:
        return write(folder / layout, tensors(layout)[0])

    return build


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_decode_to_the_same_values(layout: str, stored_as: Callable[[str], Path]) -> None:
    meant = tensors(layout)[1]
    with Checkpoint.open(stored_as(layout)) as ck:
        validate(ck)
        for name, values in meant.items():
            if ".experts." in name and layout in ("fp8 block fused",) and not name.startswith("mtp."):
                continue  # gate and up share a block of scales there; `Experts.read` below has them
            found = ck.weight(name.removesuffix(".weight")) if name.endswith(".weight") else None
            decoded = found.read().decode(torch.float64) if found else ck.read(name).double()
            assert torch.equal(decoded, values), name
        for prefix, e in product((EXPERTS, EXPERTS.replace("0", "1")), range(E)):
            gate_up, down = ck.experts(prefix).read(e)
            want = torch.cat([meant[f"{prefix}.{e}.{name}.weight"] for name in ("gate_proj", "up_proj")])
            assert torch.equal(gate_up.decode(torch.float64), want)
            assert torch.equal(down.decode(torch.float64), meant[f"{prefix}.{e}.down_proj.weight"])
        assert ck.report(aside=()).complete, "every tensor has been used"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_recognised_and_read_in_slices(layout: str, stored_as: Callable[[str], Path]) -> None:
    meant = tensors(layout)[1]
    ck = Checkpoint.open(stored_as(layout))
    experts = ck.experts(EXPERTS)
    kind = experts.weights(0)[0].kind
    assert (kind, experts.count) == (LAYOUTS[layout][2], E)
    assert [x.shape for x in experts.read(0)] == [(2 * F, D), (D, F)]
    down = ck.weight(f"{EXPERTS}.2.down_proj")
    for rows in (slice(128, 160), slice(0, 1), slice(128, 131), slice(0, 0)):
        if rows.stop > rows.start:
            part = down.read(rows).decode(torch.float64)
            assert torch.equal(part, meant[f"{EXPERTS}.2.down_proj.weight"][rows]), rows
    if kind == "fp8-block":
        with pytest.raises(Qwen35Error, match="must begin with a block"):
            down.read(slice(1, 5))
    specs = {weight.spec for e in range(E) for weight in experts.weights(e)}
    assert ck.spec(EXPERTS) == (specs.pop() if len(specs) == 1 else None)
    assert ck.spec("layers.0.mlp.experts.1.down_proj") == ck.find(f"{EXPERTS}.1.down_proj").spec
    assert ck.spec("layers.9.mlp.experts") is None and ck.spec("layers.0.mlp.nothing") is None
    with pytest.raises(Qwen35Error, match="no such expert"):
        experts.read(E)


def test_gate_and_up_in_one_block_of_scales_cannot_be_parted(tmp_path: Path) -> None:
    ck = Checkpoint.open(write(tmp_path, tensors("fp8 block fused")[0]))
    with pytest.raises(Qwen35Error, match="share a block of scales"):
        ck.weight(f"{EXPERTS}.0.up_proj")


PREFIXES = ("model.language_model.", "model.", "language_model.model.", "")
FILES = {
    "index": (("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), "model.safetensors.index.json"),
    "no index": (("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), None),
    "one file": (("model.safetensors",), None),
    "one file, index": (("model.safetensors",), "model.safetensors.index.json"),
    "other names": (("layers-0.safetensors", "mtp.safetensors", "outside.safetensors"), "x.safetensors.index.json"),
    "other names, no index": (("a.safetensors", "b.safetensors"), None),
}


@pytest.mark.parametrize(("prefix", "files"), list(product(PREFIXES, FILES)))
def test_prefixes_and_files(prefix: str, files: str, tmp_path: Path) -> None:
    stored, meant = tensors("bf16 fused", prefix=prefix)
    ck = Checkpoint.open(write(tmp_path, stored, *FILES[files]))
    validate(ck)
    assert "layers.0.linear_attn.A_log" in ck and "lm_head.weight" in ck and "mtp.fc.weight" in ck
    assert "visual.pos_embed.weight" in ck.names()
    assert torch.equal(ck.read("norm.weight").double(), meant["norm.weight"])
    assert torch.equal(ck.read("embed_tokens.weight", slice(7, 9)).double(), meant["embed_tokens.weight"][7:9])


def test_a_single_file_is_a_checkpoint(tmp_path: Path) -> None:
    folder = write(tmp_path, tensors("gpt-oss")[0], ("model.safetensors",), None)
    ck = Checkpoint.open(folder / "model.safetensors")
    validate(ck)
    assert ck.config == CONFIG
    (folder / "config.json").unlink()
    assert Checkpoint.open(folder / "model.safetensors").config == {}


def test_parts_that_may_be_left_out(tmp_path: Path) -> None:
    """Text-only saves drop vision and MTP; a tied head need not be stored."""
    stored = {k: t for k, t in tensors()[0].items() if not k.startswith(("mtp.", "model.visual."))}
    validate(Checkpoint.open(write(tmp_path / "text", stored)))
    del stored["lm_head.weight"]
    config = {**CONFIG, "tie_word_embeddings": True}
    validate(Checkpoint.open(write(tmp_path / "tied", stored, config=config)))
    with pytest.raises(Qwen35Error, match="lm_head"):
        validate(Checkpoint.open(write(tmp_path / "untied", stored)))


def test_scales_of_a_cache_are_left_aside(tmp_path: Path) -> None:
    """Of an engine's FP8 key-value cache, as compressed-tensors, ModelOpt and Quark name them."""
    names = {f"layers.1.self_attn.{name}" for name in ("k_scale", "v_proj.v_scale", "v_proj.output_scale")}
    scales = {f"model.language_model.{name}": torch.ones(1) for name in names}
    ck = Checkpoint.open(write(tmp_path, tensors()[0] | scales))
    validate(ck)
    assert names <= set(ck.report().aside)


@pytest.mark.parametrize("name", ["bf16-hub", "quark-mxfp4", "quark-moe-mxfp4"])
def test_fixtures(name: str) -> None:
    ck = Checkpoint.open(Path(__file__).parent / "data" / "fixtures" / name)
    validate(ck)
    quantised = "quark" in name
    assert str(ck.spec("layers.1.mlp.experts")) == ("mxfp4 (block 32)" if quantised else "bf16")
    assert ck.spec("layers.1.mlp.shared_expert.up_proj").kind == ("mxfp4" if "moe" in name else "bf16")
    assert ck.spec("mtp.layers.0.mlp.experts").kind == "bf16", "not in the exclude list, and BF16 all the same"


def test_read_gives_the_stored_dtype_and_memory_of_its_own(tmp_path: Path) -> None:
    stored, _ = tensors("f32 fused")
    ck = Checkpoint.open(write(tmp_path, stored))
    assert ck.read("layers.0.linear_attn.A_log").dtype == torch.float32
    first, second = ck.read("norm.weight"), ck.read("norm.weight")
    first.zero_()
    assert torch.equal(second, stored["model.language_model.norm.weight"])
    with pytest.raises(Qwen35Error, match="there is norm.weight"):
        ck.read("norm.weigh")
    with pytest.raises(Qwen35Error, match="step 1"):
        ck.read("norm.weight", slice(0, 4, 2))


def test_threads_read_at_once(tmp_path: Path) -> None:
    stored, meant = tensors("quark mxfp4")
    ck = Checkpoint.open(write(tmp_path, stored))

    def down(i: int) -> bool:
        found = ck.experts(EXPERTS).read(i % E)[1].decode(torch.float64)
        return torch.equal(found, meant[f"{EXPERTS}.{i % E}.down_proj.weight"])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(down, range(64)))


def test_files_are_closed(tmp_path: Path) -> None:
    folder = write(tmp_path, tensors()[0])
    gc.collect()  # files that other tests' models had open are closed now, and not in between
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with Checkpoint.open(folder) as ck:
            ck.experts(EXPERTS).read(0)
    Checkpoint.open(folder).read("norm.weight")
    gc.disable()
    try:  # nothing waits for the garbage collector
        Checkpoint.open(folder).experts(EXPERTS).read(0)
    finally:
        gc.enable()
    assert len(os.listdir("/proc/self/fd")) == before


def test_report_names_what_was_not_used(tmp_path: Path) -> None:
    stored, _ = tensors()
    folder = write(tmp_path, stored)
    write(tmp_path / "more", {"spare": torch.zeros(1)}, ("spare.safetensors",), None)
    (tmp_path / "more" / "spare.safetensors").rename(folder / "spare.safetensors")
    ck = Checkpoint.open(folder)
    for name in ck.names():
        if not name.startswith(("mtp.", "visual.", "layers.1.input_layernorm")) and ".experts." not in name:
            ck.read(name)
    for i in range(2):
        ck.experts(f"layers.{i}.mlp.experts")
    report = ck.report()
    assert report.unused == ["layers.1.input_layernorm.weight"] and not report.complete
    assert report.ignored == ["spare.safetensors"] and "spare" in str(report)
    assert all(name.startswith(("mtp.", "visual.")) for name in report.aside) and len(report.aside) > 20
    assert report.used + len(report.unused) + len(report.aside) == len(ck.names())


def test_identity_knows_headers_only(tmp_path: Path) -> None:
    stored, _ = tensors()
    one = Checkpoint.open(write(tmp_path / "a", stored)).identity()
    assert one == Checkpoint.open(write(tmp_path / "b", stored)).identity()
    del stored["mtp.fc.weight"]
    assert one != Checkpoint.open(write(tmp_path / "c", stored)).identity()
    assert json.loads(json.dumps(one)) == one


def test_verify(tmp_path: Path) -> None:
    stored, _ = tensors()
    folder = write(tmp_path, stored)
    ck = Checkpoint.open(folder)
    raw = "model.language_model.norm.weight"
    good = hashlib.sha256(stored[raw].view(torch.uint8).numpy().tobytes()).hexdigest()
    shard = "model-00001-of-00002.safetensors"
    of_file = hashlib.sha256((folder / shard).read_bytes()).hexdigest()
    lines = [f"{good} BF16 160 {raw}", f"{of_file} *{shard}", f"{'0' * 64} mtp.fc.weight", f"{good} nothing"]
    manifest = tmp_path / "manifest.txt"
    manifest.write_text("\n".join(lines), encoding="utf-8")
    assert [c.ok for c in ck.verify(manifest)] == [True, True, False, False]
    (folder / "with two  spaces.safetensors").write_bytes((folder / shard).read_bytes())
    lines = ["# sha256sum, by another hand", "", f"{of_file.upper()}  with two  spaces.safetensors"]
    manifest.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert [c.name for c in ck.verify(manifest) if c.ok] == ["with two  spaces.safetensors"]
    (folder / "with two  spaces.safetensors").unlink()
    manifest.write_text("abc norm.weight", encoding="utf-8")
    with pytest.raises(Qwen35Error, match=r"manifest.txt:1"):
        list(ck.verify(manifest))

    assert [(c.name, c.ok, c.expected) for c in ck.verify()][0] == (shard, True, "")
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / f"{shard}.metadata").write_text(f"commit\n{of_file}\n1.5\n", encoding="utf-8")
    assert [(c.ok, c.expected) for c in ck.verify()][0] == (True, of_file)
    (notes / f"{shard}.metadata").write_text(f"commit\n{'1' * 64}\n1.5\n", encoding="utf-8")
    assert not next(iter(ck.verify())).ok


def test_the_config_given_is_the_one_that_counts(tmp_path: Path) -> None:
    ck = Checkpoint.open(write(tmp_path, tensors()[0]))
    with pytest.raises(Qwen35Error, match="wrong shape"):
        validate(ck, Config.from_dict(config_with(vocab_size=47)))
