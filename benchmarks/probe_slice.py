"""`probe` on a slice of a large checkpoint, on a GPU or a CPU: how long it takes, and what it sees.

    python -m weights.build slice-35b --layout bf16 --layers 4 --text-only --out DIR --jobs 8
    python -m benchmarks.probe_slice time DIR --device cuda       # a loopback server with answers of our own, recorded
    python -m benchmarks.probe_slice power DIR --device cuda --save slice.jsonl --tokens 40 400

`time`: the answers are computed first, in SGLang's arithmetic; then the command runs as users run it, faults in all
layers replayed. Its wall time is that from the command to the verdict; the server answers from memory.
`power`: as `probe_power`, but engines are branches of the same replay in an arithmetic of their own, and the log p that
they tell are of the truth's likeliest tokens. `python -m benchmarks.probe_power --table` prints the records.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.probe_power import ENGINES, PROMPTS, named, seen
from qwen35_moe.numerics.tables import SGLANG_BF16
from qwen35_moe.oracle.judge.where import Where
from qwen35_moe.oracle.servers.dialects import TOKENS_PER_REQUEST
from qwen35_moe.oracle.servers.hypotheses import PlacedFault
from qwen35_moe.oracle.servers.judge import Judge
from qwen35_moe.oracle.servers.probe import How, Prepared, drawn_prompts, prepare
from qwen35_moe.oracle.servers.replay import Branch, Replay
from qwen35_moe.oracle.servers.verdict import Told, decide
from qwen35_moe.oracle.truth import open_checkpoint
from qwen35_moe.run.source import WeightSource


def recorded(source: WeightSource, ids: list[list[int]], device: str, top: int) -> dict[tuple[int, ...], Any]:
    """What SGLang's /generate would answer: prompt, or some first tokens of it -> JSON. The generated tokens
    are drawn, not chosen."""
    more = drawn_prompts(source.config, len(ids), len(ids[0]) + TOKENS_PER_REQUEST, seed=5)
    longer = [[*one, *other[len(one) :]] for one, other in zip(ids, more, strict=True)]
    fused = [False] * source.config.num_hidden_layers
    replay = Replay(source, fused, torch.tensor(longer), where=Where(device))
    branch, n = replay.run(SGLANG_BF16, [], [])[0], len(ids[0])
    answers = {}
    for b, one in enumerate(longer):
        rows = torch.full((len(one) - 1,), b), torch.arange(len(one) - 1)
        x = torch.cat([part.cpu() for _, part in replay.log_p(branch, rows)])
        given = [[None, one[0], None], *([float(x[t, i]), i, None] for t, i in enumerate(one[1:]))]
        likely = [[[float(v), int(i), None] for v, i in zip(*row.topk(top), strict=True)] for row in x]
        tops = [None, *likely]
        for end in range(1, n + 1):
            start, stop = (0, len(one)) if end == n else (end, end + 1)
            meta = {"input_token_logprobs": given[start:end], "input_top_logprobs": tops[start:end],
                    "output_token_logprobs": given[end:stop], "output_top_logprobs": tops[end:stop]}  # fmt: skip
            answers[tuple(one[:end])] = {"text": "", "output_ids": one[end:stop], "meta_info": meta}
    return answers


def timed(folder: Path, device: str, prompts: int, tokens: int, more: list[str]) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from loopback import serving

    source = open_checkpoint(folder)[1].source
    start = time.time()
    answers = recorded(source, drawn_prompts(source.config, prompts, tokens), device, 20)
    print(f"answers of {prompts} prompts of {tokens} tokens recorded in {time.time() - start:.1f} s", flush=True)
    if device != "cpu":
        torch.cuda.empty_cache()

    def reply(path: str, body: Any, _: dict[str, str]) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "slice", "owned_by": "sglang"}]}
        return 200, answers[tuple(body["input_ids"])]

    command = [sys.executable, "-m", "qwen35_moe", "probe", str(folder)]
    options = ["--device", device, "--prompts", str(prompts), "--tokens", str(tokens), *more]
    with serving(reply) as url:
        start = time.time()
        ran = subprocess.run([*command, url, *options], capture_output=True, text=True, check=False)
        wall = time.time() - start
    layers = source.config.num_hidden_layers
    print(f"{layers} layers, {' '.join(options)}: {wall:.1f} s, exit {ran.returncode}", flush=True)
    print("\n".join((ran.stdout + ran.stderr[-600:]).splitlines()[:40]), flush=True)


def values(replay: Replay, branch: Branch, judge: Judge) -> Told:
    """What an engine tells of the tokens that are looked at."""
    log_p: Tensor = replay.gather(branch, judge.at.rows, judge.at.ids)
    return Told(judge.at, log_p, torch.full((len(log_p),), -1))


def power(folder: Path, device: str, tokens: int, save: Path) -> None:
    """Every hypothesis planted, and clean engines, at one number of tokens."""
    source, start, where = open_checkpoint(folder)[1].source, time.time(), Where(device)
    ids = drawn_prompts(source.config, *PROMPTS[tokens], seed=78)
    known: Prepared = prepare(source, [False] * source.config.num_hidden_layers, ids, How(where=where))
    judge, label = known.expect(20), folder.name
    print(f"{label}, {tokens} tokens: prepared in {time.time() - start:.0f} s", flush=True)
    listed = [b.hypothesis for b in known.branches if b.hypothesis]
    replay = Replay(source, known.replay.fused, torch.tensor(ids), where=where)
    broken = replay.run(ENGINES[1], [], listed)[1:]
    made: list[tuple[Branch, PlacedFault | None]] = [(b, b.hypothesis) for b in broken]
    clean = replay.run("exact", ENGINES, [])[1:]
    made += [(b, None) for b in clean]
    with save.open("a", encoding="utf-8") as file:
        for branch, h in made:
            verdict = decide(judge, values(replay, branch, judge))
            record = {"kind": "planted" if h else "clean", "checkpoint": label, "tokens": tokens, "top": 20,
                      "name": branch.name, "seed": 78, **seen(verdict)}  # fmt: skip
            if h:
                record |= {"layer": h.layer, "fault": h.fault.name, "named": named(verdict, h)}
            file.write(json.dumps(record) + "\n")
    print(f"{label}, {tokens} tokens: {len(made)} engines judged, {time.time() - start:.0f} s in all", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["time", "power"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, nargs="*", default=[400], choices=PROMPTS, help="power: in all")
    parser.add_argument("--size", type=int, nargs=2, default=[8, 50], help="time: prompts, and tokens of each")
    parser.add_argument("--faults", default="all", help="time: all or each")
    parser.add_argument("--save", type=Path, default=Path("probe_slice.jsonl"))
    options = parser.parse_args()
    if options.what == "time":
        timed(options.folder, options.device, *options.size, ["--faults", options.faults])
    for tokens in options.tokens if options.what == "power" else []:
        power(options.folder, options.device, tokens, options.save)


if __name__ == "__main__":
    main()
