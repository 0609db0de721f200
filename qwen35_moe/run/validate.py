"""Does a checkpoint hold what its configuration implies, and nothing else? Headers tell, before a long run starts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from ..checkpoint import Checkpoint
from ..checkpoint.checkpoint import TensorLayout
from ..checkpoint.header import split_role
from ..checkpoint.recognise import CACHE_SCALES
from ..checkpoint.weight import EXPERT_PROJECTIONS
from ..errors import Qwen35Error
from ..gate.declared import as_raw, method_of, quantization_of
from ..model.config import FULL, Config
from ..model.mtp import MTP
from ..model.text import Layer, Model
from ..model.vision.tower import VisionConfig, VisionTower
from .prompt import vision_of

Shape = tuple[int, ...]
SHOWN_PROBLEMS, ENOUGH_PROBLEMS = 6, 1000


def model_config(ck: Checkpoint, ignore: Iterable[str] = ()) -> Config:
    """Its config.json, checked. ignore: further keys that mean nothing to the model. Error: there is no config."""
    if not ck.config:
        root = ck.path if ck.path.is_dir() else ck.path.parent
        do = "copy the one that belongs to these tensors beside them"
        raise Qwen35Error("no config.json", where=root / "config.json", found="absent or empty", do=do)
    config = Config.from_dict(ck.config, ignore)
    # A head that is stored is the head, whatever is said about ties; so it is in transformers, if it is another.
    return replace(config, tie_word_embeddings=config.tie_word_embeddings and "lm_head" not in ck.modules)


def expected_tensors(
    config: Config, mtp_layers: int = 0, vision: VisionConfig | None = None
) -> Iterator[tuple[str, Shape]]:
    """(name, shape) of every tensor, as the model on the meta device has them; `layers.N.mlp.experts` stands for all of
    a layer's and has shape [E, F, D]."""
    try:
        with torch.device("meta"):
            ends = Model(replace(config, num_hidden_layers=1, layer_types=config.layer_types[:1]))
            layers = {kind: dict(_shapes(Layer(config, kind))) for kind in {*config.layer_types, FULL}}
            draft = MTP(replace(config, raw={})) if mtp_layers else None
            tower = VisionTower(replace(vision, depth=1)) if vision else None  # the depth may be any number
    except RuntimeError as error:  # torch counts bytes in 64 bits
        raise Qwen35Error("a size that no model has", where="config.json", found=str(error).splitlines()[0]) from error
    yield from _shapes(ends.embed_tokens, "embed_tokens.")
    for i, kind in enumerate(config.layer_types):
        yield from ((f"layers.{i}.{name}", shape) for name, shape in layers[kind].items())
    yield from _shapes(ends.norm, "norm.")
    if not config.tie_word_embeddings:
        yield from _shapes(ends.lm_head, "lm_head.")
    if draft is not None:
        yield from ((name, shape) for name, shape in _shapes(draft, "mtp.") if ".layers." not in name)
        for i in range(mtp_layers):
            yield from ((f"mtp.layers.{i}.{name}", shape) for name, shape in layers[FULL].items())
    if vision is not None and tower is not None:
        yield from ((name, shape) for name, shape in _shapes(tower, "visual.") if ".blocks." not in name)
        for i in range(vision.depth):
            yield from _shapes(tower.blocks[0], f"visual.blocks.{i}.")


def _shapes(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Shape]]:
    for name, x in module.named_parameters():
        experts, _, projection = f"{prefix}{name}".rpartition(".")
        if projection == "down_proj":  # [E, D, F]
            yield experts, (x.shape[0], x.shape[2], x.shape[1])
        elif projection != "gate_up_proj":
            yield f"{prefix}{name}", tuple(x.shape)


def validate(ck: Checkpoint, config: Config | None = None, text_only: bool = False) -> None:
    """Error unless all tensors that the configuration implies are there, in their shapes and in a known format, and no
    others: one error about all of them. Reads headers only. Vision tower and MTP may be left out as a whole.

    A quantisation method that is not known is an error, too, though bytes alone say what is computed: what else such a
    method may mean by them is not known. text_only: draft head and vision tower may be whatever they are.
    """
    _check_prefix(ck)
    config = model_config(ck) if config is None else config
    if quantised := as_raw(quantization_of(ck.config or config.raw)):
        method_of(quantised)
    drafts = not text_only and any(name.startswith("mtp.") for name in ck.names())
    mtp = max(config.mtp_num_hidden_layers, 1) if drafts else 0
    vision = None if text_only else _vision_config(ck, config)
    aside = (*CACHE_SCALES, "" if vision else "visual.*", "mtp.*" if text_only else "")
    known: set[str] = set()
    problems: list[Qwen35Error] = []
    for name, shape in expected_tensors(config, mtp, vision):
        try:
            if name.endswith(".mlp.experts"):
                known.update(_check_experts(ck, name, shape))
            else:
                known.update(_check_tensor(ck, name, shape))
        except Qwen35Error as error:
            problems.append(error)
            if len(problems) == ENOUGH_PROBLEMS:
                break
            known.update(ck.expert_names(name), (s.name for s in ck.modules.get(split_role(name)[0], {}).values()))
    for name in () if len(problems) == ENOUGH_PROBLEMS else ck.tensors.keys() - known:
        if not any(fnmatchcase(name, pattern) for pattern in aside):
            problems.append(ck.stored(name).wrong("a tensor that is not expected", "none"))
    if problems:
        raise _as_one(ck, problems)


def _as_one(ck: Checkpoint, problems: list[Qwen35Error]) -> Qwen35Error:
    if len(problems) == 1:
        do = 'if the head is the embedding, as in many small models, set "tie_word_embeddings": true in config.json'
        headless = str(problems[0].expected) == "lm_head.weight" and "embed_tokens" in ck.modules
        return problems[0].but(do=do) if headless else problems[0]
    lines = [f"{p.where}: {p.what} (expected {p.expected}, found {p.found})" for p in problems]
    alike = Counter(re.sub(r"\d+", "#", line) for line in lines)  # hundreds of experts, in which all is the same
    first = {re.sub(r"\d+", "#", line): line for line in reversed(lines)}
    lines = [first[kind] + (f", and {n - 1} like it" if n > 1 else "") for kind, n in alike.items()]
    more = f"\n    and {len(lines) - SHOWN_PROBLEMS} other things" if len(lines) > SHOWN_PROBLEMS else ""
    what, expected = "things in the checkpoint do not fit its configuration", "the tensors that config.json implies"
    found = "".join(f"\n    {line}" for line in lines[:SHOWN_PROBLEMS]) + more
    return Qwen35Error(f"{len(problems)} {what}", where=ck.path, expected=f"{expected}, and no others", found=found)


def _check_prefix(ck: Checkpoint) -> None:
    """Error, naming what is stored, if the whole model stands under a prefix that is not one of the family's."""
    if "norm.weight" in ck or "embed_tokens.weight" in ck:
        return
    if stored := next((s for name, s in ck.tensors.items() if name.endswith(".embed_tokens.weight")), None):
        expected = "model.language_model., model., language_model.model. or repetitions of these"
        what, do = "the tensors carry a prefix that is not known", "rename the tensors; an adapter must be merged first"
        raise stored.wrong(what, expected, stored.raw_name.removesuffix("embed_tokens.weight"), do)


def _vision_config(ck: Checkpoint, config: Config) -> VisionConfig | None:
    raw = config.raw.get("vision_config")
    if raw is None or not any(name.startswith("visual.") for name in ck.names()):
        return None
    if not isinstance(raw, Mapping):
        raise Qwen35Error("bad value", where="config.json: vision_config", expected="an object", found=repr(raw)[:200])
    return vision_of(config)


def _check_tensor(ck: Checkpoint, name: str, shape: tuple[int, ...]) -> Iterable[str]:
    """The names of the tensors that make up this one."""
    module, role = split_role(name)
    if role == ".bias":
        _same(ck.stored(name).where, ck.stored(name).shape, shape)
        return [name]
    weight = ck.find(module)
    _same(weight.values.stored.where, weight.shape, shape)
    packable = len(shape) == 2 and not module.startswith("visual.") and module != "embed_tokens"
    if weight.kind != "float" and not packable:
        stored = weight.values.stored
        raise stored.wrong("this tensor must be a float", f"BF16 {list(shape)}", weight.kind)
    return [s.name for role, s in ck.modules[module].items() if role != ".bias"]


def _check_experts(ck: Checkpoint, prefix: str, shape: tuple[int, ...]) -> Iterable[str]:
    E, F, D = shape
    experts = ck.find_experts(prefix)
    if experts.count != E:
        where = experts.weights(0)[0].values.stored.where
        raise Qwen35Error("wrong number of experts", where=where, expected=f"num_experts = {E}", found=experts.count)
    seen: set[tuple[TensorLayout, ...]] = set()
    for e in range(1 if experts.fused else E):
        layouts = () if experts.fused else tuple(ck.layout(f"{prefix}.{e}.{name}") for name in EXPERT_PROJECTIONS)
        if layouts in seen:
            continue
        seen.add(layouts)
        *first, down = experts.weights(e)
        for weight in first:
            _same(weight.values.stored.where, weight.shape, (2 * F // len(first), D))
        _same(down.values.stored.where, down.shape, (D, F))
    return ck.expert_names(prefix)


def _same(where: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise Qwen35Error("wrong shape", where=where, expected=list(expected), found=list(found))
