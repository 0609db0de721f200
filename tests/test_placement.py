"""A model spread by a device map: the bits of the plain one, wherever its weights are kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import FLOAT32_PLACED, FLOAT64_REORDERED
from traces import Traces

import qwen35_moe as q
from qwen35_moe.cli.main import main
from qwen35_moe.numerics.metrics import rel_l2
from qwen35_moe.run.origin import origin_of
from qwen35_moe.run.placement import fill_devices, unit_sizes
from qwen35_moe.trace.file import Trace
from qwen35_moe.trace.layers import trace_layers

Build = Callable[[str], Path]
IDS = torch.tensor([[3, 7, 11, 5, 100, 17, 29, 31]])
SPREAD = {"": "cpu", "layers.1": "cpu:0", "lm_head": "cpu"}


def spread(path: Path, device_map: Any = SPREAD, **options: Any) -> q.Model:
    return q.load(path, device_map=device_map, **options)


@pytest.mark.parametrize(
    ("recipe", "mode", "arithmetic"),
    [
        ("tiny", "decoded", "exact"),
        ("tiny", "decoded", "transformers-bf16"),
        ("tiny-per-expert", "decoded", "transformers-bf16"),  # experts stay in the checkpoint's file
        ("tiny-mxfp4", "decoded", "float32"),
        ("tiny-mxfp4", "packed", "float32"),
        ("tiny-mxfp4", "packed", "transformers-bf16"),
        ("tiny-gpt-oss", "packed", "exact"),
        ("tiny-flat", "packed", "exact"),  # tied head
    ],
)
def test_bits_do_not_depend_on_the_place(built: Build, recipe: str, mode: str, arithmetic: str) -> None:
    path, options = built(recipe), {"arithmetic": arithmetic, "mode": mode, "text_only": True}
    plain = q.load(path, **options)(IDS)
    for device_map in (SPREAD, {"": "cpu"}):
        assert torch.equal(spread(path, device_map, **options)(IDS), plain)


def test_taps_traces_and_caches_work_through_the_hooks(built: Build, tmp_path: Path) -> None:
    plain, model = q.load(built("tiny-mxfp4"), mode="packed"), spread(built("tiny-mxfp4"), mode="packed")
    expected = q.trace(plain, IDS, experts=True)
    for found in (
        q.trace(model, IDS, experts=True),
        trace_layers(model, IDS, tmp_path / "trace", experts=True, quiet=True)[0],
    ):
        assert list(found) == list(expected) and all(torch.equal(found[key], expected[key]) for key in expected)
    pieces = [q.trace(m, IDS, chunks=[5, 1, 2], cache=q.Cache()) for m in (plain, model)]
    assert len(pieces[0]) and all(torch.equal(pieces[1][key], x) for key, x in pieces[0].items())


def test_draft_head_and_vision_tower_are_placed_too(built: Build) -> None:
    plain = q.load(built("tiny"), "float32")
    model = spread(built("tiny"), {"": "cpu", "mtp": 0 if torch.cuda.is_available() else "cpu"}, arithmetic="float32")
    assert model.mtp is not None and model.visual is not None
    assert not any(p.is_meta for part in (model.mtp, model.visual) for p in part.parameters())
    steps = [list(q.generate(m, IDS, 6, drafts=2)) for m in (plain, model)]
    assert [s.to_dict() for s in steps[0]] == [s.to_dict() for s in steps[1]]
    pixels = torch.linspace(-1, 1, 16 * plain.visual.config.patch_values).view(16, -1)
    grid = torch.tensor([[1, 4, 4]])
    assert torch.equal(model.visual(pixels, grid), plain.visual(pixels, grid))


@pytest.mark.parametrize("mode", ["decoded", "packed"])
def test_auto_fills_the_memory_that_it_may_take(built: Build, mode: str) -> None:
    path = built("tiny-mxfp4")
    plain = q.load(path, mode=mode)
    whole = spread(path, "auto", mode=mode)
    assert set(whole.hf_device_map.values()) == {"cpu"} and torch.equal(whole(IDS), plain(IDS))
    sizes = [sum(p.nbytes for p in part.parameters()) for part in (plain.embed_tokens, plain.layers)]
    if mode == "packed":
        modules = origin_of(plain).checkpoint.modules.items()
        sizes.append(sum(x.nbytes for name, roles in modules if ".experts." in name for x in roles.values()))
    with pytest.raises(q.Qwen35Error, match="(?s)does not fit.*--mode stream"):
        spread(path, "auto", mode=mode, max_memory={"cpu": sizes[0] + int(0.6 * sum(sizes[1:]))})


@pytest.mark.parametrize(
    ("how", "limits", "places"),
    [
        ("balanced", {"cpu": 99, 0: 99, 1: 99}, [0, 0, 0, 1, 1]),  # 5 and 6
        ("balanced", {0: 4, 1: 9}, [0, 0, 1, 1, 1]),
        ("balanced_low_0", {0: 99, 1: 99, "cpu": 99}, [1, 1, 1, 1, 1]),
        ("balanced_low_0", {0: 99, 1: 5, 2: 6}, [1, 1, 1, 2, 2]),
        ("sequential", {0: 8, 1: 99}, [0, 0, 0, 1, 1]),
        ("auto", {0: 7, 1: 3, "cpu": 99}, [0, 1, 1, "cpu", "cpu"]),  # the first GPU keeps room for 4
        ("auto", {"cpu": 8}, []),
        ("sequential", {0: 3, "cpu": 7}, []),
        ("auto", {0: 3, "cpu": 99}, ["cpu"] * 5),
    ],
)
def test_units_fill_devices(how: str, limits: dict[Any, int], places: list[Any]) -> None:
    sizes = {"embed_tokens": 3, "layers.0": 1, "layers.1": 1, "layers.2": 4, "lm_head": 2}
    assert list(fill_devices(sizes, limits, how).values()) == places


@pytest.mark.parametrize("mode", ["decoded", "packed"])
def test_a_map_counts_the_bytes_that_units_will_have(built: Build, mode: str) -> None:
    model = q.load(built("tiny-mxfp4"), "float32", mode=mode)
    sizes = unit_sizes(model, origin_of(model), mode)
    for unit, size in sizes.items():
        part = model.get_submodule(unit)
        held = sum(p.nbytes for p in part.parameters())
        if mode == "packed":
            modules = origin_of(model).checkpoint.modules.items()
            apart = any(".shared_expert." in name for name, _ in part.named_parameters())  # or it is packed, too
            kinds = r"\.experts\." if apart else r"\.(experts|shared_expert)\."
            mine = [roles.values() for m, roles in modules if m.startswith(f"{unit}.") and re.search(kinds, m)]
            held += sum(x.nbytes for weights in mine for x in weights)
            assert mine or unit in ("embed_tokens", "norm", "lm_head", "visual")
        assert size == held


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": {"layers": "cpu"}}, r"(?s)does not fit.*embed_tokens: no place"),
        ({"device_map": {"": "cpu", "layers.0.mlp": "cpu"}}, r"(?s)layers.0.mlp: no such unit"),
        ({"device_map": {"": "cpu", "layers.9": "cpu"}}, "layers.9: no such unit"),
        ({"device_map": "sideways"}, "unknown device_map"),
        ({"device_map": {"": "floppy"}}, "no such device"),
        ({"device_map": {"": {"layers": 1}}}, "no such device"),
        ({"device_map": {"": "meta"}}, "no such device"),
        ({"device_map": {"": "cuda:99"}}, "no such device"),
        ({"device_map": "auto", "max_memory": {"cpu": "40XB"}}, "(?s)makes no map.*max_memory"),
        ({"device_map": {"": "disk"}}, "--mode stream"),
        ({"device_map": {"": "cpu"}, "mode": "stream"}, "streamed"),
    ],
)
def test_maps_that_place_nothing(built: Build, options: dict[str, Any], message: str) -> None:
    with pytest.raises(q.Qwen35Error, match=message):
        q.load(built("tiny"), **options)


def test_the_command_line_takes_a_map(built, tmp_path, capsys):
    (tmp_path / "map.json").write_text(json.dumps(SPREAD))
    options, ids = ["--device-map", str(tmp_path / "map.json")], [1, 2, 3, 4, 5]
    traces = Traces(built("tiny-mxfp4"), tmp_path, capsys)
    given = ["--no-envelope", "--mode", "decoded", "--arithmetic", "float32"]
    traces("plain", ids, *given)
    traces("spread", ids, *given, *options)
    assert traces.files("plain") == traces.files("spread") and len(traces.files("plain")) > 4
    printed = []
    for more in ([], options, ["--device-map", "auto"]):
        command = ["generate", str(traces.weights), "--ids", "1,2,3,4,5", "--text-only", "--max-new-tokens", "4"]
        assert main([*command, "--ignore-stop", *more]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2]
    for words, more in (
        ("no device map", ["--device-map", "nowhere.json"]),
        ("a streamed model stays on disk", ["--device-map", "auto", "--mode", "stream"]),
        ("names all devices", ["--device-map", "auto", "--device", "meta"]),
        ("cannot read a limit", ["--device-map", "auto", "--max-memory", ""]),
        ("has no limits", [*options, "--max-memory", "cpu=1GB"]),
        ("no such device here", ["--device", "meta"]),
        ("a limit without a device map", ["--max-memory", "cpu=1GB"]),
    ):
        traces.refuses(words, "o", ids, *given, *more)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # the compiler's first import
@pytest.mark.parametrize(
    ("recipe", "mode", "arithmetic"),
    [
        ("tiny", "decoded", "exact"),
        ("tiny-per-expert", "decoded", "transformers-bf16"),
        ("tiny-mxfp4", "packed", "transformers-bf16"),
        ("tiny-gpt-oss", "packed", "exact"),
        ("tiny-fp8", "packed", "float32"),
        ("tiny-flat", "packed", "exact"),
    ],
)
def test_bits_on_a_gpu_do_not_depend_on_the_place(built: Build, recipe: str, mode: str, arithmetic: str) -> None:
    path, options = built(recipe), {"arithmetic": arithmetic, "mode": mode, "text_only": True}
    plain = q.load(path, device="cuda", **options)(IDS.cuda())
    maps = {"": 0}, "auto", {"": 0, "layers.0": "cpu", "layers.1": "cpu"}, {"": "cpu", "layers.0": 0}
    for device_map in maps:
        model = spread(path, device_map, **options)
        assert model.norm.weight.is_cuda
        for _ in range(2):  # what a hook has dropped comes back
            # Experts that lie elsewhere are multiplied one by one. Roundings to bf16 hide that, here.
            apart = {"exact": FLOAT64_REORDERED, "float32": FLOAT32_PLACED}.get(arithmetic, 0.0)
            assert rel_l2(model(IDS.cuda()), plain) <= apart


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
def test_a_trace_over_gpus_has_the_bits_of_one(built: Build, tmp_path: Path) -> None:
    """The tables of rotary positions, too: the CPU's cosine differs in its last bit."""
    command = ["trace", str(built("tiny-mxfp4")), "--ids", "3,7,11,5,100", "--arithmetic", "sglang-bf16", "--quiet"]
    command.append("--no-envelope")
    assert main([*command, "--out", str(tmp_path / "one"), "--device", "cuda", "--mode", "packed"]) == 0
    one = Trace.open(tmp_path / "one")
    for how in ("balanced", "auto"):
        assert main([*command, "--out", str(tmp_path / how), "--device-map", how]) == 0
        spread_out = Trace.open(tmp_path / how)
        assert set(spread_out) == set(one) and all(torch.equal(one[key], spread_out[key]) for key in one)
