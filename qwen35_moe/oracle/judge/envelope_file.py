"""The envelope of a whole run: the errors of legal arithmetics against the truth, stored beside it as norms of each
row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from ...errors import Qwen35Error
from ...model.cache import LayerState
from ...model.mtp import draft_chains
from ...model.text import Model
from ...numerics import arithmetics
from ...numerics.arithmetics import Arithmetic
from ...numerics.tap_keys import base_name, matching, per_token, split_patterns
from ...numerics.tap_table import TAPS
from ...numerics.taps import Handler, Site, attach, scope
from ...run.files import read_checked, save_checked
from ...run.origin import identity_of
from ...run.streamed import HEAD_ROWS, StreamedHead, in_steps
from ...trace.drafts import draft_ids_of
from ...trace.file import Trace
from ...trace.folder import check_threads
from ...trace.groups import joined_rows
from ...trace.images import images_of
from ...trace.layers import HEAD, begin, rounded_blocks
from ...trace.progress import Progress
from ...untrusted import tensor_file
from .envelope import Norms, rounding_loss
from .replay import ReplayRouting
from .split_k import splitting

ENVELOPE, ENVELOPE_STATE = "envelope.safetensors", "envelope-state.safetensors"
# Taps whose columns follow the order of the ids.
SLOT_ORDERED = ("moe_topk_weights", "moe_topk_probs", "moe_slot_weights")


def row_errors(rows_R6: Tensor, index: Tensor) -> tuple[Norms, Norms, Norms]:
    """Norms of the rows of one tap: the largest legal error, the truth, the truth's error when stored in bf16."""
    columns = rows_R6.to(torch.float64)[index].unbind(1)
    return Norms(*columns[:2]), Norms(*columns[2:4]), Norms(*columns[4:])


def _file_of(truth: Trace) -> Path | None:
    """The envelope beside a truth, if there is one."""
    path = None if truth.path is None else truth.path / ENVELOPE
    return path if path is not None and path.is_file() else None


def stored_envelope(truth: Trace) -> dict[str, Tensor]:
    """Key -> [rows, 6], the columns of `row_errors`."""
    if (path := _file_of(truth)) is None:
        return truth.meta.get("_envelope", {})
    with tensor_file(path, "remove it, or write the trace again") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def check_envelope(truth: Trace) -> bool:
    """Whether there is an envelope beside a truth. Error: its checksum does not hold."""
    if (path := _file_of(truth)) is not None:
        read_checked(path, "remove it, and run `qwen35-moe trace --resume` with the same options")
    return path is not None


def join_envelopes(parts: Sequence[Trace], truth: Trace) -> None:
    """The envelope of a joined truth, where all its parts have one."""
    envelopes = [stored_envelope(part) for part in parts]
    if truth.path is not None and parts and all(envelopes):
        keys = {key: None for envelope in envelopes for key in envelope}
        rows = {key: joined_rows(key, truth.sites[key], [e[key] for e in envelopes if key in e]) for key in keys}
        save_checked(rows, truth.path / ENVELOPE)


def as_rows(key: str, x: Tensor, tokens: int) -> Tensor:
    """[rows, features] of a tap: one row a token; of states and gains, one row for each first index."""
    if not per_token(key):
        return x.reshape(x.shape[0], -1)
    x = x.movedim(2, 1) if base_name(key) in TAPS and TAPS[base_name(key)].dims == "b n t s" else x
    return x.reshape(tokens, -1)


class _Errors(Handler):
    """Observes a run and keeps the norms of its errors against the truth, the largest of all runs."""

    def __init__(self, truth: Trace):
        self.truth, self.tokens = truth, truth.ids.numel()
        self.norms: dict[str, Norms] = {}
        # In one block: small tensors that stay, between large ones that come and go, would keep the memory of the large
        # ones from being given back (35B, 128 tokens: 25 MB a layer).
        rows = {key: self.tokens if per_token(key) else entry.shape[0] for key, entry in truth.sites.items()}
        memory = torch.zeros(2, sum(rows.values()), dtype=torch.float64).split(list(rows.values()), 1)
        self.room = {key: Norms(*x) for key, x in zip(rows, memory, strict=True)}

    def __call__(self, site: Site, x: Tensor) -> None:
        key = site.key
        if key not in self.truth or site.index is not None or not x.is_floating_point():
            return  # turn 3 of a loop over experts is expert 3 in one arithmetic, slot 3 in another
        truth, x = self.truth[key], x.cpu()
        if site.name in SLOT_ORDERED:
            truth, x = truth.sort(-1, descending=True).values, x.sort(-1, descending=True).values
        self.add(key, Norms.of(as_rows(key, x, self.tokens), minus=as_rows(key, truth, self.tokens)))

    def add(self, key: str, error: Norms) -> None:
        largest = self.norms[key] = self.room[key]
        torch.maximum(largest.l2, error.l2, out=largest.l2)
        torch.maximum(largest.max, error.max, out=largest.max)

    def write(self, path: Path | None, run: dict[str, str], sum_BTD: Tensor | None = None) -> None:
        """Write all that is known so far, as a whole file. Does nothing if the truth is in memory."""
        if path is not None:
            tensors = {f"error.{key}": torch.stack((n.l2, n.max)) for key, n in self.norms.items()}
            tensors |= {} if sum_BTD is None else {"sum": sum_BTD.cpu().contiguous()}
            save_checked(tensors, path, run)

    def read(self, path: Path | None) -> tuple[dict[str, str], Tensor | None]:
        if path is None or not path.is_file():
            return {}, None
        run, tensors = read_checked(path, "remove it: the envelope begins anew, the trace stays")
        sum_BTD = tensors.pop("sum", None)
        for name, x in tensors.items():
            self.add(name.removeprefix("error."), Norms(*x.unbind()))
        return run, sum_BTD


def with_ids(taps: str) -> str:
    """The taps, and moe_topk_ids: legal runs that do not repeat the truth's choice of experts make errors that hide
    faults."""
    ids = "moe_topk_ids"
    return taps if matching(split_patterns(taps), ids, ids) else f"{taps},{ids}"


@torch.inference_mode()
def write_envelope(truth: Trace, models: Iterable[Model], resume: bool = False, quiet: bool = True) -> None:
    """Run models of legal arithmetics on the truth's tokens and keep their errors beside it (`envelope.safetensors`).

    The models choose the truth's experts, so the envelope measures roundings and not flips. `models` may be a
    generator. If the truth is on disk, the state is written after each layer to `envelope-state.safetensors`. resume:
    continue from that state, to the same bytes, with models of the arithmetics that `remaining` names. quiet: print
    nothing to stderr.
    """
    if len(truth.steps) != 1:
        raise Qwen35Error("an envelope needs a truth of one forward pass", where=truth.path, found=len(truth.steps))
    errors, state = _Errors(truth), None if truth.path is None else truth.path / ENVELOPE_STATE
    if resume and state is not None and _file_of(truth) is not None:
        state.unlink(missing_ok=True)
        return
    run, sum_BTD = errors.read(state) if resume else ({}, None)
    done, first, threads = json.loads(run.get("done", "[]")), int(run.get("next", 0)), torch.get_num_threads()
    if state is not None and run:
        check_threads(state, int(run.get("threads", threads)))
    for model in models:
        name = model.arithmetic.name
        if not truth.is_of(identity_of(model)):
            what, do = "the checkpoint is not the truth's any more", "write the trace again"
            raise Qwen35Error(what, where=truth.meta["checkpoint"].get("path", truth.path), do=do)
        if first and name != run["arithmetic"]:
            do = "leave out --resume to start anew"
            raise Qwen35Error("another envelope was begun", where=state, expected=run["arithmetic"], found=name, do=do)
        label = f"envelope, pass {len(done) + 1}: {name}"
        progress = [] if quiet else [Progress(model, range(first, len(model.layers)), label=label)]
        with splitting(model.arithmetic), attach(errors, ReplayRouting(truth), *progress):
            ids, mask, at = (x.to(model.norm.weight.device) for x in (truth.ids, truth.mask, truth.positions))
            h_BTD, given = begin(model, ids, None if mask.all() else mask, at, sum_BTD, images=images_of(truth))
            for i in range(first, len(model.layers)):
                with arithmetics.using(model.arithmetic), scope(layer=i):
                    h_BTD = model.layers[i](h_BTD, *given, LayerState())
                here = {"done": json.dumps(done), "arithmetic": name, "next": str(i + 1), "threads": str(threads)}
                errors.write(state, here, h_BTD)
                for said in progress:
                    said.done(i)
            hidden_BTD = _head(model, errors, h_BTD)
            if model.mtp is not None and (drafts := draft_ids_of(truth)):
                starts = [x.to(hidden_BTD.device) for x in drafts]
                draft_chains(model, model.mtp, starts, hidden_BTD, None if mask.all() else mask.to(hidden_BTD.device))
        done, first, sum_BTD = [*done, name], 0, None
        errors.write(state, {"done": json.dumps(done), "threads": str(threads)})
    of_key = ((key, (error, *_of_truth(truth, key))) for key, error in errors.norms.items())
    out = {key: torch.stack([x for n in norms for x in (n.l2, n.max)], 1).to(torch.float32) for key, norms in of_key}
    if truth.path is None or state is None:
        truth.meta["_envelope"] = out
        return
    save_checked(out, truth.path / ENVELOPE)
    state.unlink()


def remaining(truth: Trace, tables: Iterable[Arithmetic]) -> list[Arithmetic]:
    """The arithmetics that an interrupted `write_envelope` has not finished."""
    run = {} if truth.path is None else _Errors(truth).read(truth.path / ENVELOPE_STATE)[0]
    return [table for table in tables if table.name not in json.loads(run.get("done", "[]"))]


def _head(model: Model, errors: _Errors, sum_BTD: Tensor) -> Tensor:
    """Norm (which is returned) and head; the logits of a streamed head are many, and never all there."""
    with arithmetics.using(model.arithmetic):
        x_BTD = model.norm(sum_BTD)
        if HEAD in errors.truth and isinstance(model.lm_head, StreamedHead):
            blocks = ((x.cpu(), errors.truth.columns(HEAD, v)) for v, x in rounded_blocks(model, x_BTD))
            errors.add(HEAD, _side_by_side(Norms.of(x.flatten(0, 1), y.flatten(0, 1)) for x, y in blocks))
        else:
            model.lm_head(HEAD, x_BTD)
        return x_BTD


def _of_truth(truth: Trace, key: str) -> tuple[Norms, Norms]:
    """The truth's size in each row, and what one rounding to bf16 loses of it."""
    if key == HEAD:  # whose parts are read one by one
        steps = in_steps(truth.sites[key].shape[-1], HEAD_ROWS)
        parts: Iterable[Tensor] = (truth.columns(key, which).flatten(0, 1) for which in steps)
    else:
        parts = [as_rows(key, truth[key], truth.ids.numel())]
    sizes, losses = zip(*((Norms.of(x), rounding_loss(x, torch.bfloat16)) for x in parts), strict=True)
    return _side_by_side(sizes), _side_by_side(losses)


def _side_by_side(parts: Iterable[Norms]) -> Norms:
    """Norms of rows from those of their parts."""
    return reduce(lambda a, b: Norms(torch.hypot(a.l2, b.l2), torch.maximum(a.max, b.max)), parts)
