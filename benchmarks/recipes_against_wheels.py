"""What `qwen35-moe dump-config` prints against the engines' own sources: would each version accept it?

    python -m benchmarks.recipes_against_wheels SOURCES...

SOURCES are folders with `sglang-*.whl` and `vllm-*.whl` (`pip download --no-deps sglang==0.5.23`), and for ATOM,
which has no wheel, with a folder `atom`, its whole checkout. Nothing is installed or run: names, fields and constants
are found by `ast`. Prints one line a name that an engine does not know, and one a version. Exit code 1 if there is such
a name.

    sglang   variables of the dumper, its filter, source patches (their target, and their text exactly once in it),
             options of the server, keys of the request
    vllm     arguments of LLM and SamplingParams, keys of its configs, method, connector; no call that 0.25 refuses
    atom     classes and variables
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from qwen35_moe.cli.dump_config import SGLANG_PATCHES, dump_config

CONFIGS = {  # of vLLM: keyword of LLM -> (module, class)
    "speculative_config": ("vllm/config/speculative.py", "SpeculativeConfig"),
    "kv_transfer_config": ("vllm/config/kv_transfer.py", "KVTransferConfig"),
}
CONNECTORS = "vllm/distributed/kv_transfer/kv_connector"


def names(tree: ast.AST) -> set[str]:
    """Fields, parameters and names of all classes and functions in it."""
    found = {n.target.id for n in ast.walk(tree) if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    found |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    return found | {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef)}


def constants(tree: ast.AST) -> set[str]:
    return {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def member(tree: ast.AST, *path: str) -> ast.AST:
    """A class, or a function of it."""
    for name in path:
        tree = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name)
    return tree


def unknown(what: str, wanted: set[str], known: set[str]) -> Iterator[str]:
    yield from (f"{what} {name!r}" for name in sorted(wanted - known))


def sglang(source: zipfile.ZipFile) -> Iterator[str]:
    def tree(module: str) -> ast.Module:
        return ast.parse(source.read(f"sglang/srt/{module}.py"))

    recipe, dumper = dump_config("sglang"), tree("debug_utils/dumper")
    variables = {name.lower() for name in re.findall(r"\bDUMPER_(\w+)=", recipe)}
    yield from unknown("DumperConfig has no field", variables, names(member(dumper, "DumperConfig")))
    condition = re.search(r"DUMPER_FILTER='(.*)'", recipe)
    assert condition is not None
    asked = {n.id for n in ast.walk(ast.parse(condition[1])) if isinstance(n, ast.Name)}
    words = {word for text in constants(dumper) for word in re.findall(r"\w+", text)}
    mode = set(re.findall(r"DUMPER_NON_INTRUSIVE_MODE=(\w+)", recipe))
    yield from unknown("the dumper knows no", asked | mode, words | names(dumper))
    kinds = tree("debug_utils/source_patcher/types")
    for patch in yaml.safe_load(SGLANG_PATCHES)["patches"]:
        module, *path = re.fullmatch(r"sglang\.srt\.(.*?)\.([A-Z]\w*)\.(\w+)", patch["target"]).groups()  # type: ignore[union-attr]
        text, keys = source.read(f"sglang/srt/{module.replace('.', '/')}.py").decode(), {*patch, *patch["edits"][0]}
        yield from unknown("patches have no key", keys, names(kinds))
        function = ast.get_source_segment(text, member(ast.parse(text), *path)) or ""
        for edit in patch["edits"]:
            if function.count(edit["match"]) != 1:
                yield f"{patch['target']} has {function.count(edit['match'])} times {edit['match']!r}"
    parts = sorted(
        name for name in source.namelist() if "srt/server_args.py" in name or "srt/arg_groups/fields/" in name
    )
    server = ast.Module([node for name in parts for node in ast.parse(source.read(name)).body], [])
    options = set(re.findall(r"(?<=\s)--([a-z-]+)", recipe))
    known = {name.replace("_", "-") for name in names(server)} | {text[2:] for text in constants(server)}
    yield from unknown("the server has no option", options, known)
    request = ast.parse(source.read("sglang/srt/managers/io_struct.py"))
    keys = set(re.findall(r'"(\w+)":', recipe))
    yield from unknown("a request has no key", keys, names(request) | names(tree("sampling/sampling_params")))


def vllm(source: zipfile.ZipFile) -> Iterator[str]:
    def tree(module: str) -> ast.Module:
        return ast.parse(source.read(module))

    arguments, sampling = tree("vllm/engine/arg_utils.py"), tree("vllm/sampling_params.py")
    speculative, factory = tree(CONFIGS["speculative_config"][0]), tree(f"{CONNECTORS}/factory.py")
    connector = tree(f"{CONNECTORS}/v1/example_hidden_states_connector.py")
    for script in re.findall(r"<<'PY'\n(.*?)^PY$", dump_config("vllm"), re.DOTALL | re.MULTILINE):
        for call in (n for n in ast.walk(ast.parse(script)) if isinstance(n, ast.Call)):
            given = {k.arg: k.value for k in call.keywords if k.arg}
            if isinstance(call.func, ast.Name) and call.func.id == "SamplingParams":
                yield from unknown("SamplingParams has no", {*given}, names(sampling))
            if not isinstance(call.func, ast.Name) or call.func.id != "LLM":
                continue
            yield from unknown("LLM has no argument", {*given}, names(member(arguments, "EngineArgs")))
            if {"enable_return_routed_experts", "kv_transfer_config"} <= {*given}:
                yield "routed experts and a KV connector in one run"
            for key, (module, cls) in CONFIGS.items():
                if not isinstance(config := given.get(key), ast.Dict):
                    continue
                fields = dict(zip((ast.literal_eval(k) for k in config.keys if k), config.values, strict=True))
                yield from unknown(f"{cls} has no field", {*fields}, names(member(tree(module), cls)))
                known = constants(speculative) | constants(factory) | constants(tree(module)) | constants(connector)
                inner = {k.value for n in ast.walk(config) if isinstance(n, ast.Dict) and n is not config
                         for k in n.keys if isinstance(k, ast.Constant)} - {"hf_config"}  # fmt: skip
                values = {
                    v.value for k, v in fields.items() if isinstance(v, ast.Constant) and isinstance(v.value, str)
                }
                yield from unknown(f"{key} knows no", inner | values, known)
        attributes = {n.attr for n in ast.walk(ast.parse(script)) if isinstance(n, ast.Attribute)} & {"routed_experts"}
        yield from unknown("CompletionOutput has no", attributes, names(tree("vllm/outputs.py")))
        prompts = {text for text in constants(ast.parse(script)) if text.startswith("prompt_")}
        inputs = (ast.parse(source.read(n)) for n in source.namelist() if re.fullmatch(r"vllm/inputs/\w+\.py", n))
        yield from unknown("prompts have no", prompts, set().union(*map(names, inputs)))


def atom(root: Path) -> Iterator[str]:
    recipe, text = dump_config("atom"), "\n".join(p.read_text(encoding="utf-8") for p in root.rglob("*.py"))
    listed = re.search(r"^CLASSES=(.*)$", recipe, re.MULTILINE)
    assert listed is not None
    yield from unknown("no class", set(listed[1].split(",")), set(re.findall(r"\w+", text)))
    yield from unknown("no variable", set(re.findall(r"\bATOM_\w+", recipe)), set(re.findall(r"\bATOM_\w+", text)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+")
    count = 0
    for folder in parser.parse_args().sources:
        found = [(p.name.split("-cp")[0], (sglang if p.name[0] == "s" else vllm)(zipfile.ZipFile(p)))
                 for p in sorted(folder.glob("*.whl")) if p.name.startswith(("sglang-", "vllm-"))]  # fmt: skip
        found += [("atom", atom(folder / "atom"))] if any(folder.glob("atom/**/debug_helper")) else []
        for name, wrong in found:
            problems = list(dict.fromkeys(wrong))
            count += len(problems)
            print("\n".join([f"{name}: {'accepted' if not problems else ''}", *(f"  {text}" for text in problems)]))
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
