"""Answers of engines, live or saved, to `Answer`: pure functions from JSON.

A saved answer is what a server sent, or {"request", "status", "response"} of it; a file holds one, a list of them, or
one a line. The ids of the request win over those in the response: SGLang answers with 0 for ids of V - 1 and above.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import Qwen35Error
from ...untrusted import parse_json, read_bytes
from .answer import (
    NO_LOG_P,
    UNKNOWN,
    Answer,
    Row,
    agreed,
    bad,
    checked_list,
    from_base64,
    from_npy,
    ids_in,
    mapping,
    number,
    prompt_of,
    row,
    token,
)

JsonObject = Mapping[str, Any]
LARGEST_ANSWER_FILE = 1 << 30  # bytes of a file of answers
BY_TEXT = "lists of likeliest tokens are keyed by text, and left out: ask for return_tokens_as_token_ids"


def read_answers(path: str | Path) -> list[Answer]:
    """All answers in a file: JSON, or one JSON object a line. Raises Qwen35Error for anything else."""
    return from_bytes(read_bytes(Path(path), LARGEST_ANSWER_FILE), str(path))


def from_bytes(data: bytes, where: str) -> list[Answer]:
    try:
        found = [parse_json(data, where)]
    except Qwen35Error:
        lines = [line for line in data.splitlines() if line.strip()]
        if len(lines) < 2:
            raise
        found = [parse_json(line, f"{where}, line {n + 1}") for n, line in enumerate(lines)]
    answers = [answer for part in found for answer in from_json(part, where)]
    if not answers:
        raise bad("no answers", where, found, "what a server sent, or a list of it")
    return answers


def from_json(found: Any, where: str, request: JsonObject | None = None) -> list[Answer]:
    """Answers in one JSON value, each of its sequences one."""
    if isinstance(found, list):
        ids, requests = (request or {}).get("input_ids"), [request or {}] * len(checked_list(found, where))
        if isinstance(ids, list) and ids and isinstance(ids[0], list) and len(ids) == len(found):
            requests = [{**(request or {}), "input_ids": one} for one in ids]
        # an entry is no list again: nothing here recurses as deep as a stranger likes
        return [a for x, r in zip(found, requests, strict=True) for a in from_json(mapping(x, where), where, r)]
    found = mapping(found, where)
    if "response" in found:
        if found.get("status", 200) != 200:
            raise bad("the server refused", where, found["response"])
        return from_json(found["response"], where, mapping(found.get("request") or {}, where))
    request = request or {}
    if "meta_info" in found:
        return [sglang(found, request, where)]
    if "choices" in found:
        return list(openai(found, request, where))
    if "completion_probabilities" in found or "tokens_evaluated" in found:
        return [llama_cpp(found, request, where)]
    if "error" in found or found.get("object") == "error":
        raise bad("the server refused", where, found.get("error") or found.get("message"))
    raise bad(NO_LOG_P, where, ", ".join(map(str, found)), "meta_info, choices or completion_probabilities")


def sglang(found: JsonObject, request: JsonObject, where: str) -> Answer:
    """/generate: [[log p, id, text], ...] of prompt and output, and the same of the likeliest. Output values are after
    temperature: they are read at 0 (computed at 1 then) and 1."""
    meta = mapping(found["meta_info"], where)
    if not (isinstance(meta.get("input_token_logprobs"), list) or meta.get("output_token_logprobs")):
        raise bad(NO_LOG_P, f"{where}: meta_info", expected="input_token_logprobs",
                  do='ask with "return_logprob": true, "logprob_start_len": 0')  # fmt: skip
    given = [_triple(x, where) for x in checked_list(meta.get("input_token_logprobs") or [], where)]
    said = [i for i, _ in given]
    sent = prompt_of(request, where, "input_ids")
    if sent is None and isinstance(found.get("prompt_token_ids"), list):
        sent = ids_in(found["prompt_token_ids"], where)
    start = len(sent) - len(said) if sent is not None else 0  # logprob_start_len
    if sent is not None and start < 0:
        raise bad("the answer is for other tokens", where, f"{len(said)} tokens", f"{len(sent)} tokens")
    clamped = list[int]()
    ids = said if sent is None else [*sent[:start], *agreed(sent[start:], said, where, clamped)]
    top = meta.get("input_top_logprobs") or []
    answer = Answer("sglang", ids, [*_sglang_rows(given, top, ids, start, where)], clamped=clamped)
    out = [_triple(x, where) for x in checked_list(meta.get("output_token_logprobs") or [], where)]
    temperature = mapping(request.get("sampling_params") or {}, where).get("temperature", 0 if not request else 1)
    if temperature in (0, 1):
        answer.ids = [*ids, *(i for i, _ in out)]
        tops = meta.get("output_top_logprobs") or []
        answer.rows += _sglang_rows(out, tops, answer.ids, len(ids), where)
    elif out:
        answer.notes.append(f"{len(out)} generated tokens are not judged: their log p are after temperature")
    counts = meta.get("spec_accept_histogram")
    if isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts):
        answer.accepted = len(ids), counts
    if meta.get("routed_experts"):
        answer.routed = from_base64(meta["routed_experts"], where)
    return answer


def _triple(found: Any, where: str) -> tuple[int, float | None]:
    found = checked_list(found, where)
    if len(found) < 2:
        raise bad("not [log p, id, text]", where, found)
    return token(found[1], where), None if found[0] is None else number(found[0], where)


def _sglang_rows(
    given: list[tuple[int, float | None]], tops: list[Any], ids: list[int], start: int, where: str
) -> Iterator[Row]:
    for i, (_, log_p) in enumerate(given):
        top = [] if i >= len(tops) or tops[i] is None else [_triple(x, where) for x in checked_list(tops[i], where)]
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
    ids, rows = _content(found["completion_probabilities"], len(prompt), where)
    return Answer("llama.cpp", [*prompt, *ids], rows)


def _content(found: Any, start: int, where: str) -> tuple[list[int], list[Row]]:
    """Entries {id or token, logprob, top_logprobs}, one a token: their ids and rows."""
    ids, rows = list[int](), list[Row]()
    for place, entry in enumerate((mapping(x, where) for x in checked_list(found, where)), start):
        if "prob" in entry:
            raise bad("probabilities after the samplers", where, do="ask without post_sampling_probs")
        pairs = [_named(x, where) for x in [entry, *checked_list(entry.get("top_logprobs") or [], where)]]
        ids.append(pairs[0][0])
        rows.append(row(place, pairs[::-1], len(pairs) > 1))
    return ids, rows


def _named(found: Any, where: str) -> tuple[int, float | None]:
    found = mapping(found, where)
    name = next((found[k] for k in ("id", "token_id", "token") if k in found), None)
    if isinstance(name, str) and not name.startswith("token_id:"):
        raise bad("tokens are texts, which name no ids", where, name, 'ids ("return_tokens_as_token_ids": true)')
    return token(name, where), number(found.get("logprob"), where)


def openai(found: JsonObject, request: JsonObject, where: str) -> Iterator[Answer]:
    """vLLM's and any OpenAI-like server's /v1/completions and chat: `prompt_logprobs`, echo, and generated tokens."""
    prompts = request.get("prompt", request.get("token_ids"))
    many = isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], list)
    for n, choice in enumerate(mapping(x, where) for x in checked_list(found["choices"], where)):
        index = choice.get("index", n)
        if many and not (type(index) is int and 0 <= index < len(prompts)):
            raise bad("a choice of no prompt", where, index, f"0 to {len(prompts) - 1}")
        sent = prompt_of({"prompt": prompts[index] if many else prompts}, where, "prompt")
        said = choice.get("prompt_token_ids") or found.get("prompt_token_ids")
        yield _choice(choice, choice.get("prompt_logprobs") or found.get("prompt_logprobs"),
                      agreed(sent, ids_in(said, where), where) if said else sent, request, where)  # fmt: skip


def _choice(choice: JsonObject, prompt_log_p: Any, sent: list[int] | None, request: JsonObject, where: str) -> Answer:
    rows, notes, ids = list[Row](), list[str](), sent
    if prompt_log_p:
        rows, ids = _prompt_rows(prompt_log_p, sent, where)
    found = mapping(choice.get("logprobs") or {}, where)
    if found.get("content"):
        if ids is None:
            raise bad("the answer does not say which tokens it was asked for", where, do="save the request with it")
        new, more = _content(found["content"], len(ids), where)
        ids, rows = [*ids, *new], [*rows, *more]
    elif found.get("token_logprobs"):
        found = {**found, "token_ids": choice.get("token_ids")}
        ids, rows, notes = _echo(found, ids, rows, bool(request.get("echo")), where)
    if not rows or ids is None:
        do = 'vLLM: ask with "prompt_logprobs"; others: with "logprobs", one request a token'
        raise bad(NO_LOG_P, where, expected="prompt_logprobs or logprobs", do=do)
    answer = Answer("vllm" if prompt_log_p else "openai", ids, rows, notes=notes)
    if choice.get("routed_experts"):
        answer.routed = from_npy(choice["routed_experts"], where)
    return answer


def _prompt_rows(found: Any, sent: list[int] | None, where: str) -> tuple[list[Row], list[int]]:
    """[null, {"id": {logprob, rank}}, ...]: the token that stands there first, then the likeliest."""
    entries = [None if x is None else mapping(x, where) for x in checked_list(found, where)]
    said = [token(next(iter(x)), where) if x else UNKNOWN for x in entries]
    ids, rows = agreed(sent, said, where), list[Row]()
    for place, entry in enumerate(entries):
        if not entry:
            continue
        pairs = [(token(k, where), number(mapping(v, where).get("logprob"), where)) for k, v in entry.items()]
        if said[place] != ids[place]:
            pairs[0] = (ids[place], pairs[0][1])
        rows.append(row(place, pairs, len(pairs) > 1))
    return rows, ids


def _echo(
    found: JsonObject, ids: list[int] | None, rows: list[Row], echo: bool, where: str
) -> tuple[list[int] | None, list[Row], list[str]]:
    """{tokens, token_logprobs, top_logprobs}, of prompt and output with echo, else of output. Lists keyed by text are
    left out: tokens that are parts of a character share one."""
    values, names = checked_list(found["token_logprobs"], where), checked_list(found.get("tokens") or [], where)
    start = 0 if echo else len(ids or ())
    by_id = len(names) == len(values) and all(isinstance(x, str) and x.startswith("token_id:") for x in names)
    given = ids_in(found["token_ids"], where) if found["token_ids"] and not echo and not by_id else []
    new = [token(x, where) for x in names] if by_id else given if len(given) == len(values) else (ids or [])[start:]
    new = new[: len(values)] if by_id or echo or given else []
    tops = checked_list(found.get("top_logprobs") or [], where)
    known = {r.place for r in rows}
    for i, (name, value) in enumerate(zip(new, values, strict=False)):
        top = mapping(tops[i], where) if i < len(tops) and tops[i] and by_id else {}
        pairs = [(token(k, where), number(v, where)) for k, v in [*top.items(), (name, value)] if v is not None]
        if start + i not in known and any(x is not None for _, x in pairs):
            rows = [*rows, row(start + i, pairs, bool(top))]
    if by_id or given:
        if echo and ids is not None:
            agreed(ids, new[: len(ids)], where)
        ids = [*(ids or [])[:start], *new]
    return ids, rows, [BY_TEXT] if not by_id and (any(tops) or not new) else []
