"""Reading dumps: one small file a format, and one function that finds out which format it is.

A format is a module with `sniff(path) -> bool`, which looks at names, and into a file only where they do not tell (an
error there means no), and `read(path, **options)`, which returns a Dump; `known(file)` may say which files of tensors
are its own. Files are data: `torch.load` runs with `weights_only=True`, numpy without pickles; a file that would need
more is refused by name, and the rest is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....errors import Qwen35Error
from ....untrusted import check_regular
from ..checks import check_steps
from ..dump import Dump, Piece, StepTokens
from ..pieces import fence
from . import answers, atom, llama_cpp, own, plain, sglang, sglang_passes, transformers, vllm

# The first that recognises a path reads it; `plain` takes what is left.
TENSORS = (*plain.TORCH_SUFFIXES, ".npy", ".npz", ".safetensors")
READERS = (own, sglang, sglang_passes, atom, transformers, llama_cpp, answers, vllm, plain)

__all__ = ["Dump", "Piece", "StepTokens", "read_dump", "transformers"]


def _sniffs(reader: Any, path: Path) -> bool:
    """Whether a format recognises a path as its own; what it cannot even look at is not."""
    try:
        return bool(reader.sniff(path))
    except Exception:  # files of strangers may raise anything
        return False


def read_dump(
    path: str | Path, *, config: Mapping[str, Any] | None = None,
    name_map: Mapping[str, str] | str | Path | None = None, layers: list[int] | None = None,
) -> Dump:  # fmt: skip
    """Read a dump of any known format, found by looking.

    path       a directory or file
    config     the checkpoint's config.json as a dict (or a trace's `meta["config"]`): sizes for splitting fused tensors
    name_map   for plain files: engine's name (or regular expression) -> key, as a dict or the path of a JSON file
    layers     for vLLM's hidden states: the layer ids that were asked for

    Raises Qwen35Error if nothing there can be read; whatever else is wrong stands in the result's `.problems`.
    """
    path = Path(path)
    if not path.exists():
        raise Qwen35Error("no such dump", where=path, do="check the path")
    if not path.is_dir():
        check_regular(path)
    reader = next((r for r in READERS if _sniffs(r, path)), None)
    if reader is None:
        inside = sorted(p.name for p in path.iterdir())[:3] if path.is_dir() else [path.name]
        raise Qwen35Error("dump is of no known format", where=path, found=", ".join(inside) or "an empty folder",
                          expected="SGLang dumper or Pass*.pt, ATOM layer*.pt, transformers debug tree, vLLM or "
                                   "llama.cpp files, safetensors, npz or npy",
                          do="see `qwen35-moe dump-config ENGINE` for how to make one, or give a name map")  # fmt: skip
    for given, only, what, do in (
        (name_map, plain, "a name map is for plain files", "leave it out: this format has names of its own"),
        (layers, vllm, "layer ids are for vLLM's files", "leave them out: this format names its layers"),
    ):
        if given is not None and reader is not only:
            raise Qwen35Error(what, where=path, found=reader.__name__.rpartition(".")[2], do=do)
    with fence("dump cannot be read", path, "dump again, or keep the files that can be read"):
        dump = reader.read(path, config=config, name_map=name_map, layers=layers)
    if not dump.sources:
        if dump.problems:
            raise dump.problems[0]
        found = ", ".join(dump.unknown[:5]) or "no tensors"
        checkpoint = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
        do = "name the engine's dump: this is a checkpoint" if checkpoint else "give a name map (--name-map)"
        raise Qwen35Error("nothing in the dump has a known name", where=path, found=found, do=do)
    check_steps(dump)
    if left := _not_understood(path, reader):
        dump.notes.append(f"{len(left)} files were not understood, and left out: {', '.join(left[:5])}"
                          f"{', ...' if len(left) > 5 else ''}")  # fmt: skip
    return dump


def _not_understood(path: Path, reader: Any) -> list[str]:
    """Files of tensors in the folder that its reader does not read. Those that it failed to read are problems."""
    known = getattr(reader, "known", lambda file: file.suffix not in plain.TORCH_SUFFIXES)
    files = (p for p in path.rglob("*") if p.suffix in TENSORS) if path.is_dir() else ()
    return sorted(str(p.relative_to(path)) for p in files if p.is_file() and not known(p))
