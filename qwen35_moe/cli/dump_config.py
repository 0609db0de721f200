"""`qwen35-moe dump-config ENGINE`: what to set in an engine so that its dump can be compared. Ready to paste."""

from __future__ import annotations

import argparse

from ..errors import Qwen35Error

# Source patches for values that hooks do not see, since their modules are not called. Each `match` must occur exactly
# once in its function, as it does in 0.5.17 and 0.5.23. SGLang imports `dumper` into each by itself.
SGLANG_PATCHES = """\
patches:
  - target: sglang.srt.models.qwen3_5.Qwen3_5AttentionDecoderLayer.forward_prepare_fused_gate
    edits: &norms
      - match: "q, k = self.rotary_emb(positions, q, k)"
        prepend: |
          dumper.dump("attn_q_norm", q, dims="t (n*h)[attn_tp]")
          dumper.dump("attn_k_norm", k, dims="t (g*h)[attn_tp]")
  - target: sglang.srt.models.qwen3_5.Qwen3_5AttentionDecoderLayer.forward_prepare_native
    edits: *norms
  - target: sglang.srt.models.qwen3_5.Qwen3_5AttentionDecoderLayer.self_attention
    edits:
      - match: "attn_output = self.attn(q, k, v, forward_batch)"
        prepend: |
          if gate is not None:
              dumper.dump("attn_gate", gate.reshape(gate.shape[0], -1).sigmoid(), dims="t (n*h)[attn_tp]")
"""

_SGLANG = f"""\
# SGLang 0.5.17 to 0.5.23: its own dumper on every module. The filter names the layers to dump.
# Graphs are off, since hooks do not see the decode steps of a graph. The radix cache is off, since the dump would lack
# a cached prefix. Leave out warm-up, MTP and EPLB.
cat > patches.yaml <<'YAML'
{SGLANG_PATCHES}YAML
export DUMPER_ENABLE=1 DUMPER_NON_INTRUSIVE_MODE=all DUMPER_DIR=$PWD/engine_dump
export DUMPER_FILTER='layer_id is None or layer_id in [0, 1, 2, 3]'
export DUMPER_SOURCE_PATCHER_CONFIG=$PWD/patches.yaml
python -m sglang.launch_server --model-path MODEL --disable-radix-cache --skip-server-warmup \\
    --cuda-graph-backend-decode disabled --cuda-graph-backend-prefill disabled
# Send ids, not text, so that both sides see the same tokens:
curl -s localhost:30000/generate -H 'Content-Type: application/json' \\
    -d '{{"input_ids": [1, 2, 3], "sampling_params": {{"max_new_tokens": 4, "temperature": 0}}}}'
qwen35-moe diagnose MODEL engine_dump/
# With several ranks, first bring the files of all of them into one folder.
# The dump cannot hold: a shared_expert_gate inside of a fused kernel, the router of gfx950's small-batch kernel, the
# residual stream, conv and recurrent states.
# A coarser dump, without logits of the last pass: --debug-tensor-dump-output-folder engine_dump
"""

_VLLM = """\
# vLLM 0.25 to 0.33 has no dump of layers. A connector writes the residual stream; the answer brings the routed experts.
# These are two runs. vLLM does not start with routed experts while prefix caching or chunked prefill is off. It writes
# no hidden states of a cached prefix. Prompts shorter than max_num_batched_tokens run in one piece.
python - <<'PY'
from vllm import LLM, SamplingParams
layers = list(range(61))  # 0 .. number of layers: entry of each, and the end
llm = LLM(
    model="MODEL", enforce_eager=True, enable_prefix_caching=False,
    speculative_config={
        "method": "extract_hidden_states", "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": layers}},
    },
    kv_transfer_config={
        "kv_connector": "ExampleHiddenStatesConnector", "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": "engine_dump"},
    },
)
llm.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=1, temperature=0))
PY
python - <<'PY'
import numpy
from vllm import LLM, SamplingParams
llm = LLM(model="MODEL", enforce_eager=True, enable_return_routed_experts=True)
answer = llm.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=1, temperature=0))[0]
numpy.save("routed_experts.npy", answer.outputs[0].routed_experts)
PY
# If you asked for fewer layers, add --layer-ids 2,18,33. Their order does not matter: vLLM writes layers by number.
qwen35-moe diagnose MODEL engine_dump/
qwen35-moe diagnose MODEL routed_experts.npy --ids 1,2,3  # ids of experts only, no weights
"""

_TRANSFORMERS = """\
# transformers 5.23, in the Python that holds the model. No files are needed.
import qwen35_moe as q
dump = q.capture_transformers(model, input_ids=ids, attention_mask=mask, use_cache=False)
# The truth of the same ids: qwen35-moe trace CHECKPOINT --ids ids.json --out truth
print(q.report(q.compare("truth", dump, "CHECKPOINT")))
# Or as files, for: qwen35-moe diagnose CHECKPOINT engine_dump/
# They leave out what a container module returns (the MoE block's sum).
from transformers.model_debugging_utils import model_addition_debugger_context
with model_addition_debugger_context(model, debug_path="engine_dump", do_prune_layers=False, use_repr=False):
    model(input_ids=ids)
"""

_LLAMA_CPP = """\
# llama.cpp, one of three. The logits after the last token of a prompt:
llama-debug -m MODEL.gguf -p "PROMPT" --save-logits --logits-output-dir engine_dump
qwen35-moe diagnose CHECKPOINT engine_dump/
# The engine's log-probabilities of a text (resolution 2.4e-4 nat):
llama-perplexity -m MODEL.gguf -f text.txt --kl-divergence-base engine.kld
qwen35-moe diagnose CHECKPOINT engine.kld
# llama.cpp compares by itself: write_kl_base of qwen35_moe.oracle.dumps.writers writes the truth's file, then
llama-perplexity -m MODEL.gguf --kl-divergence-base truth.kld --kl-divergence
# CHECKPOINT is the folder that MODEL.gguf was converted from.
"""

_ATOM = """\
# ROCm ATOM. ONE_SHOT=0 dumps every call; with 1 the only file would hold the warm-up.
export ATOM_FWD_DUMP_DIR=$PWD/engine_dump
export ATOM_FWD_DUMP_ONE_SHOT=0
export ATOM_FWD_DUMP_LAYERS=0,1,2,3
# The MoE block and full attention keep the names of Qwen3-Next. If the shared expert is a slot, FusedMoE returns the
# block's output. The dump has both modules, so the reader can tell.
CLASSES=Qwen3_5DecoderLayer,Qwen3_5GatedDeltaNet,Qwen3NextAttention,Qwen3NextSparseMoeBlock,FusedMoE
export ATOM_FWD_DUMP_BLOCK_CLASS=$CLASSES
export ATOM_FWD_DUMP_LAYER_ATTR=layer_idx
# Class and attribute names are those of the model file in use: print them with
#   for name, module in model.named_modules(): print(name, type(module).__name__)
# To dump weights, set this for a run of its own, which exits after loading:
# export ATOM_WEIGHT_DUMP_DIR=$PWD/engine_weights ATOM_WEIGHT_DUMP_LAYERS=0,1,2,3
# Run eagerly (--enforce-eager or --level 0), one prompt, prefix cache off. Then:
qwen35-moe diagnose CHECKPOINT engine_dump/
"""

ENGINES = {"sglang": _SGLANG, "vllm": _VLLM, "transformers": _TRANSFORMERS, "llama.cpp": _LLAMA_CPP, "atom": _ATOM}


def dump_config(engine: str) -> str:
    """What to set in `engine` to get a good dump. Raises Qwen35Error for an engine without a reader."""
    if engine not in ENGINES:
        raise Qwen35Error("no dump settings for this engine", found=engine, expected=", ".join(ENGINES))
    return ENGINES[engine]


def layer_lines(layers: list[int]) -> list[str]:
    """The settings of every engine that name layers, for these layers."""
    some, ends = ", ".join(map(str, layers)), sorted({end for i in layers for end in (i, i + 1)})
    return [
        f"sglang   export DUMPER_FILTER='layer_id is None or layer_id in [{some}]'",
        f"vllm     layers = {ends}  # entry and end of each",
        f"atom     export ATOM_FWD_DUMP_LAYERS={some.replace(' ', '')}",
    ]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "Prints what to set in an engine so that it dumps its values. The lines are ready to paste."
    parser.add_argument("engine", choices=list(ENGINES))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    print(dump_config(args.engine), end="")
    return 0
