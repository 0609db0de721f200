"""SGLang's /generate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .answer import NO_LOG_P, Answer, Row, agreed, bad, ids_in, listed, mapping, number, prompt_of, row, token
from .routed import from_base64

Json = Mapping[str, Any]


def sglang(found: Json, request: Json, where: str) -> Answer:
    """/generate: [[log p, id, text], ...] of prompt and output, and the same of the likeliest. Output values are after
    temperature: they are read at 0 (computed at 1 then) and 1."""
    meta = mapping(found["meta_info"], where)
    if not isinstance(meta.get("input_token_logprobs"), list):
        raise bad(NO_LOG_P, f"{where}: meta_info", expected="input_token_logprobs",
                  do='ask with "return_logprob": true, "logprob_start_len": 0')  # fmt: skip
    given = [_triple(x, where) for x in meta["input_token_logprobs"]]
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
    out = [_triple(x, where) for x in meta.get("output_token_logprobs") or []]
    temperature = mapping(request.get("sampling_params") or {}, where).get("temperature", 0 if not request else 1)
    if temperature in (0, 1):
        answer.ids = [*ids, *(i for i, _ in out)]
        tops = meta.get("output_top_logprobs") or []
        answer.rows += _sglang_rows(out, tops, answer.ids, len(ids), where)
    elif out:
        answer.notes.append(f"{len(out)} generated tokens are not judged: their log p are after temperature")
    if meta.get("routed_experts"):
        answer.routed = from_base64(meta["routed_experts"], where)
    return answer


def _triple(found: Any, where: str) -> tuple[int, float | None]:
    found = listed(found, where)
    if len(found) < 2:
        raise bad("not [log p, id, text]", where, found)
    return token(found[1], where), None if found[0] is None else number(found[0], where)


def _sglang_rows(
    given: list[tuple[int, float | None]], tops: list[Any], ids: list[int], start: int, where: str
) -> Iterator[Row]:
    for i, (_, log_p) in enumerate(given):
        top = [] if i >= len(tops) or tops[i] is None else [_triple(x, where) for x in listed(tops[i], where)]
        yield row(start + i, [*top, (ids[start + i], log_p)], bool(top))
