"""transformers (5.23): captured live by hooks, and the debug tree of `model_addition_debugger_context`.

The tree is {module_path, inputs, outputs, children}; tensors are {shape, dtype, value}, where value names a
safetensors file beside it, key "data" (with use_repr=False; with use_repr=True it is printed text, which is no use
here). Nodes with children have no outputs, and middle layers are left out unless do_prune_layers=False.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ....errors import Qwen35Error
from ....untrusted import read_json, tensor_file
from ..dump import Dump, Piece, StepTokens
from .common import outputs

TREE = "_debug_tree_FULL_TENSORS.json"
TENSOR_FIELDS = {"shape", "dtype", "value"}  # what the tree says of one


def sniff(path: Path) -> bool:
    return path.name.endswith(TREE) if path.is_file() else any(path.glob(f"*{TREE}"))


class TransformersCapture:
    """Hooks on every module of a transformers model: copies of inputs and outputs, one step a forward pass.

        with TransformersCapture(model) as capture:
            model(input_ids=ids, attention_mask=mask)
        dump = capture.dump()

    Values that no module takes or returns (probabilities between functions, states) are not seen.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.pieces: list[Piece] = []
        self.tokens: dict[int, StepTokens] = {}
        self.step = -1
        self._handles: list[Any] = []

    def __enter__(self) -> TransformersCapture:
        for name, module in self.model.named_modules():  # the root's hook comes first, and counts the steps
            self._handles += [module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True),
                              module.register_forward_hook(partial(self._after, name))]  # fmt: skip
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not name:
            self.step += 1
            ids = kwargs.get("input_ids", args[0] if args else None)
            if isinstance(ids, Tensor):
                positions = kwargs.get("position_ids")
                self.tokens[self.step] = _batch_tokens(ids, kwargs.get("attention_mask"), positions)
        known, given = self.tokens.get(self.step), kwargs.get("position_ids")
        if known is not None and known.positions is None and isinstance(given, Tensor):  # for its layers
            known.positions = _flat_positions(given, known.batch)
        for index, value in (*enumerate(args), *kwargs.items()):
            self._keep(f"{name}.inputs.{index}", value)

    def _after(self, name: str, _: nn.Module, args: Any, output: Any) -> None:
        for raw, value in outputs(name, output):
            self._keep(raw, value)

    def _keep(self, raw: str, value: Any) -> None:
        if isinstance(value, Tensor) and not raw.startswith("."):
            copy = value.detach().clone()
            self.pieces.append(Piece.named(raw, lambda: copy, step=self.step, where="live"))

    def dump(self) -> Dump:
        """What was captured so far."""
        config = getattr(self.model, "config", None)
        sizes = None if config is None else config.get_text_config().to_dict()
        return Dump("transformers live", "live", self.pieces, self.tokens, family="transformers", config=sizes)


def capture_transformers(model: nn.Module, *calls: Mapping[str, Any], **inputs: Any) -> Dump:
    """Run a transformers model and return what its modules took and gave.

    `inputs` are arguments of one forward pass; `calls` are those of several, one step each (prefill, then decode).
    """
    with TransformersCapture(model) as capture, torch.no_grad():
        for call in calls or (inputs,):
            model(**call)
    return capture.dump()


def read(path: Path, *, config: Mapping[str, Any] | None = None, **_: Any) -> Dump:
    """A debug tree: its directory, or the JSON file itself."""
    files = [path] if path.is_file() else sorted(path.glob(f"*{TREE}"))
    if len(files) > 1:
        raise Qwen35Error("several debug trees lie here", where=path, found=", ".join(f.name for f in files[:3]))
    tree = read_json(files[0])
    if not isinstance(tree, dict) or "module_path" not in tree:
        raise Qwen35Error("not a debug tree", where=files[0], expected="an object with module_path and children")
    pieces, problems, tokens = list[Piece](), list[Qwen35Error](), dict[int, StepTokens]()
    root = tree["module_path"]
    for raw, found in _tensors(tree):
        name = raw.removeprefix(root).removeprefix(".")
        if not isinstance(found["value"], str) or not found["value"].endswith(".safetensors"):
            do = "make the tree with use_repr=False"
            raise Qwen35Error("debug tree holds printed text, not tensors", where=files[0], found=name, do=do)
        # Only files beside the tree are opened, wherever the tree points.
        file = files[0].parent / Path(found["value"]).name
        if not file.is_file():
            problems.append(Qwen35Error("file of the debug tree is missing", where=file, do="copy the whole folder"))
        elif name in ("inputs.input_ids", "inputs.0", "model.inputs.input_ids") and 0 not in tokens:
            tokens[0] = _batch_tokens(_load(file))
        elif name not in ("inputs.input_ids", "model.inputs.input_ids"):
            pieces.append(Piece.named(name, partial(_load, file), where=str(file)))
    notes = ["the debug tree leaves out what containers of modules return, the MoE block's sum among them"]
    return Dump("transformers debug tree", path, pieces, tokens, problems, notes, "transformers", config)


def _tensors(node: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, tensor record) of a node and all below, in the order of execution."""
    name = node["module_path"]
    inputs = node.get("inputs") or {}
    for index, value in (*enumerate(inputs.get("args") or []), *(inputs.get("kwargs") or {}).items()):
        if isinstance(value, Mapping) and set(value) >= TENSOR_FIELDS:
            yield f"{name}.inputs.{index}", value
    for child in node.get("children") or []:
        yield from _tensors(child)
    for raw, value in outputs(name, node.get("outputs")):
        if isinstance(value, Mapping) and set(value) >= TENSOR_FIELDS:
            yield raw, value


def _load(file: Path) -> Tensor:
    with tensor_file(file, "make the debug tree again") as opened:
        return opened.get_tensor("data")


def _batch_tokens(ids: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> StepTokens:
    """Tokens of a [B, T] batch. A mask may cover cached tokens too: its last T columns count."""
    B, T = ids.shape
    real = torch.ones(B, T, dtype=torch.bool) if mask is None else mask[:, -T:].bool()
    return StepTokens(ids.flatten(), _flat_positions(positions, (B, T)), batch=(B, T), mask=real.flatten())


def _flat_positions(positions: Tensor | None, batch: tuple[int, int] | None) -> Tensor | None:
    """[B * T] of position ids [B, T], or those of text, height and width [3, B, T]; None for other shapes."""
    if positions is not None and positions.dim() == 3:  # with images in the prompt, time alone orders no tokens
        positions = positions[0] if bool((positions == positions[:1]).all()) else None
    if positions is None or batch is None or positions.dim() != 2 or positions.shape[1] != batch[1]:
        return None
    return positions.expand(batch).flatten().clone()
