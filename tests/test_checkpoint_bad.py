"""Bad checkpoints: each is found from headers, with one error that names place, expected and found."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import CONFIG, D, E, F, Tensors, config_with, tensors, write

from qwen35_moe.checkpoint import Checkpoint
from qwen35_moe.checkpoint.header import read_header
from qwen35_moe.errors import Qwen35Error
from qwen35_moe.gate.decide import can_fuse_shared_expert
from qwen35_moe.model.config import Config
from qwen35_moe.run.load import load
from qwen35_moe.run.validate import validate

P = "model.language_model."
EXPERT = P + "layers.1.mlp.experts.1.up_proj"
U8, BF16, F32, F8 = torch.uint8, torch.bfloat16, torch.float32, torch.float8_e4m3fn


def without(*names: str) -> Callable[[Tensors], None]:
    def change(stored: Tensors) -> None:
        for name in names:
            del stored[name]

    return change


def having(**others: torch.Tensor) -> Callable[[Tensors], None]:
    """Adds or replaces tensors `EXPERT.<role>`."""
    return lambda stored: stored.update({f"{EXPERT}.{role}": tensor for role, tensor in others.items()})


def named(name: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda stored: stored.update({P + name: tensor})


def gptq(stored: Tensors) -> None:
    for role in ("weight", "weight_scale"):
        del stored[f"{EXPERT}.{role}"]
    stored[f"{EXPERT}.qweight"] = torch.zeros(D // 8, F, dtype=torch.int32)
    stored[f"{EXPERT}.qzeros"] = torch.zeros(1, F // 8, dtype=torch.int32)
    stored[f"{EXPERT}.scales"] = torch.zeros(1, F, dtype=torch.float16)


# (layout, change, what the message holds)
TENSORS: dict[str, tuple[str, Callable[[Tensors], Any], tuple[str, ...]]] = {
    "a matrix of an expert is missing": (
        "quark mxfp4", without(f"{EXPERT}.weight", f"{EXPERT}.weight_scale"),
        ("a tensor is missing", "layers.1.mlp.experts.1.up_proj.weight", "absent"),
    ),
    "an expert is missing": (
        "bf16 one by one", without(*(P + f"layers.1.mlp.experts.1.{n}_proj.weight" for n in ("gate", "up", "down"))),
        ("a tensor is missing", "layers.1.mlp.experts.1.gate_proj.weight"),
    ),
    "the last expert is missing": (
        "bf16 one by one", without(*(P + f"layers.1.mlp.experts.2.{n}_proj.weight" for n in ("gate", "up", "down"))),
        ("wrong number of experts", "layers.1.mlp.experts", "num_experts = 3", "2"),
    ),
    "a layer's experts are missing": (
        "bf16 fused", without(P + "layers.1.mlp.experts.gate_up_proj", P + "layers.1.mlp.experts.down_proj"),
        ("a tensor is missing", "layers.1.mlp.experts"),
    ),
    "half of the fused experts": (
        "bf16 fused", without(P + "layers.1.mlp.experts.down_proj"), ("missing", "layers.1.mlp.experts.down_proj")
    ),
    "fused experts that differ in number": (
        "bf16 fused", named("layers.1.mlp.experts.down_proj", torch.zeros(E + 1, D, F, dtype=BF16)),
        ("wrong shape", "layers.1.mlp.experts.down_proj", "of one E", "[4, 160, 160]"),
    ),
    "fused experts in the orientation of Qwen3-VL": (
        "bf16 fused", named("layers.1.mlp.experts.gate_up_proj", torch.zeros(E, D, 2 * F, dtype=BF16)),
        ("wrong shape", "layers.1.mlp.experts.gate_up_proj", "[320, 160]", "[160, 320]"),
    ),
    "experts both fused and not": (
        "bf16 one by one", named("layers.1.mlp.experts.gate_up_proj", torch.zeros(E, 2 * F, D, dtype=BF16)),
        ("both fused and one by one", "layers.1.mlp.experts"),
    ),
    "codes without scales": ("quark mxfp4", without(f"{EXPERT}.weight_scale"), (EXPERT, "U8 [160, 80], scale: none")),
    "packed codes without scales": (
        "compressed-tensors", without(f"{EXPERT}.weight_scale"), (f"{EXPERT}.weight_packed", "no scale")
    ),
    "scales without codes": ("quark mxfp4", without(f"{EXPERT}.weight"), ("a weight is missing", EXPERT[-9:])),
    "fp8 without a scale": ("fp8 block", without(f"{EXPERT}.weight_scale_inv"), (f"{EXPERT}.weight", "no scale")),
    "wrong dtype of a scale, mxfp4": (
        "quark mxfp4", having(weight_scale=torch.ones(F, D // 32, dtype=BF16)),
        ("wrong dtype for an MXFP4 scale", f"{EXPERT}.weight_scale", "U8", "BF16 [160, 5]"),
    ),
    "wrong dtype of a scale, fp8": (
        "fp8 block", having(weight_scale_inv=torch.ones(2, 2, dtype=U8)),
        ("wrong dtype for an FP8 scale", f"{EXPERT}.weight_scale_inv", "BF16 or F32", "U8 [2, 2]"),
    ),
    "wrong shape of scales, mxfp4": (
        "quark mxfp4", having(weight_scale=torch.ones(F, D // 16, dtype=U8)),
        ("scales of the wrong shape", f"{EXPERT}.weight_scale", "U8 [160, 5]", "U8 [160, 10]"),
    ),
    "wrong shape of scales, fp8": (
        "fp8 block", having(weight_scale_inv=torch.ones(1, 2, dtype=BF16)),
        ("scale of the wrong shape", f"{EXPERT}.weight_scale_inv", "[2, 2]", "BF16 [1, 2]"),
    ),
    "two scales": (
        "fp8 block", having(weight_scale=torch.ones(1, dtype=F32)), ("two scales", "up_proj.weight_scale_inv")
    ),
    "a float with a scale": (
        "bf16 one by one", having(weight_scale=torch.ones(1, dtype=F32)), ("a float weight has a scale", EXPERT)
    ),
    "two weights": ("quark mxfp4", having(weight_packed=torch.ones(F, D // 2, dtype=U8)), ("there are two", EXPERT)),
    "K is no multiple of 32": (
        "quark mxfp4",
        having(weight=torch.ones(F, 72, dtype=U8), weight_scale=torch.ones(F, 5, dtype=U8)),
        ("whole blocks", f"{EXPERT}.weight", "a multiple of 32", "I = 144"),
    ),
    "NVFP4": (
        "quark mxfp4",
        having(weight_scale=torch.ones(F, D // 16).to(F8), weight_scale_2=torch.ones(1), input_scale=torch.ones(1)),
        ("not supported", "NVFP4", f"{EXPERT}.weight_scale_2", "MXFP4"),
    ),
    "NVFP4 without its mark": (
        "quark mxfp4", having(weight_scale=torch.ones(F, D // 16).to(F8)), ("NVFP4", f"{EXPERT}.weight_scale")
    ),
    "GPTQ": ("quark mxfp4", gptq, ("not supported", "GPTQ", f"{EXPERT}.q")),
    "integers": (
        "quark mxfp4", having(weight=torch.ones(F, D, dtype=torch.int8)), ("not supported", f"{EXPERT}.weight", "I8")
    ),
    "bitsandbytes": ("bf16 one by one", having(SCB=torch.ones(F)), ("not supported", "bitsandbytes", EXPERT)),
    "e5m2": (
        "fp8 block", having(weight=torch.ones(F, D).to(torch.float8_e5m2)), ("not supported", EXPERT, "F8_E5M2 [160")
    ),
    "a misshapen norm": (
        "quark mxfp4", named("layers.1.input_layernorm.weight", torch.ones(D + 1)),
        ("wrong shape", "layers.1.input_layernorm.weight", "[160]", "[161]"),
    ),
    "a misshapen vision tensor": (
        "quark mxfp4", lambda stored: stored.update({"model.visual.blocks.0.attn.qkv.bias": torch.ones(47)}),
        ("wrong shape", "visual.blocks.0.attn.qkv.bias", "[48]", "[47]"),
    ),
    "a missing draft tensor": ("quark mxfp4", without("mtp.fc.weight"), ("missing", "mtp.fc.weight")),
    "a tensor too many": (
        "quark mxfp4", named("layers.1.self_attn.extra.weight", torch.ones(3)),
        ("not expected", "layers.1.self_attn.extra.weight", "none", "F32 [3]"),
    ),
    "a layer too many": (
        "quark mxfp4", named("layers.2.input_layernorm.weight", torch.ones(D)), ("not expected", "layers.2.input")
    ),
    "a bias in the text model": (
        "quark mxfp4", named("layers.1.self_attn.q_proj.bias", torch.ones(3)), ("not expected", "self_attn.q_proj.bias")
    ),
    "a scale beside float embeddings": (
        "quark mxfp4", named("embed_tokens.weight_scale", torch.ones(48, D // 32, dtype=U8)),
        ("a float weight has a scale", "embed_tokens.weight_scale"),
    ),
    "quantised embeddings": (
        "quark mxfp4",
        lambda stored: stored.update({P + "embed_tokens.weight": torch.ones(48, D // 2, dtype=U8),
                                      P + "embed_tokens.weight_scale": torch.ones(48, D // 32, dtype=U8)}),
        ("must be a float", "embed_tokens.weight", "mxfp4"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(case: str, tmp_path: Path) -> None:
    layout, change, expected = TENSORS[case]
    stored, _ = tensors(layout)
    change(stored)
    ck = Checkpoint.open(write(tmp_path, stored))
    with pytest.raises(Qwen35Error) as error:
        validate(ck)
    for text in expected:
        assert text in str(error.value), str(error.value)
    assert error.value.where and error.value.expected and error.value.found != ""


def test_many_problems_make_one_error(tmp_path: Path) -> None:
    stored, _ = tensors("bf16 fused")
    ck = Checkpoint.open(write(tmp_path, stored, config=config_with(hidden_size=96)))
    with pytest.raises(Qwen35Error, match=r"things in the checkpoint do not fit") as error:
        validate(ck, Config.from_dict(config_with(num_experts=4, vocab_size=50, moe_intermediate_size=32)))
    message = str(error.value)
    assert "embed_tokens.weight" in message and "[50, 160]" in message and "[48, 160]" in message
    assert len(message) < 3000


@pytest.mark.parametrize(("layout", "role", "value"), [
    ("quark mxfp4", "weight_scale", 255), ("compressed-tensors", "weight_scale", 255),
    ("fp8 block", "weight_scale_inv", float("nan")), ("fp8 channel", "weight_scale", float("inf")),
])  # fmt: skip
def test_nan_scales_are_found_when_read(layout: str, role: str, value: float, tmp_path: Path) -> None:
    stored, _ = tensors(layout)
    scale = stored[f"{EXPERT}.{role}"].clone()
    scale.view(-1)[-1] = value
    stored[f"{EXPERT}.{role}"] = scale
    ck = Checkpoint.open(write(tmp_path, stored))
    validate(ck)
    ck.experts("layers.1.mlp.experts").read(0)
    with pytest.raises(Qwen35Error, match=r"(?s)a scale is .*safetensors: .*experts.1.up_proj.weight_scale"):
        ck.experts("layers.1.mlp.experts").read(1)


SHARD, OTHER = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def edit_bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_bytes(change((folder / name).read_bytes())))


def void(_: object) -> None: ...


def edit_header(change: Callable[[dict[str, Any]], Any], name: str = SHARD) -> Callable[[Path], None]:
    """Rewrites the header of a shard, and keeps the data."""

    def edit(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        changed = change(header)
        text = changed if isinstance(changed, bytes) else json.dumps(header if changed is None else changed).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return edit_bytes(name, edit)


def entry(header: dict[str, Any], i: int = 1) -> dict[str, Any]:
    """The i-th tensor of a file, in the order of its data."""
    tensors = [e for name, e in header.items() if name != "__metadata__"]
    return sorted(tensors, key=lambda e: e["data_offsets"])[i]


def edit_index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def edit(data: bytes) -> bytes:
        index = json.loads(data)
        change(index["weight_map"])
        return json.dumps(index).encode()

    return edit_bytes(INDEX, edit)


def move_by(begin: int, end: int) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        offsets = entry(header)["data_offsets"]
        offsets[0], offsets[1] = offsets[0] + begin, offsets[1] + end

    return change


def another_checkpoint(folder: Path) -> None:
    """The second shard is one of a checkpoint with more layers."""
    stored, _ = tensors("bf16 fused")
    more = {k.replace("layers.1.", "layers.2."): t for k, t in stored.items()}
    write(folder / "other", more)
    shutil.copy(folder / "other" / OTHER, folder / OTHER)
    edit_index(lambda m: [m.pop(k) for k in [k for k, f in m.items() if f == OTHER and k not in more]])(folder)


def twice(folder: Path) -> None:
    shutil.copy(folder / SHARD, folder / "copy.safetensors")
    (folder / INDEX).unlink()


FILES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "cut off in the data": (edit_bytes(SHARD, lambda b: b[:-100]), ("cut off", SHARD, "bytes")),
    "cut off in the header": (edit_bytes(SHARD, lambda b: b[:100]), ("cut off", SHARD, "file of 100 bytes")),
    "cut off at once": (edit_bytes(SHARD, lambda b: b[:5]), ("cut off", SHARD, "of 5 bytes")),
    "empty": (edit_bytes(SHARD, lambda b: b""), ("cut off", SHARD)),
    "an enormous header": (
        edit_bytes(SHARD, lambda b: (2**60).to_bytes(8, "little") + b[8:]), (SHARD, "1152921504606846976 announced")
    ),
    "bytes after the end": (edit_bytes(SHARD, lambda b: b + b"x"), ("does not know", SHARD)),
    "not JSON": (edit_header(lambda h: b"{nonsense"), ("not valid JSON", SHARD)),
    "not UTF-8": (edit_header(lambda h: b'{"\xff": 1}'), ("not valid JSON", SHARD)),
    "deeply nested": (edit_header(lambda h: b'{"a":' * 50_000), ("not valid JSON", SHARD)),
    "a list": (edit_header(lambda h: [1]), ("expected: an object", SHARD)),
    "a repeated key": (edit_header(lambda h: b'{"a": {}, "a": {}}'), ("a key is repeated", SHARD, "'a'")),
    "an overlap": (edit_header(move_by(-2, -2)), ("lies about offsets: tensors overlap", SHARD)),
    "a gap": (edit_header(move_by(2, 2)), ("lies about offsets: bytes that belong to none", SHARD)),
    "out of the file": (edit_header(move_by(2**50, 2**50)), ("lies about offsets", SHARD)),
    "bytes that are not the shape's": (edit_header(move_by(0, 2)), ("size in bytes", SHARD)),
    "ends before it begins": (edit_header(move_by(2**40, 0)), ("size in bytes", SHARD)),
    "negative offsets": (edit_header(move_by(-(2**40), 0)), ("data_offsets", SHARD)),
    "wrong dtype for the size": (edit_header(lambda h: entry(h).update(dtype="F64")), ("size in bytes", SHARD, "F64")),
    "unknown dtype": (edit_header(lambda h: entry(h).update(dtype="F7")), ("dtype", SHARD, "'F7'")),
    "a shape that is none": (edit_header(lambda h: entry(h).update(shape=[True, 1.5])), ("shape", SHARD)),
    "an absurd shape": (edit_header(lambda h: entry(h).update(shape=[2**62] * 8)), ("size in bytes", SHARD)),
    "an entry that is none": (edit_header(lambda h: h.update(x=3)), ("a tensor's entry", "'x'", SHARD)),
    "a name that cannot be printed": (
        edit_header(lambda h: h.update({"\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}})),
        ("name of a tensor", SHARD),
    ),
    "the index names a missing file": (
        edit_index(lambda m: m.update({"lm_head.weight": "gone.safetensors"})), ("not there", INDEX, "gone.safetensors")
    ),
    "the index names a missing tensor": (
        edit_index(lambda m: m.update({"a.b.weight": SHARD})), ("not in their files", INDEX, f"{SHARD}: a.b.weight")
    ),
    "the index names the wrong shard": (
        edit_index(lambda m: m.update(dict.fromkeys([k for k, f in m.items() if f == SHARD][:1], OTHER))),
        ("not in their files", INDEX, OTHER),
    ),
    "the index leaves the folder": (
        edit_index(lambda m: m.update({"lm_head.weight": "../x.safetensors"})), ("bad index", "'../x.safetensors'")
    ),
    "the index has a number for a file": (edit_index(lambda m: m.update({"lm_head.weight": 3})), ("bad index", "3")),
    "the index has two names for a tensor": (
        edit_index(lambda m: m.update({"norm.weight": SHARD})), ("two names for one tensor", "norm.weight")
    ),
    "the index is empty": (edit_bytes(INDEX, lambda b: b"{}"), ("bad index", "weight_map")),
    "the index is no JSON": (edit_bytes(INDEX, lambda b: b"]"), ("not valid JSON", INDEX)),
    "a shard of another checkpoint": (another_checkpoint, ("the index does not know", "another checkpoint", OTHER)),
    "a shard is missing, index": (lambda f: (f / OTHER).unlink(), ("not there", OTHER)),
    "a shard is missing, no index": (
        lambda f: ((f / OTHER).unlink(), (f / INDEX).unlink()), ("shards are missing", "2 files", "numbers 1")
    ),
    "a tensor is in two files, no index": (twice, ("in two files", SHARD, "copy.safetensors")),
    "two indexes": (
        lambda f: (shutil.copy(f / INDEX, f / "a.safetensors.index.json"),
                   (f / INDEX).rename(f / "b.safetensors.index.json")),
        ("several indexes", "a.safetensors.index.json"),
    ),
    "no files": (lambda f: [file.unlink() for file in f.glob("*.saf*")], ("no *.safetensors",)),
    "config.json is a list": (edit_bytes("config.json", lambda b: b"[]"), ("must hold an object", "config.json")),
    "config.json is no JSON": (edit_bytes("config.json", lambda b: b"{"), ("not valid JSON", "config.json")),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("good"), tensors("bf16 fused")[0])


@pytest.mark.parametrize("case", FILES)
def test_files_that_cannot_be_believed(case: str, good: Path, tmp_path: Path) -> None:
    change, expected = FILES[case]
    folder = tmp_path / "checkpoint"
    shutil.copytree(good, folder)
    change(folder)
    with pytest.raises(Qwen35Error) as error:
        Checkpoint.open(folder)
    for text in expected:
        assert text in str(error.value), str(error.value)
    assert str(error.value).isprintable() or "\n" in str(error.value)


def test_two_prefixes_in_one_file(tmp_path: Path) -> None:
    stored, _ = tensors("bf16 fused")
    stored["model.norm.weight"] = stored[P + "norm.weight"].clone()
    with pytest.raises(Qwen35Error, match="two names for one tensor"):
        Checkpoint.open(write(tmp_path, stored, ("model.safetensors",), None))


def test_a_copy_that_the_index_does_not_point_at_is_reported(tmp_path: Path) -> None:
    """A tensor in two shards of an index: the index decides, and the run's report names the other."""
    stored, meant = tensors("bf16 fused")
    folder = write(tmp_path, stored)
    name = next(k for k, f in json.loads((folder / INDEX).read_text())["weight_map"].items() if f == SHARD)
    write(
        tmp_path / "b",
        {name: torch.zeros_like(stored[name]), **{k: t for k, t in stored.items() if k > "model.visual"}},
    )
    index = json.loads((folder / INDEX).read_text())
    (tmp_path / "b" / SHARD).rename(folder / "extra.safetensors")
    extra = read_header(folder / "extra.safetensors").entries
    index["weight_map"] |= {k: "extra.safetensors" for k in extra if k != name}
    (folder / INDEX).write_text(json.dumps(index))
    ck = Checkpoint.open(folder)
    validate(ck)
    duplicated = ck.report().duplicated
    ck.used.update(ck.names())
    assert duplicated and all(".safetensors: " in where for where in duplicated) and not ck.report().complete


def test_a_file_cut_short_after_opening(tmp_path: Path) -> None:
    folder = write(tmp_path, tensors("bf16 fused")[0], ("model.safetensors",), None)
    opened, fresh = Checkpoint.open(folder), Checkpoint.open(folder)
    opened.read("norm.weight")
    file = folder / "model.safetensors"
    with open(file, "r+b") as handle:
        handle.truncate(file.stat().st_size // 2)
    words = r"cannot read a tensor.*model.safetensors: .*changed after it was opened"
    for ck, found in ((opened, words), (fresh, "written to while it was in use.*model.safetensors")):
        with pytest.raises(Qwen35Error, match=f"(?s){found}"):
            for name in ck.names():
                ck.read(name)
    file.unlink()
    with pytest.raises(Qwen35Error, match="No such file"):
        Checkpoint.open(write(tmp_path / "again", tensors()[0])).__class__(ck.folder).read("norm.weight")


def test_a_lying_header_allocates_nothing(tmp_path: Path) -> None:
    """2^60 bytes announced, or more than the format allows of a file that has them."""
    file = tmp_path / "model.safetensors"
    tracemalloc.start()
    for length in (2**60, 2**63, 2**64 - 1, 100_000_001):
        file.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(Qwen35Error):
            read_header(file)
    os.truncate(file, 10**9)  # sparse
    with pytest.raises(Qwen35Error, match="at most 100000000 bytes"):
        read_header(file)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_dtypes_that_torch_lacks_are_named_when_read(tmp_path: Path) -> None:
    text = json.dumps({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"ab")
    ck = Checkpoint.open(tmp_path)
    with pytest.raises(Qwen35Error, match=r"(?s)no such dtype.*m.safetensors: a.*F4"):
        ck.read("a")


def test_validate_needs_a_config(tmp_path: Path) -> None:
    folder = write(tmp_path, tensors("bf16 fused")[0])
    (folder / "config.json").unlink()
    with pytest.raises(Qwen35Error, match="no config.json"):
        validate(Checkpoint.open(folder))
    assert CONFIG["text_config"]["num_experts"] == E


def test_a_git_lfs_pointer_is_called_that(tmp_path: Path) -> None:
    folder = write(tmp_path, tensors("bf16 fused")[0])
    shard = sorted(folder.glob("*.safetensors"))[0]
    for file in (shard, folder / "model.safetensors.index.json", folder / "config.json"):
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 4000000000\n")
        with pytest.raises(Qwen35Error, match=rf"(?s)a git-lfs pointer.*{file.name}.*git lfs pull"):
            Checkpoint.open(folder)


def test_what_is_wrong_in_all_layers_is_said_once(tmp_path: Path) -> None:
    stored = tensors("quark mxfp4")[0]
    for name in [name for name in stored if name.endswith("weight_scale")]:
        stored[name.replace("weight_scale", "weight_scale_2")] = torch.ones(1)
    with pytest.raises(Qwen35Error) as error:
        validate(Checkpoint.open(write(tmp_path, stored)))
    assert 0 < str(error.value).count("NVFP4 (has") < 6
    assert "mlp.experts.0.gate_proj" in str(error.value) and "like it" in str(error.value)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("quantised", "words"),
    [({"quant_method": "aqlm"}, "unknown quantisation method.*aqlm"),
     ({"quant_method": ["fp8"]}, "unknown quantisation method.*fp8"), ([], "must be an object")],
    ids=["aqlm", "list", "empty list"],
)  # fmt: skip
def test_a_quantisation_method_that_is_not_known(tmp_path: Path, quantised: Any, words: str, inside: bool) -> None:
    """Over bytes that are sound: all of them refuse it, before a run."""
    folder = write(tmp_path, tensors("quark mxfp4")[0])
    config = json.loads((folder / "config.json").read_text())
    place = config["text_config"] if inside else config
    config.pop("quantization_config", None)
    place["quantization_config"] = quantised
    (folder / "config.json").write_text(json.dumps(config))
    for command in (
        lambda: validate(Checkpoint.open(folder)),
        lambda: load(folder, mode="stream"),
        lambda: can_fuse_shared_expert(config) if quantised != {"quant_method": "aqlm"} else load(folder),
    ):
        with pytest.raises(Qwen35Error, match=f"(?s){words}"):
            command()
