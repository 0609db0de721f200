"""Answers of servers: read as their engines sent them, judged against the truth, and asked for over a loopback."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from loopback import Dialects, LogP, cached, serving
from tolerances import FLOAT32_LOG_P, FLOAT64_REORDERED
from torch import Tensor

from qwen35_moe.cli.main import main
from qwen35_moe.errors import Qwen35Error
from qwen35_moe.numerics import arithmetics
from qwen35_moe.numerics.metrics import rel_l2
from qwen35_moe.numerics.taps import Handler, attach
from qwen35_moe.oracle.diagnose.catalogue import FAULTS
from qwen35_moe.oracle.diagnose.faults import Fault, FaultSite
from qwen35_moe.oracle.judge.envelope import LIMIT
from qwen35_moe.oracle.judge.rerun_parts import Layers
from qwen35_moe.oracle.judge.where import HERE, Where
from qwen35_moe.oracle.servers import client, replay
from qwen35_moe.oracle.servers.answer import UNKNOWN, Answer
from qwen35_moe.oracle.servers.client import API_KEY, Server
from qwen35_moe.oracle.servers.dialects import Asker, buckets, detect, saver
from qwen35_moe.oracle.servers.hypotheses import KINDS
from qwen35_moe.oracle.servers.judge import DECIDED, surely
from qwen35_moe.oracle.servers.probe import How, Prepared, drawn_prompts, ordinary, prepare
from qwen35_moe.oracle.servers.readers import from_bytes, from_json, read_answers
from qwen35_moe.oracle.servers.replay import Replay
from qwen35_moe.oracle.truth import Loaded, open_checkpoint, write_truth
from qwen35_moe.run import streamed
from qwen35_moe.run.load import build as build_model
from qwen35_moe.run.prompt import padded
from weights.build import build

DATA = Path(__file__).parent / "data" / "servers"
FIXTURE = DATA.parent / "fixtures" / "bf16-hub"
CPU = torch.device("cpu")
ASKED = 4, 24  # prompts, and tokens of each: enough for every fault in all layers
JUDGED = ("sglang", "trtllm")  # the others differ in how they say the same log p
ENGINES = ("sglang", "vllm", "llama.cpp", "openai", "trtllm")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, one of each kind: every fault can be replayed in a second."""
    sizes = {"layer_types": ["linear_attention", "full_attention"], "num_experts": 6}
    return build("tiny", tmp_path_factory.mktemp("servers") / "two", text_config=sizes, flat=True, mtp=False)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Loaded:
    return open_checkpoint(checkpoint)[1]


@pytest.fixture(scope="module")
def known(loaded: Loaded) -> Prepared:
    return prepare(loaded.source, loaded.fused, drawn_prompts(loaded.source.config, *ASKED))


def planted(loaded: Loaded, arithmetic: str, broken: Fault | None, layer: int | None, expert: int = 0) -> LogP:
    """log p of our model in an arithmetic, with a fault or none."""
    source, table = loaded.source, arithmetics.get(arithmetic)

    def log_p(ids: list[int]) -> Tensor:
        layers = None if layer is None else frozenset({layer})
        place = FaultSite(source.config, torch.arange(len(ids))[None], layers, expert)
        weights, how, handlers, fused = source, table, list[Handler](), loaded.fused
        if broken is not None:
            weights, how, handlers = broken.source(source, place), broken.arithmetic(table), broken.handlers(place)
            fused = [flag or (broken.fused and place.covers(i)) for i, flag in enumerate(loaded.fused)]
        with attach(*handlers):
            return build_model(weights, how, fused, CPU, "decoded")(torch.tensor([ids]))[0].double().log_softmax(-1)

    return log_p


_engines: dict[tuple[str, str, int | None], LogP] = {}


def engine(loaded: Loaded, arithmetic: str = "sglang-bf16", fault: str = "", layer: int | None = None) -> LogP:
    """log p of our model as an engine. Each is one for all tests."""
    if (known := _engines.get((arithmetic, fault, layer))) is None:
        broken = next((f for f in FAULTS if f.name == fault), None)
        known = _engines[arithmetic, fault, layer] = cached(planted(loaded, arithmetic, broken, layer))
        for ids in drawn_prompts(loaded.source.config, *ASKED):
            known(ids)  # so that what a request a token asks for is a beginning of something known
    return known


# ---- answers as engines sent them


@pytest.mark.parametrize(
    ("name", "engine", "ids", "rows", "first"),
    [
        ("llamacpp_completion_n_probs", "llama.cpp", 43, 3, {81: -0.8198751, 27: -1.8972394}),
        ("llamacpp_completion_n_predict0", "llama.cpp", 41, 1, {81: -0.8198754}),
        ("llamacpp_v1_completions_logprobs", "openai", 43, 3, {81: -0.8198751}),
        ("vllm_chat", "vllm", 8, 7, {101: -14.827459, 22: -1.2649593}),
        ("vllm_completions_echo_as_ids", "vllm", 41, 40, {151: -7.3980355, 113: -1.5699106}),
        ("vllm_completions_echo_logprobs_text", "vllm", 40, 39, {151: -7.3980355, 113: -1.5699106}),
        ("vllm_completions_prompt_logprobs_token_ids", "vllm", 44, 43, {151: -7.3980355, 113: -1.5699106}),
        ("vllm_inference_generate", "vllm", 42, 41, {151: -7.3980355, 113: -1.5699106}),
        ("vllm_prompt_logprobs_0", "vllm", 40, 39, {151: -7.3980355}),
        ("sglang_bf16", "sglang", 44, 43, {608: -11.6548233, 1457: -2.3579478}),
        ("sglang_generate_from_source", "sglang", 41, 40, {151: -13.4773597, 193: -0.0867348}),
    ],
)  # fmt: skip
def test_real_answers_are_read(name: str, engine: str, ids: int, rows: int, first: dict[int, float]) -> None:
    answer = read_answers(DATA / f"{name}.json")[0]
    told = [row for row in answer.rows if row.log_p]
    assert (answer.engine, len(answer.ids), len(told)) == (engine, ids, rows)
    assert {i: told[0].log_p[i] for i in first} == pytest.approx(first, abs=1e-6)
    assert [row.place for row in told] == list(range(ids - rows, ids))


def test_what_an_answer_leaves_open() -> None:
    """The likeliest token, where it was not asked for; lists that are keyed by text."""
    assert read_answers(DATA / "vllm_prompt_logprobs_0.json")[0].rows[0].best is None
    assert read_answers(DATA / "vllm_completions_prompt_logprobs_token_ids.json")[0].rows[0].best == 113
    assert "keyed by text" in read_answers(DATA / "vllm_completions_echo_logprobs_text.json")[0].notes[0]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("llamacpp_completion_post_sampling", "probabilities after the samplers"),
        ("llamacpp_no_probabilities", "the answer holds no log-probabilities"),
        ("vllm_err_stream", "the server refused"),
        ("sglang_v1_completions_text", "the answer names tokens by texts, which name no ids"),
    ],
)
def test_answers_that_tell_nothing_are_refused(name: str, what: str) -> None:
    with pytest.raises(Qwen35Error) as error:
        read_answers(DATA / f"{name}.json")
    assert error.value.what == what


def test_one_answer_a_line() -> None:
    lines = [(DATA / f"{name}.json").read_text().replace("\n", " ") for name in ("vllm_chat", "sglang_bf16")]
    assert [a.engine for a in from_bytes("\n".join(lines).encode(), "here")] == ["vllm", "sglang", "sglang"]


@pytest.mark.parametrize(
    ("data", "do"),
    [
        (b'data: {"choices": []}\n\ndata: [DONE]\n', "stream"),
        (b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n{"choices": []}', "without -i"),
        (b"\x1f\x8b\x08\n\x00\n", "gunzip"),
        ('{"choices": []}'.encode("utf-16"), "UTF-8"),
    ],
)
def test_how_to_save_it_is_said_of_what_is_no_json(data: bytes, do: str) -> None:
    with pytest.raises(Qwen35Error) as error:
        from_bytes(data, "here")
    assert do in error.value.do


def test_errors_say_the_line_and_the_place(tmp_path: Path) -> None:
    good = json.dumps(vllm({"5": {"logprob": -1.0}}))
    for data, where, found in (
        (f"{good}\n\n{good.replace('-1.0', 'true')}", "here, line 3", "True"),
        (f"{good}\n\n{good[:-1]}", "here, line 3", "Expecting"),
        (json.dumps([json.loads(good)] * 2, indent=1)[:-9], "here", "line "),  # of many lines, and cut off
    ):
        with pytest.raises(Qwen35Error) as error:
            from_bytes(data.encode(), "here")
        assert error.value.where == where and str(error.value.found).startswith(found) or found in str(error.value)


def sglang(ids: list[int], **meta: object) -> dict[str, object]:
    given = [[None if not t else -1.0 - t, i, None] for t, i in enumerate(ids)]
    return {"output_ids": [], "meta_info": {"input_token_logprobs": given, **meta}}


def test_what_was_sent_wins_over_what_sglang_clamps() -> None:
    (answer,) = from_json(sglang([3, 0, 5]), "here", {"input_ids": [3, 255, 5]})
    assert (answer.ids, answer.clamped) == ([3, 255, 5], [255])
    assert answer.rows[1].log_p == {255: -2.0}


def test_output_of_sglang_after_temperature_is_not_judged() -> None:
    found = sglang([3, 4], output_token_logprobs=[[-0.5, 7, None]])
    request = {"input_ids": [3, 4], "sampling_params": {"temperature": 0.7}}
    (answer,) = from_json(found, "here", request)
    assert answer.ids == [3, 4] and "after temperature" in answer.notes[0]
    assert from_json(found, "here", {**request, "sampling_params": {"temperature": 0}})[0].ids == [3, 4, 7]


def entry(i: int | str, log_p: object = -1.0) -> dict[str, object]:
    name = {"token": i} if isinstance(i, str) else {"id": i}
    return {**name, "logprob": log_p, "top_logprobs": [{**name, "logprob": log_p}]}


def test_parts_of_a_stream_are_not_judged() -> None:
    """Each part would be read as if it stood behind the prompt."""
    part = {"choices": [{"index": 0, "logprobs": {"content": [entry(5)]}}]}
    llama = {"completion_probabilities": [entry(5)], "tokens_predicted": 3}
    for found, asked in ((part, {"stream": True}), ({**part, "object": "chat.completion.chunk"}, {}),
                         (llama, {"stream": True}), ({**llama, "stop": False}, {})):  # fmt: skip
        with pytest.raises(Qwen35Error, match="a part of an answer"):
            from_json(found, "here", {"prompt": [4], **asked})
    found = sglang([3, 4], output_token_logprobs=[[-0.5, 7, None]], completion_tokens=2)
    (answer,) = from_json(found, "here", {"input_ids": [3, 4], "stream": True})
    assert answer.ids == [3, 4] and "stream" in answer.notes[0]


def test_several_prompts_in_one_request_and_several_answers_to_each() -> None:
    prompts, cold = [[3, 4], [5, 6]], {"temperature": 0}
    request = {"input_ids": prompts, "sampling_params": [cold, {"temperature": 0.5}]}
    found = [sglang(p, output_token_logprobs=[[-0.5, 7, None]]) for p in prompts]
    assert [a.ids for a in from_json(found, "here", request)] == [[3, 4, 7], [5, 6]]
    twice = [x for x in found for _ in range(2)]
    answers = from_json(twice, "here", {**request, "sampling_params": cold})
    assert [a.ids for a in answers] == [[3, 4, 7]] * 2 + [[5, 6, 7]] * 2
    with pytest.raises(Qwen35Error, match="answers to other prompts"):
        from_json(found[:1] * 3, "here", request)
    choices = [{"index": n, "logprobs": {"content": [entry(7)]}} for n in (3, 1, 0, 2)]
    answers = from_json({"choices": choices}, "here", {"prompt": prompts, "n": 2})
    assert [a.ids[:2] for a in answers] == [[5, 6], [3, 4], [3, 4], [5, 6]]
    llama = [{"completion_probabilities": [entry(7)]}] * 2
    assert [a.ids for a in from_json(llama, "here", {"prompt": prompts})] == [[3, 4, 7], [5, 6, 7]]


def test_prompts_beside_the_response_and_results_of_a_batch_job() -> None:
    found = {"choices": [{"index": 0, "logprobs": {"content": [entry(7)]}}]}
    assert from_json([{"prompt": [3, 4], "response": found}], "here")[0].ids == [3, 4, 7]
    body = {**found, "prompt_token_ids": [3, 4]}
    job = {"custom_id": "a", "response": {"status_code": 200, "body": body}, "error": None}
    assert from_json(job, "here")[0].ids == [3, 4, 7]
    with pytest.raises(Qwen35Error, match="the server refused"):
        from_json({"response": {"status_code": 400, "body": {"error": "x"}}}, "here")


@pytest.mark.parametrize("echo", [True, False, None])
@pytest.mark.parametrize("heard", [True, False])
def test_an_echo_is_told_from_none(echo: bool | None, heard: bool) -> None:
    """Servers ignore it, and a saved answer need not say whether it was asked for."""
    given = {"tokens": ["token_id:4", "token_id:5"] * heard + ["token_id:6"],
             "token_logprobs": [None, -1.0] * heard + [-2.0]}  # fmt: skip
    choice = {"logprobs": given, "prompt_token_ids": [4, 5], "token_ids": [6]}
    request = {} if echo is None else {"prompt": [4, 5], "echo": echo}
    if heard and echo is False:
        return
    (answer,) = from_json({"choices": [choice]}, "here", request)
    assert answer.ids == [4, 5, 6]
    told = {1: {5: -1.0}, 2: {6: -2.0}} if heard else {2: {6: -2.0}}
    assert {r.place: r.log_p for r in answer.rows if r.log_p} == told


def test_texts_of_a_chat_do_not_cost_its_prompt() -> None:
    found = {"prompt_token_ids": [4, 5], "prompt_logprobs": [None, {"5": {"logprob": -1.0}}],
             "choices": [{"logprobs": {"content": [entry("x", -2.0)]}}]}  # fmt: skip
    for ids, rows in ((None, {1: {5: -1.0}}), ([6], {1: {5: -1.0}, 2: {6: -2.0}})):
        (answer,) = from_json({**found, "choices": [{**found["choices"][0], "token_ids": ids}]}, "here")
        assert {r.place: r.log_p for r in answer.rows if r.log_p} == rows and "keyed by text" in answer.notes[0]
    with pytest.raises(Qwen35Error, match="which name no ids"):
        from_json({**found, "prompt_logprobs": None}, "here")


def vllm(*rows: object) -> dict[str, object]:
    return {"choices": [{"prompt_logprobs": [None, *rows]}]}


def echoed(value: float | None, top: object) -> dict[str, object]:
    tokens = {"tokens": ["token_id:4", "token_id:5"], "token_logprobs": [None, value], "top_logprobs": [None, top]}
    return {"choices": [{"logprobs": tokens}]}


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("found", "log_p", "best"),
    [
        (vllm({"5": {"logprob": -1.0, "rank": 3}, "9": {"logprob": -0.5, "rank": 1}}), {5: -1.0, 9: -0.5}, 9),
        (vllm({"token_id:5": {"logprob": -1, "rank": 1, "decoded_token": "\ufffd"}}), {5: -1.0}, None),
        (vllm({"5": {"logprob": -INF}, "9": {"logprob": -0.5}}), {9: -0.5}, 9),
        (vllm({"5": {"logprob": -9999.0}, "9": {"logprob": -0.5}}), {9: -0.5}, 9),
        (vllm({"5": {"logprob": 1e-7}, "9": {"logprob": -20}}), {5: 1e-7, 9: -20.0}, 5),
        (echoed(-1.0, {"token_id:9": -0.5, "token_id:5": -1.0}), {5: -1.0, 9: -0.5}, 9),
        (echoed(-1.0, None), {5: -1.0}, None),
        (sglang([4, 5], input_top_logprobs=[None, [[-0.5, 9, None], [-2.0, 5, None], [-2.0, 5, "x"]]]),
         {5: -2.0, 9: -0.5}, 9),
        (sglang([4, 5], input_top_logprobs=[None, [[-0.5, 9, None], [None, 3, None]]]), {5: -2.0, 9: -0.5}, 9),
        (sglang([4, 5], input_top_logprobs=[None]), {5: -2.0}, None),
        (sglang([4, 5], input_top_logprobs=None), {5: -2.0}, None),
        ({"choices": [{"token_ids": [5], "logprobs": {"tokens": ["x"], "token_logprobs": [-1.0],
                                                      "top_logprobs": [{"x": -1.0, "y": -2.0}]}}]}, {5: -1.0}, None),
        ({"choices": [{"logprobs": {"content": [{"token_id": 5, "token": "x", "logprob": -1.0, "top_logprobs": []}]}}]},
         {5: -1.0}, None),
    ],
)  # fmt: skip
def test_values_in_every_form(found: object, log_p: dict[int, float], best: int | None) -> None:
    whole = "prompt_logprobs" in str(found) or "input_token" in str(found) or "token_id:4" in str(found)
    request = {"prompt": [4, 5] if whole else [4], "input_ids": [4, 5], "echo": "token_id:4" in str(found)}
    (answer,) = from_json(found, "here", request)
    assert answer.ids == [4, 5]
    (row,) = (r for r in answer.rows if r.log_p)
    assert (row.place, row.log_p, row.best) == (1, log_p, best)


@pytest.mark.parametrize(
    ("found", "what"),
    [
        (vllm(None), "the answer holds no log-probabilities"),
        (vllm({}), "the answer holds no log-probabilities"),
        (vllm({"5": {"logprob": INF}}), "log-probability above 0"),
        (vllm({"5": {"logprob": "-1"}}), "not a log-probability"),
        (vllm({"5": {}}), "not a log-probability"),
        (vllm({"-5": {"logprob": -1}}), "not a token id"),
        (vllm({"5" * 12: {"logprob": -1}}), "not a token id"),
        (sglang([4, 5], input_top_logprobs=[None, [[]]]), "not [log p, id, text]"),
        (sglang([4, 5], input_top_logprobs=[None, {"5": -1}]), "not a list"),
    ],
)
def test_values_that_are_none(found: object, what: str) -> None:
    with pytest.raises(Qwen35Error) as error:
        from_json(found, "here", {"prompt": [4, 5], "input_ids": [4, 5]})
    assert error.value.what == what


def test_nan_is_kept(tmp_path: Path) -> None:
    (tmp_path / "answer.json").write_text(json.dumps({"request": {"prompt": [4, 5]}, "response": vllm(
        {"5": {"logprob": NAN}})}))  # fmt: skip
    (answer,) = read_answers(tmp_path / "answer.json")
    (row,) = (r for r in answer.rows if r.log_p)
    assert str(row.log_p) == "{5: nan}" and row.best is None


@pytest.mark.parametrize("found", [
    vllm({"5": {"logprob": None}}), echoed(None, {"token_id:5": None}), {"completion_probabilities": [entry(5, None)]},
    {"meta_info": {"input_token_logprobs": [[None, 4, None], [None, 5, None]],
                   "input_top_logprobs": [None, [[None, 5, None]]]}},
])  # fmt: skip
def test_null_is_nan_where_a_server_has_no_other_word(found: dict[str, object]) -> None:
    whole = "completion_probabilities" not in found
    (answer,) = from_json(found, "here", {"prompt": [4, 5] if whole else [4], "input_ids": [4, 5]})
    (row,) = (r for r in answer.rows if r.log_p)
    assert answer.ids == [4, 5] and (row.place, str(row.log_p), row.best) == (1, "{5: nan}", None)


def npy(x: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, x, allow_pickle=True)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("found", "what"),
    [
        ([], "no answers"),
        ({}, "the answer holds no log-probabilities"),
        ([[[[]]]], "not an object"),
        ({"choices": [{}]}, "the answer holds no log-probabilities"),
        ({"choices": {}}, "not a list"),
        ({"meta_info": {"input_token_logprobs": [[-1]]}}, "not [log p, id, text]"),
        ({"meta_info": {"input_token_logprobs": [[-1, "x", None]]}}, "not a token id"),
        ({"meta_info": {"input_token_logprobs": [[-1, -4, None]]}}, "not a token id"),
        ({"meta_info": {"input_token_logprobs": [["-1", 4, None]]}}, "not a log-probability"),
        ({"meta_info": {"input_token_logprobs": [[0.4, 4, None]]}}, "log-probability above 0"),
        (sglang([1, 2], routed_experts="%%"), "routed_experts are no base64"),
        (sglang([1, 2], routed_experts="\u0661"), "routed_experts are no base64"),
        (sglang([1, 2], routed_experts="AAA="), "routed_experts are cut off"),
        (sglang([1, 2], input_top_logprobs={"a": 1}), "not a list"),
        (sglang([1, 2], output_token_logprobs=[[-1.0, 3, None]], output_top_logprobs=True), "not a list"),
        ({"choices": [{"prompt_logprobs": [None, {"1": {"logprob": -1}}], "routed_experts": npy(np.array([{}]))}]},
         "no whole .npy file"),
        ({"choices": [{"prompt_logprobs": [None, {"1": {"logprob": -1}}], "routed_experts": npy(np.zeros(3))}]},
         "routed_experts have the wrong shape"),
        ({"request": {"prompt": [1, 2, 3]}, "response": {"choices": [{"prompt_logprobs": [None, {"9": {"logprob": -1}},
         None]}]}}, "the answer is for other tokens"),
        ({"request": {"prompt": [[1, 2]]}, "response": {"choices": [{"index": 7}]}}, "a choice of no prompt"),
        ({"response": {"error": {"message": "out of memory\x1b[2J"}}}, "the server refused"),
    ],
)  # fmt: skip
def test_hostile_answers_are_errors(found: object, what: str) -> None:
    with pytest.raises(Qwen35Error) as error:
        from_bytes(json.dumps(found).encode(), "here")
    assert error.value.what == what
    assert str(error.value).isascii() and "\x1b" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "9" * 5000, "\x00", '{"meta_info": ' * 3000])
def test_text_that_is_no_json_is_an_error(text: str) -> None:
    with pytest.raises(Qwen35Error):
        from_bytes(text.encode(), "here")


# ---- real answers, judged


def test_real_engines_differ_by_no_more_than_rounding(tmp_path: Path) -> None:
    """SGLang 0.5.17 on an H200 in bf16, and llama-server, each on the checkpoint that it served."""
    path = build(DATA.parent / "real" / "engine-size.toml", tmp_path / "size", flat=True, mtp=False)
    for folder, name in ((path, "sglang_bf16"), (FIXTURE, "llamacpp_completion_n_predict0")):
        opened = open_checkpoint(folder)[1]
        answers = read_answers(DATA / f"{name}.json")
        how = How(faults="none", more=0)
        verdict = prepare(opened.source, opened.fused, [a.ids for a in answers], how).judge(answers)
        assert verdict.positions == sum(bool(r.log_p) for a in answers for r in a.rows)
        assert all(q.ratio < 1.5 for q in verdict.quantiles), verdict.evidence
        assert verdict.finding == "cannot tell without a dump"  # no fault was replayed: who knows what would be seen
        if name == "sglang_bf16":
            assert "experts: 264 of 276 sets as the truth's" in verdict.evidence


# ---- a server, asked


def asked(log_p: LogP, known: Prepared, api: str = "vllm", top: int = 8) -> list[Answer]:
    """What a server in this dialect, with these log p, answers to the prompts."""
    vocab = known.replay.config.vocab_size
    with serving(Dialects(log_p, api, vocab)) as url:
        return [*Asker(Server(url), api, top, vocab).ask(known.ids)]


def test_a_fault_in_a_batch_is_what_it_is_alone(loaded: Loaded, known: Prepared) -> None:
    """Replayed hypotheses share products; here each fault runs by itself, through the model and its own handlers."""
    ids, replay = known.ids[0], known.replay
    rows = torch.zeros(len(ids), dtype=torch.long), torch.arange(len(ids))
    clean = planted(loaded, "float32", None, None)(ids)
    listed = [b for b in known.branches if b.hypothesis and b.hypothesis.layer in (None, 1)]
    assert len(listed) > 100
    for branch, h in ((b, b.hypothesis) for b in listed[::2] if b.hypothesis):
        alone = planted(loaded, "float32", h.fault, h.layer, h.expert)(ids)
        together = torch.cat([x for _, x in replay.log_p(branch, rows)])
        assert float((together - alone).abs().max()) < FLOAT32_LOG_P, branch.name
        assert h.fault.rounds or not torch.equal(alone, clean), branch.name


@pytest.mark.parametrize("api", ENGINES)
def test_every_dialect_tells_a_clean_engine_from_a_broken_one(api: str, loaded: Loaded, known: Prepared) -> None:
    vocab = loaded.source.config.vocab_size
    for fault, finding in (("", "agrees"), ("gate and up swapped", "diverges"))[:: 1 if api in JUDGED else 2]:
        with serving(Dialects(engine(loaded, fault=fault, layer=1 if fault else None), api, vocab)) as url:
            asker = Asker(Server(url), "auto", 8, vocab)
            assert asker.api == api
            verdict = known.judge([*asker.ask(known.ids)])
        if api == "trtllm" and not fault:  # one log p a position, of a token that it names by its id
            assert verdict.finding == "cannot tell without a dump" and "rotary theta 10000" in verdict.why
            continue
        assert verdict.finding == finding, verdict
        if fault:
            assert verdict.alike[0].name == "gate and up swapped, layer 1"


@pytest.mark.parametrize("arithmetic", ["transformers-bf16", "exact"])
def test_other_arithmetics_agree(arithmetic: str, loaded: Loaded, known: Prepared) -> None:
    assert known.judge(asked(engine(loaded, arithmetic), known)).finding == "agrees"


def test_a_fault_below_the_noise_of_one_position_is_found_by_all_of_them(loaded: Loaded, known: Prepared) -> None:
    """The median is not surely beyond the limit: the direction of the differences tells."""
    verdict = known.judge(asked(engine(loaded, fault="last chosen expert dropped", layer=1), known, top=20))
    assert verdict.finding == "diverges" and verdict.quantiles[0].low < LIMIT
    assert verdict.suspect is not None and verdict.suspect.sure > DECIDED
    assert verdict.alike[0].name == "last chosen expert dropped, layer 1"


def test_answers_that_do_not_tell_their_first_token(loaded: Loaded, known: Prepared) -> None:
    """vLLM, saved without the request and without ids: each is matched by its other tokens."""
    answers = asked(engine(loaded), known)
    for answer in answers:
        answer.ids[0] = UNKNOWN
    verdict = known.judge(answers)
    assert verdict.finding == "agrees" and verdict.sequences == len(known.ids)
    for answer in answers:  # now by none
        answer.ids = [UNKNOWN] * len(answer.ids)
    with pytest.raises(Qwen35Error, match="for other tokens"):
        known.judge(answers)


def test_a_temperature_that_is_not_told_accuses_nobody(loaded: Loaded, known: Prepared) -> None:
    vocab, log_p = loaded.source.config.vocab_size, engine(loaded)
    with serving(Dialects(log_p, "sglang", vocab)) as url:
        answers = [a for p in known.ids * 2 for a in Asker(Server(url), "sglang", 8, vocab).together([p], 12)]
    for answer in answers:
        for row in (r for r in answer.rows if r.place >= ASKED[1]):
            warm = (log_p(answer.ids)[row.place - 1] / 0.6).log_softmax(-1)
            row.log_p.update({i: float(warm[i]) for i in row.log_p})
    assert known.judge(answers).why.startswith("in decode: ")
    for answer in answers:
        answer.warm = True
    verdict = known.judge(answers)
    assert verdict.finding == "agrees" and "look like log p after temperature 0.6" in verdict.notes[-1]
    answers = asked(lambda ids: (log_p(ids) / 0.7).log_softmax(-1), known, "openai")
    assert known.judge(answers).finding == "diverges"  # at temperature 0, nothing but the engine divides by one
    for answer in answers:
        answer.warm = True
    verdict = known.judge(answers)
    assert verdict.exit_code == 2 and "look like log p after temperature 0.7" in verdict.why


def test_few_positions_cannot_tell(loaded: Loaded, known: Prepared) -> None:
    answers = asked(engine(loaded), known, top=1)
    answers[0].rows = answers[0].rows[:4]
    verdict = known.judge(answers[:1])
    assert verdict.finding == "cannot tell without a dump"
    assert "rotary theta 10000, all layers" in verdict.unseen


def test_a_few_positions_are_sure_of_no_quantile(loaded: Loaded, known: Prepared) -> None:
    """Three of three are beyond the limit: one flip of an expert does that, which legal arithmetics make too."""
    answers = asked(engine(loaded), known)[:1]
    answers[0].rows = answers[0].rows[:3]
    for row in answers[0].rows:
        row.log_p.update({i: x - 0.5 * (i % 2) for i, x in row.log_p.items()})
    verdict = known.judge(answers)
    assert verdict.quantiles[1].ratio > 3.5 and verdict.finding == "cannot tell without a dump", verdict
    for n, q, low, high in ((1, 0.9, -1, 1), (3, 0.75, -1, 3), (11, 0.5, 0, 10), (400, 0.75, 270, 328)):
        assert surely(n, q) == (low, high)


def test_all_of_the_vocabulary(loaded: Loaded, known: Prepared) -> None:
    vocab = loaded.source.config.vocab_size
    with serving(Dialects(engine(loaded, "exact"), "llama.cpp", vocab)) as url:
        verdict = known.judge([*Asker(Server(url), "llama.cpp", -1, vocab).ask(known.ids[:1])])
    said = re.fullmatch(r"all (\d+) log p told: \|delta\| median (\S+), largest (\S+)", verdict.evidence[-1])
    assert said is not None and int(said[1]) == (ASKED[1] - 1) * vocab and float(said[3]) < FLOAT64_REORDERED


def test_experts_are_judged_with_the_log_p(loaded: Loaded, known: Prepared) -> None:
    truth = known.branches[0].routing
    right = torch.stack([ids.view(*ASKED, -1) for _, ids in truth], 2)  # [B, T, layers, A]
    answers = asked(engine(loaded), known, "sglang")
    for answer, ids in zip(answers, right, strict=True):
        answer.routed = ids.flatten()
    assert known.judge(answers).finding == "agrees"
    for answer, ids in zip(answers, right, strict=True):
        answer.routed = (ids + torch.tensor([0, 1])[:, None]).remainder(6).flatten()
    verdict = known.judge(answers)
    assert verdict.finding == "diverges" and verdict.why.startswith("layer 1: ")


def test_a_fault_of_cached_states_alone_is_found_and_named(loaded: Loaded, known: Prepared) -> None:
    """The prompt in one request is right; fed one token at a time, from a cache, it is not."""
    vocab, answers = loaded.source.config.vocab_size, dict[bool, list[Answer]]()
    whole = list[Answer]()
    for broken, fault in ((False, ""), (True, "gate and up swapped")):
        with serving(Dialects(engine(loaded, fault=fault, layer=1 if fault else None), "sglang", vocab)) as url:
            asker = Asker(Server(url), "auto", 8, vocab)
            answers[broken] = [a for ids in known.ids for a in asker.grown(ids, 1)]
            whole = whole or asker.together([known.ids[0]]) + asker.together(known.ids[1:])
    assert all(len(a.rows) == 1 for a in answers[True])
    verdict = known.judge([*whole, *answers[True]])
    assert verdict.finding == "diverges" and verdict.why.startswith("asked again: ")
    assert verdict.alike[0].name == "gate and up swapped, layer 1"


def test_nan_is_a_verdict(loaded: Loaded, known: Prepared) -> None:
    answers = asked(engine(loaded), known, "sglang")
    answers[1].rows[5].log_p[known.ids[1][5]] = float("nan")
    verdict = known.judge(answers)
    assert (verdict.finding, verdict.why) == ("diverges", "log p at 1 of 96 positions are NaN")


def test_a_fault_of_decode_alone_is_found(loaded: Loaded, known: Prepared) -> None:
    """Prompts are right, and so is what follows one token; the cached state is wrong from the second on."""
    right, wrong, vocab = engine(loaded), engine(loaded, fault="gate and up swapped"), loaded.source.config.vocab_size
    for broken, finding in ((False, "agrees"), (True, "diverges")):
        answers = []
        for ids in known.ids * 2:
            with serving(Dialects(right, "vllm", vocab)) as url:
                (answer,) = Asker(Server(url), "vllm", 8, vocab).together([ids], 12)
            for row in answer.rows:
                if row.place > len(ids):
                    log_p = (wrong if broken else right)(answer.ids)[row.place - 1]
                    row.log_p.update({i: float(log_p[i]) for i in row.log_p})
            answers.append(answer)
        verdict = known.judge(answers)
        assert verdict.finding == finding, verdict
        assert verdict.why.startswith("in decode: ") == broken


def test_generated_tokens_that_are_counted_wrongly_are_named(loaded: Loaded, known: Prepared) -> None:
    """Where layers are many, their log p move by less than a quantile shows."""
    model = build_model(loaded.source, arithmetics.get("sglang-bf16"), loaded.fused, CPU, "decoded")
    vocab, n = loaded.source.config.vocab_size, ASKED[1]

    def counted(by: int) -> LogP:
        def log_p(ids: list[int]) -> Tensor:
            places = torch.arange(len(ids))
            where = places + by * (places >= n)
            return model(torch.tensor([ids]), position_ids=where[None])[0].double().log_softmax(-1)

        return cached(log_p)

    for by, name in ((0, ""), (1, "positions one too high"), (-1, "positions one too low")):
        with serving(Dialects(counted(by), "sglang", vocab)) as url:
            verdict = known.judge([*Asker(Server(url), "auto", 8, vocab).ask(known.ids)])
        assert verdict.finding == ("diverges" if by else "agrees"), verdict
        assert not by or (verdict.why.startswith("in decode: ") and verdict.alike[0].name == name), verdict


def test_a_prompt_may_begin_as_another_one_does(loaded: Loaded) -> None:
    """What the longer one adds is no generated token, and what follows it is generated after all of it."""
    vocab, (short, more) = loaded.source.config.vocab_size, drawn_prompts(loaded.source.config, 2, 20)
    ids = [short, [*short, *more]]
    known = prepare(loaded.source, loaded.fused, ids, How(faults="none"))
    for api in ("sglang", "llama.cpp"):  # all tokens in one request, and one a request
        with serving(Dialects(cached(engine(loaded)), api, vocab)) as url:
            answers = [a for one in ids for a in Asker(Server(url), api, 8, vocab).ask([one])]
        verdict = known.judge(answers)
        assert verdict.sequences == 2 and verdict.positions > 30, verdict
    whole = [[*short, 7, 8], [*ids[1], 7, 8]]
    replay = Replay(loaded.source, loaded.fused, *(padded([torch.tensor(x) for x in whole])))
    wrong = known._counted_wrongly(whole, replay.positions)["positions one too high"] - replay.positions
    assert wrong.sum(1).tolist() == [replay.ids.shape[1] - 20, 2]


def test_another_model_is_called_another_model(loaded: Loaded, known: Prepared) -> None:
    vocab = loaded.source.config.vocab_size

    def other(ids: list[int]) -> Tensor:
        words = (torch.arange(len(ids))[:, None] * 7919 + torch.arange(vocab)[None] * 104729) % 1009
        return (words / 100.0).double().log_softmax(-1)

    verdict = known.judge(asked(other, known))
    assert verdict.finding == "diverges" and "another model" in verdict.notes[0]
    with serving(Dialects(lambda ids: torch.zeros(len(ids), 512).log_softmax(-1), "vllm", 512)) as url:
        answers = [*Asker(Server(url), "vllm", 512, 512).ask(known.ids)]
    with pytest.raises(Qwen35Error, match="it serves another model"):
        known.judge(answers)


def test_answers_for_other_tokens_are_not_judged(loaded: Loaded, known: Prepared) -> None:
    vocab = loaded.source.config.vocab_size
    with serving(Dialects(engine(loaded), "vllm", vocab)) as url:
        answers = [*Asker(Server(url), "vllm", 1, vocab).ask([[5, 5, 5, 5]])]
    with pytest.raises(Qwen35Error, match="for other tokens"):
        known.judge(answers)


@pytest.mark.parametrize("api", ["sglang", "vllm"])
def test_a_kernel_that_is_wrong_at_four_is_found_there(api: str, loaded: Loaded, known: Prepared) -> None:
    vocab, right = loaded.source.config.vocab_size, engine(loaded)

    def log_p(ids: list[int]) -> Tensor:
        return right(ids) if dialects.batch != 4 else (right(ids) * 1.5).log_softmax(-1)

    dialects = Dialects(log_p, api, vocab)
    with serving(dialects) as url:
        asker = Asker(Server(url), api, 8, vocab)
        found = buckets(asker, known.ids[0], [1, 4, 5], float(known.expect(8).sigma.median()))
    assert [b.name for b in found if b.bad] == ["batch of 4, prompt", "batch of 4, decode"]
    assert all(b.rows for b in found)
    assert "fed 4 at a time" in [b.name for b in found]


# ---- the network


def test_one_address_no_redirect_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serving(lambda *_: (200, {"fine": 1})) as there, serving(lambda *_: (302, {"to": there})) as here:
        assert Server(there).call("/x") == {"fine": 1}
        with pytest.raises(Qwen35Error, match="redirects are not followed"):
            Server(here).call("/x")


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(API_KEY, "s3cret")
    seen = []

    def reply(_: str, __: object, headers: dict[str, str]) -> tuple[int, object]:
        seen.append(headers["Authorization"])
        return 401, {"error": f"bad key {headers['Authorization']}"}

    with serving(reply) as url, pytest.raises(Qwen35Error) as error:
        Server(url).call("/x")
    assert seen == ["Bearer s3cret"] and "s3cret" not in str(error.value) and API_KEY in str(error.value)
    for found, path in ((b'{"s3cret": 1, "s3cret": 2}', "repeated"), (b"s3cret{", "JSON")):
        with serving(lambda *_, found=found: (200, found)) as url, pytest.raises(Qwen35Error, match=path) as error:
            Server(url).call("/x")
        assert "s3cret" not in str(error.value)
    saver(tmp_path / "answers.jsonl")({"request": {}, "response": {"s3cret": ["Bearer s3cret", 1, None, {"a": -0.5}]}})
    assert json.loads((tmp_path / "answers.jsonl").read_text())["response"] == {
        "***": ["Bearer ***", 1, None, {"a": -0.5}]
    }
    with serving(lambda *_: (403, {})) as url, pytest.raises(Qwen35Error, match="refused") as error:
        detect(Server(url))
    assert API_KEY in error.value.do
    monkeypatch.setenv(API_KEY, "s3c\nret")  # no key
    with serving(lambda *_: (200, {})) as url, pytest.raises(Qwen35Error) as error:
        Server(url, retries=0).call("/x")
    assert "s3c" not in str(error.value) and API_KEY in str(error.value)


def test_a_server_that_is_busy_says_when_it_may_be_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    states, pauses = iter([429, 200, 429]), list[float]()
    monkeypatch.setattr(client.time, "sleep", pauses.append)
    with serving(lambda *_: (next(states), {"n": 1})) as url:
        assert Server(url).call("/x") == {"n": 1}
        assert pauses == [1.0]
        with pytest.raises(Qwen35Error, match="429"):
            Server(url, retries=0).call("/x")


@pytest.mark.parametrize("status", [200, 404, 502])
def test_pages_for_people_are_errors(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a proxy says for the server."""
    monkeypatch.setattr(client, "PAUSE", 0.01)
    page = b"<!doctype html><html><script>alert(1)</script>\x1b[31mBad Gateway" + b" " * 9000
    with serving(lambda *_: (status, page)) as url, pytest.raises(Qwen35Error) as error:
        Server(url).call("/v1/models")
    assert error.value.what == ("not valid JSON" if status == 200 else "the server refused")
    assert "\x1b" not in str(error.value) and len(str(error.value)) < 600


def test_an_answer_in_chunks_is_read_and_one_that_breaks_off_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAUSE", 0.01)
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    cut = (head + b'5\r\n{"a":\r\n9\r\n 1', b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{", b"garbage\r\n\r\n")
    whole = head + b'5\r\n{"a":\r\n3\r\n 1}\r\n0\r\n\r\n'
    for data in (whole, *cut):
        with raw(data) as url:
            if data == whole:
                assert Server(url, retries=0).call("/x") == {"a": 1}
            else:
                with pytest.raises(Qwen35Error, match="cannot be reached"):
                    Server(url, retries=0).call("/x")


@contextmanager
def raw(data: bytes, drips: int = 0) -> Iterator[str]:
    """A server that sends these bytes to the first who asks, then some more one at a time, and ends."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        peer, _ = listener.accept()
        with peer, suppress(OSError):  # the client has had enough
            peer.recv(1 << 16)
            peer.sendall(data)
            for _ in range(drips):
                time.sleep(0.02)
                peer.sendall(b" ")

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    with listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def test_what_fails_on_the_way_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAUSE", 0.01)
    states = iter([503, 500, 200, 503, 503])
    count = []

    def reply(*_: object) -> tuple[int, object]:
        count.append(1)
        return next(states), {"n": len(count)}

    with serving(reply) as url:
        assert Server(url).call("/x") == {"n": 3}
        with pytest.raises(Qwen35Error, match="refused"):
            Server(url, retries=1).call("/x")
    assert len(count) == 5


def test_slow_down_large_and_garbled_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAUSE", 0.01)
    stop = threading.Event()

    def reply(path: str, _: object, __: object) -> tuple[int, object]:
        if path == "/slow":
            stop.wait(5)
        return 200, {"/large": b"[" + b"1," * 5000 + b"1]", "/garbled": b"\xff{"}.get(path, {})

    with serving(reply) as url:
        server = Server(url, timeout=0.2, retries=0, largest=4096)
        for path, what in (("/slow", "slow"), ("/large", "too large"), ("/garbled", "not valid JSON")):
            with pytest.raises(Qwen35Error, match=what):
                server.call(path)
        stop.set()
    with pytest.raises(Qwen35Error, match="cannot be reached"):
        Server(url, retries=1).call("/x")


def test_a_server_that_drips_is_cut_off() -> None:
    """Each byte comes in time, and the answer never ends."""
    head, start = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", time.monotonic()
    with raw(head, drips=200) as url, pytest.raises(Qwen35Error, match="slow"):
        Server(url, timeout=0.3, retries=0).call("/x")
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    "url", ["ftp://x", "x:80", "http://", "http://a:b@c", "http://x:99999", "http://x?y=1", "http://[", ""]
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(Qwen35Error):
        Server(url)


# ---- prompts and commands


def test_prompts_are_ordinary_tokens_and_the_same_everywhere(loaded: Loaded) -> None:
    config = loaded.source.config
    ids = drawn_prompts(config, 3, 40)
    assert ids[0][:6] == drawn_prompts(config, 1, 40)[0][:6] != drawn_prompts(config, 1, 40, seed=1)[0][:6]
    assert max(map(max, ids)) < ordinary(config) < config.vocab_size


def test_the_command_and_answers_that_it_saved(
    checkpoint: Path, loaded: Loaded, known: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    vocab = loaded.source.config.vocab_size
    write_truth(checkpoint, known.ids, tmp_path / "truth", taps="next_token_logits", with_envelope=False)
    monkeypatch.setattr("qwen35_moe.cli.probe.prepare", lambda *_, **__: known)
    options = ["--prompts", str(ASKED[0]), "--tokens", str(ASKED[1]), "--top", "8"]
    files = {name: tmp_path / f"answers.{name}" for name in ("jsonl", "json", "html")}
    for fault, code, word in (("", 0, "AGREES"), ("shared expert dropped", 1, "DIVERGES")):
        with serving(Dialects(engine(loaded, fault=fault), "sglang", vocab)) as url:
            ask = ["probe", str(checkpoint), url, *options, "--batch", "2", "--save", str(files["jsonl"]),
                   "--json", str(files["json"]), "--html", str(files["html"])]  # fmt: skip
            assert main(ask) == code
        out = capsys.readouterr().out
        assert word in out and "sees" in out and "batch of 2, decode" in out
        assert ("DUMPER_FILTER" in out) == bool(code)
        assert json.loads(files["json"].read_text())["finding"] == word.lower()
        assert word.lower() in files["html"].read_text()
        assert main(["compare", str(tmp_path / "truth"), str(files["jsonl"])]) == code
        assert word in capsys.readouterr().out


def test_the_command_says_what_is_wrong(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = partial(main, ["probe", str(checkpoint), "http://127.0.0.1:9", "--retries", "0", "--timeout", "2"])
    assert run() == 2
    assert "the server cannot be reached" in capsys.readouterr().err
    with serving(lambda *_: (404, {})) as url:
        assert main(["probe", str(checkpoint), url]) == 2
    assert "which engine this is cannot be told" in capsys.readouterr().err
    with serving(lambda *_: (200, {"data": [{"id": "a", "owned_by": "vllm"}, {"id": "b", "owned_by": "vllm"}]})) as url:
        assert main(["probe", str(checkpoint), url]) == 2
    assert "a, b" in capsys.readouterr().err


def test_hypotheses_together_have_the_log_p_of_each(known: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    r, some = known.replay, known.branches[known.members + 1 :: 9]
    rows = torch.arange(len(known.ids)).repeat_interleave(5), torch.arange(5).repeat(len(known.ids))
    ids = torch.randint(r.config.vocab_size, (len(rows[0]), 3), generator=torch.Generator().manual_seed(0))
    each = torch.stack([r.gather(b, rows, ids) for b in some])
    monkeypatch.setattr(replay, "LOGITS_HELD", 1 << 12)
    for module in (replay, streamed):
        monkeypatch.setattr(module, "HEAD_ROWS", 100)
    assert len(some) > 3 and rel_l2(r.gather_all(some, rows, ids), each) <= 1e-6  # float32
    assert r.gather_all([], rows, ids).shape == (0, *ids.shape)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("faults", ["all", "each"])
def test_every_fault_is_replayed_on_a_gpu(loaded: Loaded, faults: str) -> None:
    ids = drawn_prompts(loaded.source.config, *ASKED)
    here, there = (
        prepare(loaded.source, loaded.fused, ids, How(faults=faults, where=w)) for w in (HERE, Where("cuda"))
    )
    assert [b.name for b in here.branches] == [b.name for b in there.branches]
    assert rel_l2(there.branches[0].stream.cpu(), here.branches[0].stream) <= FLOAT64_REORDERED
    assert all(bool(b.stream.isfinite().all()) == bool(a.stream.isfinite().all())
               for a, b in zip(here.branches, there.branches, strict=True))  # fmt: skip


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
@pytest.mark.parametrize("recipe", ["tiny", "tiny-fp8", "tiny-mxfp4"])
@pytest.mark.parametrize("mode", ["decoded", "stream"])
def test_layers_with_a_fault_have_the_same_weights_on_a_gpu(small: Callable[..., Path], recipe: str, mode: str) -> None:
    source = open_checkpoint(small(recipe))[1].source
    place, table = FaultSite(source.config, torch.zeros(1, 1), expert=2), arithmetics.get("float32")
    here, there = (
        Layers(source, lambda _: torch.device("cpu"), mode),
        Layers(source, lambda _: torch.device("cuda"), mode),
    )
    for i in range(source.config.num_hidden_layers):
        for fault in (f for f in FAULTS if f.block in ("mlp", "gdn", "attn") and f.applies(source, i, a4=False)):
            if fault.block == "mlp" or KINDS[fault.block] == source.config.layer_types[i]:
                ours, theirs = (layers.broken(i, table, False, fault, place) for layers in (there, here))
                assert ours.mlp.experts.count == theirs.mlp.experts.count, fault.name
                for e in range(theirs.mlp.experts.count):
                    for a, b in zip(ours.mlp.experts.at(e), theirs.mlp.experts.at(e), strict=True):
                        assert torch.equal(a.cpu(), b), (fault.name, e)
                theirs_by_name = dict(theirs.named_parameters())
                for name, x in ours.named_parameters():
                    assert ".experts." in name or torch.equal(x.cpu(), theirs_by_name[name]), (fault.name, name)
