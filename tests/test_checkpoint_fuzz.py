"""Whatever stands in a header, an index or a config: our own error or a checkpoint, and never much memory."""

from __future__ import annotations

import json
import tracemalloc
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import CONFIG, tensors, write

from qwen35_moe.checkpoint import Checkpoint
from qwen35_moe.checkpoint.header import BITS, read_header
from qwen35_moe.errors import Qwen35Error
from qwen35_moe.model.config import Config
from qwen35_moe.run.validate import validate

# The folders are overwritten by every example, so that sharing them between examples is meant.
FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NUMBERS = st.integers(-2, 40) | st.sampled_from([2**31, 2**62, 2**63, 10**400, -(2**63)])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "F9"]) | JSON,
        "shape": st.lists(NUMBERS, max_size=9) | JSON,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON,
    }
)
NAMES = st.sampled_from(
    [
        "norm.weight", "model.norm.weight", "lm_head.weight", "layers.0.mlp.experts.0.up_proj.weight",
        "layers.0.mlp.experts.0.up_proj.weight_scale", "layers.0.mlp.experts.99999999999.up_proj.weight",
        "layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.gate_up_proj_blocks", "__metadata__", ".weight", "",
    ]
)  # fmt: skip
HEADER = st.dictionaries(NAMES | st.text(max_size=12), ENTRY | JSON, max_size=6)


def file_of(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def explore(folder: Path) -> None:
    """Everything that headers decide; only our own error may come out."""
    try:
        ck = Checkpoint.open(folder)
    except Qwen35Error as error:
        assert str(error)
        return
    str(ck.report())
    ck.identity()
    steps = [lambda m=m: ck.spec(m) for m in list(ck.modules)[:8]]
    steps += [lambda n=n: ck.read(n) for n in ck.names()[:8]]
    steps += [lambda m=m: ck.weight(m).read() for m in list(ck.modules)[:8]]
    steps += [lambda: validate(ck), lambda: ck.experts("layers.0.mlp.experts").read(0)]
    for step in steps:
        try:
            step()
        except Qwen35Error as error:
            assert str(error)
    ck.reader.close()


@FUZZ
@given(HEADER, st.binary(max_size=64))
def test_any_header(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(file_of(json.dumps(header).encode(), data))
    explore(tmp_path)


@FUZZ
@given(st.data())
def test_headers_that_cover_their_file(tmp_path: Path, data: st.DataObject) -> None:
    """Consistent headers of any dtypes and shapes, so that what comes after the header's checks is reached."""
    header, at = {}, 0
    for name in data.draw(st.lists(NAMES.filter(lambda n: n != "__metadata__"), unique=True, max_size=5)):
        dtype = data.draw(st.sampled_from(sorted(BITS)))
        shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 16, 32]), max_size=4))
        nbytes = BITS[dtype]
        for size in shape:
            nbytes *= size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes // 8]}
        at += nbytes // 8
    (tmp_path / "model.safetensors").write_bytes(file_of(json.dumps(header).encode(), bytes(at)))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    explore(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("fuzz"), tensors("quark mxfp4")[0], ("model.safetensors",))


@pytest.mark.parametrize("changes", [
    {"num_experts": 10**9, "vocab_size": 10**12, "hidden_size": 10**9}, {"mtp_num_hidden_layers": 10**12},
    {"num_hidden_layers": 2**62, "layer_types": None}, {"num_hidden_layers": 2**62, "full_attention_interval": 2**60},
    {"depth": 2**62},
])  # fmt: skip
def test_huge_counts_in_a_config_allocate_nothing(folder: Path, changes: dict[str, Any]) -> None:
    config = deepcopy(CONFIG)
    config["vision_config" if "depth" in changes else "text_config"] |= changes
    if "full_attention_interval" in changes:
        del config["text_config"]["layer_types"]
    ck = Checkpoint.open(folder)
    tracemalloc.start()
    with pytest.raises(Qwen35Error):
        validate(ck, Config.from_dict(config))
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_a_long_header(tmp_path: Path) -> None:
    entries = {f"layers.{i}.w": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(30_000)}
    file = tmp_path / "model.safetensors"
    file.write_bytes(file_of(json.dumps(entries).encode(), bytes(30_000)))
    assert len(read_header(file).entries) == 30_000
