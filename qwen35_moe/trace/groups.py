"""Many prompts in many processes: each traces groups of prompts of its own, and one process joins the traces.

    accelerate launch --multi_gpu --num_processes 4 -m qwen35_moe trace CHECKPOINT --ids prompts.json --out truth

A group is `--batch` prompts, one forward pass; all groups are padded to one length. Its trace lies in
`truth/groups/00000`, ... until all layers are done, and --resume continues it. The bytes of the result depend on the
size of a group (a product of another shape may add up in another order), not on the number of processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Qwen35Error
from ..numerics.taps import Site
from ..run.files import whole
from ..run.processes import Processes
from ..run.streamed import HEAD_ROWS, in_steps
from ..untrusted import read_bytes
from .file import Trace
from .folder import GROUPS, GROUPS_RUN, START_ANEW, check_ours, check_same, complete_trace, has_state, remove_groups
from .head import Entry
from .writer import TraceWriter

MOST_GROUPS = 99_999  # five digits


def begin_groups(out: Path, count: int, layers: int, run: str, resume: bool, processes: Processes) -> list[Path]:
    """The folders that traces of groups are written to, one after another; OUT itself for one group; none if all are
    joined already. Without `resume`, what another run has left is removed.

    run: what must be equal for equal bytes. Error: `resume`, and another run was begun there.
    """
    folder, said = out / GROUPS, out / GROUPS / GROUPS_RUN
    begun = resume and said.is_file()
    if count == 1:
        if begun and not has_state(out) and complete_trace(out, layers) is None:
            raise _other_way(out, "all prompts in one pass", "groups of prompts")
        return [out]
    if resume and not begun and complete_trace(out, layers) is not None:
        return []
    check_ours(out)
    if count > MOST_GROUPS:
        raise Qwen35Error("too many groups", where="--batch", expected=f"at most {MOST_GROUPS}", found=count)
    if begun:
        check_same(out, read_bytes(said).decode("utf-8", "replace"), run)
    elif resume and has_state(out):
        raise _other_way(out, "groups of prompts", "all prompts in one pass")
    processes.wait()
    if processes.rank == 0 and not begun:
        remove_groups(out)
        folder.mkdir(parents=True)
        with whole(said) as temporary:
            temporary.write_text(run, encoding="utf-8")
    processes.wait()
    return [folder / f"{i:05d}" for i in range(count)]


def _other_way(out: Path, expected: str, found: str) -> Qwen35Error:
    what, do = "another run was begun here", f"give the options of that run, or {START_ANEW}"
    return Qwen35Error(what, where=out, expected=expected, found=found, do=do)


def join(traces: Sequence[Trace], out: Path, meta: dict[str, Any]) -> Trace:
    """One trace from those of consecutive prompts (`joined_rows`); without any, the one in `out`. Memory holds about
    one layer."""
    if not traces:
        return Trace.open(out)
    tensors = [Counter(entry.file for entry in t.sites.values()) for t in traces]  # how many a file holds
    alone = {key for t, held in zip(traces, tensors, strict=True) for key, e in t.sites.items() if held[e.file] == 1}
    with TraceWriter(out, meta) as writer:
        for key in _order(traces):
            there = [t for t in traces if key in t]
            entry = there[0].sites[key]
            if key in alone and key == entry.name and len(entry.shape) == 3:  # logits: larger than all of a layer
                shape = (sum(t.sites[key].shape[0] for t in there), *entry.shape[1:])
                writer.add_blocks(Site(key), entry.dims, shape, _blocks(there, key, entry.shape[-1]))
            else:
                x = joined_rows(key, entry, [t[key] for t in there])
                writer.add(replace(entry, shape=tuple(x.shape), file=""), x)
    return Trace.open(out)


def _order(traces: Sequence[Trace]) -> list[str]:
    """Keys of all traces in the order of computing. An expert that a group does not hit is missing in its trace.

    The place of a key: how many keys of no expert stand before it; its expert, or the one whose turn of the running sum
    it is; how many of that expert's stand before it.
    """
    place: dict[str, tuple[int, int, int]] = {}
    for trace in traces:
        common, expert, own = 0, -1, 0
        for key, entry in trace.sites.items():
            last, own = expert, own + 1
            if entry.expert is not None or not key.endswith(f".{expert}"):
                expert = -1 if entry.expert is None else entry.expert
            if expert != last or expert < 0:
                common, own = common + (expert < 0), 0
            place[key] = common, expert, own
    return sorted(place, key=place.__getitem__)


def joined_rows(key: str, entry: Entry, values: Sequence[Tensor]) -> Tensor:
    """Values of tokens one behind the other, in the order of the prompts; those that have no tokens (`dims` without b,
    t or r: gains) are the same in all parts. Error: they are not."""
    if entry.dims.split()[0] in ("b", "t", "r"):
        return torch.cat(list(values))
    if any(not torch.equal(value, values[0]) for value in values[1:]):
        raise Qwen35Error("parts of a trace do not belong together", where=key, expected="the same weights' values")
    return values[0]


def _blocks(traces: Sequence[Trace], key: str, columns: int) -> Iterator[tuple[slice, Tensor]]:
    for which in in_steps(columns, HEAD_ROWS):
        yield which, torch.cat([trace.columns(key, which) for trace in traces])
