"""`qwen35-moe trace`: the truth of a prompt, written to a directory layer by layer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..errors import Qwen35Error
from ..model.text import Model
from ..model.vision.config import VisionConfig
from ..numerics.arithmetics import ARITHMETICS
from ..numerics.tap_keys import matching, split_patterns
from ..numerics.tap_table import TAPS
from ..oracle.dumps.draft_rows import hidden_of
from ..oracle.dumps.readers import read_dump
from ..oracle.judge.envelope import legal
from ..oracle.judge.envelope_file import ENVELOPE, remaining, with_ids, write_envelope
from ..run.files import claim
from ..run.load import MODES, load
from ..run.origin import origin_of
from ..run.prompt import Images, padded, place_images, prompt_ids, read_ids
from ..run.validate import model_config
from ..trace.drafts import check_parts, unknown_drafts
from ..trace.file import Trace, in_utf8
from ..trace.folder import GROUPS, GROUPS_RUN, complete_trace, remove_groups, resumable, resumed_complete, run_of
from ..trace.layers import aside_of, check_request, meta_of, trace_layers
from .device_options import add_device_options, add_ignored_keys, add_image_options, device_options, given_images
from .parsing import layers, within
from .report_options import add_shared
from .shares import Processes, begin_groups, check_one_pass, join


def configure(p: argparse.ArgumentParser) -> None:
    p.description = "Computes the truth layer by layer, and writes each layer to disk when it is done."
    p.add_argument("checkpoint", nargs="?", help="checkpoint folder or .safetensors file")
    prompt = p.add_mutually_exclusive_group()
    prompt.add_argument("--ids", help="1,2,3 or a file: a list of token ids, or a list of lists (padded on the right)")
    prompt.add_argument("--prompt", help="a prompt as text; needs the folder's tokenizer")
    add_image_options(p)
    p.add_argument("--drafts", type=within(int, 1, 1000), nargs="?", const=1, default=0, metavar="N",
                   help="trace the draft head as well: at each token a chain of N drafts (without N: 1)")  # fmt: skip
    p.add_argument("--hidden", metavar="DUMP", help="the drafts start from an engine's hidden states, after the final "
                   "norm, where this dump holds them; no envelope is written")  # fmt: skip
    p.add_argument("--out", help="folder to write the trace to")
    p.add_argument("--arithmetic", default="exact", help="who rounds where; --list names all (default: %(default)s)")
    p.add_argument("--taps", default="*", help="taps to record: globs, separated by commas (default: all but those "
                   "of --experts). moe_topk_ids is added unless --no-envelope is given")  # fmt: skip
    p.add_argument("--experts", action="store_true", help="also trace each expert and each turn of a loop")
    p.add_argument("--layers", dest="last", type=last_layer, metavar="0-N",
                   help="trace only the first layers; --resume with a larger N continues")  # fmt: skip
    p.add_argument(
        "--batch", type=within(int, 1, 10**9), metavar="N",
        help="prompts in one forward pass (default: all; under `accelerate launch`: 1, and each process takes others)",
    )  # fmt: skip
    p.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    p.add_argument("--mode", choices=MODES,
                   help="how weights are held in memory (default: stream; packed with --device-map)")  # fmt: skip
    p.add_argument("--stream", dest="mode", action="store_const", const="stream", help="the same as --mode stream")
    add_device_options(p)
    add_ignored_keys(p)
    add_shared(p)
    p.add_argument("--no-envelope", action="store_true", help="do not compute the errors of legal rounding")
    p.add_argument("--quiet", action="store_true", help="print no progress to stderr")
    p.add_argument("--list", action="store_true", help="list all taps and arithmetics, and exit")


def run(args: argparse.Namespace) -> int:
    if args.list:
        for name, tap in TAPS.items():
            print(f"{name:<28}{tap.dims:<14}{tap.meaning}")
        print("\narithmetics: " + ", ".join(ARITHMETICS))
        return 0
    if not (args.checkpoint and (args.ids or args.prompt is not None) and args.out):
        missing = "--out" if args.checkpoint and (args.ids or args.prompt is not None) else "a checkpoint or a prompt"
        raise Qwen35Error(f"{missing} is missing", expected="trace CHECKPOINT --ids IDS --out FOLDER")
    in_utf8(args.out)
    args.asked = split_patterns(args.taps)
    args.taps = args.taps if args.no_envelope else with_ids(args.taps)
    rows = read_ids(args.ids, "--ids") if args.prompt is None else [prompt_ids(args.checkpoint, args.prompt)]
    args.images = pixels_of(args, rows)
    ids, mask = padded([torch.tensor(row) for row in rows])
    if args.hidden and not args.drafts:
        raise Qwen35Error("hidden states that nothing starts from", where="--hidden", do="add --drafts N")
    args.hidden_states = hidden_of(read_dump(args.hidden), [torch.tensor(row) for row in rows]) if args.hidden else None
    processes = Processes(args.device)
    args.device = processes.device
    batch = args.batch or (len(ids) if processes.count == 1 else 1)
    groups = [slice(i, min(i + batch, len(ids))) for i in range(0, len(ids), batch)]
    try:
        with claim(Path(args.out)) if processes.rank == 0 else nullcontext():
            _trace(args, ids, mask, groups, processes)
    except KeyboardInterrupt:
        print("qwen35-moe: interrupted; the same command with --resume goes on after the last layer", file=sys.stderr)
        return 2
    return 0


def _trace(
    args: argparse.Namespace, ids: Tensor, mask: Tensor | None, groups: list[slice], processes: Processes
) -> None:
    """Traces those groups of prompts that are this process's; the first process joins them."""
    out, last, model = Path(args.out), args.last, _load(args, args.arithmetic)
    args.device = str(model.norm.weight.device)  # with a device map, the first GPU: positions have its bits, too
    path = str(Path(args.checkpoint).resolve())
    more = {
        "checkpoint": {**origin_of(model).identity, "path": path},
        "shared_expert": args.shared_expert,
        "fused": model.fused,
        **({"drafts": args.drafts} if args.drafts else {}),
        **({"hidden": args.hidden} if args.hidden else {}),
    }
    if args.drafts and (args.images or last is not None):
        raise Qwen35Error(
            "drafts need all layers, and a text", where="--drafts", do="leave out --drafts, or --layers and images"
        )
    check_request(model, ids, args.taps, last)
    check_parts(args.asked, drafts=bool(args.drafts), images=args.images is not None)
    meta = meta_of(model, ids, mask, args.taps, args.experts, more, args.images)
    aside = aside_of(model, args.taps, last, args.images)
    parts = _directories(args, model, len(groups), meta, aside, processes)
    for i in processes.own(len(parts)):
        rows = groups[i]
        label = "" if len(groups) == 1 else f"prompts {rows.start} to {rows.stop - 1}"
        try:
            with claim(parts[i]) if label else nullcontext():
                group = [None if x is None else x[rows] for x in (mask, args.hidden_states)]
                _trace_group(args, model, ids[rows], group, parts[i], more, label)
        except Qwen35Error as error:
            where = f"{error.where} ({label}, process {processes.rank})" if label else error.where
            raise Qwen35Error(
                error.what, where=where, expected=error.expected, found=error.found, do=error.do
            ) from error
    checkpoint = origin_of(model).checkpoint
    checkpoint.used.update(processes.gather(set(checkpoint.used)))
    if processes.rank == 0:
        layers = len(model.layers) if last is None else last + 1
        with resumable(out, len(model.layers)):
            truth = join(parts, out, {**meta, "layers": layers}) if len(parts) > 1 else Trace.open(out)
        if layers == len(model.layers):
            remove_groups(out)
        for mlp, cost in origin_of(model).conversion.items():
            print(f"{mlp}: shared expert converted to MXFP4, relative error {cost:.4f}")
        print(checkpoint.report(aside))
        if not any(matching(args.asked, entry.name, entry.key) for entry in truth.sites.values()):
            print("qwen35-moe: no tap that was asked for lies in these layers", file=sys.stderr)
        tokens = ids.numel() if mask is None else int(mask.sum())  # without the padding
        print(f"{args.out}: {len(truth)} tensors of {tokens} tokens, arithmetic {args.arithmetic}")
    processes.close()


def _directories(
    args: argparse.Namespace, model: Model, groups: int, meta: dict[str, Any], aside: list[str], processes: Processes
) -> list[Path]:
    """Where the groups' traces are written; none if they are joined already. Error: --resume, and another run there."""
    out, layers = Path(args.out), len(model.layers)
    if groups == 1:
        if args.resume:
            check_one_pass(out, layers)
        return [out]
    there = complete_trace(out, layers) if args.resume and not (out / GROUPS / GROUPS_RUN).is_file() else None
    if there is None:
        run = run_of(meta, args.device.partition(":")[0], groups=groups)
        return begin_groups(out, groups, run, args.resume, processes)
    resumed_complete(model, there, meta, aside)
    if _wants_envelope(args, layers) and not (out / ENVELOPE).is_file():
        what, do = "a joined trace without an envelope", "leave out --resume to write both anew, or add --no-envelope"
        raise Qwen35Error(what, where=out, do=do)
    return []


def _wants_envelope(args: argparse.Namespace, layers: int) -> bool:
    return not args.no_envelope and not args.hidden and args.last in (None, layers - 1)


def _trace_group(
    args: argparse.Namespace, model: Model, ids: Tensor, given: list[Tensor | None], out: Path, more: dict[str, Any],
    label: str,
) -> None:  # fmt: skip
    """Traces one forward pass, and its envelope. given: the mask, and an engine's hidden states."""
    mask, hidden = (None if x is None else x.to(args.device) for x in given)
    truth, _ = trace_layers(model, ids.to(args.device), out, mask=mask, taps=args.taps, experts=args.experts,
                            last=args.last, resume=args.resume, meta=more, quiet=args.quiet, label=label,
                            images=args.images, drafts=unknown_drafts(ids, args.drafts), hidden=hidden)  # fmt: skip
    if _wants_envelope(args, len(model.layers)):
        with resumable(out, len(model.layers)):
            write_envelope(truth, _legal_models(args, truth), resume=args.resume, quiet=args.quiet)


def pixels_of(args: argparse.Namespace, rows: list[list[int]]) -> Images | None:
    """The images of the prompt; each gets its placeholders in `rows`."""
    if (images := given_images(args)) is None:
        return None
    if len(rows) > 1:
        raise Qwen35Error("one prompt with images at a time", where="command line", expected="one prompt")
    config = model_config(Checkpoint.open(args.checkpoint), args.ignore_config_keys)
    if images.image_grid_thw is not None:
        vision = VisionConfig.from_dict(config.raw.get("vision_config") or {}, config.hidden_size)
        rows[0] = place_images(config, rows[0], images.image_grid_thw, vision.spatial_merge_size)
    return images


def last_layer(text: str) -> int:
    """ "0-7" -> 7."""
    some = layers(text, "--layers")
    if some != list(range(len(some))):
        expected = f"0-{max(some)}: a layer needs those before it"
        do = "with --resume, layers that are done are not computed again"
        raise Qwen35Error("bad range of layers", where="--layers", expected=expected, found=text, do=do)
    return some[-1]


def _load(args: argparse.Namespace, arithmetic: Any) -> Model:
    mode = args.mode or ("stream" if args.device_map is None else "packed")
    text_only = args.images is None and not args.drafts
    return load(args.checkpoint, arithmetic, args.shared_expert, mode=mode, text_only=text_only,
                ignore_config_keys=args.ignore_config_keys, **device_options(args))  # fmt: skip


def _legal_models(args: argparse.Namespace, truth: Trace) -> Iterator[Model]:
    """Those that are still to run."""
    for table in remaining(truth, legal(args.arithmetic)) if args.resume else legal(args.arithmetic):
        yield _load(args, table)
