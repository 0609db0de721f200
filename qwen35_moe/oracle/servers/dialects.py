"""The requests for each engine, with ids, and how to tell the engines apart.

    engine     its owned_by     path              log p of the prompt
    SGLang     sglang           /generate         in one request, with what is generated
    vLLM       vllm             /v1/completions   in one request, with what is generated
    llama.cpp  llamacpp         /completion       one request a token
    TRT-LLM    tensorrt_llm     /v1/completions   one request a token; only that of the likeliest token has an id
    others     -                /v1/completions   one request a token, if tokens come as "token_id:N"

The temperature is 0: these engines tell log p before temperature. For TRT-LLM that is not known; there it is 1, which
changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...errors import Qwen35Error
from .answer import API_KEY, FAR, NO_LOG_P, Answer, clean, without_key
from .client import Refused, Server
from .readers import from_json

ALL = -1  # of `top`: the whole vocabulary
TOKENS_PER_REQUEST = 24  # generated after each prompt that is told in one request: 8 prompts make 184 decode steps
DECODE_TOKENS = 4  # tokens generated after each prompt: decode steps with as many rows as there are prompts
ASCII = 65  # ids of llama-server's texts are not known; this one is a letter in byte-level vocabularies

Ids = Sequence[int]
Json = dict[str, Any]
Save = Callable[[Json], None]


class Dialect(NamedTuple):
    """body    ids (or lists of ids), tokens to generate, likeliest tokens -> the request
    prompt  likeliest tokens -> what to add, so that the same request tells log p of the prompt; None: no request does
    named   the model's name must be in the request
    """

    owner: str
    path: str
    body: Callable[[Any, int, int], Json]
    prompt: Callable[[int], Json] | None = None
    named: bool = False


def _completion(ids: Any, new: int, top: int) -> Json:
    return {"prompt": ids, "max_tokens": new, "temperature": 0, "logprobs": top, "return_tokens_as_token_ids": True}


DIALECTS = {
    "sglang": Dialect("sglang", "/generate", lambda ids, new, top: {
        "input_ids": ids, "return_logprob": True, "logprob_start_len": -1, "top_logprobs_num": top,
        "sampling_params": {"max_new_tokens": new, "temperature": 0, "ignore_eos": True},
    }, lambda top: {"logprob_start_len": 0}),
    "vllm": Dialect("vllm", "/v1/completions", lambda *asked: {
        **_completion(*asked), "ignore_eos": True, "return_token_ids": True,
    }, lambda top: {"prompt_logprobs": top}, named=True),
    "llama.cpp": Dialect("llamacpp", "/completion", lambda ids, new, top: {
        "prompt": ids, "n_predict": new, "temperature": 0, "n_probs": top, "cache_prompt": True, "return_tokens": True,
    }),
    "trtllm": Dialect("tensorrt_llm", "/v1/completions", lambda ids, new, top: {
        "prompt": ids, "max_tokens": new, "temperature": 1, "top_k": 1, "logprobs": top, "detokenize": False,
        "add_special_tokens": False,
    }, named=True),
    "openai": Dialect("", "/v1/completions", _completion, named=True),
}  # fmt: skip
APIS = tuple(DIALECTS)


class Asker:
    """Asks one server. `save` is handed every {"request", "status", "response"}."""

    def __init__(self, server: Server, api: str, top: int, vocab: int, model: str = "", save: Save = lambda _: None):
        self.server, self.save = server, save
        self.api = detect(server) if api == "auto" else api
        self.dialect = DIALECTS[self.api]
        self.whole = self.dialect.prompt is not None  # log p of a prompt come in one request
        self.top = vocab if top == ALL and self.api != "vllm" else top
        self.model = {"model": model or served(server)} if self.dialect.named else {}

    def ask(self, prompts: Sequence[Ids]) -> Iterator[Answer]:
        """Answers for each prompt, one request each, or one request a token."""
        for ids in prompts:
            yield from self.together([ids], TOKENS_PER_REQUEST) if self.whole else self.grown(ids, 1)

    def together(self, prompts: Sequence[Ids], new: int = 1) -> list[Answer]:
        """All prompts in one request, so that the engine may run them as one batch, and `new` tokens after each."""
        if self.dialect.prompt is None:
            raise Qwen35Error("no batch in one request", where="--batch", found=self.api, expected="sglang or vllm")
        ids = [list(p) for p in prompts] if len(prompts) > 1 else list(prompts[0])
        return self._post(self.dialect.body(ids, new, self.top) | self.dialect.prompt(self.top))

    def grown(self, ids: Ids, step: int) -> Iterator[Answer]:
        """The prompt fed `step` tokens at a time, each request with all tokens before it, which the engine may have
        cached: log p of the next tokens, and not of the prompt, since for those an engine computes everything again."""
        for end in range(step, len(ids), step):
            yield from self._post(self.dialect.body(list(ids[:end]), 1, self.top))

    def _post(self, body: Json) -> list[Answer]:
        try:
            return self._sent(body | self.model)
        except Qwen35Error as error:
            if error.what != NO_LOG_P or self.api != "llama.cpp":
                raise
            # The token ended inside of a character. A bias moves no reported value: those are before samplers.
            return self._sent(body | {"logit_bias": [[ASCII, 1000]]})

    def _sent(self, body: Json) -> list[Answer]:
        path = self.dialect.path
        response = self.server.call(path, body)
        self.save({"request": {"POST": path, **body}, "status": 200, "response": response})
        return from_json(response, f"{self.server.url}{path}", body)


def _tried(server: Server, path: str) -> Json:
    """What is there, if it is an object; a server that is down is an error all the same."""
    with suppress(Refused):
        found = server.call(path)
        return found if isinstance(found, dict) else {}
    return {}


def _models(server: Server) -> list[Json]:
    """What the server says of its models; nothing if it has no such path. Error: it wants another key."""
    try:
        found = server.call("/v1/models")
    except Refused as error:
        if API_KEY in error.do:
            raise
        return []
    entries = found.get("data") if isinstance(found, dict) else None
    return [m for m in entries if isinstance(m, dict)] if isinstance(entries, list) else []


def detect(server: Server) -> str:
    """Which engine answers. Sources: `owned_by` of each; SGLang's /server_info, llama.cpp's /props."""
    models = _models(server)
    owners = {str(m.get("owned_by")) for m in models}
    for api, dialect in DIALECTS.items():
        if dialect.owner and dialect.owner in owners:
            return api
    for path, key, api in (("/server_info", "model_path", "sglang"), ("/get_server_info", "model_path", "sglang"),
                           ("/props", "default_generation_settings", "llama.cpp")):  # fmt: skip
        if key in _tried(server, path):
            return api
    if models:
        return "openai"
    raise Qwen35Error("which engine this is cannot be told", where=server.url, do=f"say --api {' | '.join(APIS)}")


def served(server: Server) -> str:
    """The name of the model that is served: the only one, or an error that lists them."""
    names = [m["id"] for m in _models(server) if isinstance(m.get("id"), str)]
    if len(names) != 1:
        listed = ", ".join(clean(name, 40) for name in names[:8]) or "none"
        raise Qwen35Error("which model shall be asked?", where=server.url, found=listed, do="say --model NAME")
    return names[0]


def saver(path: Path) -> Save:
    """One line a request, at once: what was answered stays when the next request fails."""
    path.write_text("", encoding="utf-8")

    def save(entry: Json) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(without_key(entry)) + "\n")

    return save


@dataclass(frozen=True)
class Bucket:
    """`ratio`: the median over `rows` positions of rms(delta log p) against the lone request, in legal units."""

    name: str
    rows: int
    ratio: float

    @property
    def bad(self) -> bool:
        return self.rows > 0 and not self.ratio <= FAR

    def __str__(self) -> str:
        said = "nothing to compare" if not self.rows else f"{self.ratio:.2f} x the legal difference, {self.rows} rows"
        return f"{self.name}: {said}{'  <-- differs' if self.bad else ''}"


def buckets(asker: Asker, prompt: Sequence[int], sizes: Sequence[int], typical: float) -> list[Bucket]:
    """The same tokens in other batches: alone, n times in one batch, cut to n tokens, fed n at a time, and once more.

    An engine chooses kernels by the number of tokens. A single request does not show a kernel that is wrong for a few
    of these numbers. This needs no truth: an engine is compared with itself. The unit is the difference of two legal
    orders of addition, the root of two times `typical`: the legal error of a position, the median of sigma.
    """
    alone = _rows(asker.together([prompt], DECODE_TOKENS)[0])

    def bucket(name: str, others: Iterable[Answer], start: int = 0, stop: int = 1 << 30) -> Bucket:
        sizes = list[float]()
        for key, log_p in (item for other in others for item in _rows(other, start, stop).items()):
            off = [log_p[i] - x for i, x in alone.get(key, {}).items() if i in log_p]
            if off:
                sizes.append(float(torch.tensor(off, dtype=torch.float64).square().mean().sqrt()))
        ratio = float(torch.tensor(sizes).median()) / (2**0.5 * typical) if sizes else 0.0
        return Bucket(name, len(sizes), ratio)

    found, first = [bucket("once more, perhaps from a cache", asker.together([prompt], DECODE_TOKENS))], len(prompt) + 1
    for n in sizes:
        found.append(bucket(f"{n} tokens alone", asker.together([prompt[:n]], 1)))
        found.append(bucket(f"fed {n} at a time", asker.grown(prompt, n)))
        if n > 1:
            many = asker.together([prompt] * n, DECODE_TOKENS)
            found.append(bucket(f"batch of {n}, prompt", many, 0, first))
            found.append(bucket(f"batch of {n}, decode", many, first))
    return found


def _rows(answer: Answer, start: int = 0, stop: int = 1 << 30) -> dict[tuple[int, ...], dict[int, float]]:
    """log p by the tokens before them, of places from `start` on."""
    return {tuple(answer.ids[: r.place]): r.log_p for r in answer.rows if r.log_p and start <= r.place < stop}
