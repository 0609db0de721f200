"""Does a checkpoint hold what its configuration implies, and nothing else? Headers tell, before a long run starts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ..checkpoint.folder import few
from ..checkpoint.recognise import BESIDE, CACHE_SCALES
from ..checkpoint.tensor_names import split_role
from ..errors import Qwen35Error
from ..gate.declared import as_raw, method_of, quantization_of
from ..model.config import Config
from ..model.vision.tower import VisionConfig
from .expected import expected_tensors

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint

SHOWN, ENOUGH = 6, 1000


def check_complete(ck: Checkpoint, config: Config) -> None:
    """One error about all tensors that are missing, misshapen, in a wrong or unknown format, or not expected.

    A quantisation method that is not known is an error, too, though bytes alone say what is computed: what else such a
    method may mean by them is not known.
    """
    if quantised := as_raw(quantization_of(ck.config or config.raw)):
        method_of(quantised)
    mtp = max(config.mtp_num_hidden_layers, 1) if any(name.startswith("mtp.") for name in ck.names()) else 0
    vision = _vision_config(ck, config)
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
            if len(problems) == ENOUGH:
                break
            known.update(ck.expert_names(name), (s.name for s in ck.modules.get(split_role(name)[0], {}).values()))
    for name in () if len(problems) == ENOUGH else ck.tensors.keys() - known:
        if not any(fnmatchcase(name, pattern) for pattern in (*CACHE_SCALES, "" if vision else "visual.*")):
            where, found = ck.stored(name).where, ck.stored(name)
            problems.append(Qwen35Error("a tensor that is not expected", where=where, expected="none", found=found))
    if len(problems) == 1:
        raise problems[0]
    if problems:
        lines = [f"{p.where}: {p.what} (expected {p.expected}, found {p.found})" for p in problems]
        alike = Counter(re.sub(r"\d+", "#", line) for line in lines)  # hundreds of experts, in which all is the same
        first = {re.sub(r"\d+", "#", line): line for line in reversed(lines)}
        lines = [first[kind] + (f", and {n - 1} like it" if n > 1 else "") for kind, n in alike.items()]
        more = f"\n    and {len(lines) - SHOWN} other things" if len(lines) > SHOWN else ""
        raise Qwen35Error(
            f"{len(problems)} things in the checkpoint do not fit its configuration",
            where=ck.path,
            expected="the tensors that config.json implies, and no others",
            found="".join(f"\n    {line}" for line in lines[:SHOWN]) + more,
        )


def _vision_config(ck: Checkpoint, config: Config) -> VisionConfig | None:
    raw = config.raw.get("vision_config")
    if raw is None or not any(name.startswith("visual.") for name in ck.names()):
        return None
    if not isinstance(raw, Mapping):
        raise Qwen35Error("bad value", where="config.json: vision_config", expected="an object", found=repr(raw)[:200])
    return VisionConfig.from_dict(raw, config.hidden_size)


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
        raise Qwen35Error(
            "this tensor must be a float", where=stored.where, expected=f"BF16 {list(shape)}", found=weight.kind
        )
    return [s.name for role, s in ck.modules[module].items() if role != ".bias"]


def _check_experts(ck: Checkpoint, prefix: str, shape: tuple[int, ...]) -> Iterable[str]:
    E, F, D = shape
    experts = ck.find_experts(prefix)
    if experts.count != E:
        where = experts.weights(0)[0].values.stored.where
        raise Qwen35Error("wrong number of experts", where=where, expected=f"num_experts = {E}", found=experts.count)
    for e in range(1 if experts.fused else E):
        *first, down = experts.weights(e)
        for weight in first:
            _same(weight.values.stored.where, weight.shape, (2 * F // len(first), D))
        _same(down.values.stored.where, down.shape, (D, F))
    return ck.expert_names(prefix)


def _same(where: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise Qwen35Error("wrong shape", where=where, expected=list(expected), found=list(found))


@dataclass(frozen=True)
class Report:
    """What became of every tensor. `unused` should be empty; `aside` was left out on purpose."""

    used: int
    unused: list[str]
    aside: list[str]
    duplicated: list[str]
    ignored: list[str]

    @property
    def complete(self) -> bool:
        return not self.unused and not self.duplicated

    def __str__(self) -> str:
        lines = [f"{self.used} tensors used"]
        for label, names in (
            ("never used", self.unused),
            ("left out on purpose", self.aside),
            ("stored twice", self.duplicated),
            ("files in no index", self.ignored),
        ):
            if names:
                lines.append(f"{len(names)} {label}: {few(names)}")
        return "\n".join(lines)


def report(ck: Checkpoint, aside: Iterable[str] = ("visual.*", "mtp.*")) -> Report:
    """aside: patterns of names that are left out on purpose."""
    unused = sorted(ck.tensors.keys() - ck.used)
    patterns = (*aside, *CACHE_SCALES, *(f"*{role}" for role in BESIDE if role != ".bias"))
    apart = [name for name in unused if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return Report(
        used=len(ck.tensors) - len(unused),
        unused=sorted(set(unused) - set(apart)),
        aside=apart,
        duplicated=[s.where for s in ck.folder.duplicated],
        ignored=[file.name for file in ck.folder.ignored],
    )
