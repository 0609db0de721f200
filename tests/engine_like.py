"""An engine made of our model: SGLang's names, flat batches, steps, and ranks that hold shares and partial sums.

Values are those of exact runs, one sequence at a time; partial sums come from splitting the weights, as TP and EP do.
So a dump of it, read and aligned, must give the truth back up to the order of additions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qwen35_moe.model.config import Config
from qwen35_moe.model.text import Model
from qwen35_moe.trace.file import Trace
from qwen35_moe.trace.recorder import trace

CONFIG = Path(__file__).parent / "data/fixtures/bf16-hub/config.json"


@dataclass
class Value:
    """One tensor that the engine would dump."""

    name: str
    x: Tensor
    step: int
    rank: int = 0
    layer: int | None = None


def tiny_model() -> Model:
    """The fixtures' architecture with weights of its own."""
    config = Config.from_pretrained(CONFIG)
    model = Model(config)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return model


def padded_truth(model: Model, sequences: list[list[int]], **options: object) -> Trace:
    """The truth over [B, T], shorter sequences padded on the right."""
    T = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (T - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (T - len(s)) for s in sequences])
    return trace(model, ids, attention_mask=mask, **options)


class Engine:
    """`steps` are lists of (sequence, first token, end), run flat in that order; tp ranks in ep groups."""

    def __init__(self, model: Model, sequences: list[list[int]], tp: int = 1, ep: int = 1):
        self.model, self.sequences, self.tp, self.ep = model, sequences, tp, ep
        self.traces = [trace(model, torch.tensor([s]), experts=True) for s in sequences]

    def values(self, steps: list[list[tuple[int, int, int]]], prefix: str = "non_intrusive__model.") -> Iterator[Value]:
        for step, parts in enumerate(steps):
            for rank in range(self.tp):
                yield from self._core(step, rank, parts)
                for layer in range(self.model.config.num_hidden_layers):
                    for name, x in self._layer(layer, rank, parts).items():
                        yield Value(f"{prefix}layers.{layer}.{name}", x, step, rank, layer)
                yield Value(f"{prefix}norm.output", self._rows("final_norm", parts), step, rank)
                last = [(s, end - 1, end) for s, _, end in parts]
                logits = self._rows("next_token_logits", last)
                # Engines pad the vocabulary, and return the last token of each sequence only.
                logits = torch.cat((logits, logits.new_zeros(len(logits), 8)), 1)
                yield Value("next_token_logits", logits, step, rank)

    def _core(self, step: int, rank: int, parts: list[tuple[int, int, int]]) -> Iterator[Value]:
        ids = [i for s, start, end in parts for i in self.sequences[s][start:end]]
        positions = [p for _, start, end in parts for p in range(start, end)]
        yield Value("input_ids", torch.tensor(ids), step, rank)
        yield Value("positions", torch.tensor(positions), step, rank)
        yield Value("seq_lens", torch.tensor([end for _, _, end in parts]), step, rank)

    def _rows(self, key: str, parts: list[tuple[int, int, int]]) -> Tensor:
        """A tap as flat rows [tokens, features]."""
        rows = [self.traces[s][key] for s, _, _ in parts]
        rows = [x[0] if x.shape[0] == 1 and x.dim() > 2 else x for x in rows]
        return torch.cat([x[start:end].flatten(1) for x, (_, start, end) in zip(rows, parts, strict=True)])

    def _layer(self, layer: int, rank: int, parts: list[tuple[int, int, int]]) -> dict[str, Tensor]:
        def tap(name: str) -> Tensor:
            return self._rows(f"layers.{layer}.{name}", parts)

        def share(x: Tensor, blocks: int = 1) -> Tensor:
            """This rank's part of each of `blocks` equal blocks of columns."""
            return torch.cat([block.chunk(self.tp, 1)[rank] for block in x.chunk(blocks, 1)], 1)

        config, module = self.model.config, self.model.layers[layer]
        out = {
            "input_layernorm.output.0": tap("input_layernorm"),
            "input_layernorm.output.1": tap("layer_input"),
            "post_attention_layernorm.output.0": tap("pre_mlp_layernorm_output"),
            "post_attention_layernorm.output.1": tap("pre_mlp_residual"),
        }
        if config.layer_types[layer] == "full_attention":
            k, v = share(tap("attn_k_proj")), share(tap("attn_v"))
            context = share(tap("attn_pre_o_proj"))
            out |= {
                "qkv_proj.output": torch.cat((share(tap("attn_q_gate")), k, v), 1),
                # Norms run over heads: [tokens * heads, width].
                "q_norm.output": share(tap("attn_q_norm")).reshape(-1, config.head_dim),
                "k_norm.output": share(tap("attn_k_norm")).reshape(-1, config.head_dim),
                "attn.inputs.0": share(tap("attn_q")),
                "attn.inputs.1": share(tap("attn_k")),
                "attn.output": share(tap("attn_context")),
                "o_proj.inputs.0": context,
                "o_proj.output": context @ share(module.self_attn.o_proj.weight).T,
            }
        else:
            key = config.linear_num_key_heads * config.linear_key_head_dim
            sizes = [key, key, config.linear_num_value_heads * config.linear_value_head_dim]
            qkv = torch.cat([share(x) for x in tap("gdn_qkv").split(sizes, 1)], 1)
            heads = config.linear_num_value_heads // self.tp
            read = share(tap("gdn_norm_out"))
            out |= {
                "linear_attn.in_proj_qkvz.output": torch.cat((qkv, share(tap("gdn_z"))), 1),
                "linear_attn.in_proj_ba.output": torch.cat((share(tap("gdn_b")), share(tap("gdn_a"))), 1),
                "linear_attn.attn.output": share(tap("gdn_core_out")).unflatten(1, (heads, -1)),
                "linear_attn.norm.output": read.reshape(-1, config.linear_value_head_dim),
                "linear_attn.out_proj.output": read @ share(module.linear_attn.out_proj.weight).T,
            }
        return out | self._moe(layer, rank, parts, tap, share)

    def _moe(self, layer: int, rank: int, parts: list[tuple[int, int, int]], tap, share) -> dict[str, Tensor]:
        moe, config = self.model.layers[layer].mlp, self.model.config
        x, ids, weights = tap("pre_mlp_layernorm_output"), tap("moe_topk_ids"), tap("moe_topk_weights")
        moe_tp = self.tp // self.ep
        ep_rank, tp_rank = rank // moe_tp, rank % moe_tp
        routed = torch.zeros_like(x)
        per_rank = config.num_experts // self.ep
        for e in range(ep_rank * per_rank, (ep_rank + 1) * per_rank):
            gate, up = (x @ moe.experts.gate_up_proj[e].T).chunk(2, 1)
            act = (gate * gate.sigmoid() * up).chunk(moe_tp, 1)[tp_rank]
            down = act @ moe.experts.down_proj[e].chunk(moe_tp, 1)[tp_rank].T
            routed += down * (weights * (ids == e)).sum(1, keepdim=True)
        shared = share(tap("moe_shared_act")) @ share(moe.shared_expert.down_proj.weight).T
        return {
            "mlp.gate.output": tap("moe_router_logits"),
            "mlp.topk.output.0": weights,
            "mlp.topk.output.1": ids,
            "mlp.experts.inputs.0": x,
            "mlp.experts.output": routed,
            "mlp.shared_expert_gate.output": tap("moe_shared_gate_logit"),
            "mlp.shared_expert.gate_up_proj.output": torch.cat(
                (share(tap("moe_shared_gate_proj")), share(tap("moe_shared_up_proj"))), 1
            ),
            "mlp.shared_expert.act_fn.output": share(tap("moe_shared_act")),
            "mlp.shared_expert.down_proj.output": shared,
            "mlp.output": routed + tap("moe_shared_gate") * shared,
        }


def write_dumper(path: Path, values: Iterator[Value], world: int = 1) -> None:
    """Files as SGLang's dumper writes them (tests/data/dumps has some that it wrote itself)."""
    path.mkdir(parents=True)
    index: dict[int, int] = {}
    for value in values:
        index[value.rank] = index.get(value.rank, 0) + 1
        tags = {"step": value.step, "rank": value.rank, "dump_index": index[value.rank], "name": value.name,
                "recompute_status": "disabled"}  # fmt: skip
        if value.layer is not None:
            tags["layer_id"] = value.layer
        meta = {**tags, "world_rank": value.rank, "world_size": world}
        name = "___".join(f"{k}={v}" for k, v in tags.items()) + ".pt"
        torch.save({"value": value.x.clone(), "meta": meta}, path / name)


def write_passes(path: Path, values: Iterator[Value]) -> None:
    """Files as --debug-tensor-dump-output-folder writes them, late outputs in the next file, the last ones lost."""
    passes: dict[tuple[int, int], dict[str, Tensor | list[Tensor]]] = {}
    for v in values:
        name = v.name.removeprefix("non_intrusive__")
        if v.name == "next_token_logits":
            passes.setdefault((v.rank, v.step + 1), {})["logits_processor"] = v.x
            passes[v.rank, v.step + 1]["model"] = v.x[:, :64]
        elif v.name in ("input_ids", "positions", "seq_lens"):
            passes.setdefault((v.rank, v.step), {})[f"model.forward_batch_info.{v.name}"] = v.x
        elif name.endswith((".output.0", ".output.1")):
            passes.setdefault((v.rank, v.step), {}).setdefault(name[:-9], []).append(v.x)
        elif name.endswith(".output"):
            passes.setdefault((v.rank, v.step), {})[name[:-7]] = v.x
    count = max(step for _, step in passes)
    for (rank, step), tensors in passes.items():
        if step < count:
            folder = path / f"TP{rank}_PP0_Rank{rank}_pid{100 + rank}"
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(tensors, folder / f"Pass{step:05d}.pt")
