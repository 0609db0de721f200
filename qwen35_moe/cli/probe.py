"""`qwen35-moe probe`: does a running server compute the model that its checkpoint holds?

Exit codes: 0 agrees, 1 diverges, 2 cannot tell without a dump, or could not be asked.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import Qwen35Error
from ..model.config import Config
from ..numerics.choices import STATE_DTYPES
from ..oracle.judge.where import Where
from ..oracle.report import servers as pages
from ..oracle.servers.answer import Answer
from ..oracle.servers.client import API_KEY, RETRIES, Server
from ..oracle.servers.dialects import ALL, APIS, Asker, Bucket, buckets, saver
from ..oracle.servers.probe import GIVEN, How, Prepared, drawn_prompts, prepare
from ..oracle.servers.readers import read_answers
from ..oracle.servers.verdict import Verdict
from ..oracle.truth import open_checkpoint, weights_of
from ..run.load import usable
from ..run.prompt import prompt_ids, read_ids
from ..trace.file import Trace
from .device_options import add_ignored_keys
from .dump_config import layer_lines
from .parsing import within
from .report_options import add_shared, check_outputs, new_file, where, write_outputs

SHORTEST_PROMPT, LAYERS_ONE_BY_ONE = 2, 8  # tokens of a prompt; layers up to which faults are replayed layer by layer

MOST_TOKENS = 1 << 24  # of all drawn prompts


def configure(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Asks a server for log-probabilities of tokens, computes them from the checkpoint, and says whether they "
        f"agree or diverge, or that it cannot tell. Takes an API key from {API_KEY}. Contacts only URL."
    )
    p.add_argument("checkpoint", help="checkpoint folder or .safetensors file")
    p.add_argument("url", help="http://HOST:PORT of the server")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--ids", help='prompts as ids: "1,2,3", or a file with lists')
    which.add_argument("--prompt", help="a prompt as text; needs the folder's tokenizer")
    which.add_argument("--prompts", type=int, default=8, metavar="N",
                       help="draw N random prompts (default: %(default)s)")  # fmt: skip
    p.add_argument("--tokens", type=int, default=50, metavar="T",
                   help="length of a drawn prompt (default: %(default)s)")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="seed of the drawn prompts")
    p.add_argument("--top", type=top, default=GIVEN, metavar="K",
                   help="ask for the K likeliest tokens, or all (default: %(default)s)")  # fmt: skip
    p.add_argument("--api", default="auto", choices=("auto", *APIS), help="the server's API (default: %(default)s)")
    p.add_argument("--model", default="", help="the model to ask, if the server has several")
    p.add_argument("--engine", help="the server's arithmetic, if it is not a usual one: a name of `trace --list`")
    p.add_argument("--arithmetic", default="exact",
                   help="arithmetic of the truth: exact+a8 for W8A8, exact+a4-round-up for W4A4")  # fmt: skip
    add_shared(p)
    add_ignored_keys(p)
    p.add_argument("--kv-cache", metavar="fp8_e4m3[:SCALE]", help="the server's dtype for keys and values")
    p.add_argument("--state", choices=STATE_DTYPES, help="the server's dtype for DeltaNet's state")
    p.add_argument("--device", default="cpu", help="where the truth is computed: cpu, cuda or cuda:N (default: "
                   "%(default)s)")  # fmt: skip
    p.add_argument("--faults", choices=("each", "all", "none"), help="replay known faults in each layer, in all layers "
                   f"at once, or not (default: each up to {LAYERS_ONE_BY_ONE} layers, else all)")  # fmt: skip
    p.add_argument("--batch", type=sizes, default=[], metavar="1,2,4",
                   help="also ask in batches of these sizes, and with prompts of these lengths")  # fmt: skip
    p.add_argument("--timeout", type=within(float, 0.01, 86_400), default=120.0, metavar="S",
                   help="timeout of one request (default: %(default)g s)")  # fmt: skip
    p.add_argument("--retries", type=within(int, 0, 100), default=RETRIES,
                   help="retries of a failed request (default: %(default)s)")  # fmt: skip
    p.add_argument("--save", type=new_file, help="write the answers, one JSON object a line")
    p.add_argument("--json", type=new_file, help="write the verdict as JSON")
    p.add_argument("--html", type=new_file, help="write the report as one self-contained page")
    p.set_defaults(run=run)


def top(word: str) -> int:
    number = ALL if word == "all" else int(word)
    if number != ALL and not 1 <= number <= 1000:
        raise ValueError
    return number


def sizes(word: str) -> list[int]:
    found = [int(part) for part in word.split(",")]
    if not all(1 <= n <= 4096 for n in found):
        raise ValueError
    return found


def run(args: argparse.Namespace) -> int:
    check_outputs(args)
    server = Server(args.url, args.timeout, args.retries)
    model, loaded = open_checkpoint(args.checkpoint, args.shared_expert, args.arithmetic, args.ignore_config_keys)
    ids = prompts(args, model.config)
    asker = Asker(server, args.api, args.top, model.config.vocab_size, args.model,
                  saver(args.save) if args.save else lambda _: None)  # fmt: skip
    print(f"server   {asker.api}, {server.url}")
    usable(args.device, f"--device {args.device}")
    how = How(args.arithmetic, args.engine, args.kv_cache, args.state, faults(args.faults, model.config),
              where=Where(args.device, quiet=False))  # fmt: skip
    known = prepare(loaded.source, loaded.fused, ids, how)
    typical = foresee(known, 63 if args.top == ALL else args.top)
    answers = list[Answer]()
    for n, one in enumerate(ids):
        answers += asker.ask([one])
        progress(n + 1, len(ids))
    answers += asker.grown(ids[0], 1) if asker.whole else []  # from cached states, which prompts do not show
    found = buckets(asker, ids[0], args.batch, typical) if args.batch else []
    return print_verdict(known.judge(answers), args, found)


def prompts(args: argparse.Namespace, config: Config) -> list[list[int]]:
    if args.prompt is not None:
        ids = [prompt_ids(args.checkpoint, args.prompt)]
    elif args.ids is not None:
        ids = read_ids(args.ids, "--ids")
    elif args.prompts < 1 or args.tokens < SHORTEST_PROMPT or args.prompts * args.tokens > MOST_TOKENS:
        expected = f"1 and {SHORTEST_PROMPT}, or more, and {MOST_TOKENS} tokens together, or fewer"
        raise Qwen35Error("no number of prompts to ask", where="--prompts, --tokens", expected=expected)
    else:
        ids = drawn_prompts(config, args.prompts, args.tokens, args.seed)
    if short := [one for one in ids if len(one) < SHORTEST_PROMPT]:
        raise Qwen35Error(
            "a prompt is too short", where="prompts", expected=f"{SHORTEST_PROMPT} tokens", found=short[0]
        )
    if large := [i for one in ids for i in one if i >= config.vocab_size]:
        raise Qwen35Error(
            "not in the vocabulary", where="--ids", expected=f"0 .. {config.vocab_size - 1}", found=large[0]
        )
    return ids


def faults(asked: str | None, config: Config) -> str:
    return asked or ("each" if config.num_hidden_layers <= LAYERS_ONE_BY_ONE else "all")


def foresee(known: Prepared, top: int) -> float:
    """Prints which faults could be seen; the typical legal error of a position."""
    judge = known.expect(top)
    seen, unseen = judge.power()
    rows = len(judge.sigma)
    print(f"asking   {rows} positions of {len(known.ids)} prompts")
    if seen or unseen:
        print(f"sees     {len(seen)} of {len(seen) + len(unseen)} faults, given the {top} likeliest tokens")
        print(pages.listed("not seen", unseen))
    return float(judge.sigma.median())


def progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {of} prompts answered", end="\n" if done == of else "", file=sys.stderr, flush=True)


def print_verdict(verdict: Verdict, args: argparse.Namespace, found: Sequence[Bucket] = ()) -> int:
    """Prints and writes the verdict; its exit code, or 1 if a bucket differs."""
    print(pages.verdict_text(verdict))
    for bucket in found:
        print(f"bucket   {bucket}")
    layers = sorted({i for e in verdict.alike for i in e.layers}) or sorted({x.layer for x in verdict.experts})
    if verdict.exit_code:
        print("\nto be sure, dump these layers (qwen35-moe dump-config ENGINE says how):")
        print("\n".join(f"  {line}" for line in layer_lines(layers or [0, 1])))
    records = {**verdict.to_dict(), "buckets": [{"name": b.name, "rows": b.rows, "ratio": b.ratio} for b in found]}
    files: dict[Path, Callable[[], str]] = {}
    if args.json:
        files[args.json] = lambda: json.dumps({"type": "probe", **records}) + "\n"
    if args.html:
        files[args.html] = lambda: pages.verdict_page(verdict, [str(b) for b in found])
    code = 1 if any(b.bad for b in found) else verdict.exit_code
    return write_outputs(code, files, args.html)


def saved(truth: Trace, path: Path, args: argparse.Namespace) -> int:
    """`compare TRUTH answers.json`: answers of any engine that were kept, to the tokens of a truth."""
    source, fused = weights_of(truth, args.checkpoint, args.ignore_config_keys)
    if source is None:
        do = "say where it is with --checkpoint"
        raise Qwen35Error("answers are judged by the checkpoint, which is not there", where=args.truth, do=do)
    ids = [row[mask.bool()].tolist() for row, mask in zip(truth.ids, truth.mask, strict=True)]
    answers = read_answers(path)
    arithmetic = truth.meta.get("arithmetic") or "exact"
    which = faults(None, source.config)
    how = How(arithmetic, args.engine, args.kv_cache, args.state, which, where=where(args))
    known = prepare(source, fused, ids, how)
    return print_verdict(known.judge(answers), args)
