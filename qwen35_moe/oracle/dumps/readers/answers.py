"""Saved answers of servers (SGLang's /generate, vLLM's and llama.cpp's).

One step an answer: its routed experts, and log p of the tokens that it names, the prompt's own and the likeliest K.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ....errors import Qwen35Error
from ...servers.answer import UNKNOWN, Answer, shaped
from ...servers.readers import read_answers
from ..dump import Dump, Piece, StepTokens
from ..engine_names import text_config
from ..pieces import itself

JSON_SUFFIXES = (".json", ".jsonl")


def known(file: Path) -> bool:
    return file.suffix in JSON_SUFFIXES


def sniff(path: Path) -> bool:
    return path.is_file() and known(path) and any(UNKNOWN not in answer.ids for answer in read_answers(path))


def read(path: Path, *, config: Mapping[str, Any] | None = None, **_: Any) -> Dump:
    answers = read_answers(path)
    text = text_config(config)
    pieces, tokens, notes, problems = list[Piece](), dict[int, StepTokens](), list[str](), list[Qwen35Error]()
    width = max((len(row.log_p) for answer in answers for row in answer.rows), default=0)
    for step, answer in enumerate(answers):
        notes += answer.notes
        if UNKNOWN in answer.ids:
            problems.append(Qwen35Error("an answer does not say all of its tokens", where=f"{path}, answer {step}",
                                        do="ask with ids in the answer, or save the request with it"))  # fmt: skip
            continue
        ids = torch.tensor(answer.ids)
        tokens[step] = StepTokens(ids, torch.arange(len(ids)))
        if answer.routed is not None and text.get("num_hidden_layers"):
            pieces += _routing(answer, step, text, str(path))
        pieces += _log_p(answer, step, width, str(path))
    dump = Dump("answers", path, pieces, tokens, problems, list(dict.fromkeys(notes)), config=config)
    dump.accepted = {step: answer.accepted for step, answer in enumerate(answers) if answer.accepted is not None}
    return dump


def _routing(answer: Answer, step: int, text: Mapping[str, Any], where: str) -> list[Piece]:
    assert answer.routed is not None
    ids = shaped(answer.routed, text["num_hidden_layers"], text["num_experts_per_tok"], where)
    rows = torch.arange(min(len(ids), len(answer.ids)))  # a request's last token has no routing
    return [
        Piece(f"routed_experts[{i}]", partial(itself, ids[: len(rows), i]), step, layer=i, path="moe_topk_ids",
              where=where, rows=rows)
        for i in range(ids.shape[1])
    ]  # fmt: skip


def _log_p(answer: Answer, step: int, width: int, where: str) -> list[Piece]:
    """log p of up to `width` tokens a row; rows with fewer repeat their first. A row is that of the token before."""
    found = [row for row in answer.rows if row.place > 0 and row.log_p]
    if not found:
        return []
    some = [list(row.log_p.items()) for row in found]
    some = [[*row, *[row[0]] * (width - len(row))] for row in some]
    values = torch.tensor([[log_p for _, log_p in row] for row in some], dtype=torch.float32)
    chosen = torch.tensor([[i for i, _ in row] for row in some])
    key = "next_token_logits"
    return [Piece("log p", partial(itself, values), step, path=key, key=key, where=where, chosen=chosen,
                  rows=torch.tensor([row.place - 1 for row in found]))]  # fmt: skip
