"""The ends of the model: the draft step, and the log-probabilities of tokens."""

from __future__ import annotations

import math

import torch

from ..model.norms import rms_norm
from ..model.ops import linear, promote
from .case import Case, Inputs, Outputs, WrongKernel, on
from .drawn import config_of, drawn, hidden, matrix

DRAFT_FC, CHOSEN_LOG_P = "mtp_fc", "log_p"
DRAFT_NORMS = ("embedding_norm", "hidden_norm")


def draft_case(model: str = "tiny", tokens: int = 41, seed: int = 0) -> Case:
    """What a draft step feeds to its layer: fc([norm(embedding of token t+1); norm(h_t)]), both norms with 1 + w:
    `embeds`, `hidden` [T, D], `embedding_norm`, `hidden_norm` [D], `fc` [D, 2 D] -> `mtp_fc` [T, D]."""
    config = config_of(model)
    D, eps = config.hidden_size, config.rms_norm_eps

    def make() -> Inputs:
        norms = {name: drawn(seed, name, D, spread=0.25) for name in DRAFT_NORMS}
        states = {"embeds": drawn(seed, "embeds", tokens, D), "hidden": hidden(seed, "hidden", tokens, D)}
        return {**states, **norms, "fc": matrix(seed, "fc", D, 2 * D)}

    def compute(i: Inputs) -> Outputs:
        embeds = rms_norm("mtp_embedding", i["embeds"], i["embedding_norm"], eps)
        states = rms_norm("mtp_hidden", i["hidden"], i["hidden_norm"], eps)
        return {DRAFT_FC: linear(DRAFT_FC, torch.cat((embeds, states), -1), i["fc"])}

    def raw_embedding(i: Inputs) -> Outputs:
        states = rms_norm("mtp_hidden", i["hidden"], i["hidden_norm"], eps)
        return {DRAFT_FC: torch.cat((i["embeds"], states), -1) @ i["fc"].T}

    wrong = (
        WrongKernel("hidden state first", on(lambda w: w.roll(w.shape[1] // 2, 1), "fc")),
        WrongKernel("draft norms without 1 +", on(lambda w: w - 1, *DRAFT_NORMS)),
        WrongKernel("embedding not normalised", compute=raw_embedding),
        WrongKernel("embedding of token t", on(lambda x: x.roll(1, 0), "embeds")),
        WrongKernel("hidden state of token t+1", on(lambda x: x.roll(-1, 0), "hidden")),
    )  # fmt: skip
    return Case(f"draft-{model}-{tokens}", (DRAFT_FC,), make, compute, wrong=wrong, config=config)


def log_p_case(vocabulary: int = 1000, tokens: int = 41, temperature: float = 0.7, seed: int = 0) -> Case:
    """log softmax(logits / temperature) at the ids: `logits` [T, V] float32, `ids` [T], `temperature` [] -> `log_p`
    [T]. Engines compute it in float32."""

    def make() -> Inputs:
        logits = drawn(seed, "logits", tokens, vocabulary, spread=3.0, dtype=torch.float32)
        ids = logits.argsort(-1, descending=True)[torch.arange(tokens), torch.arange(tokens) % 7]
        return {"logits": logits, "ids": ids, "temperature": torch.tensor(temperature)}

    def compute(i: Inputs) -> Outputs:
        log_p = (promote(i["logits"]) / i["temperature"]).log_softmax(-1)
        return {CHOSEN_LOG_P: log_p.gather(-1, i["ids"][:, None])[:, 0]}

    wrong = (
        WrongKernel("temperature ignored", on(torch.ones_like, "temperature")),
        WrongKernel("temperature multiplied", on(lambda t: 1 / t, "temperature")),
        WrongKernel("log of base 2", outputs=lambda o, i: {CHOSEN_LOG_P: o[CHOSEN_LOG_P] / math.log(2)}),
        WrongKernel("probability, not its log", outputs=lambda o, i: {CHOSEN_LOG_P: o[CHOSEN_LOG_P].exp()}),
        WrongKernel("logits of the next row", on(lambda x: x.roll(-1, 0), "logits")),
        WrongKernel("logits not normalised", outputs=lambda o, i: {
            CHOSEN_LOG_P: (i["logits"] / i["temperature"]).gather(-1, i["ids"][:, None])[:, 0]}),
    )  # fmt: skip
    return Case(f"log_p-{vocabulary}-{tokens}", (CHOSEN_LOG_P,), make, compute, wrong=wrong)
