"""Many prompts in many processes: each traces groups of prompts of its own, and one process joins the traces.

    accelerate launch --multi_gpu --num_processes 4 -m qwen35_moe trace CHECKPOINT --ids prompts.json --out truth

A group is `--batch` prompts, one forward pass; all groups are padded to one length. Its trace lies in
`truth/groups/00000`, ... until all layers are done, and --resume continues it. The bytes of the result depend on the
size of a group (a product of another shape may add up in another order), not on the number of processes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Qwen35Error, extra
from ..numerics.taps import Site
from ..oracle.judge.envelope_file import ENVELOPE, stored_envelope
from ..run.files import save_checked, whole
from ..run.streamed import HEAD_ROWS
from ..trace.file import Trace
from ..trace.folder import GROUPS, GROUPS_RUN, check_ours, check_same, complete_trace, has_state, remove_groups
from ..trace.head import Entry
from ..trace.writer import TraceWriter
from ..untrusted import read_bytes, tensor_file

MOST_GROUPS = 99_999  # five digits
# What torchrun (`accelerate launch` with GPUs) and MPI (on CPUs) say of how many processes there are.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class Processes:
    """Those that `accelerate launch` has started, or this one alone."""

    def __init__(self, device: str):
        self.state: Any = None
        self.rank, self.count, self.device = 0, 1, device
        if any(os.environ.get(name, "1") != "1" for name in SIZES):
            with extra("placement"):
                from accelerate import PartialState
            try:  # the fastest waits for the slowest, for hours
                self.state = PartialState(cpu=device == "cpu", timeout=timedelta(days=30))
            except (ValueError, RuntimeError, KeyError) as error:
                said = ", ".join(f"{name}={os.environ[name]}" for name in SIZES if name in os.environ)
                what, do = "cannot join the other processes", "use `accelerate launch`, or unset it"
                raise Qwen35Error(what, where="the environment", found=f"{said}: {error}", do=do) from error
            self.rank, self.count = self.state.process_index, self.state.num_processes
            if device == "cuda":
                self.device = str(self.state.device)

    def own(self, groups: int) -> list[int]:
        """Which of the groups are this process's."""
        if self.state is None:
            return list(range(groups))
        with self.state.split_between_processes(list(range(groups))) as own:
            return own

    def gather(self, names: set[str]) -> set[str]:
        """The union over all processes, once all of them have come here."""
        if self.state is None:
            return names
        from accelerate.utils import gather_object

        return set(gather_object(sorted(names)))

    def wait(self) -> None:
        """Returns once all processes have come here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def close(self) -> None:
        if self.state is not None:
            self.state.wait_for_everyone()
            self.state.destroy_process_group()


def begin_groups(out: Path, count: int, run: str, resume: bool, processes: Processes) -> list[Path]:
    """The folders of a run's groups, one after another. Without `resume`, those of another run are removed.

    run: what must be equal for equal bytes. Error: `resume`, and another run was begun there.
    """
    folder, said = out / GROUPS, out / GROUPS / GROUPS_RUN
    check_ours(out)
    if count > MOST_GROUPS:
        raise Qwen35Error("too many groups", where="--batch", expected=f"at most {MOST_GROUPS}", found=count)
    begun = resume and said.is_file()
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


def check_one_pass(out: Path, layers: int) -> None:
    """Error if the run that was begun there, and not finished, is one over groups of prompts."""
    if (out / GROUPS / GROUPS_RUN).is_file() and not has_state(out) and complete_trace(out, layers) is None:
        raise _other_way(out, "all prompts in one pass", "groups of prompts")


def _other_way(out: Path, expected: str, found: str) -> Qwen35Error:
    what, do = "another run was begun here", "give the options of that run, or leave out --resume to start anew"
    return Qwen35Error(what, where=out, expected=expected, found=found, do=do)


def join(parts: Sequence[Path], out: Path, meta: dict[str, Any]) -> Trace:
    """One trace, and one envelope where the parts have one, from those of consecutive prompts.

    Values of tokens are put one behind the other in the order of the prompts; those that have no tokens (`dims` without
    b, t or r: gains) are the same in all parts. Memory holds about one layer. Error: a part that is not complete.
    """
    traces = [Trace.open(part) for part in parts]
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
                x = _joined(key, entry, [t[key] for t in there])
                writer.add(replace(entry, shape=tuple(x.shape), file=""), x)
    envelopes = [stored_envelope(t) for t in traces]
    if all(envelopes):
        sites = {key: e for t in traces for key, e in t.sites.items()}
        keys = {key: None for envelope in envelopes for key in envelope}
        rows = {key: _joined(key, sites[key], [e[key] for e in envelopes if key in e]) for key in keys}
        save_checked(rows, out / ENVELOPE)
    return Trace.open(out)


def _order(traces: Sequence[Trace]) -> list[str]:
    """Keys of all traces in the order of computing. Experts that a group does not hit are missing in its trace."""
    order, expert = list(traces[0]), _experts(traces)
    for trace in traces[1:]:
        at, known = 0, {key: i for i, key in enumerate(order)}
        if all(key in known for key in trace):
            continue
        for key in trace:
            if key in known:
                at = order.index(key, at) + 1
                continue
            while at < len(order) and expert[order[at]] < expert[key] < inf:
                at += 1
            order.insert(at, key)
            at += 1
    return order


def _experts(traces: Sequence[Trace]) -> dict[str, float]:
    """The expert of each key, or of the one whose turn of the running sum it is; what is no expert's comes last."""
    found: dict[str, float] = {}
    for trace in traces:
        last: int | None = None
        for key, entry in trace.sites.items():
            last = last if entry.expert is None and key.endswith(f".{last}") else entry.expert
            found[key] = inf if last is None else last
    return found


def _joined(key: str, entry: Entry, values: Sequence[Tensor]) -> Tensor:
    if entry.dims.split()[0] in ("b", "t", "r"):
        return torch.cat(list(values))
    if any(not torch.equal(value, values[0]) for value in values[1:]):
        raise Qwen35Error("parts of a trace do not belong together", where=key, expected="the same weights' values")
    return values[0]


def _blocks(traces: Sequence[Trace], key: str, columns: int) -> Iterator[tuple[slice, Tensor]]:
    for first in range(0, columns, HEAD_ROWS):
        which, parts = slice(first, min(first + HEAD_ROWS, columns)), []
        for trace in traces:
            assert trace.path is not None
            with tensor_file(trace.path / trace.sites[key].file) as file:
                parts.append(file.get_slice(key)[:, :, which])
        yield which, torch.cat(parts)
