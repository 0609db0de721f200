"""Greedy and sampled continuations, log-probabilities of an engine's tokens, and speculative decoding.

Probabilities are a float64 softmax of the logits that the model's arithmetic gives. The token at place n of a
continuation depends on the logits before it, on the settings and on one number u(seed, n) of an integer hash, neither
on a library's random generator nor on whether a draft was right. So a continuation can be repeated anywhere, and
speculation changes only its speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..model.cache import Cache
from ..model.mtp import draft, greedy, with_hidden
from ..model.text import Model
from ..numerics.taps import attached
from .gpu.graphs import DecodeGraph, can_capture
from .origin import was_left_out

Prompt = Tensor | Sequence[int] | Mapping[str, Tensor]
SCORED_AT_ONCE = 256  # tokens whose logits are held at a time
ROOM = 1024  # a graph holds up to the next multiple of so many tokens; the last bits depend on it


@dataclass(frozen=True)
class Step:
    """One token. `log_p` and `rank` (how many tokens are likelier) are the model's own, whatever the temperature."""

    id: int
    log_p: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens and their log p; of equals, the lower id first
    drafted: bool = False  # the draft head had it right

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. temperature 0: the likeliest (of equals, the lowest id).

    Otherwise from softmax(logits / temperature), cut to the `top_k` likeliest (0: all), and then, normalised again, to
    the likeliest that together reach `top_p` (at least one). The remaining tokens are sorted by id, and the first whose
    cumulated probability exceeds u(seed, n) is taken. Order of the cuts as in transformers and vLLM.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
        ):
            if not ok:
                raise Qwen35Error("bad value", where=f"Sampling.{name}", expected=expected, found=vars(self)[name])

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """The distribution [V] that a token is drawn from, for a temperature above 0."""
        p_V = (logits_V.to(torch.float64) / self.temperature).softmax(-1)
        p, order = p_V.sort(descending=True, stable=True)
        if self.top_k:
            p[self.top_k :] = 0
        p = p / p.sum()
        p[1:][p.cumsum(0)[:-1] >= self.top_p] = 0
        return torch.zeros_like(p_V).scatter(0, order, p / p.sum())

    def choose(self, logits_V: Tensor, place: int) -> int:
        """The token at `place` (0, 1, ...) of the continuation."""
        if not self.temperature:
            return int(greedy(logits_V))
        below_V = self.probabilities(logits_V).cumsum(0)
        return int((below_V / below_V[-1] > uniform(self.seed, place)).to(torch.uint8).argmax())


def uniform(seed: int, n: int) -> float:
    """u(seed, n) in [0, 1): the upper 53 bits of splitmix64's n-th output, started at a hash of the seed.

    Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"; constants as in Java's.
    """
    mask = 2**64 - 1

    def mixed(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    step = 0x9E3779B97F4A7C15
    return (mixed(mixed(seed * step & mask) + (n + 1) * step & mask) >> 11) / 2**53


def describe(logits_V: Tensor, token: int, top: int = 0, drafted: bool = False) -> Step:
    """The record of one token, given the logits that it was (or could have been) chosen from."""
    if top < 0:
        raise Qwen35Error("bad value", where="top", expected="0 or more", found=top)
    log_p_V = logits_V.to(torch.float64).log_softmax(-1)
    if log_p_V[token].isnan():
        do = "`qwen35-moe trace` names the first tap that holds one"
        raise Qwen35Error("logits hold NaN, or infinity", where=f"those of token {token}", do=do)
    values, ids = log_p_V.sort(descending=True, stable=True) if top else (log_p_V[:0], log_p_V[:0])
    likeliest = tuple(zip(ids[:top].long().tolist(), values[:top].tolist(), strict=True))
    rank = int((log_p_V > log_p_V[token]).sum())
    return Step(token, log_p_V[token].item(), rank, likeliest, drafted)


def generate(
    model: Model,
    prompt: Prompt,
    max_new_tokens: int = 20,
    sampling: Sampling | None = None,
    stop: Sequence[int] = (),
    top: int = 0,
    drafts: int = 0,
) -> Iterator[Step]:
    """Continues one sequence and yields each token as soon as it is known.

    prompt: ids, or what `embed_prompt` gives. stop: ids after which to end (the stop token is handed out too).
    top: how many alternatives to record. drafts: let the model's own draft head guess so many tokens ahead and verify
    them in one pass. The same tokens come out: a draft counts only if it is what would have been chosen. (In an
    arithmetic that rounds, a pass over several tokens may round differently from single ones, here as in engines.)
    On a GPU tokens come from a graph where one can be captured (`graphs.can_capture`); while taps are attached its
    steps run one operation after the other, to the same bits.
    """
    sampling = sampling or Sampling()
    choose = sampling.choose
    if max_new_tokens < 0 or drafts < 0:
        found = (max_new_tokens, drafts)
        raise Qwen35Error("bad value", where="max_new_tokens, drafts", expected="0 or more", found=found)
    drafts = min(drafts, max_new_tokens)
    tokens = _speculate(model, prompt, choose, drafts) if drafts else _one_by_one(model, prompt, choose)
    for logits_V, token, drafted in islice(tokens, max_new_tokens):
        yield describe(logits_V, token, top, drafted)
        if token in stop:
            return


def score(
    model: Model, prompt: Prompt, forced: Sequence[int], top: int = 0, temperature: float = 0.0
) -> Iterator[Step]:
    """The log p of an engine's tokens, each given those before it.

    temperature: above 0, log p are those of softmax(logits / temperature), as engines write them after sampling.
    """
    scale = Sampling(temperature).temperature or 1.0
    cache, forced = Cache(), [int(i) for i in forced]
    logits_TV = model(**_inputs(model, prompt), cache=cache, logits_to_keep=1)[0]
    for start in range(0, len(forced), SCORED_AT_ONCE):
        piece = forced[start : start + SCORED_AT_ONCE]
        ids_BT = torch.tensor([piece], device=logits_TV.device)
        logits_TV = torch.cat((logits_TV[-1:], model(ids_BT, cache=cache)[0]))
        for row_V, token in zip(logits_TV, piece, strict=False):
            yield describe(row_V.to(torch.float64) / scale, token, top)


Chosen = Iterator[tuple[Tensor, int, bool]]  # the logits of each token, the token, whether it was drafted


def _inputs(model: Model, prompt: Prompt) -> dict[str, Tensor]:
    device = model.norm.weight.device
    if not isinstance(prompt, Mapping):
        ids = prompt if isinstance(prompt, Tensor) else torch.tensor([int(i) for i in prompt], dtype=torch.long)
        prompt = {"input_ids": ids[None] if ids.dim() == 1 else ids}
    fed, mask = prompt["inputs_embeds" if "inputs_embeds" in prompt else "input_ids"], prompt.get("attention_mask")
    if fed.shape[0] != 1 or (mask is not None and not mask.all()):
        what, found = "one sequence at a time, without padding", list(fed.shape)
        raise Qwen35Error(what, where="prompt", expected="[1, T]", found=found)
    return {name: x.to(device) for name, x in prompt.items() if name != "attention_mask"}


def _one_by_one(model: Model, prompt: Prompt, choose: Callable[[Tensor, int], int]) -> Chosen:
    cache, place, capturable = Cache(), 0, can_capture(model)
    graph: DecodeGraph | None = None
    logits_BTV = model(**_inputs(model, prompt), cache=cache, logits_to_keep=1)
    while True:
        token = choose(logits_BTV[0, -1], place)
        yield logits_BTV[0, -1], token, False
        ids_BT, place = torch.tensor([[token]], device=logits_BTV.device), place + 1
        if not capturable:
            logits_BTV = model(ids_BT, cache=cache, logits_to_keep=1)
            continue
        unwatched = not attached()  # a graph calls no taps
        if graph is None or graph.full or graph.capture != unwatched:
            cache = cache if graph is None else graph.cache()
            graph = DecodeGraph(model, cache, (cache.length // ROOM + 1) * ROOM, unwatched)
        logits_BTV = graph.step(ids_BT)


def _speculate(model: Model, prompt: Prompt, choose: Callable[[Tensor, int], int], drafts: int) -> Chosen:
    """Each round feeds the last token and its drafts. The states of wrong drafts are dropped.

    A state of DeltaNet cannot be cut back, so the pass runs on a copy of the cache. If a draft was wrong, the tokens
    before it are fed again, to the original.
    """
    if (mtp := model.mtp) is None:
        do = "load without text_only" if was_left_out(model, "mtp") else "generate without drafts"
        raise Qwen35Error("the model has no draft head", where="model.mtp", found=None, do=do)
    cache, draft_cache, inputs = Cache(), Cache(), _inputs(model, prompt)
    logits_BTV, hidden_BTD = with_hidden(model, **inputs, cache=cache, logits_to_keep=1)
    row_V = logits_BTV[0, -1]
    fresh = [choose(row_V, 0)]  # tokens chosen in this round
    yield row_V, fresh[0], False
    first, place = _first_draft(model, inputs, fresh[0]), 1
    while True:
        guesses, _ = draft(model, mtp, hidden_BTD=hidden_BTD, steps=drafts, cache=draft_cache, **first)
        guessed = guesses[0].tolist()
        fed = torch.tensor([[fresh[-1], *guessed]], device=row_V.device)
        trial = cache.clone()
        logits_BTV, hidden_BTD = with_hidden(model, fed, cache=trial)
        fresh = []
        for i, row_V in enumerate(logits_BTV[0]):
            fresh.append(choose(row_V, place))
            right = i < drafts and fresh[-1] == guessed[i]
            yield row_V, fresh[-1], right
            place += 1
            if not right:
                break
        if len(fresh) <= drafts:
            model(fed[:, : len(fresh)], cache=cache, logits_to_keep=1)
            hidden_BTD = hidden_BTD[:, : len(fresh)]
        else:
            cache = trial
        first = {"next_ids": torch.tensor([fresh], device=row_V.device)}


def _first_draft(model: Model, inputs: Mapping[str, Tensor], token: int) -> dict[str, Any]:
    """The prompt for the draft head: the token after each of the prompt's, the last of them just chosen."""
    if "input_ids" in inputs:
        ids_BT = inputs["input_ids"]
        return {"next_ids": torch.cat((ids_BT[:, 1:], ids_BT.new_tensor([[token]])), 1)}
    embeds_BTD, positions = inputs["inputs_embeds"], inputs["position_ids"]
    with torch.inference_mode():
        last_BTD = model.embed_tokens(torch.tensor([[token]], device=embeds_BTD.device)).to(embeds_BTD.dtype)
    return {"next_ids": None, "next_embeds": torch.cat((embeds_BTD[:, 1:], last_BTD), 1), "position_ids": positions}
