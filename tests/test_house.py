"""The house keeps its law: imports go down only, no module imports itself by a detour, the model needs torch alone."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import qwen35_moe

ROOT = Path(qwen35_moe.__file__).parent
# From the ground up; folders on one floor do not import each other.
# `weights` leads to the recipes beside the package.
FLOORS = (
    {"errors", "weights"}, {"quant"}, {"gate", "numerics"}, {"checkpoint", "model"}, {"run"}, {"trace"}, {"oracle"},
    {"testing", "cli"}, {"pytest_plugin"},
)  # fmt: skip
FLOOR = {folder: floor for floor, folders in enumerate(FLOORS) for folder in folders}
ABOVE_ALL = {
    "__init__",
    "__main__",
    "pytest_plugin",
}  # the face, `python -m qwen35_moe`, what pytest loads


@cache
def modules() -> dict[str, ast.Module]:
    """Name within the package ("model.moe", "model.vision" for its __init__) -> its tree."""
    return {_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


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


@pytest.mark.parametrize("name", [name for name in modules() if name.partition(".")[0] == "model"])
def test_the_model_needs_numerics_errors_and_torch(name: str) -> None:
    inside = {target.partition(".")[0] for target, _ in inner(name)}
    outside = {target.partition(".")[0] for target, own, _ in imports(name) if not own}
    assert inside <= {"model", "numerics", "errors"}
    assert outside <= {"torch"} | sys.stdlib_module_names


def test_an_import_does_nothing_but_define() -> None:
    """The host's threads, warnings and defaults are its own: a module calls nothing for its effect but `register`."""
    found = {
        f"{name}: {ast.unparse(node.value.func)}"
        for name, tree in modules().items()
        for node in tree.body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    }
    assert found == {"numerics.tables: register"}


@pytest.mark.parametrize("name", [n for n in modules() if n.partition(".")[0] in ("model", "numerics", "run")])
def test_nothing_is_chosen_by_what_an_object_has(name: str) -> None:
    """What a handler or an expert can do is said by its type."""
    called = {
        node.func.id
        for node in ast.walk(modules()[name])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"hasattr", "getattr"}
