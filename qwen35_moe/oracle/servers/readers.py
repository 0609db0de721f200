"""Answers of engines, live or saved, to `Answer`: pure functions from JSON.

A saved answer is what a server sent, or {"request", "status", "response"} of it, or {"prompt": ids, "response"}. A file
holds one, a list of them, or one a line. The ids of the request win over those in the response: SGLang answers with 0
for ids of V - 1 and above.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...errors import Qwen35Error
from ...untrusted import parse_json, read_bytes
from .answer import (
    NO_LOG_P,
    Answer,
    Row,
    agreed,
    bad,
    checked_list,
    from_base64,
    ids_in,
    mapping,
    number,
    prompt_of,
    row,
    token,
)
from .openai import JsonObject, content_rows, openai

LARGEST_ANSWER_FILE = 1 << 30  # bytes of a file of answers
NO_STREAM = 'ask without "stream": a part does not say where it stands in its answer'
NO_JSON = {  # how files begin that hold an answer in another form, and what to do
    b"data:": NO_STREAM,
    b"event:": NO_STREAM,
    b"HTTP/": "save the body without the headers: curl without -i",
    b"\x1f\x8b": "unpack it: gunzip",
    b"\xff\xfe": "save it as UTF-8",
}


def read_answers(path: str | Path) -> list[Answer]:
    """All answers in a file: JSON, or one JSON object a line. Raises Qwen35Error for anything else."""
    return from_bytes(read_bytes(Path(path), LARGEST_ANSWER_FILE), str(path))


def from_bytes(data: bytes, where: str) -> list[Answer]:
    """Answers in one JSON value, or in one a line."""
    try:
        found = [(where, parse_json(data, where))]
    except Qwen35Error as error:
        lines = [(f"{where}, line {n}", line) for n, line in enumerate(data.splitlines(), 1) if line.strip()]
        do = next((do for begin, do in NO_JSON.items() if data.lstrip().startswith(begin)), "")
        if do or len(lines) < 2 or not _is_json(lines[0][1]):
            raise error.but(do=do) from error
        found = [(at, parse_json(line, at)) for at, line in lines]
    answers = [answer for at, part in found for answer in from_json(part, at)]
    if not answers:
        raise bad("no answers", where, [part for _, part in found], "what a server sent, or a list of it")
    return answers


def _is_json(line: bytes) -> bool:
    with suppress(Qwen35Error):
        parse_json(line, "")
        return True
    return False


def from_json(found: Any, where: str, request: JsonObject | None = None) -> list[Answer]:
    """Answers in one JSON value, each of its sequences one."""
    request = request or {}
    if isinstance(found, list):
        requests = _requests(request, len(checked_list(found, where)), where)
        # an entry is no list again: nothing here recurses as deep as a stranger likes
        return [a for x, r in zip(found, requests, strict=True) for a in from_json(mapping(x, where), where, r)]
    found = mapping(found, where)
    if (key := next((k for k in ("response", "body") if k in found), "")) and "choices" not in found:
        if found.get("status", found.get("status_code", 200)) != 200:  # status_code, body: the batch API of OpenAI
            raise bad("the server refused", where, found[key])
        asked = found.get("request") or request or {k: v for k, v in found.items() if k != key}
        return from_json(found[key], where, mapping(asked, where))
    if "meta_info" in found:
        return [sglang(found, request, where)]
    if request.get("stream") or found.get("stop") is False or found.get("object") == "chat.completion.chunk":
        raise bad("a part of an answer", where, do=NO_STREAM)
    if "choices" in found:
        return list(openai(found, request, where))
    if "completion_probabilities" in found or "tokens_evaluated" in found:
        return [llama_cpp(found, request, where)]
    if "error" in found or found.get("object") == "error":
        raise bad("the server refused", where, found.get("error") or found.get("message"))
    raise bad(NO_LOG_P, where, ", ".join(map(str, found)), "meta_info, choices or completion_probabilities")


def _requests(request: JsonObject, count: int, where: str) -> list[JsonObject]:
    """The request of each of `count` answers. Those to one prompt stand together: it may have been sampled n times."""
    name = "input_ids" if "input_ids" in request else "prompt"
    prompts, params = request.get(name), request.get("sampling_params")
    if not (isinstance(prompts, list) and prompts and isinstance(prompts[0], list)):
        return [request] * count
    if count % len(prompts):
        raise bad("answers to other prompts", where, f"{count} answers", f"{len(prompts)}, as prompts were sent")
    own = params if isinstance(params, list) and len(params) == len(prompts) else [params] * len(prompts)
    return [{**request, name: p, "sampling_params": o}
            for p, o in zip(prompts, own, strict=True) for _ in range(count // len(prompts))]  # fmt: skip


def sglang(found: JsonObject, request: JsonObject, where: str) -> Answer:
    """/generate: [[log p, id, text], ...] of prompt and output, and the same of the likeliest. Output values are after
    temperature: they are read at 0 (computed at 1 then) and 1."""
    meta = mapping(found["meta_info"], where)
    if not (isinstance(meta.get("input_token_logprobs"), list) or meta.get("output_token_logprobs")):
        raise bad(NO_LOG_P, f"{where}: meta_info", expected="input_token_logprobs",
                  do='ask with "return_logprob": true, "logprob_start_len": 0')  # fmt: skip
    given = _triples(meta.get("input_token_logprobs"), where)
    given[:1] = [(i, None if math.isnan(x or 0) else x) for i, x in given[:1]]  # nothing stands before it
    said = [i for i, _ in given]
    sent = prompt_of(request, where, "input_ids")
    if sent is None and isinstance(found.get("prompt_token_ids"), list):
        sent = ids_in(found["prompt_token_ids"], where)
    start = len(sent) - len(said) if sent is not None else 0  # logprob_start_len
    if sent is not None and start < 0:
        raise bad("the answer is for other tokens", where, f"{len(said)} tokens", f"{len(sent)} tokens")
    clamped = list[int]()
    ids = said if sent is None else [*sent[:start], *agreed(sent[start:], said, where, clamped)]
    tops = checked_list(meta.get("input_top_logprobs") or [], where)
    answer = Answer("sglang", ids, [*_sglang_rows(given, tops, ids, start, where)], clamped=clamped)
    out = _triples(meta.get("output_token_logprobs"), where)
    params = mapping(request.get("sampling_params") or {}, where)
    answer.warm = "temperature" not in params
    if len(out) != meta.get("completion_tokens", len(out)):
        answer.notes.append(f"{len(out)} generated tokens are not judged, as part of a stream: {NO_STREAM}")
    elif params.get("temperature", 1) in (0, 1):
        answer.ids = [*ids, *(i for i, _ in out)]
        tops = checked_list(meta.get("output_top_logprobs") or [], where)
        answer.rows += _sglang_rows(out, tops, answer.ids, len(ids), where)
    elif out:
        answer.notes.append(f"{len(out)} generated tokens are not judged: their log p are after temperature")
    counts = meta.get("spec_accept_histogram")
    if isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts):
        answer.accepted = len(ids), counts
    if meta.get("routed_experts"):
        answer.routed = from_base64(meta["routed_experts"], where)
    return answer


def _triples(found: Any, where: str) -> list[tuple[int, float | None]]:
    pairs = []
    for x in (checked_list(x, where) for x in checked_list(found or [], where)):
        if len(x) < 2:
            raise bad("not [log p, id, text]", where, x)
        pairs.append((token(x[1], where), number(x[0], where)))
    return pairs


def _sglang_rows(
    given: list[tuple[int, float | None]], tops: list[Any], ids: list[int], start: int, where: str
) -> Iterator[Row]:
    for i, (_, log_p) in enumerate(given):
        # null among the likeliest may be log 0, of a token that a grammar forbids
        top = [(j, x) for j, x in _triples(tops[i], where) if not math.isnan(x or 0)] if i < len(tops) else []
        yield row(start + i, [*top, (ids[start + i], log_p)], bool(top))


def llama_cpp(found: JsonObject, request: JsonObject, where: str) -> Answer:
    """llama-server's /completion: what was generated, and n_probs alternatives of it. The prompt is in the request."""
    if not isinstance(found.get("completion_probabilities"), list):
        do = 'ask with "n_probs"; none are sent where the token ends inside of a character: add a logit_bias then'
        raise bad(NO_LOG_P, where, expected="completion_probabilities", do=do)
    prompt = prompt_of(request, where, "prompt")
    if prompt is None:
        raise bad("llama-server does not say which tokens it was asked for", where,
                  do='save {"request", "response"} of each, as `probe --save` does')  # fmt: skip
    ids, rows = content_rows(found["completion_probabilities"], len(prompt), where)
    return Answer("llama.cpp", [*prompt, *ids], rows)
