"""vLLM 0.25.1 in this process: hidden states by its own connector, routed experts and prompt log p with the answer."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .bugs import CLEAN
from .prompts import prompts
from .vllm_bugs import PLANT

LAYERS = 4  # of `engine-size`


@dataclass(frozen=True)
class Setup:
    lengths: Sequence[int] = (30, 17)
    broken: Sequence[int] = (16, 9)
    layout: str | None = None
    recipe: str = "engine-size"
    declared: dict[str, Any] = field(default_factory=lambda: {"layer_ids": list(range(LAYERS + 1))})
    hidden: bool = True  # hidden states, else routed experts: this version does not give both


SETUPS = {
    "bf16": Setup(),
    "fp8": Setup(layout="fp8"),
    "routed": Setup(lengths=(30,), broken=(16,), declared={}, hidden=False),
}


def run(setup: str, checkpoint: Path, out: Path, bugs: Sequence[str], port: int) -> Iterator[tuple[str, Path]]:
    """Yields the name of each run and the folder with its hidden states; NAME.json beside it holds the answers."""
    dumps, shared = out / f"dumps-{setup}", out / f"shared-{setup}"
    for folder in (dumps, shared):
        folder.mkdir(parents=True, exist_ok=True)
    chosen = SETUPS[setup]
    llm = _start(checkpoint, shared if chosen.hidden else None)
    for bug in bugs:
        name = f"{setup}.{bug}"
        undo = [] if bug == CLEAN else PLANT[bug](_model(llm))
        ids = prompts(chosen.lengths if bug == CLEAN else chosen.broken)
        answers = _ask(llm, ids)
        _ask(llm, prompts((5,)))  # a step in which the last files are written
        (dumps / name).mkdir(exist_ok=True)
        for answer in answers if chosen.hidden else ():
            shutil.move(_written(Path(answer["hidden_states"])), dumps / name)
        if not chosen.hidden:
            np.save(dumps / name / "routed_experts.npy", np.array(answers[0]["routed_experts"]))
        (dumps / f"{name}.json").write_text(json.dumps({"ids": ids, "answers": answers}))
        for weight, old in undo:
            weight.data.copy_(old)
        yield name, dumps / name if chosen.hidden else dumps / name / "routed_experts.npy"


def _start(checkpoint: Path, shared: Path | None) -> Any:
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_FLASHINFER_SAMPLER="0", VLLM_USE_DEEP_GEMM="0")
    from vllm.v1.worker import gpu_worker

    gpu_worker.kernel_warmup = lambda worker: None  # asks for kernels that are not needed here
    if shared is None:
        return _engine(checkpoint, enable_return_routed_experts=True)
    place = {"shared_storage_path": str(shared.resolve()), "use_synchronization_lock": False}
    connector = {"kv_connector": "ExampleHiddenStatesConnector", "kv_role": "kv_producer",
                 "kv_connector_extra_config": place}  # fmt: skip
    layers = {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(range(LAYERS + 1))}}
    method = {"method": "extract_hidden_states", "num_speculative_tokens": 1, "draft_model_config": layers}
    return _engine(checkpoint, kv_transfer_config=connector, speculative_config=method)


def _engine(checkpoint: Path, **arguments: Any) -> Any:
    from vllm import LLM

    return LLM(
        model=str(checkpoint), skip_tokenizer_init=True, enforce_eager=True, enable_prefix_caching=False,
        enable_chunked_prefill=False, max_model_len=2048, max_num_batched_tokens=4096, gpu_memory_utilization=0.2,
        kv_cache_memory_bytes=2**30, gdn_prefill_backend="triton",
        attention_backend="TRITON_ATTN", limit_mm_per_prompt={"image": 0, "video": 0}, max_logprobs=20, **arguments,
    )  # fmt: skip


def _written(file: Path) -> Path:
    """The connector writes in a thread."""
    for _ in range(200):
        if file.exists() and file.stat().st_size:
            break
        time.sleep(0.1)
    time.sleep(0.2)
    return file


def _model(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.model_runner.model


def _ask(llm: Any, ids: list[list[int]]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    wish = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=20, detokenize=False, ignore_eos=True)
    return [_plain(out) for out in llm.generate([{"prompt_token_ids": row} for row in ids], wish)]


def _plain(out: Any) -> dict[str, Any]:
    first, routed = out.outputs[0], out.outputs[0].routed_experts
    return {
        "hidden_states": (out.kv_transfer_params or {}).get("hidden_states_path", ""),
        "output_ids": list(first.token_ids),
        "routed_experts": None if routed is None else routed.tolist(),
        "prompt_logprobs": [
            None if row is None else {str(k): v.logprob for k, v in row.items()} for row in out.prompt_logprobs or []
        ],
    }
