"""Who is to blame for a bad tap, and what excuses it.

Suspects are the blocks that ran since the last value of the engine was put in. A sum starts from the residual stream, a
block from its norm's output. A block that another tap shows to be right is no suspect.

A tap near the limit gets a second look, since few arithmetics are few samples of a random error. A Gaussian error
exceeds 3 times the largest of 4 such errors once in 70 rows, and of 20 such errors once in 60,000. So up to SAMPLES
more are made, for ratios from LOOK on (below it no tap is clean by luck) up to DOUBTFUL_LIMITS limits (above them no
rounding is the cause).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ...numerics.arithmetics import Arithmetic
from ...numerics.tap_keys import base_name
from .records import BlockId, Record
from .replay import Captured
from .rerun import Rerun, Taps
from .split_k import samples

RESIDUAL = "pre_mlp_residual"
UNSAID = (
    "beyond the limit, where legal experts may be others than the truth's: dump moe_topk_ids, or give the checkpoint"
)
CACHED = (
    "beyond the limit in rows after cached tokens, whose experts may legally be others than the truth's: dump the "
    "prompt without a prefix cache"
)
FLIPS = 0.05  # of a layer's tokens have legally other experts: 47 of 1052 in SGLang 0.5.17 on a slice of the 35B
# Cached values carry the errors of all layers before, which the rerun's do not: clean runs in W8A8 reached 1.36 limits,
# the least unlisted fault of the score made 1.74.
CACHED_LIMITS = 1.5
SAMPLES, TABLES_PER_BATCH = 24, 4
LOOK, DOUBTFUL_LIMITS = 2.0, 4.0


def suspects(captured: Captured, kinds: Sequence[str]) -> dict[BlockId, list[BlockId]]:
    """(layer, block) -> (layer, block) of all that may have made an error there, in order of execution.

    The two sums of a layer stand under RESIDUAL and "stream".
    """
    found: dict[BlockId, list[BlockId]] = {}

    def through(before: list[BlockId], layer: int | None, *steps: tuple[str, str]) -> list[BlockId]:
        for block, output in steps:
            before = found[layer, block] = [*before, (layer, block)]
            if output in captured:
                before = []
        return before

    stream = found[None, "stream"] = through([], None, ("embedding", "embed_tokens"))
    for i, kind in enumerate(kinds):
        at = f"layers.{i}."
        if f"{at}layer_input" in captured:
            stream = []
        added = through(stream, i, ("input_layernorm", f"{at}input_layernorm"), (kind, f"{at}attn_output"))
        stream = found[i, RESIDUAL] = list(dict.fromkeys([*stream, *added]))
        if at + RESIDUAL in captured:
            stream = []
        norm = ("post_attention_layernorm", f"{at}pre_mlp_layernorm_output")
        added = through(stream, i, norm, ("mlp", f"{at}mlp_output"))
        stream = found[i, "stream"] = list(dict.fromkeys([*stream, *added]))
        if f"{at}layer_output_sum" in captured:
            stream = []
    through(stream, None, ("final_norm", "final_norm"), ("head", ""))
    return found


def accuse(records: Sequence[Record], found: Mapping[BlockId, list[BlockId]], cleared: set[BlockId]) -> None:
    """Write the suspects of a layer's bad records. `cleared` are the blocks whose output good records, from the
    embedding on, depend on: all but their own blocks, of which a tap shows only a part. Taps of ids clear no block,
    since ids often agree in spite of an error."""
    for r in records:
        if r.cls in ("bit-equal", "within rounding") and not r.key.endswith((".gain", "_ids")):
            cleared.update(found.get(place_of(r), [])[:-1])
    for r in records:
        if r.bad and not r.key.endswith(".gain"):  # a gain is made of weights alone
            r.suspects = [place for place in found.get(place_of(r), []) if place not in cleared]


def place_of(r: Record) -> BlockId:
    """Where the suspects of a record stand."""
    return (r.layer, RESIDUAL if base_name(r.key).startswith(RESIDUAL) else r.block)


def excuse(records: Sequence[Record], excuses: Callable[[Record], str]) -> None:
    """Give no verdict on the bad records that something excuses."""
    for r in [r for r in records if r.bad and not r.nan]:
        if reason := excuses(r):
            r.cls, r.note, r.starts = "not comparable", reason, []


def other_experts(r: Record, found: Mapping[BlockId, list[BlockId]], work: Any) -> str:
    """Excuses a few bad rows that all come at or after a token whose experts may legally be others, in layers before
    whose choice and output the dump does not hold. Few: FLIPS of the rows a layer, and one; none in an engine that
    computes in float32. In a state the row of a sequence is that after its end."""
    if r.key not in work.bad_at or all(name.startswith("float32") for name in work.result.members):
        return ""
    B, T = work.alignment.truth.ids.shape
    layers = [i for i, block in found.get(place_of(r), []) if block == "mlp" and i in work.undecided]
    before = [work.undecided[i].view(B, T) for i in layers if i is not None and (r.layer is None or i < r.layer)]
    loose_BT = torch.stack(before).any(0) if before else torch.zeros(B, T, dtype=torch.bool)
    first_B = torch.where(loose_BT.any(1), loose_BT.int().argmax(1), T + 1)
    b, t = work.bad_at[r.key].long().unbind(1)
    few = r.bad_rows <= 1 + FLIPS * r.rows * len(before)
    return UNSAID if few and bool((torch.where(t < 0, T, t) >= first_B[b]).all()) else ""


def after_cached(r: Record, work: Any) -> bool:
    """Whether all bad rows of a mixer's tap come after cached tokens, which the dump does not hold. The rerun takes the
    truth's values of these tokens. The engine may have chosen other experts at some of them."""
    if r.block not in ("attn", "gdn") or not r.bad or r.nan:
        return False
    seen = torch.cat([table[:, 1:3] for table in work.alignment.tokens_of.read.values()])
    bad = work.bad_at.get(r.key, seen)  # no row alone is bad, only all together
    return all(bool((seen[seen[:, 0] == b, 1] > 0).all()) for b in bad[:, 0].unique())


def cached_tokens(r: Record, work: Any) -> str:
    """Excuses a tap whose bad rows all come after cached tokens, if no known bug explains it, and if at most half of
    its rows are bad or all are within CACHED_LIMITS limits. In clean runs one cached token with other experts made up
    to 16 of 40 rows bad; a bug of a mixer strikes nearly all."""
    if any(d.named and d.layer == r.layer for d in work.result.diagnoses):
        return ""
    strong = 2 * r.bad_rows > r.rows and (r.ratio or 0.0) > CACHED_LIMITS * work.limit
    if strong or not after_cached(r, work):
        return ""
    work.result.diagnoses = [d for d in work.result.diagnoses if d.layer != r.layer]
    return CACHED


def batches(
    tables: Sequence[Arithmetic], run: Callable[[Sequence[tuple[int, Arithmetic]]], list[Taps]]
) -> Iterator[list[Taps]]:
    """Taps under TABLES_PER_BATCH more arithmetics at a time. `run` gets (member, its table)."""
    more = [(i % len(tables), table) for i, table in enumerate(samples(tables, SAMPLES))]
    for start in range(0, SAMPLES, TABLES_PER_BATCH):
        yield run(more[start : start + TABLES_PER_BATCH])


def second_look(rerun: Rerun, layer: int | None, work: Any, seen: Sequence[Taps]) -> list[Taps]:
    """Judge the taps of this layer that were just beyond the limit again, with more samples. Returns all taps that were
    used."""

    def doubtful(r: Record) -> bool:
        ratio = r.by_rows or r.ratio or 0.0
        return (r.bad or ratio > LOOK) and ratio <= DOUBTFUL_LIMITS * work.limit

    found = list(seen)
    more = batches(rerun.tables[1:], lambda some: rerun.taps(layer, [(i + 1, table) for i, table in some]))
    while keys := [r.key for r in work.judged(layer, seen) if doubtful(r)]:
        if (batch := next(more, None)) is None:
            break
        found += batch
        work.again(keys, layer, found)
    return found
