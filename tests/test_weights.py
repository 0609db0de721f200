"""The checkpoints that weights/ builds: the pinned bytes, the form of the real files, the values' distribution."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from qwen35_moe.errors import Qwen35Error
from qwen35_moe.model.config import Config
from qwen35_moe.model.text import Model
from qwen35_moe.quant import mxfp4
from weights import draw
from weights.build import Recipe, build, config_of, load, main, manifest, plan, real_config, recipes
from weights.encode import encode_fp8
from weights.layouts import LAYOUTS, quantization_config, quark_exclude, stored
from weights.safetensors_file import nbytes, read_header
from weights.tensors import logical

DATA = Path(__file__).parent / "data" / "fixtures"
MANIFESTS = Path(__file__).parent.parent / "weights" / "manifests"
TINY = [name for name in recipes() if name.startswith("tiny")]
Built = Callable[[str], Path]


@pytest.fixture(scope="module")
def read(built: Built) -> Callable[[str], dict[str, torch.Tensor]]:
    def tensors(recipe: str) -> dict[str, torch.Tensor]:
        found = {}
        for file in built(recipe).glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return found

    return tensors


@pytest.mark.parametrize("recipe", TINY)
def test_bytes_are_the_pinned_ones(recipe: str, built: Built) -> None:
    expected = (MANIFESTS / f"{recipe}.txt").read_text(encoding="utf-8")
    assert manifest(built(recipe)).splitlines() == expected.splitlines()


@pytest.mark.parametrize("recipe", TINY)
def test_files_are_valid_and_the_index_tells_the_truth(recipe: str, built: Built) -> None:
    path = built(recipe)
    where = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            where |= dict.fromkeys(opened.keys(), file.name)
            for name, entry in read_header(file).items():
                assert list(opened.get_tensor(name).shape) == entry["shape"]
    _, tensors = plan(load(recipe))
    assert sorted(where) == sorted(t.name for t in tensors)
    if load(recipe).shards:
        index = json.loads((path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == where
        assert index["metadata"]["total_size"] == sum(map(nbytes, tensors))
        assert len(set(where.values())) == load(recipe).shards


@pytest.mark.parametrize(
    ("folder", "layout"), [("bf16-hub", "bf16"), ("quark-mxfp4", "mxfp4"), ("quark-moe-mxfp4", "moe-mxfp4")]
)
def test_form_is_that_of_the_hub_and_of_quark_exports(folder: str, layout: str) -> None:
    config = json.loads((DATA / folder / "config.json").read_text())
    exported = config.pop("quantization_config", None)
    expected = {}
    for file in (DATA / folder).glob("*.safetensors"):
        expected |= {name: (e["dtype"], tuple(e["shape"])) for name, e in read_header(file).items()}
    tensors = list(logical(config))
    ours = stored(tensors, LAYOUTS[layout], prefix=Recipe.prefix, seed=1, method="draw", float32=True)
    assert {t.name: (t.dtype, t.size) for t in ours} == expected
    assert quantization_config([t.name for t in tensors], LAYOUTS[layout], Recipe.prefix) == exported


def test_exclude_names_mtp_experts_only_where_the_source_stored_them_apart() -> None:
    names = [t.name for t in logical(real_config("tiny"))]
    fused = quark_exclude(names, LAYOUTS["mxfp4"], Recipe.prefix)
    apart = quark_exclude(names, LAYOUTS["mxfp4"], Recipe.prefix, mtp_listed=True)
    assert set(apart) - set(fused) == {
        f"mtp.layers.0.mlp.experts.{e}.{m}_proj" for e in range(10) for m in ("gate", "up", "down")
    }
    assert not any("embed_tokens" in n or "patch_embed" in n or n.endswith("norm") for n in apart)
    assert apart == sorted(apart)


# Parameters of the text model, of text and vision together (what transformers' meta device counts), and of MTP; then
# tensors of the text model, of the vision tower and of MTP, with each layer's experts fused into two. The model that we
# build has as many.
@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("qwen3.5-35b-a3b", (34_660_610_688, 35_107_181_936, 844_640_768), (693, 333, 19)),
        ("qwen3.6-35b-a3b", (34_660_610_688, 35_107_181_936, 844_640_768), (693, 333, 19)),
        ("qwen3.5-122b-a10b", (122_111_526_912, 122_562_817_776, 2_523_679_232), (831, 333, 19)),
        ("qwen3.5-397b-a17b", (396_346_350_336, 396_802_360_816, 6_595_568_128), (1038, 333, 19)),
        ("qwen3.8-2.4t-a95b", (2_419_804_697_984, 2_419_804_697_984, 26_378_027_520), (1590, 0, 19)),
    ],
)
def test_real_configs_have_the_real_numbers(name: str, parameters: tuple[int, ...], tensors: tuple[int, ...]) -> None:
    ours = {"text": [0, 0], "visual": [0, 0], "mtp": [0, 0]}
    layout = stored(logical(real_config(name)), LAYOUTS["bf16"], prefix="", seed=1, method="draw", float32=True)
    for tensor in layout:
        part = ours.get(tensor.name.split(".")[0], ours["text"])
        part[0] += int(np.prod(tensor.size))
        part[1] += 1
    text, vision, mtp = ours["text"][0], ours["visual"][0], ours["mtp"][0]
    assert (text, text + vision, mtp) == parameters
    assert tuple(part[1] for part in ours.values()) == tensors
    with torch.device("meta"):
        models = [Model(Config.from_dict(real_config(name)), fused=fused) for fused in (False, True)]
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [text, text]


def test_every_layout_holds_the_same_model(read: Callable[[str], dict[str, torch.Tensor]]) -> None:
    fused, apart, packed, blocks = map(read, ("tiny", "tiny-per-expert", "tiny-mxfp4", "tiny-gpt-oss"))
    compressed, inner = read("tiny-compressed-tensors"), read("tiny-inner-prefix")
    width = 32
    for layer, expert in ((0, 0), (3, 9)):
        mlp = f"model.language_model.layers.{layer}.mlp.experts"
        both, down = fused[f"{mlp}.gate_up_proj"][expert], fused[f"{mlp}.down_proj"][expert]
        for name, own in (("gate_proj", both[:width]), ("up_proj", both[width:]), ("down_proj", down)):
            module = f"{mlp}.{expert}.{name}"
            assert torch.equal(apart[f"{module}.weight"], own)
            codes, scales = mxfp4.encode(own, scale_rule="even")
            assert torch.equal(packed[f"{module}.weight"], codes)
            assert torch.equal(packed[f"{module}.weight_scale"], scales)
            assert torch.equal(compressed[f"{module}.weight_packed"], codes)
            assert torch.equal(compressed[f"{module}.weight_scale"], scales)
            raw = blocks[f"{mlp}.{'down' if name == 'down_proj' else 'gate_up'}_proj_blocks"][expert]
            rows = slice(None) if name == "down_proj" else slice(int(name == "up_proj"), None, 2)
            assert torch.equal(raw[rows].flatten(1), codes)
    assert torch.equal(inner["language_model.model.norm.weight"], fused["model.language_model.norm.weight"])
    assert torch.equal(inner["language_model.lm_head.weight"], fused["lm_head.weight"])


def test_fp8_is_the_nearest_code_of_its_stored_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, 200, generator=generator, dtype=torch.float64).to(torch.bfloat16)
    for block in (True, False):
        codes, scale = encode_fp8(x, block)
        value = torch.from_numpy(codes).view(torch.float8_e4m3fn).to(torch.float64)
        if block:
            assert scale.shape == (2, 2)
            scale_of = torch.from_numpy(scale.view(np.int16)).view(torch.bfloat16).to(torch.float64)
            scale_of = scale_of.repeat_interleave(128, 0)[:150].repeat_interleave(128, 1)[:, :200]
        else:
            scale_of = torch.from_numpy(scale).to(torch.float64)[:, None]
        error = (value - x.to(torch.float64) / scale_of).abs()
        # Half a step of E4M3: 2^-4 of the value where it is normal, 2^-10 below. The scale's own rounding (2^-9) may
        # push the largest element past 448, by less than half the step there.
        assert bool((error <= torch.maximum(value.abs() * 2**-4, torch.tensor(2.0**-10))).all())
        assert not value.isnan().any()


@pytest.mark.parametrize("layout", ["bf16", "mxfp4", "moe-mxfp4", "fp8"])
def test_slices_are_drawn_without_holding_them(layout: str, tmp_path: Path) -> None:
    small = {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 16, "vocab_size": 100_000}
    tracemalloc.start()
    path = build("slice-35b", tmp_path / "slice", layers=1, layout=layout, flat=True, mtp=False, text_config=small)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    # 14 MiB measured (numpy 2.4), whatever the layout: one chunk of hash words and values, and the write buffer.
    assert size > 100e6 and peak < 20 << 20
    config = json.loads((path / "config.json").read_text())
    assert config["layer_types"] == ["linear_attention"] and config["model_type"] == "qwen3_5_moe_text"
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in (n for n in opened.keys() if ".experts." in n):  # noqa: SIM118
                tensor = opened.get_tensor(name)
                if tensor.dtype == torch.float8_e4m3fn:
                    assert not tensor.to(torch.float32).isnan().any()
                elif name.endswith("weight_scale"):
                    assert 100 < int(tensor.min()) < int(tensor.max()) < 127


def test_jobs_do_not_change_the_bytes(tmp_path: Path, built: Built) -> None:
    assert manifest(build("tiny-moe-mxfp4", tmp_path / "x", jobs=4)) == manifest(built("tiny-moe-mxfp4"))


def test_hash_is_splitmix64() -> None:
    def splitmix64(state: int) -> int:
        x = state % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    stream = draw.key(1, "norm.weight")
    expected = [splitmix64(stream + (i + 1) * 0x9E3779B97F4A7C15) for i in range(8)]
    assert draw.hash_words(stream, 0, 8).tolist() == expected
    assert draw.hash_words(stream, 5, 3).tolist() == expected[5:]
    assert draw.hash_bits(stream, 7, 9, "<u2").tolist() == draw.hash_bits(stream, 0, 16, "<u2").tolist()[7:]


def test_rounding_is_to_nearest_even() -> None:
    x = draw.bell() * 0.37
    float32 = torch.from_numpy(x).to(torch.float32).view(torch.int32).numpy().astype(np.uint32)
    assert (draw.round_bits(x, "F32") == float32).all()
    halves = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 1 + 2**-8 + 2**-40], dtype=torch.float64)
    words = torch.from_numpy(draw.round_bits(halves.numpy(), "BF16").view(np.int16)).view(torch.bfloat16)
    assert words.tolist() == [1.0, 1 + 2**-6, -1.0, 1 + 2**-7]
    with pytest.raises(OverflowError):
        draw.round_bits(np.array([0.0]), "BF16")


@pytest.mark.parametrize("size", [(70, 50), (9, 64), (5,), (6, 3, 2, 4, 4)])
def test_chunks_do_not_change_the_values(size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    values = draw.Values(mixed=True, short=((2, 5, -3),))
    whole = np.concatenate(list(draw.draw(1, "x", size, values, "BF16")))
    monkeypatch.setattr(draw, "CHUNK", 100)
    pieces = list(draw.draw(1, "x", size, values, "BF16"))
    assert size[0] == 5 or len(pieces) > 1
    assert (np.concatenate(pieces) == whole).all()
    plain = np.concatenate(list(draw.draw(1, "x", size, draw.Values(mixed=True), "BF16")))
    assert ((plain.astype(np.int32) - whole)[2:5] == 3 << 7).all()  # the exponent field is 3 less


def test_values_are_spread_as_stated(read: Callable[[str], dict[str, torch.Tensor]]) -> None:
    tensors = read("tiny")
    embedding = tensors["model.language_model.embed_tokens.weight"].to(torch.float64)
    assert abs(float(embedding.std()) - 1) < 0.02 and abs(float(embedding.mean())) < 0.02  # 16,384 draws: 3 sigma
    norm = tensors["model.language_model.layers.0.input_layernorm.weight"]
    assert 16 < int((norm < 0).sum()) < 48  # zero-centred norms have negative weights, and none is refused for it
    experts = tensors["model.language_model.layers.0.mlp.experts.gate_up_proj"].to(torch.float64)
    _, scales = mxfp4.encode(experts, scale_rule="even")
    assert len(scales.unique()) >= 4  # neighbouring blocks need different scales


def test_bad_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.toml").write_text('layuot = "bf16"')
    (tmp_path / "layout.toml").write_text('layout = "int3"')
    (tmp_path / "text.toml").write_text('layers = "two"')
    (tmp_path / "half.toml").write_text("layers =")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    out = tmp_path / "out"
    for recipe, changes, words in (
        ("tniy", {}, "no such recipe"),
        (str(tmp_path / "odd.toml"), {}, "layuot"),
        (str(tmp_path / "layout.toml"), {}, "int3"),
        (str(tmp_path / "text.toml"), {}, r"(?s)bad entry.*layers.*int"),
        (str(tmp_path / "half.toml"), {}, "cannot read the recipe"),
        (str(tmp_path / "bytes.toml"), {}, "cannot read the recipe"),
        ("tiny", {"jobs": 0}, "nobody to draw"),
        ("tiny", {"config": "qwen9"}, "no such config"),
        ("tiny", {"layers": 5}, "1 to 4"),
        ("tiny-mxfp4", {"text_config": {"moe_intermediate_size": 40}}, "multiple of 32"),
    ):
        with pytest.raises(Qwen35Error, match=words):
            build(recipe, out, **changes)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".toml"]


def test_output_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = build("tiny-flat", tmp_path / "out")
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    assert build("tiny-flat", out) == out  # the same recipe: nothing to do
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before
    with pytest.raises(Qwen35Error, match="exists"):
        build("tiny", out)
    monkeypatch.setattr("weights.build._write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(Qwen35Error, match="(?s)cannot write the checkpoint.*disk full.*MB are needed"):
        build("tiny", tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny", "--out", str(tmp_path / "tiny")]) == 0
    assert "as pinned in tiny.txt" in capsys.readouterr().out
    assert main(["tiny", "--layers", "2", "--layout", "mxfp4", "--text-only", "--out", str(tmp_path / "two")]) == 0
    assert config_of(load("tiny", layers=2))["text_config"]["num_hidden_layers"] == 2
    assert main(["tniy", "--out", str(tmp_path / "none")]) == 2
    assert "no such recipe" in capsys.readouterr().err
