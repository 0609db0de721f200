"""`qwen35-moe generate`: text, ids and images in; tokens out, one at a time, with what the model thinks of them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..errors import Qwen35Error
from ..model.text import Model
from ..numerics.arithmetics import ARITHMETICS
from ..run.generate import Sampling, Step, generate, score
from ..run.load import MODES, load
from ..run.origin import origin_of
from ..run.prompt import embed_prompt, load_images, load_tokenizer, place_images, placeholders, read_ids, stop_ids
from .device_options import add_device_options, device_options


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Continues a prompt (greedily, unless --temperature is given), or gives the log-probability of "
        "each of an engine's tokens (--force). Ids need no tokenizer; text and images use the files in the folder."
    )
    parser.add_argument("checkpoint", help="checkpoint folder")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="a prompt as text, without a chat template; see --chat")
    prompt.add_argument("--ids", help='a prompt as ids: "1,2,3", or a file with a list')
    parser.add_argument("--chat", action="store_true", help="put --prompt into the folder's chat template")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=20, metavar="N",
                        help="number of tokens (default: %(default)s)")  # fmt: skip
    parser.add_argument("--temperature", type=float, default=0.0,
                        help="0 (default) is greedy; with --force, log p at this temperature")  # fmt: skip
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest (0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="sample from the likeliest that together reach P")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (default: %(default)s)")
    parser.add_argument("--ignore-stop", action="store_true", help="continue after a stop token")
    parser.add_argument("--force", metavar="IDS", help="give the log p of these tokens (as --ids)")
    parser.add_argument("--draft", nargs="?", type=int, const=3, default=0, metavar="N",
                        help="speculate N tokens ahead with the draft head (without N: 3)")  # fmt: skip
    parser.add_argument("--top", type=int, default=0, metavar="K", help="show each token's log p and K alternatives")
    parser.add_argument("--json", action="store_true", help="print one JSON object a token")
    parser.add_argument("--arithmetic", default="exact", choices=[*ARITHMETICS], metavar="A",
                        help="who rounds where, a name of `trace --list` (default: %(default)s)")  # fmt: skip
    parser.add_argument("--mode", default="packed", choices=MODES, help="how weights are held (default: %(default)s)")
    add_device_options(parser)
    parser.add_argument("--text-only", action="store_true", help="load neither draft head nor vision tower")


def run(args: argparse.Namespace) -> int:
    """Prints tokens as they come; 0, or 2 where something cannot be read (`cli.main` reports it)."""
    for option, wanted in (("--image", args.image), ("--draft", args.draft)):
        if args.text_only and wanted:
            raise Qwen35Error(f"{option} needs what --text-only leaves out", where="command line")
    if args.chat and args.prompt is None:
        raise Qwen35Error("--chat is for text", where="command line", expected="--prompt", found="--ids")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    if args.force is not None and (args.top_k or args.top_p != 1):
        do = "leave them out; --temperature is honoured"
        raise Qwen35Error("--force chooses no tokens", where="--top-k, --top-p", do=do)
    forced = None if args.force is None else one(read_ids(args.force, "--force"), "--force")
    # The prompt first: what is wrong with it shows before a large checkpoint is read.
    tokenizer = load_tokenizer(args.checkpoint) if args.prompt is not None or has_tokenizer(args.checkpoint) else None
    ids = one(read_ids(args.ids, "--ids"), "--ids") if args.prompt is None else chat_ids(tokenizer, args)
    images = load_images(args.checkpoint, args.image) if args.image else None
    where = {**device_options(args), "ignore_config_keys": args.ignore_config_keys}
    model = load(args.checkpoint, args.arithmetic, mode=args.mode, text_only=args.text_only, **where)
    for part, count in origin_of(model).left_out.items():
        print(f"left out, as --text-only asks: {count} tensors of {part}", file=sys.stderr)
    prompt = prompt_or_embeds(model, ids, images)
    if forced is None:
        stop = () if args.ignore_stop else stop_ids(args.checkpoint, model.config)
        steps = generate(model, prompt, args.max_new_tokens, sampling, stop, args.top, args.draft)
    else:
        steps = score(model, prompt, forced, args.top, args.temperature)
    print_steps(steps, tokenizer, args)
    return 0


def has_tokenizer(folder: str) -> bool:
    return (Path(folder) / "tokenizer.json").is_file()


def one(rows: list[list[int]], option: str) -> list[int]:
    if len(rows) > 1:
        do = "give them one after another"
        raise Qwen35Error("one prompt at a time", where=option, found=f"{len(rows)} lists of ids", do=do)
    return rows[0]


def chat_ids(tokenizer: Any, args: argparse.Namespace) -> list[int]:
    """Ids of --prompt. Special tokens in the text count as such; nothing is put in front."""
    text = args.prompt
    if args.chat:
        if not tokenizer.chat_template:
            raise Qwen35Error("no chat template", where=args.checkpoint, do="leave out --chat, or copy the template")
        content = [{"type": "image"}] * len(args.image) + [{"type": "text", "text": text}]
        message = {"role": "user", "content": content if args.image else text}
        try:
            text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program, and may raise anything
            do = "leave out --chat, and write what it would write"
            raise Qwen35Error("the chat template fails", where=args.checkpoint, found=error, do=do) from error
    return tokenizer.encode(text, add_special_tokens=False)


def prompt_or_embeds(model: Model, ids: list[int], images: tuple[torch.Tensor, torch.Tensor] | None) -> Any:
    """What `generate` starts from: ids, or embeddings with images in them."""
    if images is None:
        prompt = torch.tensor([ids])
        if count := int(placeholders(model.config, prompt).count_nonzero()):
            print(f"no --image: {count} placeholders of images or videos are taken for text", file=sys.stderr)
        return prompt
    if model.visual is not None:
        ids = place_images(model.config, ids, images[1])
    device = model.norm.weight.device
    return embed_prompt(model, torch.tensor([ids], device=device), *(x.to(device) for x in images))


def print_steps(steps: Iterable[Step], tokenizer: Any, args: argparse.Namespace) -> None:
    """Prints each step at once: JSON lines, a table, or the text itself (ids, without a tokenizer)."""
    table, written, ids = args.top > 0 or args.force is not None, "", list[int]()

    def word(i: int) -> str:
        return "" if tokenizer is None else repr(tokenizer.decode([i]))

    for place, step in enumerate(steps):
        ids.append(step.id)
        if args.json:
            text = {} if tokenizer is None else {"text": tokenizer.decode([step.id])}
            print(json.dumps({"type": "token", "step": place, **step.to_dict(), **text}), flush=True)
        elif table:
            others = "  ".join(f"{i} {word(i)} {log_p:.4f}".replace("  ", " ") for i, log_p in step.top)
            mark = "*" if step.drafted else " "
            line = (
                f"{place:4} {step.id:7}{mark} {word(step.id):14} log p {step.log_p:9.4f}  rank {step.rank:<4} {others}"
            )
            print(line.rstrip(), flush=True)
        elif tokenizer is None:
            print(f"{', ' if place else ''}{step.id}", end="", flush=True)
        else:
            whole = tokenizer.decode(ids)
            if not whole.endswith("\N{REPLACEMENT CHARACTER}"):  # else a character of which bytes are missing
                print(whole[len(written) :], end="", flush=True)
                written = whole
    if not args.json and not table:
        print()
