"""SGLang 0.5.17: started once for a configuration, with its own dumper, and asked once for each bug."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import sglang_images as images
from .bugs import CLEAN
from .prompts import UNEQUAL, prompts

ARGUMENTS: dict[str, Any] = {
    "skip_tokenizer_init": True, "enable_multimodal": False, "attention_backend": "triton",
    "moe_runner_backend": "triton", "sampling_backend": "pytorch", "grammar_backend": "none",
    "disable_cuda_graph": True, "cuda_graph_backend_decode": "disabled", "cuda_graph_backend_prefill": "disabled",
    "disable_radix_cache": True, "mem_fraction_static": 0.1, "context_length": 2048, "max_total_tokens": 8192,
    "enable_return_routed_experts": True, "skip_server_warmup": True,
}  # fmt: skip

PLAIN_SUMS = {"disable_custom_all_reduce": True, "enforce_disable_flashinfer_allreduce_fusion": True}


@dataclass(frozen=True)
class Setup:
    """What differs from the plain BF16 engine. `declared` is told to the oracle."""

    arguments: dict[str, Any] = field(default_factory=dict)
    layout: str | None = None
    recipe: str = "engine-size"
    lengths: Sequence[int] = (30, 17)
    broken: Sequence[int] = (16, 9)  # of runs with a bug
    declared: dict[str, str] = field(default_factory=dict)
    new: int = 4  # tokens to generate


SETUPS = {
    "bf16": Setup(),
    "batch-8": Setup(lengths=UNEQUAL),
    "fp8": Setup(layout="fp8"),
    "chunked": Setup({"chunked_prefill_size": 32}, lengths=(70, 23), broken=(50, 9)),
    "prefix": Setup({"disable_radix_cache": False}),
    "spec": Setup({"speculative_algorithm": "NEXTN", "speculative_num_steps": 2, "speculative_eagle_topk": 1,
                   "speculative_num_draft_tokens": 3}),
    "fp8-kv": Setup({"kv_cache_dtype": "fp8_e4m3"}, declared={"kv_cache": "fp8_e4m3"}),
    "state-bf16": Setup({"mamba_ssm_dtype": "bfloat16"}, declared={"state": "bf16"}),
    "pass": Setup({"debug_tensor_dump_output_folder": "pass"}),
    "probe": Setup(lengths=(64,) * 8, broken=(64,) * 8, new=24),  # judged by log p, as `qwen35-moe probe` does
    "image": Setup(images.ARGUMENTS, recipe=images.RECIPE),
    "tp2": Setup({"tp_size": 2, **PLAIN_SUMS}),
    "ep2": Setup({"tp_size": 2, "ep_size": 2, **PLAIN_SUMS}),
}  # fmt: skip


def run(setup: str, checkpoint: Path, out: Path, bugs: Sequence[str], port: int) -> Iterator[tuple[str, Path]]:
    """Yields the name of each run and the folder of its dump; beside it NAME.json holds the prompts and the answers."""
    import sglang

    dumps = (out / f"dumps-{setup}").resolve()
    dumps.mkdir(parents=True, exist_ok=True)
    chosen = SETUPS[setup]
    arguments = {**ARGUMENTS, **chosen.arguments, "model_path": str(checkpoint), "port": port}
    if setup == "pass":
        arguments["debug_tensor_dump_output_folder"] = str(dumps / f"{setup}.{CLEAN}")
    else:
        os.environ.update(DUMPER_ENABLE="1", DUMPER_NON_INTRUSIVE_MODE="all", DUMPER_DIR=str(dumps),
                          DUMPER_EXP_NAME="start", DUMPER_ENABLE_OUTPUT_CONSOLE="0")  # fmt: skip
        where = {"hook_factory": "benchmarks.real_engine.sglang_planter:factory", "config": {"folder": str(dumps)}}
        arguments["forward_hooks"] = [{"name": "planter", "target_modules": ["model.norm"], **where}]
    pictured = chosen.recipe == images.RECIPE
    if pictured:
        images.write_processor(checkpoint)
    _wish(dumps, "", CLEAN)
    engine = sglang.Engine(**arguments)
    try:
        if pictured:
            _ask(engine, chosen.new, prompt=images.PROMPT, image_data=images.draw(checkpoint, dumps, "start")[0])
        elif setup not in ("pass", "prefix"):
            _ask(engine, chosen.new, input_ids=prompts((5, 3)))  # compiles, and dumps nothing
        for bug in bugs:
            name = f"{setup}.{bug}"
            _wish(dumps, name, bug)
            ids = prompts(chosen.lengths if bug == CLEAN else chosen.broken)
            if pictured:
                files, row = images.draw(checkpoint, dumps, name)
                ids, answers = [row], _ask(engine, chosen.new, prompt=images.PROMPT, image_data=files)
            else:
                answers = _ask(engine, chosen.new, input_ids=ids)
            if setup == "prefix":  # the second turn of the first conversation
                follow = [ids[0] + answers[0]["output_ids"] + prompts((9,), 7)[0]]
                answers, ids = answers + _ask(engine, chosen.new, input_ids=follow), ids + follow
            (dumps / f"{name}.json").write_text(json.dumps({"ids": ids, "answers": answers}, default=_plain))
            yield name, dumps / name
            time.sleep(0.3)
    finally:
        engine.shutdown()


def _wish(folder: Path, run_name: str, bug: str) -> None:
    new = folder / "control.new"
    new.write_text(json.dumps({"run": run_name, "bug": bug}))
    new.replace(folder / "control.json")


def _ask(engine: Any, new: int, **asked: Any) -> list[dict[str, Any]]:
    out = engine.generate(
        **asked, sampling_params={"max_new_tokens": new, "temperature": 0, "ignore_eos": True},
        return_logprob=True, logprob_start_len=0, top_logprobs_num=20, return_routed_experts=True,
    )  # fmt: skip
    return out if isinstance(out, list) else [out]


def _plain(value: Any) -> Any:
    """What JSON has no word for: tensors and bytes."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.tolist()
