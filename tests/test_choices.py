"""What an operator declares: a cache of keys and values in FP8, DeltaNet's state in bf16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwen35_moe.cli.main import main
from qwen35_moe.errors import Qwen35Error
from qwen35_moe.model.cache import Cache, LayerState
from qwen35_moe.numerics import arithmetics
from qwen35_moe.numerics.arithmetics import Arithmetic
from qwen35_moe.numerics.choices import in_fp8, scale_of, with_choices
from qwen35_moe.numerics.tables import SGLANG_BF16, VLLM_BF16
from qwen35_moe.numerics.taps import Handler
from qwen35_moe.oracle.compare import compare
from qwen35_moe.oracle.diagnose.faults import FaultSite
from qwen35_moe.oracle.dumps.dump import Dump
from qwen35_moe.oracle.dumps.readers.own import from_trace
from qwen35_moe.oracle.dumps.writers import DUMPED
from qwen35_moe.oracle.play import known_fault
from qwen35_moe.oracle.truth import open_checkpoint
from qwen35_moe.run.load import load
from qwen35_moe.trace.file import Trace
from qwen35_moe.trace.recorder import trace

IDS = (torch.arange(40) * 7919 % 251)[None]
CHUNKS = (24, 12, 1, 1, 1, 1)


def _engine(path: Path, table: Arithmetic, handlers: tuple[Handler, ...] = ()) -> Dump:
    model = load(path, table, "unfused", text_only=True)
    return from_trace(trace(model, IDS, taps=DUMPED, chunks=CHUNKS, cache=Cache(), replay=handlers))


@pytest.fixture(scope="module")
def truth(small: Callable[..., Path]) -> Trace:
    return trace(load(small("tiny"), "exact", "unfused", text_only=True), IDS, taps=DUMPED)


def _reads_its_own_step_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As SGLang's extend kernel: new keys come from the projection, earlier ones from the cache."""

    def append(self: LayerState, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (k, v) if self.k is None else (torch.cat((self.k, k), 1), torch.cat((self.v, v), 1))
        size = k.shape[1]
        self.k, self.v = (torch.cat((x[:, :-size], in_fp8(x[:, -size:])), 1) for x in (keys, values))
        return keys, values

    monkeypatch.setattr(LayerState, "append", append)


@pytest.mark.parametrize("own_step", [True, False])
def test_an_fp8_kv_cache_is_named_and_can_be_declared(
    small: Callable[..., Path], truth: Trace, own_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if own_step:
        dump = _engine(small("tiny"), with_choices(SGLANG_BF16, kv_cache="fp8_e4m3"))
    else:
        with monkeypatch.context() as patched:
            _reads_its_own_step_as_it_is(patched)
            dump = _engine(small("tiny"), SGLANG_BF16)
    source = open_checkpoint(small("tiny"))[1].source
    undeclared = compare(truth, dump, source, diagnoses=1)
    assert undeclared.exit_code == 1 and undeclared.first is not None and undeclared.first.block == "attn"
    name = "undeclared FP8 KV cache" + ", read in its own step, too" * own_step
    assert undeclared.diagnoses[0].named and undeclared.diagnoses[0].name == name, undeclared.diagnoses[0]
    declared = compare(truth, dump, source, kv_cache="fp8_e4m3")
    assert declared.exit_code == 0, declared.verdict
    assert "sglang-bf16/kv-fp8_e4m3" in declared.members


def test_a_fault_is_found_beside_a_declared_cache(small: Callable[..., Path], truth: Trace) -> None:
    source = open_checkpoint(small("tiny"))[1].source
    fault = known_fault("output gate ignored")
    place = FaultSite(source.config, truth.positions, frozenset({1}))
    dump = _engine(small("tiny"), with_choices(SGLANG_BF16, kv_cache="fp8_e4m3"), tuple(fault.handlers(place)))
    result = compare(truth, dump, source, diagnoses=1, kv_cache="fp8_e4m3")
    assert result.exit_code == 1 and result.diagnoses[0].name == fault.name, result.verdict


def test_a_state_in_bf16_can_be_declared(small: Callable[..., Path], truth: Trace) -> None:
    source = open_checkpoint(small("tiny"))[1].source
    dump = _engine(small("tiny"), with_choices(SGLANG_BF16, state="bf16"))
    undeclared = compare(truth, dump, source, diagnoses=1)
    assert undeclared.exit_code == 1 and undeclared.diagnoses[0].name == "state in bf16"
    assert compare(truth, dump, source, state="bf16").exit_code == 0


def test_what_is_no_cache(small: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert (scale_of("fp8_e4m3"), scale_of("fp8_e4m3:0.25")) == (1.0, 0.25)
    for text in ("fp8", "fp8_e4m3:0", "fp8_e4m3:x", "fp8_e5m2:1"):
        with pytest.raises(Qwen35Error, match="unknown cache"):
            scale_of(text)
    with pytest.raises(SystemExit):
        main(["diagnose", str(small("tiny")), "dump", "--state", "fp8"])
    assert "--state" in capsys.readouterr().err


def test_vllm_keeps_beta_in_decode_steps_alone(small: Callable[..., Path]) -> None:
    run = trace(load(small("tiny"), VLLM_BF16, "unfused", text_only=True), IDS[:, :9], chunks=(8, 1), cache=Cache())
    prefill, step = run["layers.0.gdn_beta"], run["step.1.layers.0.gdn_beta"]
    assert prefill.dtype == torch.bfloat16 and step.dtype == torch.float32
    assert not torch.equal(step, step.to(torch.bfloat16).float())
    assert run["layers.0.moe_router_logits"].dtype == torch.float32
    assert arithmetics.get("vllm-bf16") is VLLM_BF16
