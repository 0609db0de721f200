"""The house keeps its law: imports go down only, no module imports itself by a detour, the model needs torch alone."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import qwen35_moe

ROOT = Path(qwen35_moe.__file__).parent
# From the ground up; folders on one floor do not import each other.
# `weights` leads to the recipes beside the package.
FLOORS = (
    {"errors", "weights"}, {"untrusted"}, {"quant"}, {"gate", "numerics"}, {"checkpoint", "model"}, {"run"},
    {"trace"}, {"oracle"}, {"testing", "cli"}, {"pytest_plugin"},
)  # fmt: skip
FLOOR = {folder: floor for floor, folders in enumerate(FLOORS) for folder in folders}
ABOVE_ALL = {"__init__", "__main__", "pytest_plugin"}  # the face, `python -m qwen35_moe`, what pytest loads


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {_name(path): path for path in sorted(ROOT.rglob("*.py"))}


@cache
def modules() -> dict[str, ast.Module]:
    """Name within the package ("model.moe", "model.vision" for its __init__) -> its tree."""
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports(name: str) -> Iterator[tuple[str, bool, int]]:
    """(module or name, whether it is within the package, line) of all imports of a module, those in functions, too."""
    package = name.split(".") if (ROOT / name.replace(".", "/")).is_dir() else name.split(".")[:-1]
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            own = (node.module or "").partition(".")[0] == ROOT.name
            yield (node.module or "").removeprefix(f"{ROOT.name}."), own, node.lineno
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                yield ".".join([*start, alias.name]), True, node.lineno


def inner(name: str) -> Iterator[tuple[str, int]]:
    """The package's modules that a module imports."""
    for target, own, line in imports(name):
        if own:
            found = target if target in modules() else target.rpartition(".")[0]
            if found in modules():
                yield found, line


def test_the_floors_are_all_folders() -> None:
    there = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert there - ABOVE_ALL <= FLOOR.keys()


def test_imports_go_down() -> None:
    wrong = []
    for name in modules():
        here = name.partition(".")[0]
        for target, line in inner(name):
            there = target.partition(".")[0]
            if here not in ABOVE_ALL and here != there and FLOOR.get(there, len(FLOORS)) >= FLOOR[here]:
                wrong.append(f"{name}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_no_circle() -> None:
    """At any depth: a module that is being visited is not met again."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target, _ in inner(name):
                if target != name:
                    visit(target, (*path, name))
            done.add(name)

    for name in modules():
        visit(name, ())


@pytest.mark.parametrize("name", [name for name in FILES if name.partition(".")[0] == "model"])
def test_the_model_needs_numerics_errors_and_torch(name: str) -> None:
    inside = {target.partition(".")[0] for target, _ in inner(name)}
    outside = {target.partition(".")[0] for target, own, _ in imports(name) if not own}
    assert inside <= {"model", "numerics", "untrusted", "errors"}
    assert outside <= {"torch"} | sys.stdlib_module_names


def test_the_model_is_twelve_words() -> None:
    """What a reader of the model opens, and nothing else."""
    entries = {path.stem for path in (ROOT / "model").iterdir() if path.suffix == ".py" or path.is_dir()}
    words = "config ops norms rope attention deltanet router moe cache text mtp vision"
    assert entries - {"__init__", "__pycache__"} == set(words.split())


def test_an_import_does_nothing_but_define() -> None:
    """The host's threads, warnings and defaults are its own: a module calls nothing for its effect but `register`."""
    found = {
        f"{name}: {ast.unparse(node.value.func)}"
        for name, tree in modules().items()
        for node in tree.body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    }
    assert found == {"numerics.tables: register"}


@pytest.mark.parametrize("name", [n for n in FILES if n.partition(".")[0] in ("model", "numerics", "run")])
def test_nothing_is_chosen_by_what_an_object_has(name: str) -> None:
    """What a handler or an expert can do is said by its type."""
    called = {
        node.func.id
        for node in ast.walk(modules()[name])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"hasattr", "getattr"}


# What opens a file or parses JSON past `untrusted`, and why it may: the file was found regular before, its bytes are
# ours, or the library takes a path only.
OPENERS = {"open", "load", "loads", "load_file", "safe_open", "read_text", "read_bytes", "fromfile", "memmap"}
OURS = ("Trace", "Checkpoint", "Folder", "cls")  # whose `open` is not the library's
OPEN_HERE = {
    "untrusted": "the one reader",
    "checkpoint.checksums": "hashes files whose header was read by the one reader",
    "checkpoint.checkpoint": "hashes files whose header was read by the one reader",
    "checkpoint.header": "calls check_regular, then reads a header of bounded size",
    "checkpoint.reader": "maps files whose header was read by the one reader",
    "cli.main": "opens the null device",
    "oracle.dumps.readers.common": "torch.load of weights only, after check_regular",
    "oracle.dumps.readers.llama_cpp": "float32 of a size that is checked, after check_regular",
    "oracle.dumps.readers.plain": "numpy maps the file, after check_regular",
    "oracle.dumps.readers.vllm": "numpy maps the file, after check_regular",
    "oracle.dumps.writers": "writes",
    "oracle.servers.dialects": "writes",
    "run.files": "hashes and locks its own files",
    "run.prompt": "Pillow reads a picture, after check_regular",
    "testing.drawn": "the package's own configurations",
    "testing.gate": "the package's own configurations",
    "oracle.judge.envelope_file": "parses what its checksum covers",
    "trace.estimate": "reads /proc of this process",
    "trace.folder": "the first 64 bytes of a regular file, and what this process has written",
    "trace.writer": "writes",
}


def test_strangers_files_are_read_in_one_place() -> None:
    found = {
        name: [ast.unparse(node)[:60] for node in ast.walk(tree) if _opens(node)] for name, tree in modules().items()
    }
    found = {name: calls for name, calls in found.items() if calls}
    assert found.keys() == OPEN_HERE.keys(), {k: found.get(k) for k in found.keys() ^ OPEN_HERE.keys()}


def _opens(node: ast.AST) -> bool:
    """Whether this is a call of a function that reads a file or parses JSON, but those of `untrusted` and of ours."""
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Name):
        return node.func.id in OPENERS - {"load", "read_bytes"}
    if not isinstance(node.func, ast.Attribute) or node.func.attr not in OPENERS:
        return False
    of = ast.unparse(node.func.value)
    return of in ("torch", "np", "pickle", "json") if node.func.attr == "load" else of not in OURS


# Functions of more than 7 parameters, and why each has them.
MANY_PARAMETERS = {
    "run.load.load": "public: each is one choice, under the names of transformers' from_pretrained",
    "trace.recorder.trace": "public: what `model(...)` takes, and what is traced",
    "oracle.truth.write_truth": "public: what `trace` and `load` take",
    "model.mtp.draft_head": "what `Model.forward` takes, and the draft's own inputs",
    "model.mtp.draft": "the same for a chain",
    "oracle.dumps.dump.__init__": "each reader gives what its format holds",
}
# Names that several modules define: one meaning each, which every one of them offers under the same name.
SHARED_NAMES = {
    "configure": "every command: adds its options to the parser",
    "run": "every command: runs it, and returns the exit status",
    "sniff": "every reader of dumps: whether a path has its format",
    "known": "every reader of dumps: whether a file is one that it reads",
    "read": "every reader of dumps: the dump at a path",
    "quantise_dequantise": "every number format of `quant`: what is left of a tensor",
}


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for name, tree in modules().items():
        yield from ((f"{name}.{node.name}", node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def parameters(node: ast.FunctionDef) -> int:
    named = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    return len([argument for argument in named if argument.arg not in ("self", "cls")])


def test_files_and_functions_are_short() -> None:
    """250 lines a file, 60 a function, 7 parameters."""
    files = {name for name, path in FILES.items() if path.read_text(encoding="utf-8").count("\n") > 250}
    long = {name for name, node in functions() if (node.end_lineno or 0) - node.lineno >= 60}
    many = {name for name, node in functions() if parameters(node) > 7}
    assert (files, long, many) == (set(), set(), MANY_PARAMETERS.keys())


def defined(tree: ast.Module) -> set[str]:
    """The public names that a module defines at its top."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update(part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name))
    return {name for name in found if not name.startswith("_")}


def test_a_name_has_one_meaning() -> None:
    """No two modules define one public name, but those above, each of which some modules do share."""
    counts = Counter(name for tree in modules().values() for name in defined(tree))
    assert {name for name, count in counts.items() if count > 1} == SHARED_NAMES.keys()
    assert len(SHARED_NAMES) <= 10 and all(SHARED_NAMES.values())
