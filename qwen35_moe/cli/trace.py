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
from ..numerics.arithmetics import ARITHMETICS
from ..numerics.tap_keys import matching, split_patterns
from ..numerics.tap_table import TAPS
from ..oracle.dumps.draft_rows import hidden_of
from ..oracle.dumps.readers import read_dump
from ..oracle.judge.envelope import legal
from ..oracle.judge.envelope_file import ENVELOPE, join_envelopes, remaining, with_ids, write_envelope
from ..run.files import claim
from ..run.load import MODES, load
from ..run.origin import origin_of
from ..run.processes import Processes
from ..run.prompt import Images, padded, place_images, prompt_ids, read_ids
from ..run.validate import model_config
from ..trace.drafts import check_parts, unknown_drafts
from ..trace.file import Trace, in_utf8
from ..trace.folder import remove_groups, resumable, resumed_complete, run_of
from ..trace.groups import begin_groups, join
from ..trace.layers import aside_of, check_request, meta_of, trace_layers
from .device_options import add_device_options, add_image_options, device_options, given_images
from .parsing import layers, within
from .report_options import add_shared


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
    if args.drafts and (args.images or args.last is not None):
        do = "leave out --drafts, or --layers and images"
        raise Qwen35Error("drafts need all layers, and a text", where="--drafts", do=do)
    hidden = hidden_of(read_dump(args.hidden), [torch.tensor(row) for row in rows]) if args.hidden else None
    processes = Processes(args.device)
    args.device = processes.device
    try:
        with claim(Path(args.out)) if processes.rank == 0 else nullcontext():
            _trace(args, {"ids_BT": ids, "mask": mask, "hidden": hidden}, processes)
    except KeyboardInterrupt:
        print("qwen35-moe: interrupted; the same command with --resume goes on after the last layer", file=sys.stderr)
        return 2
    return 0


def _trace(args: argparse.Namespace, prompts: dict[str, Tensor | None], processes: Processes) -> None:
    """Traces those groups of prompts that are this process's; the first process joins them."""
    ids, mask = prompts["ids_BT"], prompts["mask"]
    assert ids is not None
    out, model = Path(args.out), _load(args, args.arithmetic)
    args.device = str(model.norm.weight.device)  # with a device map, the first GPU: positions have its bits, too
    count, layers = len(model.layers), len(model.layers) if args.last is None else args.last + 1
    origin, checkpoint = origin_of(model), origin_of(model).checkpoint
    more = {
        "checkpoint": {**origin.identity, "path": str(Path(args.checkpoint).resolve())},
        "shared_expert": args.shared_expert,
        "fused": model.fused,
        **{name: vars(args)[name] for name in ("drafts", "hidden") if vars(args)[name]},
    }
    check_request(model, ids, args.taps, args.last)
    check_parts(args.asked, drafts=bool(args.drafts), images=args.images is not None)
    meta = meta_of(model, ids, mask, args.taps, args.experts, more, args.images)
    aside = aside_of(model, args.taps, args.last, args.images, bool(args.drafts))
    args.envelope = not args.no_envelope and not args.hidden and layers == count
    batch = args.batch or (len(ids) if processes.count == 1 else 1)
    groups = [slice(i, min(i + batch, len(ids))) for i in range(0, len(ids), batch)]
    begun_as = run_of(meta, args.device.partition(":")[0], groups=len(groups))
    parts = begin_groups(out, len(groups), count, begun_as, args.resume, processes)
    if not parts:
        resumed_complete(model, Trace.open(out), meta, aside)
        if args.envelope and not (out / ENVELOPE).is_file():
            do = "leave out --resume to write both anew, or add --no-envelope"
            raise Qwen35Error("a joined trace without an envelope", where=out, do=do)
    for i in processes.own(len(parts)):
        label = "" if parts == [out] else f"prompts {groups[i].start} to {groups[i].stop - 1}"
        group = {name: x[groups[i]].to(args.device) for name, x in prompts.items() if x is not None}
        try:
            with claim(parts[i]) if label else nullcontext():
                _trace_group(args, model, group, parts[i], more, label)
        except Qwen35Error as error:
            if not label:
                raise
            raise error.but(where=f"{error.where} ({label}, process {processes.rank})") from error
    checkpoint.used.update(processes.gather(set(checkpoint.used)))
    if processes.rank == 0:
        with resumable(out, count):
            traces = [Trace.open(part) for part in parts if part != out]
            truth = join(traces, out, {**meta, "layers": layers})
            join_envelopes(traces, truth)
        if layers == count:
            remove_groups(out)
        for mlp, cost in origin.conversion.items():
            print(f"{mlp}: shared expert converted to MXFP4, relative error {cost:.4f}")
        print(checkpoint.report(aside))
        if not any(matching(args.asked, entry.name, entry.key) for entry in truth.sites.values()):
            print("qwen35-moe: no tap that was asked for lies in these layers", file=sys.stderr)
        tokens = ids.numel() if mask is None else int(mask.sum())  # without the padding
        print(f"{args.out}: {len(truth)} tensors of {tokens} tokens, arithmetic {args.arithmetic}")
    processes.close()


def _trace_group(
    args: argparse.Namespace, model: Model, group: dict[str, Tensor], out: Path, more: dict[str, Any], label: str
) -> None:
    """Traces one forward pass, and its envelope."""
    drafts = unknown_drafts(group["ids_BT"], args.drafts)
    truth, _ = trace_layers(model, out=out, **group, taps=args.taps, experts=args.experts, last=args.last,
                            resume=args.resume, meta=more, quiet=args.quiet, label=label, images=args.images,
                            drafts=drafts)  # fmt: skip
    if args.envelope:
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
        rows[0] = place_images(config, rows[0], images.image_grid_thw)
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
