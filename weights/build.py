"""Build a checkpoint from a recipe.

python -m weights.build tiny --out build/tiny
python -m weights.build slice-35b --layers 4 --layout mxfp4 --text-only --out build/slice

from weights.build import build
path = build("tiny", tmp_path / "tiny")
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from qwen35_moe.errors import Qwen35Error

from .layouts import LAYOUTS, Stored, quantization_config, stored
from .safetensors_file import nbytes, read_tensors, write
from .tensors import Json, logical, text_config

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """A checkpoint in one page. Fields are the keys of the TOML file; `text_config` and `vision_config` override single
    entries of the config that is named."""

    doc: str = ""
    config: str = "tiny"  # configs/<name>.json
    layout: str = "bf16"  # a key of layouts.LAYOUTS
    seed: int = 1
    layers: int | None = None  # the first so many layers only
    prefix: str = "model.language_model."
    flat: bool = False  # text only: flat config, Qwen3_5MoeForCausalLM, prefix model.
    mtp: bool = True
    method: str = "encode"  # or "draw": see encode.py
    float32: bool = True  # A_log and the DeltaNet norm stored F32 (Qwen3.5) or BF16 (Qwen3.6)
    short_heads: int | None = None  # see tensors.logical
    shards: int = 3  # 0: one model.safetensors without an index
    shard_names: str = "model-{i:05d}-of-{n:05d}.safetensors"
    text_config: Json = field(default_factory=dict)
    vision_config: Json = field(default_factory=dict)


def recipes() -> list[str]:
    return sorted(path.stem for path in (HERE / "recipes").glob("*.toml"))


def load(name: str | Path, **changes: Any) -> Recipe:
    """The recipe of this name, or in this file, with some fields changed."""
    path = Path(name) if str(name).endswith(".toml") else HERE / "recipes" / f"{name}.toml"
    if not path.is_file():
        raise Qwen35Error("no such recipe", expected=", ".join(recipes()) + ", or a .toml file", found=name)
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")) | changes
    except (OSError, ValueError, RecursionError) as error:  # bad UTF-8 and bad TOML are ValueErrors
        raise Qwen35Error("cannot read the recipe", where=path, expected="TOML", found=error) from error
    known = get_type_hints(Recipe)
    for entry, value in entries.items():
        if entry not in known:
            raise Qwen35Error("unknown entry in a recipe", where=path, expected=", ".join(known), found=entry)
        kind = dict if get_origin(known[entry]) is dict else known[entry]
        if not isinstance(value, kind):
            raise Qwen35Error("bad entry in a recipe", where=f"{path}: {entry}", expected=kind, found=repr(value))
    recipe = Recipe(**entries)
    if recipe.layout not in LAYOUTS:
        raise Qwen35Error("unknown layout", where=path, expected=", ".join(LAYOUTS), found=recipe.layout)
    return recipe


def real_config(name: str) -> Json:
    """configs/<name>.json as it is: the dimensions of a real model, or those of the tiny one."""
    path = HERE / "configs" / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.json")))
        raise Qwen35Error("no such config", where=path, expected=known, found=name)
    return json.loads(path.read_text(encoding="utf-8"))


def config_of(recipe: Recipe) -> Json:
    """config.json of the recipe, before `quantization_config` is added."""
    config = real_config(recipe.config)
    text = text_config(config)
    text.update(recipe.text_config)
    if "vision_config" in config:
        config["vision_config"].update(recipe.vision_config, out_hidden_size=text["hidden_size"])
    if recipe.layers is not None:
        if not 1 <= recipe.layers <= len(text["layer_types"]):
            raise Qwen35Error(
                "wrong number of layers", where=recipe.config, expected=f"1 to {len(text['layer_types'])}",
                found=recipe.layers,
            )  # fmt: skip
        text["layer_types"] = text["layer_types"][: recipe.layers]
    text["num_hidden_layers"] = len(text["layer_types"])
    if not recipe.mtp:
        text["mtp_num_hidden_layers"] = 0
    if recipe.flat and text is not config:
        tied = config.get("tie_word_embeddings", False)
        config = text | {"architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text"}
        config.setdefault("tie_word_embeddings", tied)
    return config


def plan(recipe: Recipe) -> tuple[Json, list[Stored]]:
    """config.json and the tensors, none of them drawn yet."""
    config, layout = config_of(recipe), LAYOUTS[recipe.layout]
    prefix = "model." if recipe.flat and recipe.prefix == Recipe.prefix else recipe.prefix
    tensors = list(logical(config, vision=not recipe.flat, mtp=recipe.mtp, short_heads=recipe.short_heads))
    quantised = quantization_config([t.name for t in tensors], layout, prefix)
    if quantised:
        config["quantization_config"] = quantised
    ways = {"prefix": prefix, "seed": recipe.seed, "method": recipe.method, "float32": recipe.float32}
    return config, list(stored(tensors, layout, **ways))  # type: ignore[arg-type]


def shards(tensors: list[Stored], count: int, names: str) -> dict[str, list[Stored]]:
    """Contiguous runs of tensors of about equal size."""
    if count == 0:
        return {"model.safetensors": tensors}
    runs: list[list[Stored]] = [[] for _ in range(count)]
    total, before = sum(map(nbytes, tensors)), 0
    for tensor in tensors:
        runs[min(count - 1, before * count // total)].append(tensor)
        before += nbytes(tensor)
    runs = [run for run in runs if run]
    return {names.format(i=i + 1, n=len(runs)): run for i, run in enumerate(runs)}


def build(recipe: str | Path | Recipe, out: str | Path, *, jobs: int = 1, **changes: Any) -> Path:
    """Write the checkpoint into the new folder `out` and return that. It appears whole or not at all; a folder that
    holds this very recipe already is left as it is."""
    recipe = replace(recipe, **changes) if isinstance(recipe, Recipe) else load(recipe, **changes)
    out = Path(out)
    if jobs < 1:
        raise Qwen35Error("nobody to draw the tensors", where="jobs", expected="1 or more", found=jobs)
    config, tensors = plan(recipe)
    made_from = json.dumps(vars(recipe) | {"built_by": fingerprint()}, indent=1)
    if out.exists():
        if (out / "recipe.json").is_file() and (out / "recipe.json").read_text(encoding="utf-8") == made_from:
            return out
        raise Qwen35Error("the output folder exists", where=out, do="name a new one, or remove it first")
    scratch = out.parent / f".{out.name}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        files = shards(tensors, recipe.shards, recipe.shard_names)
        for name, run in files.items():
            write(scratch / name, run, jobs)
        if recipe.shards:
            index = {
                "metadata": {"total_size": sum(map(nbytes, tensors))},
                "weight_map": {t.name: name for name, run in files.items() for t in run},
            }
            _write_json(scratch / "model.safetensors.index.json", index)
        _write_json(scratch / "config.json", config)
        (scratch / "recipe.json").write_text(made_from, encoding="utf-8")
        scratch.rename(out)
    except OSError as error:
        do = f"{sum(map(nbytes, tensors)) / 1e6:.1f} MB are needed; what was written is removed again"
        raise Qwen35Error("cannot write the checkpoint", where=out, found=error, do=do) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def fingerprint() -> str:
    """Of the code that decides the bytes: a folder built by other code is not taken for this one's."""
    digest = hashlib.sha256()
    modules = ("draw", "tensors", "encode", "layouts", "safetensors_file", "build")
    for path in [*(HERE / f"{name}.py" for name in modules), *sorted(HERE.glob("configs/*.json"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _write_json(path: Path, content: Json) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def manifest(checkpoint: str | Path) -> str:
    """A line for each tensor, sorted by name: sha256 of its bytes, dtype, shape, name; last, that of config.json."""
    checkpoint = Path(checkpoint)
    lines = {}
    for file in checkpoint.glob("*.safetensors"):
        for name, entry, data in read_tensors(file):
            shape = "x".join(map(str, entry["shape"]))
            lines[name] = f"{hashlib.sha256(data).hexdigest()} {entry['dtype']} {shape} {name}"
    config = hashlib.sha256((checkpoint / "config.json").read_bytes()).hexdigest()
    return "".join(f"{lines[name]}\n" for name in sorted(lines)) + f"{config} JSON - config.json\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m weights.build", description="Build a checkpoint from a recipe.")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `run`."""
    parser.add_argument("recipe", help="one of " + ", ".join(recipes()) + ", or a .toml file")
    parser.add_argument("--out", required=True, type=Path, help="the folder to create")
    parser.add_argument("--layers", type=int, help="build only the first layers")
    parser.add_argument("--layout", choices=LAYOUTS, help="use this layout instead of the recipe's")
    parser.add_argument("--text-only", action="store_true", help="build no vision tower and no MTP; flat config")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="number of tensors drawn at a time")
    parser.add_argument("--write-manifest", action="store_true", help="write the checksums to manifests/")


def run(options: argparse.Namespace) -> int:
    """Build, and compare with the pinned bytes where there are any. 0; 1 if they differ; 2 if it cannot be built."""
    changes: dict[str, Any] = {k: v for k in ("layers", "layout") if (v := getattr(options, k)) is not None}
    if options.text_only:
        changes |= {"flat": True, "mtp": False}
    try:
        start = time.perf_counter()
        build(options.recipe, options.out, jobs=options.jobs, **changes)
        seconds = time.perf_counter() - start
    except Qwen35Error as error:
        print(f"qwen35-moe: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in options.out.glob("*.safetensors"))
    print(f"{options.out}: {size / 1e6:.1f} MB in {seconds:.1f} s, {size / 1e6 / seconds:.0f} MB/s")
    pinned = HERE / "manifests" / f"{options.recipe}.txt"
    if options.write_manifest:
        pinned.write_text(manifest(options.out), encoding="utf-8")
    elif pinned.is_file() and not changes:
        return _verify(options.out, pinned)
    return 0


def _verify(checkpoint: Path, pinned: Path) -> int:
    expected, found = set(pinned.read_text(encoding="utf-8").splitlines()), set(manifest(checkpoint).splitlines())
    for line in sorted(expected - found):
        print(f"not as pinned: {line}")
    print(f"{len(expected & found)} of {len(expected)} tensors and configs as pinned in {pinned.name}")
    return int(expected != found)


if __name__ == "__main__":
    sys.exit(main())
