"""From prompts and answers to a verdict: `prepare` computes what is known beforehand, `judge` takes the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ...model.config import Config
from ...numerics.arithmetics import Arithmetic
from ...run.generate import uniform
from ...run.prompt import padded
from ...run.source import WeightSource
from ..diagnose.step_faults import STEP_FAULTS
from ..judge.envelope import legal, with_declared_caches
from ..judge.routing import Routing, compare_ids
from ..judge.split_k import samples
from ..judge.where import HERE, Where
from .answer import FAR, UNKNOWN, Answer, Row, shaped
from .hypotheses import placed_faults
from .judge import AFTER_TEMPERATURE, Judge, Positions
from .replay import Branch, Replay
from .verdict import Told, Verdict, decide, told

MORE = 4  # legal arithmetics besides those of the envelope: their products in other orders
FEWEST_POSITIONS = 16  # positions of generated tokens that are worth a truth of their own
FLIPS_ALLOWED = 3  # of experts, in a layer
GIVEN = 20  # likeliest tokens that a server is asked for


@dataclass(frozen=True)
class How:
    """arithmetic  of the truth
    engine      the arithmetic that the server says it has ("float32": the legal ones are then those of float32, and
                nearly everything is visible);  kv_cache, state: the formats that it says its caches have
    faults      hypotheses in `all` layers at once, `each` layer too, or `none`
    more        legal arithmetics besides those of the envelope
    """

    arithmetic: str = "exact"
    engine: str | Arithmetic | None = None
    kv_cache: str | None = None
    state: str | None = None
    faults: str = "each"
    more: int = MORE
    where: Where = HERE


@dataclass
class Prepared:
    """Truth, `members` legal arithmetics and hypotheses on prompts `ids`, computed and waiting for answers."""

    ids: list[list[int]]
    replay: Replay
    branches: list[Branch]
    members: int

    def expect(self, top: int = GIVEN) -> Judge:
        """The tests as they will be once a server tells the prompts' tokens and the `top` likeliest."""
        config = self.replay.config
        rows = [(b, t) for b, known in enumerate(self.ids) for t in range(len(known) - 1)]
        sequence, place = (torch.tensor(x) for x in zip(*rows, strict=True))
        given = torch.tensor([self.ids[b][t + 1] for b, t in rows])[:, None]
        k = min(top, config.vocab_size)
        likely = [x.topk(k).indices.cpu() for _, x in self.replay.log_p(self.branches[0], (sequence, place))]
        ids = torch.cat((given, torch.cat(likely)), 1)
        known = torch.ones_like(ids, dtype=torch.bool)
        known[:, 1:] &= ids[:, 1:] != given
        return Judge(self.replay, self.branches, self.members, Positions(sequence, place, ids, known))

    def judge(self, answers: Sequence[Answer]) -> Verdict:
        """The verdict. Raises Qwen35Error where the answers are of other tokens, or of another model.

        What the generated tokens say comes from other kernels and from cached states. Their truth is computed now: they
        were not known before. Only faults of counting their positions are replayed on them.
        """
        asked, again, longer = self._parts([self._completed(a) for a in answers])
        verdict, found = self._judged(asked)
        if (warm := _warm(verdict, asked)) and all(a.engine == "openai" and a.routed is None for a in asked):
            verdict.finding, verdict.why = "cannot tell without a dump", f"the differences {warm}"
        if found.whole is not None:
            at, log_p = found.whole
            off = (log_p - self.replay.gather(self.branches[0], at.rows, at.ids)).abs()[at.known]
            verdict.evidence.append(f"all {len(off)} log p told: |delta| median {float(off.median()):.2g}, largest "
                                    f"{float(off.max()):.2g}")  # fmt: skip
        if again:
            verdict.add("asked again", self._judged([replace(a, routed=None) for a in again])[0])
        count = sum(len(a.rows) for a in longer)
        if count >= FEWEST_POSITIONS:
            r, tables = self.replay, [b.table for b in self.branches[1 : self.members + 1]]
            ids = [a.ids for a in longer]
            replay = Replay(r.source, r.fused, *_rows(ids), r.where, before=r)
            counted = self._counted_wrongly(ids, replay.positions)
            branches = replay.run(self.branches[0].table, tables, [], counted)
            decode = Prepared(ids, replay, branches, self.members)._judged(longer)[0]
            if warm := _warm(decode, longer):
                verdict.notes.append(f"{count} generated tokens are not judged: they {warm}")
            else:
                verdict.add("in decode", decode)
        elif count:
            verdict.notes.append(f"{count} generated tokens are not judged: {FEWEST_POSITIONS} are worth it")
        return verdict

    def _counted_wrongly(self, ids: Sequence[Sequence[int]], right: Tensor) -> dict[str, Tensor]:
        """Hypotheses of decode alone: generated tokens at wrong positions [B, T], which may move log p too little for
        quantiles. ids: prompts and what was generated; right: the positions."""
        found = dict[str, Tensor]()
        for fault in STEP_FAULTS:
            if fault.shift and not fault.needs:
                found[fault.name] = right.clone()
                for row, one in zip(found[fault.name], ids, strict=True):
                    n = max(len(p) for p in self.ids if list(one[: len(p)]) == p)
                    row[n:] += fault.shift(n, 0)
        return found

    def _completed(self, answer: Answer) -> Answer:
        """The answer with the tokens that it does not tell (vLLM's first), where the prompts leave no choice."""
        open_ = [i for i, said in enumerate(answer.ids) if said == UNKNOWN]
        fits = [p for p in self.ids if all(a in (b, UNKNOWN) for a, b in zip(answer.ids, p, strict=False))]
        if not open_ or len({tuple(p[i] for i in open_ if i < len(p)) for p in fits}) != 1:
            return answer
        longest = max(fits, key=len)
        ids = [longest[i] if i < len(longest) and a == UNKNOWN else a for i, a in enumerate(answer.ids)]
        return replace(answer, ids=ids)

    def _judged(self, answers: Sequence[Answer]) -> tuple[Verdict, Told]:
        found = told(answers, self.ids, self.replay.config.vocab_size)
        width = self.replay.ids.shape[1]
        wrong, said = judge_routing(answers, self.ids, width, self.branches, self.members)
        verdict = decide(Judge(self.replay, self.branches, self.members, found.at), found, wrong)
        verdict.evidence += said
        return verdict, found

    def _known(self, ids: list[int]) -> int:
        """How many tokens are those of a prompt, which may begin as another one does; all where no prompt is whole."""
        shares = [next((i for i, (a, b) in enumerate(zip(ids, p, strict=False)) if a != b), min(len(ids), len(p)))
                  for p in self.ids]  # fmt: skip
        whole = any(n == len(p) for n, p in zip(shares, self.ids, strict=True))
        return max(shares) if whole else len(ids)

    def _parts(self, answers: Sequence[Answer]) -> tuple[list[Answer], list[Answer], list[Answer]]:
        """What is told of prompts for the first time, what is told again (of the same tokens, perhaps from a cache),
        and what comes after the first generated token."""
        seen = set[tuple[int, int]]()
        parts: tuple[list[Answer], list[Answer], list[Answer]] = [], [], []
        for answer in answers:
            n = self._known(answer.ids)
            before = [*accumulate(answer.ids, lambda h, i: hash((h, i)), initial=0)]
            rows: tuple[list[Row], list[Row], list[Row]] = [], [], []
            for row in (r for r in answer.rows if r.place > 0 and (r.log_p or r.place <= n)):
                key = row.place, before[row.place]
                rows[2 if row.place > n else 1 if key in seen else 0].append(row)
                seen |= {key} if row.log_p else set()
            for kept, some in zip(parts, rows, strict=True):
                if some or kept is parts[0]:
                    kept.append(replace(answer, rows=some))
        return parts


def _warm(verdict: Verdict, answers: Sequence[Answer]) -> str:
    """What a verdict against the engine comes from, if it is a temperature that may have been asked for."""
    name = verdict.alike[0].name if verdict.alike else ""
    if not name.startswith(AFTER_TEMPERATURE) or not any(a.warm for a in answers):
        return ""
    return f"look like {name}, and no request says 0 or 1: ask with one of these, and save the requests"


def prepare(
    source: WeightSource, fused: Sequence[bool], ids: Sequence[Sequence[int]], how: How | None = None
) -> Prepared:
    how = how or How()
    tables = list(legal(how.arithmetic, how.engine))
    tables += with_declared_caches(tables, how.kv_cache, how.state)
    tables += samples(tables, how.more) if tables[0].name != "float32" else []
    listed = placed_faults(source, how.faults, a4=how.arithmetic.startswith("exact+a4"))
    said = {"attn": how.kv_cache, "gdn": how.state}
    listed = [h for h in listed if not (h.fault.rounds and said.get(h.fault.block))]
    replay = Replay(source, fused, *_rows(ids), how.where)
    return Prepared([*map(list, ids)], replay, replay.run(how.arithmetic, tables, listed), len(tables))


def _rows(ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    return padded([torch.tensor(list(one)) for one in ids])


def ordinary(config: Config) -> int:
    """The number of ordinary tokens. Special tokens and rows that pad the vocabulary come after them."""
    text: dict[str, Any] = config.raw.get("text_config", config.raw)
    found = [v for part in (config.raw, text) for k, v in part.items() if k.endswith("_token_id")]
    flat = [i for v in found for i in (v if isinstance(v, list) else [v])]
    special = [i for i in flat if type(i) is int and config.vocab_size // 2 <= i < config.vocab_size]
    return min([*special, config.vocab_size - 1])


def drawn_prompts(config: Config, prompts: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """`prompts` lists of `tokens` ids, uniform over the ordinary ones: id = floor(u(seed, place) n)."""
    n = ordinary(config)
    return [[int(uniform(seed, p * tokens + t) * n) for t in range(tokens)] for p in range(prompts)]


def judge_routing(
    answers: Sequence[Answer], ids: Sequence[Sequence[int]], width: int, branches: Sequence[Branch], members: int
) -> tuple[list[str], list[str]]:
    """(what speaks against the engine, what else to say). `width`: T of the padded prompts; `branches`: the truth's and
    `members` legal ones.

    The experts are judged as those of a dump: as sets; a flip within the noise of the logits is legal. The noise is
    what the legal arithmetics make of a router logit of that token by then, flips in the layers before among it. Those
    move logits by more than a few runs show. So a layer counts as wrong only if it has more illegal flips than FAR
    times what a legal arithmetic has when it is judged by the others, and FLIPS_ALLOWED besides.
    """
    truth = branches[0].routing
    picked, theirs = list[int](), list[Tensor]()
    for answer in answers:
        fits = [b for b, known in enumerate(ids) if answer.ids[: len(known)] == list(known)]
        b = max(fits, key=lambda b: len(ids[b]), default=None)
        if answer.routed is not None and b is not None:
            A = truth[0][1].shape[-1]
            found = shaped(answer.routed, len(truth), A, f"{answer.engine}: routed_experts")
            n = min(len(ids[b]), len(found))
            picked += range(b * width, b * width + n)
            theirs.append(found[:n])
    if not picked:
        return [], []
    rows, engine = torch.tensor(picked), torch.cat(theirs)
    wrong, flips, total = list[str](), 0, 0
    for i, (logits, chosen) in enumerate(truth):
        ours = logits.flatten(0, -2)[rows]
        legal = [b.routing[i] for b in branches[1 : members + 1]]
        off = torch.stack([(x.flatten(0, -2)[rows] - ours).abs().amax(1) for x, _ in legal])
        sets = chosen.flatten(0, -2)[rows]
        result = compare_ids(sets, engine[:, i], ours, off.amax(0), i)
        others = [
            compare_ids(sets, x.flatten(0, -2)[rows], ours, torch.cat((off[:m], off[m + 1 :])).amax(0), i)
            for m, (_, x) in enumerate(legal)
        ]
        flips, total = flips + len(result.flips), total + result.tokens
        most = max(_illegal(r) for r in others)
        if _illegal(result) > FAR * most + FLIPS_ALLOWED:
            wrong.append(f"layer {i}: {_illegal(result)} of {result.tokens} sets of experts are none that rounding "
                         f"makes (legal arithmetics: {most})")  # fmt: skip
    return wrong, [f"experts: {total - flips} of {total} sets as the truth's"]


def _illegal(r: Routing) -> int:
    return len(r.illegal) + r.nonsense
