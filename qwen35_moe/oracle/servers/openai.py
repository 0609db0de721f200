"""Answers of /v1/completions and chat, vLLM's and of any OpenAI-like server, to `Answer`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .answer import (
    NO_LOG_P,
    UNKNOWN,
    Answer,
    Row,
    agreed,
    bad,
    checked_list,
    from_npy,
    ids_in,
    mapping,
    number,
    prompt_of,
    row,
    token,
)

JsonObject = Mapping[str, Any]
BY_TEXT = "lists of likeliest tokens are keyed by text, and left out: ask for return_tokens_as_token_ids"


def openai(found: JsonObject, request: JsonObject, where: str) -> Iterator[Answer]:
    """vLLM's and any OpenAI-like server's /v1/completions and chat: `prompt_logprobs`, echo, and generated tokens."""
    prompts = request.get("prompt", request.get("token_ids"))
    many = isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], list)
    for n, choice in enumerate(mapping(x, where) for x in checked_list(found["choices"], where)):
        index = choice.get("index", n)
        if many and type(index) is int:
            index //= max(1, len(found["choices"]) // len(prompts))  # n choices of each prompt
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
    content = checked_list(found.get("content") or [], where)
    if content and not _by_id(content):
        given = ids_in(choice.get("token_ids") or [], where)
        if len(given) == len(content):
            content = [{"id": i, "logprob": mapping(x, where).get("logprob", "")}
                       for i, x in zip(given, content, strict=True)]  # fmt: skip
        if len(given) == len(content) or rows:
            content, notes = content if given else [], [BY_TEXT]
    if content:
        if ids is None:
            raise bad("the answer does not say which tokens it was asked for", where, do="save the request with it")
        new, more = content_rows(content, len(ids), where)
        ids, rows = [*ids, *new], [*rows, *more]
    elif found.get("token_logprobs"):
        found = {**found, "token_ids": choice.get("token_ids")}
        ids, rows, notes = _echo(found, ids, rows, request.get("echo") is not False, where)
    if not any(r.log_p for r in rows) or ids is None:
        if notes:
            do = 'ask for "return_tokens_as_token_ids": true; SGLang, which ignores it, tells ids at /generate'
            raise bad("the answer names tokens by texts, which name no ids", where, do=do)
        do = 'vLLM: ask with "prompt_logprobs"; others: with "logprobs", one request a token'
        raise bad(NO_LOG_P, where, expected="prompt_logprobs or logprobs", do=do)
    params = mapping(request.get("sampling_params") or request, where)
    answer = Answer("vllm" if prompt_log_p else "openai", ids, rows, notes=notes,
                    warm=params.get("temperature") not in (0, 1))  # fmt: skip
    if choice.get("routed_experts"):
        answer.routed = from_npy(choice["routed_experts"], where)
    return answer


def _prompt_rows(found: Any, sent: list[int] | None, where: str) -> tuple[list[Row], list[int]]:
    """[null, {"id": {logprob, rank}}, ...]: the token that stands there first, then the likeliest."""
    entries = [None if x is None else mapping(x, where) for x in checked_list(found, where)]
    said = [token(next(iter(x)), where) if x else UNKNOWN for x in entries]
    ids, rows = agreed(sent, said, where), list[Row]()
    for place, entry in enumerate(entries):
        pairs = [(token(k, where), number(mapping(v, where).get("logprob", ""), where))
                 for k, v in (entry or {}).items()]  # fmt: skip
        if pairs and said[place] != ids[place]:
            pairs[0] = (ids[place], pairs[0][1])
        if place or pairs:
            rows.append(row(place, pairs, len(pairs) > 1))
    return rows, ids


def _echo(
    found: JsonObject, ids: list[int] | None, rows: list[Row], echo: bool, where: str
) -> tuple[list[int] | None, list[Row], list[str]]:
    """{tokens, token_logprobs, top_logprobs}, of prompt and output with echo, else of output. Some servers ignore echo;
    of those that do not, the first log p is null, or the first tokens are the prompt. Lists keyed by text are left out:
    tokens that are parts of a character share one."""
    values, names = checked_list(found["token_logprobs"], where), checked_list(found.get("tokens") or [], where)
    by_id = len(names) == len(values) and all(isinstance(x, str) and x.startswith("token_id:") for x in names)
    echo = echo and len(values) >= len(ids or ()) and (
        values[0] is None or by_id and ids == [token(x, where) for x in names[: len(ids or ())]])  # fmt: skip
    start = 0 if echo else len(ids or ())
    given = ids_in(found["token_ids"], where) if found["token_ids"] and not echo and not by_id else []
    new = [token(x, where) for x in names] if by_id else given if len(given) == len(values) else (ids or [])[start:]
    new = new[: len(values)] if by_id or echo or given else []
    tops = checked_list(found.get("top_logprobs") or [], where)
    known, rows = {r.place for r in rows}, [*rows]
    for i, (name, value) in enumerate(zip(new, values, strict=False)):
        top = mapping(tops[i], where) if i < len(tops) and tops[i] and by_id else {}
        pairs = [(token(k, where), number(v, where)) for k, v in top.items() if v is not None]
        pairs += [] if echo and not i else [(name, number(value, where))]
        if start + i not in known and any(x is not None for _, x in pairs):
            rows.append(row(start + i, pairs, bool(top)))
    if by_id or given:
        if echo and ids is not None:
            agreed(ids, new[: len(ids)], where)
        ids = [*(ids or [])[:start], *new]
    return ids, rows, [BY_TEXT] if not by_id and (any(tops) or not new) else []


def content_rows(found: Any, start: int, where: str) -> tuple[list[int], list[Row]]:
    """Entries {id or token, logprob, top_logprobs}, one a token: their ids and rows."""
    ids, rows = list[int](), list[Row]()
    for place, entry in enumerate((mapping(x, where) for x in checked_list(found, where)), start):
        if "prob" in entry:
            raise bad("probabilities after the samplers", where, do="ask without post_sampling_probs")
        pairs = [_named(x, where) for x in [entry, *checked_list(entry.get("top_logprobs") or [], where)]]
        ids.append(pairs[0][0])
        rows.append(row(place, pairs[::-1], len(pairs) > 1))
    return ids, rows


def _by_id(content: list[Any]) -> bool:
    """Whether the first entry names its token by id."""
    first = content[0] if isinstance(content[0], dict) else {}
    return "id" in first or "token_id" in first or str(first.get("token")).startswith("token_id:")


def _named(found: Any, where: str) -> tuple[int, float | None]:
    found = mapping(found, where)
    name = next((found[k] for k in ("id", "token_id", "token") if k in found), None)
    if isinstance(name, str) and not name.startswith("token_id:"):
        raise bad("tokens are texts, which name no ids", where, name, 'ids ("return_tokens_as_token_ids": true)')
    return token(name, where), number(found.get("logprob", ""), where)
