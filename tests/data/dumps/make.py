"""Makes dumps.tar.xz with the code of SGLang and transformers: `python tests/data/dumps/make.py UNPACKED_WHEEL OUT`.

Needs torch and what the dumper imports (pyzmq), not SGLang's kernels: of its other modules only the few names that
dumper.py takes are stood in for here. OUT then holds the folders to pack:
`tar --sort=name --mtime=@0 --owner=0 --group=0 -cJf dumps.tar.xz *`.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

ROOT = Path(__file__).parents[3]
STEPS = [[(0, 0, 5), (1, 0, 3)], [(1, 3, 4), (0, 5, 6)], [(0, 6, 7), (1, 4, 5)]]
SEQUENCES = [[5, 9, 200, 7, 31, 8, 77], [5, 9, 4, 250, 3]]


class ForwardBatch(SimpleNamespace):
    """What SGLang's dumper reads of its ForwardBatch."""


def stand_in(wheel: Path, rank: int, size: int) -> None:
    def module(name: str, folder: str | None = None, **names: Any) -> None:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(names)
        if folder is not None:
            sys.modules[name].__path__ = [folder]

    groups = {f"{g}_{what}": v for g in ("tp", "attn_tp", "moe_tp") for what, v in (("rank", rank), ("size", size))}
    ones = {
        f"{g}_{what}": v
        for g in ("pp", "moe_ep", "moe_dp", "attn_dp", "attn_cp")
        for what, v in (("rank", 0), ("size", 1))
    }
    parallel = SimpleNamespace(**groups, **ones)
    module("sglang", str(wheel / "sglang"))
    module("sglang.srt", str(wheel / "sglang/srt"))
    module("sglang.srt.utils", "", get_device=lambda: "cpu")
    module("sglang.srt.managers", "")
    module("sglang.srt.managers.io_struct", sock_recv=None, sock_send=None, wrap_as_pickle=None)
    module("sglang.srt.runtime_context", get_parallel=lambda: parallel, get_server_args=lambda: None, get_serving=None)
    module("sglang.srt.layers", "")
    attention = {"get_moe_cp_size": lambda: 1, "is_dp_attention_enabled": lambda: False}
    module("sglang.srt.layers.dp_attention", **attention)
    sys.modules["sglang.srt.layers"].dp_attention = sys.modules["sglang.srt.layers.dp_attention"]
    logits = type("LogitsProcessorOutput", (SimpleNamespace,), {})
    module("sglang.srt.layers.logits_processor", LogitsProcessorOutput=logits)
    module("sglang.srt.layers.layer_boundary", "")
    module("sglang.srt.layers.layer_boundary.output", UnreducedOutput=type("UnreducedOutput", (), {}))
    module("sglang.srt.layers.layer_boundary.residual", "")
    module("sglang.srt.layers.layer_boundary.residual.stream", OwedOutput=type("OwedOutput", (), {}))
    module("sglang.srt.model_executor", "")
    proxy = type("PPProxyTensors", (), {})
    module("sglang.srt.model_executor.forward_batch_info", ForwardBatch=ForwardBatch, PPProxyTensors=proxy)
    module("sglang.srt.distributed")
    sys.modules["sglang.srt"].distributed = sys.modules["sglang.srt.distributed"]


class Node(nn.Module):
    """A module that takes and returns recorded values, under the names of an engine's modules."""

    def __init__(self, path: str = ""):
        super().__init__()
        self.path = path

    def forward(self, *args: Any) -> Any:
        batch, values = args[-2:]
        for child in self.children():
            inputs = [values[k] for k in sorted(values) if k.startswith(f"{child.path}.inputs.")]
            child(*inputs, batch, values)
        found = [
            values[k] for k in sorted(values) if k == f"{self.path}.output" or k.startswith(f"{self.path}.output.")
        ]
        return found[0] if len(found) == 1 else tuple(found) or None


def tree(names: list[str]) -> Node:
    root = Node()
    for name in names:
        node, path = root, ""
        for part in name.split("."):
            if part in ("output", "inputs"):
                break
            path = f"{path}.{part}".removeprefix(".")
            if part not in dict(node.named_children()):
                node.add_module(part, Node(path))
            node = node.get_submodule(part)
    return root


def play(rank: int, size: int, wheel: Path, out: Path) -> None:
    """One rank: recorded values of tests/engine_like.py, seen by SGLang's hooks of both kinds."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29533")
    dist.init_process_group("gloo", rank=rank, world_size=size)
    stand_in(wheel, rank, size)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(wheel)]
    from engine_like import Engine, tiny_model
    from sglang.srt.debug_utils.dumper import DumperConfig, _Dumper
    from sglang.srt.debug_utils.tensor_dump_forward_hook import register_forward_hook_for_model
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput

    steps: list[dict[str, Any]] = [{"requests": [s for s, _, _ in parts]} for parts in STEPS]
    for v in Engine(tiny_model(), SEQUENCES, size).values(STEPS, prefix="model."):
        if v.rank == rank and v.layer in (None, 0, 3):
            name = (
                v.name if v.layer is not None or v.name in ("input_ids", "positions", "seq_lens") else f"model.{v.name}"
            )
            name = name.replace("model.non_intrusive__model", "model").replace("model.model", "model")
            x = v.x.to(torch.float32) if v.x.is_floating_point() else v.x
            if "next_token_logits" in name:
                name, x = "logits_processor.output", LogitsProcessorOutput(next_token_logits=x)
            steps[v.step][name] = x
    paths = [n for n in steps[0] if "." in n]
    for kind in ("dumper", "passes"):
        model = tree(sorted(paths, key=lambda n: n.startswith("logits")))
        dumper = None
        if kind == "dumper":
            config = DumperConfig(enable=True, dir=str(out), exp_name="sglang_tp2", non_intrusive_mode="all",
                                  enable_output_console=False)  # fmt: skip
            dumper = _Dumper(config=config)
            dumper.register_non_intrusive_dumper(model)
        else:
            register_forward_hook_for_model(model, str(out / "sglang_passes"), None, size, rank, 0)
        for values in steps:
            core = {name: values[name] for name in ("input_ids", "positions", "seq_lens")}
            model(ForwardBatch(**core, req_pool_indices=torch.tensor(values["requests"]), rids=None), values)
            if dumper:
                dumper.step()
    dist.destroy_process_group()


def transformers(wheel: Path, out: Path) -> None:
    """transformers' model of the fixtures under the dumper's hooks, and its own debug tree."""
    stand_in(wheel, 0, 1)
    sys.path[:0] = [str(ROOT), str(wheel)]
    from sglang.srt.debug_utils.dumper import DumperConfig, _Dumper
    from transformers.model_debugging_utils import model_addition_debugger_context

    from tests.peers.transformers_model import load_transformers

    model = load_transformers(ROOT / "tests/data/fixtures/bf16-hub", torch.bfloat16)
    ids = torch.tensor([SEQUENCES[0]])
    tree_path = out / "transformers_tree"
    with torch.no_grad(), model_addition_debugger_context(model, str(tree_path), do_prune_layers=True, use_repr=False):
        model(input_ids=ids, use_cache=False)
    config = DumperConfig(enable=True, dir=str(out), exp_name="sglang_transformers", non_intrusive_mode="all",
                          filter="layer_id in (None, 0, 3) and not search('inputs', name) or name == 'input_ids'",
                          enable_output_console=False)  # fmt: skip
    dumper = _Dumper(config=config)
    dumper.register_non_intrusive_dumper(model)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)


if __name__ == "__main__":
    wheel_path, out_path = (Path(p).resolve() for p in sys.argv[1:3])
    mp.spawn(play, (2, wheel_path, out_path), nprocs=2)
    transformers(wheel_path, out_path)
