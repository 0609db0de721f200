"""What is known without trying a fault: ids that the engine's own logits contradict, logits with a constant factor,
blocks whose input holds NaN already, and a checkpoint that is not the one that the engine loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..judge.diagnosis import Diagnosis, Hypothesis
from ..judge.records import Comparison, Record

OWN_LOGITS = "ids are not the top k of the engine's own logits"
SCALE_NOTE = "a scale, or a temperature"
VICTIM = "its input holds NaN already: a victim"
OTHER_CHECKPOINT = "is this the checkpoint that the engine loaded?"


def against_own_logits(ids_RA: Tensor, logits_RE: Tensor) -> Tensor:
    """[R] whether an expert that was not chosen has a larger logit than one that was. No rounding on the way from the
    router's logits to the dumped ones can do that: it keeps their order. Ids of no expert are not judged."""
    inside = ((ids_RA >= 0) & (ids_RA < logits_RE.shape[1])).all(1)
    ids_RA = torch.where(inside[:, None], ids_RA.long(), 0)
    chosen_RE = torch.zeros(logits_RE.shape, dtype=torch.bool).scatter(1, ids_RA, True)
    least = logits_RE.masked_fill(~chosen_RE, torch.inf).amin(1)
    return inside & logits_RE.isfinite().all(1) & (logits_RE.masked_fill(chosen_RE, -torch.inf).amax(1) > least)


def known_at_sight(layer: int | None, first: Record) -> Diagnosis | None:
    """The diagnosis, where the note of the first bad record is one already."""
    if SCALE_NOTE in first.note:
        cause = Hypothesis(f"logits {first.note}", 1.0, "", "in all rows alike, whatever was chosen before")
        return Diagnosis(layer, "head", first.key, [cause], True)
    if OWN_LOGITS not in first.note:
        return None
    cause = Hypothesis(OWN_LOGITS, 1.0, "flashinfer 2822, vllm 37605", "the router's kernel, not its weights")
    return Diagnosis(layer, "mlp", first.key, [cause], True)


def spare_victims(bad: Sequence[Record], begun: bool) -> list[Record]:
    """The bad records of a layer that it may have caused itself. Where an earlier layer has a NaN (`begun`), those are
    left out that are bad in rows with NaN alone, and the ids, which a router chose among NaN; their notes say so."""
    found = []
    for record in bad:
        if begun and (record.key.endswith("_ids") or (record.nan and record.bad_rows <= record.nan)):
            record.note = VICTIM
        else:
            found.append(record)
    return found


def ask_for_checkpoint(result: Comparison) -> None:
    """A note that asks for it, where all blocks of a kind are wrong and no known bug explains the first one."""
    if not result.diagnoses or result.diagnoses[0].named:
        return
    for kind in ("mlp", "attn", "gdn"):
        judged = {r.layer for r in result.records if r.block == kind and r.added is not None}
        wrong = {r.layer for r in result.records if r.block == kind and r.bad and r.added is not None}
        if len(judged) > 1 and judged == wrong:
            what = f"all {len(wrong)} {kind} blocks are wrong, from layer {min(i for i in wrong if i is not None)} on"
            result.notes.append(f"{what}, and no known bug explains it: {OTHER_CHECKPOINT}")
            return
