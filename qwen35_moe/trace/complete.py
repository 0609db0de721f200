"""What a run meets and leaves in its directory: a trace that is complete already, and errors on the way."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..checkpoint import UsageReport
from ..errors import Qwen35Error
from ..model.text import Model
from ..run.origin import origin_of
from .file import Trace
from .folder import finish, sweep
from .head import HEAD_FILE, PARTIAL, RESUME
from .resume import check_same


@contextmanager
def resumable(out: Path, layer: int) -> Iterator[None]:
    """Says of an error on the way what can be done about it."""
    done = f" again and add --resume: layers below {layer} are done" if layer else ", and run again"
    do = f"make it work{done}"
    try:
        yield
    except Qwen35Error as error:
        do = f"{error.do}; {do}" if error.do else do
        raise Qwen35Error(error.what, where=error.where, expected=error.expected, found=error.found, do=do) from error
    except (OSError, SafetensorError) as error:
        raise Qwen35Error("cannot write the trace", where=out, found=error, do=do) from error


def complete_trace(out: Path, layers: int) -> Trace | None:
    """The complete trace in OUT; None if there is none, or one of the first layers, or an unfinished one beside it."""
    finish(out)
    if (out / PARTIAL / RESUME).is_file() or not (out / HEAD_FILE).is_file():
        return None
    trace = Trace.open(out)
    return trace if trace.meta.get("layers", layers) == layers else None


def resumed_complete(model: Model, trace: Trace, meta: dict[str, Any], aside: Sequence[str]) -> UsageReport:
    """A trace whose run was killed after its last layer. Error: it belongs to another run."""
    assert trace.path is not None
    what, do = "a complete trace of another run is here", "leave out --resume to write it anew"
    then = {key: value for key, value in trace.meta.items() if key not in ("layers", "draft_ids")}
    check_same(trace.path, json.dumps(then), json.dumps(meta, default=str), what, do)
    sweep(trace.path)
    (trace.path / RESUME).unlink(missing_ok=True)
    checkpoint = origin_of(model).checkpoint
    checkpoint.used.update(n for n in checkpoint.names() if not any(fnmatchcase(n, pattern) for pattern in aside))
    return checkpoint.report(aside)
