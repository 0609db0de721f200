"""A server on 127.0.0.1 for the tests: it answers what it is told to, or in an engine's dialect from log p of ours."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

Reply = tuple[int, Any]  # status, and JSON or bytes
LogP = Callable[[list[int]], Tensor]  # ids -> log p [T, V] after each of them


@contextmanager
def serving(reply: Callable[[str, Any, dict[str, str]], Reply]) -> Iterator[str]:
    """The URL of a server that answers with reply(path, body or None, headers)."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, content = reply(self.path, body, dict(self.headers))
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            try:
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", content["to"])
                if status == 429:
                    self.send_header("Retry-After", "1")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                return  # the client has had enough

        do_GET = do_POST = answer

        def log_message(self, *_: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def likeliest(log_p_TV: Tensor, k: int) -> list[list[tuple[float, int]]]:
    """(log p, id) of the k likeliest tokens of each row."""
    values, ids = log_p_TV.topk(k)
    return [list(zip(*row, strict=True)) for row in zip(values.tolist(), ids.tolist(), strict=True)]


class Dialects:
    """One model behind every engine's API. `log_p` may depend on the number of prompts in the batch."""

    def __init__(self, log_p: LogP, engine: str, vocab: int):
        self.log_p, self.engine, self.vocab = log_p, engine, vocab
        self.requests: list[tuple[str, Any]] = []
        self.batch = 1  # prompts of the request that is being answered

    def __call__(self, path: str, body: Any, _: dict[str, str]) -> Reply:
        self.requests.append((path, body))
        if path == "/v1/models":
            owner = {"llama.cpp": "llamacpp", "openai": "me", "trtllm": "tensorrt_llm"}.get(self.engine, self.engine)
            return 200, {"object": "list", "data": [{"id": "served", "object": "model", "owned_by": owner}]}
        wanted = {"sglang": "/generate", "llama.cpp": "/completion"}.get(self.engine, "/v1/completions")
        if path != wanted:
            return 404, {"error": {"message": "no such path"}}
        unknown = {"openai": {"prompt_logprobs", "return_token_ids"},
                   "trtllm": {"prompt_logprobs", "return_token_ids", "return_tokens_as_token_ids"}}  # fmt: skip
        if unknown.get(self.engine, set()) & body.keys():
            return 400, {"error": {"message": "unknown field"}}
        answer = {"sglang": self._sglang, "vllm": self._vllm, "llama.cpp": self._llama, "openai": self._openai,
                  "trtllm": self._trtllm}  # fmt: skip
        return 200, answer[self.engine](body)

    def _continued(self, ids: list[int], new: int) -> tuple[list[int], Tensor]:
        """Greedy tokens, and log p [T + new, V] of all."""
        ids = list(ids)
        for _ in range(new):
            ids.append(int(self.log_p(ids)[-1].argmax()))
        return ids, self.log_p(ids)

    def _sglang(self, body: Any) -> Any:
        prompts = body["input_ids"]
        many = isinstance(prompts[0], list)
        self.batch, k = len(prompts) if many else 1, body["top_logprobs_num"]
        out = []
        for ids in prompts if many else [prompts]:
            every, log_p = self._continued(ids, body["sampling_params"]["max_new_tokens"])
            said = [0 if i >= self.vocab - 1 else i for i in every]  # as SGLang clamps them
            rows = log_p.tolist()
            given = [[None, said[0], None]] + [[rows[t][i], said[t + 1], None] for t, i in enumerate(every[1:])]
            top = [None, *([[x, i, None] for x, i in row] for row in likeliest(log_p, k))]
            n = len(ids)
            first = 0 if body["logprob_start_len"] == 0 else n
            meta = {"input_token_logprobs": given[first:n], "input_top_logprobs": top[first:n],
                    "output_token_logprobs": given[n:], "output_top_logprobs": top[n : len(every)]}  # fmt: skip
            out.append({"text": "", "output_ids": every[n:], "meta_info": meta})
        return out if many else out[0]

    def _vllm(self, body: Any) -> Any:
        prompts = body["prompt"]
        many = isinstance(prompts[0], list)
        self.batch, k = len(prompts) if many else 1, body["logprobs"]
        choices = []
        for n, ids in enumerate(prompts if many else [prompts]):
            every, log_p = self._continued(ids, body["max_tokens"])
            rows: list[Any] = [None]
            likely = likeliest(log_p, self.vocab if k < 0 else k)
            for i, row, some in zip(every[1:], log_p.tolist(), likely, strict=False):
                told = dict.fromkeys([i, *(j for _, j in some)])
                rows.append({str(j): {"logprob": row[j], "rank": 1} for j in told})
            tops = [{f"token_id:{j}": x["logprob"] for j, x in row.items()} for row in rows[len(ids) :]]
            names = [f"token_id:{i}" for i in every[len(ids) :]]
            log = {"tokens": names, "token_logprobs": [t[i] for t, i in zip(tops, names, strict=True)],
                   "top_logprobs": tops}  # fmt: skip
            told = {"prompt_logprobs": rows[: len(ids)]} if "prompt_logprobs" in body else {}
            choices.append({"index": n, **told, "prompt_token_ids": ids, "logprobs": log,
                            "token_ids": every[len(ids) :]})  # fmt: skip
        return {"object": "text_completion", "choices": choices}

    def _entry(self, row: Tensor, k: int, named: Callable[[int], dict[str, Any]], pick: int | None = None) -> Any:
        best = int(row.argmax()) if pick is None else pick
        tops = [{**named(i), "logprob": x} for x, i in likeliest(row[None], k)[0]]
        return {**named(best), "logprob": float(row[best]), "top_logprobs": tops}

    def _llama(self, body: Any) -> Any:
        row = self.log_p(body["prompt"])[-1]
        biased = body.get("logit_bias")
        best = biased[0][0] if biased else int(row.argmax())
        found = {"content": "", "tokens": [best], "tokens_evaluated": len(body["prompt"])}
        if best < 128:  # above, a token is part of a character, and nothing is told
            found["completion_probabilities"] = [self._entry(row, body["n_probs"], lambda i: {"id": i}, best)]
        return found

    def _trtllm(self, body: Any) -> Any:
        """Texts are keys; the only id is that of the token that was generated, where it is not detokenised."""
        row = self.log_p(body["prompt"])[-1]
        best, top = int(row.argmax()), row.topk(body["logprobs"])
        log = {"tokens": ["x"], "token_logprobs": [float(row[best])], "text_offset": [0],
               "top_logprobs": [{f"t{int(i) % 9}": float(x) for x, i in zip(*top, strict=True)}]}  # fmt: skip
        choice = {"index": 0, "text": "", "logprobs": log} | ({} if body["detokenize"] else {"token_ids": [best]})
        return {"object": "text_completion", "choices": [choice]}

    def _openai(self, body: Any) -> Any:
        row = self.log_p(body["prompt"])[-1]
        entry = self._entry(row, body["logprobs"], lambda i: {"token": f"token_id:{i}"})
        return {"object": "text_completion", "choices": [{"index": 0, "logprobs": {"content": [entry]}}]}


def cached(log_p: LogP) -> LogP:
    """Computes the longest sequence of a prefix once: a causal model's shorter ones are its beginnings."""
    known: dict[tuple[int, ...], Tensor] = {}

    def look(ids: list[int]) -> Tensor:
        key = tuple(ids)
        for longer, x in known.items():
            if longer[: len(key)] == key:
                return x[: len(key)]
        known[key] = torch.as_tensor(log_p(ids))
        return known[key]

    return look
