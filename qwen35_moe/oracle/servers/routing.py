"""The experts of an answer are judged as those of a dump: as sets; a flip within the noise of the logits is legal.

The noise is what the legal arithmetics make of a router logit of that token by then, flips in the layers before among
it. Since those move logits by more than a few runs show, a layer counts as wrong only if it has more illegal flips than
FAR times what a legal arithmetic has when it is judged by the others, and FLIPS_ALLOWED besides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..judge.routing import Routing, compare_ids
from .answer import FAR, Answer, shaped
from .replay import Branch

FLIPS_ALLOWED = 3


def judge_routing(
    answers: Sequence[Answer], ids: Sequence[Sequence[int]], width: int, branches: Sequence[Branch], members: int
) -> tuple[list[str], list[str]]:
    """(what speaks against the engine, what else to say). `width`: T of the padded prompts; `branches`: the truth's and
    `members` legal ones, with routing."""
    truth = branches[0].routing
    picked, theirs = list[int](), list[Tensor]()
    for answer in answers:
        b = next((b for b, known in enumerate(ids) if answer.ids[: len(known)] == list(known)), None)
        if answer.routed is not None and b is not None:
            A = truth[0][1].shape[-1]
            found = shaped(answer.routed, len(truth), A, f"{answer.engine}: routed_experts")
            n = min(len(ids[b]), len(found))
            picked += range(b * width, b * width + n)
            theirs.append(found[:n])
    if not picked:
        return [], []
    rows, engine = torch.tensor(picked), torch.cat(theirs)
    wrong, flips, total = list[str](), 0, 0
    for i, (logits, chosen) in enumerate(truth):
        ours = logits.flatten(0, -2)[rows]
        legal = [b.routing[i] for b in branches[1 : members + 1]]
        off = torch.stack([(x.flatten(0, -2)[rows] - ours).abs().amax(1) for x, _ in legal])
        sets = chosen.flatten(0, -2)[rows]
        result = compare_ids(sets, engine[:, i], ours, off.amax(0), i)
        others = [
            compare_ids(sets, x.flatten(0, -2)[rows], ours, torch.cat((off[:m], off[m + 1 :])).amax(0), i)
            for m, (_, x) in enumerate(legal)
        ]
        flips, total = flips + len(result.flips), total + result.tokens
        most = max(_illegal(r) for r in others)
        if _illegal(result) > FAR * most + FLIPS_ALLOWED:
            wrong.append(f"layer {i}: {_illegal(result)} of {result.tokens} sets of experts are none that rounding "
                         f"makes (legal arithmetics: {most})")  # fmt: skip
    return wrong, [f"experts: {total - flips} of {total} sets as the truth's"]


def _illegal(r: Routing) -> int:
    return len(r.illegal) + r.nonsense
