"""Compares a dump with the truth, tap by tap: is it wrong, where first, and by how many legal errors?

The added error of a block is measured by a rerun of this block on the engine's own input. The inherited error is the
engine's value against the truth's. docs/judge.md explains both, and the order of work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..model.config import Config
from ..numerics import arithmetics
from ..numerics.arithmetics import Arithmetic
from ..numerics.tap_keys import is_vision
from ..run.prompt import Images, placeholders
from ..run.source import WeightSource
from ..trace.drafts import draft_ids_of
from ..trace.file import Trace
from ..trace.images import images_of
from .diagnose.at_sight import ask_for_checkpoint, spare_victims
from .diagnose.diagnose import explain
from .dumps.align import align
from .dumps.draft_rows import branches_of, drafts_of
from .dumps.dump import Dump
from .dumps.matched import with_branches
from .dumps.readers import read_dump
from .dumps.sequences import placed, sequences_in, sequences_of
from .judge.added import Judgement
from .judge.conclude import conclude, noted
from .judge.envelope import LIMIT, legal, with_declared_caches
from .judge.envelope_file import stored_envelope
from .judge.function import engine_function, truth_in, usual
from .judge.inherited import inherited
from .judge.log_p import LOG_P
from .judge.records import POSITIONS, BlockId, Comparison
from .judge.rerun import Rerun
from .judge.rerun_parts import TruthTokens
from .judge.suspects import accuse, cached_tokens, excuse, other_experts, second_look, suspects
from .judge.tokens import engine_positions, judge_positions, moved_alike
from .judge.weights_check import check_weights
from .judge.where import HERE, Where
from .truth import names_in, open_checkpoint, weights_of, write_truth

# Of 61 faults, each planted in one layer of a small model, 15 show in log p beyond the roundings of bf16, and all
# beyond those of float32.
ONLY_LOGITS = (
    "only the logits were compared: the fault of one layer may hide in the rounding of later ones; "
    "dump the layers, or give --engine float32 if the engine computes in float32"
)


@dataclass(frozen=True)
class CompareOptions:
    """How a dump is compared.

    fused      whether the shared expert is a slot, in all layers or layer by layer (default: as the truth was traced)
    engine     the arithmetic that the engine says it has, if that is not one of the envelope's
    limit      a tap is not within rounding if its ratio is larger
    layers     judge these layers only
    diagnoses  how many bad blocks to diagnose at most, in order of execution
    members    the envelope's arithmetics (default: those that `legal` names)
    partial    the dump may hold only some of the truth's tokens, and the verdict may still be "agrees"
    ids        the sequences of a dump that does not hold its token ids, in the order of its rows
    kv_cache   the format of the engine's cached keys and values, if not its dtype: fp8_e4m3, or fp8_e4m3:SCALE
    state      the format of its DeltaNet state, if not float32: bf16
    where      the device, device_map and mode of the rerun, and whether it prints its progress
    images     those of the prompt, where the truth is computed for the dump (`diagnose`)
    """

    fused: bool | Sequence[bool] | None = None
    engine: str | Arithmetic | None = None
    limit: float = LIMIT
    layers: Sequence[int] | None = None
    diagnoses: int = 2
    members: Sequence[Arithmetic] | None = None
    partial: bool = False
    ids: Sequence[Sequence[int]] | None = None
    kv_cache: str | None = None
    state: str | None = None
    where: Where = HERE
    images: Images | None = None


def compare(
    truth: Trace | str | Path,
    dump: Dump | str | Path,
    checkpoint: WeightSource | str | Path | None = None,
    **options: Any,
) -> Comparison:
    """Compare an engine's dump with the truth.

    truth       a trace, or the directory that `write_truth` or `qwen35-moe trace` wrote
    dump        what `read_dump` returned, or a path that it reads
    checkpoint  its folder, or the weights of an open one (default: the folder that the truth names). Where there is
                none, only inherited errors are known, and nothing is diagnosed
    options     the fields of `CompareOptions`

    Errors: what `Trace.open` and `read_dump` refuse; a checkpoint that the truth is not of.
    """
    truth = truth if isinstance(truth, Trace) else Trace.open(truth)
    dump = dump if isinstance(dump, Dump) else read_dump(dump, config=truth.meta.get("config"))
    chosen = CompareOptions(**options)
    check_layers(chosen.layers, 1 + max((entry.layer or 0 for entry in truth.sites.values()), default=0))
    source, fused = weights_of(truth, checkpoint, chosen.where.ignore_config_keys)
    return _compare(truth, dump, source, replace(chosen, fused=fused if chosen.fused is None else chosen.fused))


def diagnose(
    checkpoint: str | Path, dump: Dump | str | Path, truth: str | Path | None = None, *,
    arithmetic: str | None = None, shared_expert: str = "unfused", **options: Any,
) -> Comparison:  # fmt: skip
    """Compare a dump with a truth that is computed for the tokens of the dump.

    truth          a directory to keep the truth in (default: it is removed afterwards)
    arithmetic     that of the truth (default: exact, or exact+a8 of an FP8 checkpoint)
    shared_expert  as of `load`
    options        the fields of `CompareOptions`
    """
    chosen = CompareOptions(**options)
    model, loaded = open_checkpoint(checkpoint, shared_expert, ignore_config_keys=chosen.where.ignore_config_keys)
    dump = dump if isinstance(dump, Dump) else read_dump(dump, config=model.config.raw)
    check_layers(chosen.layers, model.config.num_hidden_layers)
    ids = sequences_of(dump) if chosen.ids is None else [torch.as_tensor(row) for row in chosen.ids]
    has_head = any(name.startswith("mtp.") for name in loaded.source.checkpoint.names())
    ids = placed(ids, dump, model.config, chosen.images)
    branches = branches_of(dump, ids) if chosen.images is None else []
    arithmetic = arithmetic or usual(loaded.source, "exact")
    with TemporaryDirectory() as folder:
        drafts = drafts_of(dump, with_branches(ids, branches), len(ids)) if has_head and not chosen.images else ()
        written = write_truth(
            checkpoint, ids, truth or folder, arithmetic=arithmetic, shared_expert=shared_expert,
            taps="*" if truth else names_in(dump), with_envelope=False, where=chosen.where, drafts=drafts,
            images=chosen.images, branches=branches,
        )  # fmt: skip
        result = _compare(written, dump, loaded.source, replace(chosen, fused=loaded.fused))
        if truth is None:
            result.truth = f"{arithmetic}, computed for the tokens of the dump, and not kept"
        return result


def checkpoint_in_words(identity: Mapping[str, Any]) -> str:
    """The truth's checkpoint in words: where it was, and hashes of its headers and of samples of its bytes."""
    hashes = [f"{key} {str(identity[key])[:16]}" for key in ("headers_sha256", "sample_sha256") if key in identity]
    return ", ".join([str(identity.get("path") or "unknown"), *hashes])


def _without_images(truth: Trace, dump: Dump, config: Config) -> list[str]:
    """A note, where the truth took placeholders of images for text. Error: the engine saw images."""
    if any(map(is_vision, dump)):
        what, do = "the dump is of a prompt with images, the truth of none", "trace it with --image or --pixel-values"
        raise Qwen35Error(what, where=dump.path, do=do)
    count = int((placeholders(config, truth.ids) * truth.mask).count_nonzero())
    return [f"{count} placeholders of images or videos: the truth takes them for text"] if count else []


def check_layers(layers: Sequence[int] | None, count: int) -> None:
    if strange := [i for i in layers or () if not 0 <= i < count]:
        raise Qwen35Error("no such layer", where=f"--layer {strange[0]}", expected=f"0 to {count - 1}")


def _compare(truth: Trace, dump: Dump, source: WeightSource | None, options: CompareOptions) -> Comparison:
    alignment = align(dump, truth, None if options.ids is None else sequences_in(truth, options.ids))
    table = arithmetics.get(truth.meta.get("arithmetic") or "exact")
    result = Comparison(
        extra=alignment.extra, unknown=list(dump.unknown), problems=list(alignment.problems),
        notes=list(alignment.notes), limit=options.limit, truth=f"{table.name}, {truth.path or 'in memory'}",
        engine=f"{dump.format}, {dump.path}", tokens=(alignment.matched, alignment.tokens),
        checkpoint=checkpoint_in_words(truth.meta.get("checkpoint") or {}),
        absent=alignment.tokens_of.absent, partial=options.partial,
    )  # fmt: skip
    if all(key.startswith("next_token_") for key in alignment.keys):
        result.notes.append(ONLY_LOGITS)
    work = Judgement(result, alignment)
    if (record := judge_positions(alignment)) is not None:
        work.records[POSITIONS] = record
        result.diagnoses += moved_alike(alignment)
    if source is not None:
        stored = _rerun(work, source, table, options)
    elif options.kv_cache or options.state:
        what, do = "a declared cache needs the checkpoint", "give the checkpoint, too"
        raise Qwen35Error(what, where=options.kv_cache or options.state, do=do)
    else:
        result.members, stored = ("the arithmetics that its envelope was made of",), stored_envelope(truth)
        result.notes.append("without the checkpoint, only inherited errors are known, and nothing is diagnosed")
    inherited(work, stored)
    conclude(work, stored, options.layers)
    ask_for_checkpoint(result)
    return result


def _rerun(work: Judgement, source: WeightSource, table: Arithmetic, options: CompareOptions) -> Mapping[str, Tensor]:
    """Judge weights and added errors, and diagnose. table: the truth's arithmetic. Returns the stored envelope of the
    truth, which may by now be that of another function."""
    result, alignment, config = work.result, work.alignment, source.config
    truth, dump, fused = alignment.truth, alignment.dump, options.fused or False
    images, drafts = images_of(truth), draft_ids_of(truth)
    result.notes += [] if images is not None else _without_images(truth, dump, config)
    result.layers = tuple("gdn" if kind == "linear_attention" else "attn" for kind in config.layer_types)
    result.weights = check_weights(dump, source)
    flags = [fused] * config.num_hidden_layers if isinstance(fused, bool) else fused
    tokens = TruthTokens(truth.ids, engine_positions(alignment), truth.mask, alignment.step_rows, images, drafts)
    captured = work.captured(config.num_experts)
    again = partial(Rerun, source, flags, tokens, captured, with_log_p=LOG_P in alignment.keys, where=options.where)
    function = engine_function(table, source, work, again) if options.members is None else table
    members = legal(function.name, options.engine) if options.members is None else options.members
    members = [*members, *with_declared_caches(members, options.kv_cache, options.state)]
    result.members = tuple(m.name for m in members)
    rerun = again([function, *members])
    with noted(result, "the layers that follow were not rerun"):
        _judge_layers(work, rerun, options)
    stored = stored_envelope(truth)
    if function is table or not stored:
        return stored
    with noted(result, "the truth of that function could not be computed"):
        if not images and not drafts:
            own = truth_in(function, truth, source, flags, rerun)
            work.alignment = align(dump, own, None if options.ids is None else sequences_in(truth, options.ids))
            return stored_envelope(own)
    return {}


def _judge_layers(work: Judgement, rerun: Rerun, options: CompareOptions) -> None:
    """Run each layer on the engine's own inputs, judge its taps, and diagnose the first blocks that are wrong."""
    result = work.result
    places, cleared, nan = suspects(rerun.captured, result.layers), set[BlockId](), False
    for layer, seen in rerun.parts(options.layers):
        if options.layers is not None and layer is not None and layer not in options.layers:
            continue
        work.shared = rerun.shared
        work.added(layer, seen)
        seen = second_look(rerun, layer, work, seen)
        own = work.judged(layer, seen)
        excuse(own, lambda r: other_experts(r, places, work))
        accuse(own, places, cleared)
        guilty = [r for r in own if r.bad]
        bad, nan = spare_victims(guilty, nan), nan or any(r.nan for r in guilty)
        if bad and sum(d.key != POSITIONS for d in result.diagnoses) < options.diagnoses:
            with noted(result, "the diagnosis failed; the verdict stands", counts=False):
                result.diagnoses.append(explain(rerun, layer, bad, work, seen))
        excuse(own, lambda r: cached_tokens(r, work))
