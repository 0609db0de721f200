"""What is asked of each engine: requests with ids, and how to tell the engines apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...errors import Qwen35Error
from .answer import NO_LOG_P, Answer, clean
from .client import Refused, Server
from .readers import from_json

APIS = ("sglang", "vllm", "llama.cpp", "openai")
ALL = -1  # of `top`: the whole vocabulary
NEW = 8  # tokens generated after each prompt, by engines that tell a prompt's log p in one request
ASCII = 65  # ids of llama-server's texts are not known; this one is a letter in byte-level vocabularies

Ids = Sequence[int]
Save = Callable[[dict[str, Any]], None]


class Asker:
    """Asks one server. `save` is handed every {"request", "status", "response"}."""

    def __init__(self, server: Server, api: str, top: int, vocab: int, model: str = "", save: Save = lambda _: None):
        self.server, self.top, self.vocab, self.model, self.save = server, top, vocab, model, save
        self.api = detect(server) if api == "auto" else api
        if self.api in ("vllm", "openai"):
            self.model = model or served(server)

    def ask(self, prompts: Sequence[Ids]) -> Iterator[Answer]:
        """Answers for each prompt, one request each, or one request a token."""
        for ids in prompts:
            if self.api in ("sglang", "vllm"):
                yield from self.together([ids], NEW)
            else:
                yield from self._one_by_one(ids)

    def together(self, prompts: Sequence[Ids], new: int = 1) -> list[Answer]:
        """All prompts in one request, so that the engine may run them as one batch, and `new` tokens after each."""
        if self.api == "sglang":
            return self._post("/generate", self._sglang(prompts, new))
        if self.api == "vllm":
            return self._post("/v1/completions", self._vllm(prompts, new))
        raise Qwen35Error("no batch in one request", where="--batch", found=self.api, expected="sglang or vllm")

    def _post(self, path: str, body: dict[str, Any]) -> list[Answer]:
        response = self.server.call(path, body)
        self.save({"request": {"POST": path, **body}, "status": 200, "response": response})
        return from_json(response, f"{self.server.url}{path}", body)

    def _sglang(self, prompts: Sequence[Ids], new: int) -> dict[str, Any]:
        ids = [list(p) for p in prompts]
        return {"input_ids": ids if len(ids) > 1 else ids[0], "return_logprob": True, "logprob_start_len": 0,
                "top_logprobs_num": self.vocab if self.top == ALL else self.top,
                "sampling_params": {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}}  # fmt: skip

    def _vllm(self, prompts: Sequence[Ids], new: int) -> dict[str, Any]:
        ids = [list(p) for p in prompts]
        return {"model": self.model, "prompt": ids if len(ids) > 1 else ids[0], "max_tokens": new, "temperature": 0,
                "prompt_logprobs": self.top, "logprobs": self.top, "return_token_ids": True, "ignore_eos": True,
                "return_tokens_as_token_ids": True}  # fmt: skip

    def _one_by_one(self, ids: Ids) -> Iterator[Answer]:
        count = self.vocab if self.top == ALL else self.top
        for end in range(1, len(ids)):
            if self.api == "llama.cpp":
                body = {"prompt": list(ids[:end]), "n_predict": 1, "temperature": 0, "n_probs": count,
                        "cache_prompt": True, "return_tokens": True}  # fmt: skip
                try:
                    yield from self._post("/completion", body)
                except Qwen35Error as error:
                    if error.what != NO_LOG_P:
                        raise
                    # The token ended inside of a character. A bias moves no reported value: those are before samplers.
                    yield from self._post("/completion", body | {"logit_bias": [[ASCII, 1000]]})
            else:
                body = {"model": self.model, "prompt": list(ids[:end]), "max_tokens": 1, "temperature": 0,
                        "logprobs": count, "return_tokens_as_token_ids": True}  # fmt: skip
                yield from self._post("/v1/completions", body)


def _tried(server: Server, path: str) -> Any:
    """What is there, or None; a server that is down is an error all the same."""
    with suppress(Refused):
        return server.call(path)
    return None


def detect(server: Server) -> str:
    """Which engine answers. Sources: vLLM's and llama.cpp's `owned_by`, SGLang's /server_info, llama.cpp's /props."""
    models = _tried(server, "/v1/models")
    entries = models.get("data") if isinstance(models, dict) else None
    owners = {str(m.get("owned_by")) for m in entries if isinstance(m, dict)} if isinstance(entries, list) else set()
    for owner, api in (("vllm", "vllm"), ("sglang", "sglang"), ("llamacpp", "llama.cpp")):
        if owner in owners:
            return api
    for path, key, api in (("/server_info", "model_path", "sglang"), ("/get_server_info", "model_path", "sglang"),
                           ("/props", "default_generation_settings", "llama.cpp")):  # fmt: skip
        found = _tried(server, path)
        if isinstance(found, dict) and key in found:
            return api
    if entries:
        return "openai"
    raise Qwen35Error("which engine this is cannot be told", where=server.url, do=f"say --api {' | '.join(APIS)}")


def served(server: Server) -> str:
    """The name of the model that is served: the only one, or an error that lists them."""
    found = server.call("/v1/models")
    entries = found.get("data") if isinstance(found, dict) else None
    names = [m["id"] for m in entries or () if isinstance(m, dict) and isinstance(m.get("id"), str)]
    if len(names) != 1:
        listed = ", ".join(clean(name, 40) for name in names[:8]) or "none"
        raise Qwen35Error("which model shall be asked?", where=server.url, found=listed, do="say --model NAME")
    return names[0]


def saver(path: Path) -> Save:
    """One line a request, at once: what was answered stays when the next request fails."""
    path.write_text("", encoding="utf-8")

    def save(entry: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    return save
