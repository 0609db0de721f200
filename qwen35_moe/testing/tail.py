"""The ends of the model: the draft step, and the log-probabilities of tokens."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch.func import functional_call

from ..model.cache import LayerState
from ..model.config import FULL
from ..model.norms import rms_norm
from ..model.ops import linear, promote
from ..model.rope import rotary_angles
from ..model.text import Layer
from .case import Case, Inputs, Outputs, by, on, out
from .drawn import config_of, drawn, hidden, matrix

DRAFT_FC, DRAFT_OUTPUT, CHOSEN_LOG_P = "mtp_fc", "final_norm", "log_p"
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

    def compute(i: Inputs, raw: bool = False) -> Outputs:
        embeds = i["embeds"] if raw else rms_norm("mtp_embedding", i["embeds"], i["embedding_norm"], eps)
        states = rms_norm("mtp_hidden", i["hidden"], i["hidden_norm"], eps)
        return {DRAFT_FC: linear(DRAFT_FC, torch.cat((embeds, states), -1), i["fc"])}

    wrong = {
        "hidden state first": on(lambda w: w.roll(w.shape[1] // 2, 1), "fc"),
        "draft norms without 1 +": on(lambda w: w - 1, *DRAFT_NORMS),
        "embedding not normalised": by(partial(compute, raw=True)),
        "embedding of token t": on(lambda x: x.roll(1, 0), "embeds"),
        "hidden state of token t+1": on(lambda x: x.roll(-1, 0), "hidden"),
    }
    return Case(f"draft-{model}-{tokens}", (DRAFT_FC,), make, compute, wrong, config=config)


def draft_layer_case(model: str = "tiny", tokens: int = 41, seed: int = 0) -> Case:
    """The rest of a draft step: its layer (attention with an output gate, and the experts with a fused shared one) and
    its final norm. `x` [1, T, D], which is what `draft_case` returns, `position_ids` [1, T], and the weights under the
    names of the checkpoint, below `mtp.layers.0` and `mtp` -> `final_norm` [1, T, D].

    All of it is decoded at once: for small models.
    """
    config = config_of(model)
    with torch.device("meta"):
        layer = Layer(config, FULL, fused=True)
    shapes = {name: tuple(x.shape) for name, x in layer.named_parameters()} | {"norm.weight": (config.hidden_size,)}

    def make() -> Inputs:
        gains = {n: drawn(seed, n, *shape, spread=0.25) for n, shape in shapes.items() if len(shape) == 1}
        weights = {n: matrix(seed, n, *shape) for n, shape in shapes.items() if len(shape) > 1}
        weights["mlp.gate.weight"] *= 4  # few choices of experts within rounding of each other
        x = hidden(seed, "x", tokens, config.hidden_size)[None]
        return {"x": x, "position_ids": torch.arange(tokens)[None], **gains, **weights}

    def compute(i: Inputs) -> Outputs:
        angles = rotary_angles(config, i["position_ids"], i["x"].dtype)
        held = {name: i[name] for name in shapes if name != "norm.weight"}
        h_BTD = functional_call(layer, held, (i["x"], angles, None, LayerState()))
        return {DRAFT_OUTPUT: rms_norm(DRAFT_OUTPUT, h_BTD, i["norm.weight"], config.rms_norm_eps)}

    gains, down = [name for name in shapes if name.endswith("norm.weight")], "mlp.experts.down_proj"
    wrong = {
        "draft norms without 1 +": on(lambda w: w - 1, *gains),
        "gain of the final norm left out": on(torch.zeros_like, "norm.weight"),
        "attention left out of the draft": on(torch.zeros_like, "self_attn.o_proj.weight"),
        "experts left out of the draft": on(torch.zeros_like, down),
        "shared expert dropped": on(lambda w: torch.cat((w[:-1], 0 * w[-1:])), down),
        "positions of the draft all 0": on(torch.zeros_like, "position_ids"),
    }
    return Case(f"draft_layer-{model}-{tokens}", (DRAFT_OUTPUT,), make, compute, wrong, config=config)


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

    wrong = {
        "temperature ignored": on(torch.ones_like, "temperature"),
        "temperature multiplied": on(lambda t: 1 / t, "temperature"),
        "log of base 2": out(CHOSEN_LOG_P, lambda y, _: y / math.log(2)),
        "probability, not its log": out(CHOSEN_LOG_P, lambda y, _: y.exp()),
        "logits of the next row": on(lambda x: x.roll(-1, 0), "logits"),
        "logits not normalised": out(
            CHOSEN_LOG_P, lambda _, i: (i["logits"] / i["temperature"]).gather(-1, i["ids"][:, None])[:, 0]
        ),
    }
    return Case(f"log_p-{vocabulary}-{tokens}", (CHOSEN_LOG_P,), make, compute, wrong)
