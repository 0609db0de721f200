"""An engine's dump, whatever its format: pieces as they were written, joined and split into our taps when asked for.

A reader (readers/) turns files into `Piece`s: one tensor each, with the engine's name, its step and rank, and a way to
load it. `Dump` finds out which taps they hold (`engine_names`), joins ranks, splits fused columns and gives each tap as
rows: one row a token of that step, features flattened. Nothing is loaded before it is asked for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import Qwen35Error
from ...numerics.tap_keys import base_name, by_rows, is_vision, per_token
from ...numerics.tap_table import TAPS
from .engine_names import TapRule, letters, rule_for
from .kinds import fused_layers, mark_drafts
from .pieces import Piece, Source, StepTokens, fenced, readable, whole_numbers
from .ranks import by_row, check_ranks, join_ranks, joining, world_of

MOST_STEPS = 1 << 31
# The tap that a name means if the shared expert is one more slot (True), and if it is not (False).
MEANING: dict[tuple[str, bool | None], str] = {
    ("moe_routed_output", True): "mlp_output",
    ("moe_slot_ids", False): "moe_topk_ids",
    ("moe_slot_weights", False): "moe_topk_weights",
}


class Dump(Mapping[str, Tensor]):
    """Mapping of tap key -> rows [tokens of all steps, features].

    format, path     what was recognised, where
    tokens           step -> Tokens, as far as the dump holds them
    problems         what is wrong with the dump, as Qwen35Errors that were not raised, in the order of discovery
    notes            what was assumed or repaired
    unknown          names of tensors that have no meaning here
    draft_ids        one [B, T] a draft of a chain: the ids that it started from, where one of our traces is the dump
    accepted         step -> tokens of the prompt, and how often 0, 1, ... drafts were accepted, if a server says so
    absent           sequences that cannot be compared, since the dump lacks their first ids, in words
    weights          name -> piece, for parameters that were dumped
    drafts           steps of a draft head -> number of the draft (taps of the first are under `mtp`, then `mtp.2`, ...)
    fused            (part, layer) -> whether `mlp.experts.output` is the block's output; None: the files do not say
    sources          key of a tap -> step -> the pieces that hold it, and the rule that reads them
    """

    def __init__(
        self, format: str, path: str | Path, pieces: Sequence[Piece], tokens: Mapping[int, StepTokens] | None = None,
        problems: Sequence[Qwen35Error] = (), notes: Sequence[str] = (), family: str = "sglang",
        config: Mapping[str, Any] | None = None, weights: Mapping[str, Piece] | None = None,
    ):  # fmt: skip
        self.format, self.path, self.family = format, Path(path), family
        self.problems, self.notes = list(problems), list(notes)
        if far := [piece for piece in pieces if not 0 <= piece.step < MOST_STEPS]:
            expected = f"0 to {MOST_STEPS - 1}"
            self.problems.append(Qwen35Error("no such step", where=far[0].where or far[0].raw, expected=expected,
                                             found=far[0].step))  # fmt: skip
            pieces = [piece for piece in pieces if 0 <= piece.step < MOST_STEPS]
        found = (tokens or {}).items()
        self.tokens = {step: readable(x, f"{path}: tokens of step {step}", self.problems) for step, x in found}
        self.config, self.sizes = config, letters(config)
        self.weights = dict(weights or {})
        self.unknown: list[str] = []
        self.absent: list[str] = []
        self.draft_ids: list[Tensor] = []
        self.accepted: dict[int, tuple[int, list[int]]] = {}
        self.sources: dict[str, dict[int, Source]] = defaultdict(dict)
        self._counts: dict[int, int | None] = {}
        self.world = 0  # how many ranks there were; 0: not looked for yet
        self._dtypes: dict[tuple[str, int], torch.dtype] = {}
        for some, as_bytes in ((pieces, False), (self.weights.values(), True)):
            for piece in some:
                piece.load = partial(fenced, piece.load, piece.where or piece.raw, as_bytes)
        self.drafts = mark_drafts(pieces, config)
        self.fused = {} if family == "transformers" else fused_layers(pieces, self.sizes, named=format != "atom")
        for pieces_of_one in _groups(pieces).values():
            self._place(sorted(pieces_of_one, key=lambda p: p.rank))
        self.sources = dict(self.sources)
        if count := sum(fused is True for fused in self.fused.values()):
            self.notes.append(f"shared expert is fused in {count} layers: mlp.experts.output is mlp_output there")

    def _place(self, pieces: list[Piece]) -> None:
        first = pieces[0]
        if first.key:
            found: tuple[TapRule, int] | None = (TapRule("same", ((base_name(first.key), ""),)), 0)
        else:
            tower = first.part == "visual"
            whole = not tower and first.layer is None and first.path.startswith(("output", "inputs"))  # of the model
            found = rule_for(f"model.{first.path}" if whole else first.path, "vision" if tower else self.family)
        if found is None:
            self.unknown += [first.raw] if first.raw not in self.unknown else []
            return
        rule, preference = found
        for name in dict.fromkeys(name for name, _ in rule.blocks if name != "-"):
            tap = MEANING.get((name, self.fused.get((first.part, first.layer))), name)
            layer = "" if first.layer is None else f"layers.{first.layer}."
            key = first.key or f"{first.part + '.' if first.part else ''}{layer}{tap}"
            known = self.sources[key].get(first.step)
            if known is None or preference < known.preference:
                blocks = tuple((tap if n == name else n, w) for n, w in rule.blocks)
                self.sources[key][first.step] = Source(pieces, TapRule(rule.join, blocks), preference)

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)

    def __contains__(self, key: object) -> bool:
        return key in self.sources

    def __repr__(self) -> str:
        return f"Dump({self.format}, {len(self)} taps, steps {self.steps}, {len(self.problems)} problems)"

    @property
    def steps(self) -> list[int]:
        return sorted({step for steps in self.sources.values() for step in steps})

    @property
    def target_steps(self) -> list[int]:
        """Without those of a draft head."""
        return [step for step in self.steps if step not in self.drafts]

    def __getitem__(self, key: str) -> Tensor:
        return torch.cat([self.read(key, step) for step in sorted(self.sources[key])])

    def count(self, step: int) -> int | None:
        """How many tokens a step has: from its ids, or else from a tensor that is as wide as the model."""
        if step in self.tokens and self.tokens[step].count is not None:
            return self.tokens[step].count
        if step not in self._counts:
            here = [k for k, steps in self.sources.items() if step in steps and per_token(k)]
            mine = [k for k in here if "logits" not in k] or here
            wide = [k for k in mine if base_name(k) in TAPS and TAPS[base_name(k)].dims.endswith(" d")]
            if not mine:
                return None
            x = self.sources[(wide + mine)[0]][step].pieces[0].load()
            flat = "next_token" in mine[0] or base_name(mine[0]) == "moe_router_logits"
            d = x.shape[-1] if flat and x.dim() else self.sizes.get("d", x.shape[-1])
            self._counts[step] = x.numel() // d if (wide or flat) and d else x.shape[0]
        return self._counts[step]

    def read(self, key: str, step: int) -> Tensor:
        """One tap of one step as rows [tokens, features]; what is not of tokens keeps its shape.

        Partial sums are added in float64. Raises Qwen35Error for files that cannot be read and ranks that do not join.
        """
        source = self.sources[key][step]
        batch = self.tokens[step].batch if step in self.tokens else None
        if base_name(key) in TAPS and TAPS[base_name(key)].dims == "b n t s" and batch is not None:
            x = source.pieces[0].load()  # a token's row: its scores, head by head
            return x.movedim(2, 1).reshape(batch[0] * batch[1], -1)
        if not by_rows(key):
            if len(source.pieces) > 1:
                raise Qwen35Error("ranks of this tap cannot be joined", where=key, do="dump with TP 1, or its dims")
            return source.pieces[0].load()
        self.world = self.world or world_of(self.sources, self.sizes, self.count)
        check_ranks(source, self.world, self.format, self.path)
        join, pieces = joining(source)
        loaded, where = [piece.load() for piece in pieces], pieces[0].where
        self._dtypes[key, step] = loaded[0].dtype
        if base_name(key).endswith("_ids"):
            loaded = [whole_numbers(x, where) for x in loaded]
        elif not loaded[0].is_floating_point():
            found, do = str(loaded[0].dtype), "dump what its codes mean, or the tensor before it is quantised"
            raise Qwen35Error("integers where values were expected", where=where, found=found, do=do)
        if is_vision(key):  # patches; batches of one are left over in front of them, or behind
            loaded = [x.squeeze(0).squeeze(1) if x.dim() == 3 else x for x in loaded]
        count = None if pieces[0].rows is not None or is_vision(key) else self.count(step)
        return join_ranks(key, [by_row(x, count) for x in loaded], join, source.rule.blocks, self.sizes)

    def width(self, key: str) -> int | None:
        """Features of a tap, as its first step has them; None where that cannot be read."""
        try:
            return self.read(key, min(self.sources[key])).shape[-1]
        except Qwen35Error:
            return None

    def keep_fused(self) -> None:
        """If the model's sizes are not known, fused columns of one rank stay together, under the first tap's name."""
        for key, steps in list(self.sources.items()):
            for step, source in list(steps.items()):
                names = [name for name, _ in source.rule.blocks]
                digits = all(w.isdigit() for _, w in source.rule.blocks)
                if self.sizes or digits or len(set(names)) == 1 or len(source.pieces) > 1:
                    continue
                if base_name(key) == names[0]:
                    steps[step] = replace(source, rule=TapRule(source.rule.join, ((names[0], ""),)))
                else:
                    del steps[step]
            if not steps:
                del self.sources[key]

    def rename(self, key: str, new: str) -> None:
        """Give a tap another key."""
        for step, source in self.sources.pop(key).items():
            blocks = tuple((base_name(new) if n == base_name(key) else n, w) for n, w in source.rule.blocks)
            renamed = replace(source, rule=TapRule(source.rule.join, blocks))
            self.sources.setdefault(new, {}).setdefault(step, renamed)

    def dtype(self, key: str, step: int | None = None) -> torch.dtype:
        """The dtype that the engine wrote."""
        step = min(self.sources[key]) if step is None else step
        if (key, step) not in self._dtypes:
            self._dtypes[key, step] = self.sources[key][step].pieces[0].load().dtype
        return self._dtypes[key, step]


def _groups(pieces: Sequence[Piece]) -> dict[tuple[Any, ...], list[Piece]]:
    """Pieces of one value: same step, layer and name, one a rank. If a value was written twice, the first counts;
    the vision tower's are joined, since it runs for one image after another, or for images and then for videos."""
    groups: dict[tuple[Any, ...], dict[int, list[Piece]]] = {}
    for p in pieces:
        groups.setdefault((p.step, p.part, p.layer, p.path, p.key), {}).setdefault(p.rank, []).append(p)
    return {name: [_one_after_another(same) for same in ranks.values()] for name, ranks in groups.items()}


def _one_after_another(pieces: Sequence[Piece]) -> Piece:
    if len(pieces) == 1 or pieces[0].part != "visual":
        return pieces[0]
    return replace(pieces[0], load=lambda: torch.cat([p.load().flatten(0, -2) for p in pieces]))
