"""`qwen35-moe gate`: may the shared expert be fused, who would fuse it, and where would that break?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import fields
from functools import cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from ..errors import Qwen35Error
from ..gate.decide import NEWEST, RULES, VARIANTS, Options, decide_layers, hazards, rule_named, summarise
from ..gate.declared import with_hf_quant_config
from ..gate.records import GateModel, SpecLookup
from ..untrusted import read_json

Variant = tuple[str, str, dict[str, Any]]  # label, rule, the options that make it
RULE_NAMES = ", ".join((*RULES, *(f"{name} ({rule})" for name, rule in NEWEST.items())))


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Says whether the shared expert may become one more slot of the routed experts. "
        "Judges a checkpoint by its tensors, and a config.json by its exclude list."
    )
    parser.add_argument("path", help="checkpoint folder, .safetensors file or config.json")
    parser.add_argument("--rule", default="strict",
                        help=f"apply this engine's rule: {RULE_NAMES} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--all-rules", action="store_true", help="show every engine's rule, and what breaks")
    parser.add_argument("--json", action="store_true", help="print the records as JSON")
    settings = ", ".join(f.name for f in fields(Options))
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
                        help=f"a setting of the engine, for example a2a_backend=mori; one of {settings}")  # fmt: skip
    parser.add_argument("--config-only", action="store_true", help="read config.json alone, no tensors")


def run(args: argparse.Namespace) -> int:
    """Prints the decisions; always 0, since both answers are good ones. Error: input that cannot be read."""
    options = parse_options(args.option)
    config, stored, source = config_and_specs(Path(args.path), args.config_only)
    rule = rule_named(args.rule)
    chosen: Iterable[Variant] = VARIANTS if args.all_rules else ((rule, rule, {}),)
    model = GateModel.from_config(config, stored=stored)
    results = [result_of(model, variant, options) for variant in chosen]
    if args.json:
        print(json.dumps({"type": "gate", "path": args.path, "decided_by": source, "rules": results}))
    else:
        print(f"{args.path}: decided by {source}")
        for result in results:
            print("\n".join(lines_of(result, brief=args.all_rules)))
    return 0


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """`NAME=VALUE` pairs, typed as the fields of `Options` are."""
    types = {f.name: type(f.default) for f in fields(Options)}
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": True}
    found: dict[str, Any] = {}
    for name, _, text in (pair.partition("=") for pair in pairs):
        kind = types.get(name := name.replace("-", "_"))
        number = kind is int and text.isdigit()
        found[name] = words.get(text.lower(), text) if kind is bool else int(text) if number else text
    Options.from_kwargs(found)
    return found


def config_and_specs(path: Path, config_only: bool = False) -> tuple[dict[str, Any], SpecLookup | None, str]:
    """(config.json, lookup of stored specs or None, in words what decides)."""
    has_tensors = path.suffix == ".safetensors" or path.is_dir() and any(path.glob("*.safetensors"))
    if has_tensors and not config_only:
        from ..checkpoint import Checkpoint

        try:
            checkpoint = Checkpoint.open(path)
        except Qwen35Error as error:
            said = {key: getattr(error, key) for key in ("what", "where", "expected", "found")}
            do = "; ".join(filter(None, [error.do, "--config-only judges by config.json alone"]))
            raise Qwen35Error(**said, do=do) from error
        # Every rule asks about the same modules, and a layer of 512 experts takes a while.
        return dict(checkpoint.config), cache(checkpoint.spec), "the tensors' dtypes and scales"
    file = path / "config.json" if path.is_dir() else path
    config = read_json(file)
    if not isinstance(config, dict):
        raise Qwen35Error("config.json must hold an object", where=file, found=type(config).__name__)
    beside = file.with_name("hf_quant_config.json")
    if file.name == "config.json" and beside.is_file():
        config = with_hf_quant_config(config, read_json(beside))
    return config, None, "the configuration alone (no tensors)"


def result_of(model: GateModel, variant: Variant, given: dict[str, Any]) -> dict[str, Any]:
    label, rule, switches = variant
    options = given | switches
    layers = decide_layers(model, rule=rule, **options)
    breaks, answer = hazards(model, None, layers), summarise(layers, rule)
    records = [d.to_dict() | {"breaks": breaks.get(d.layer), "text": str(d)} for d in layers]
    return {"rule": rule, "variant": label, "options": options, "model": answer.to_dict(), "layers": records}


def lines_of(result: dict[str, Any], brief: bool) -> list[str]:
    """One line for layers that agree, then the deciding entry, warnings, and what would break."""
    lines = []
    told = itemgetter("fused", "online", "starts", "reason")
    alike = groupby(result["layers"], key=lambda r: (told(r), r["layer"].startswith("mtp."), r["breaks"] is not None))
    for records in (list(group) for _, group in alike):
        first = records[0]
        name = first["layer"] if len(records) == 1 else f"{first['layer']}-{records[-1]['layer'].rpartition('.')[2]}"
        word = "online" if first["online"] else "fused" if first["fused"] else "unfused"
        word = word if first["starts"] else "does not start"
        verdict = f"{word}, BREAKS" if first["breaks"] else word
        head = f"{result['variant']:<24} " if brief else ""
        lines.append(f"  {head}{name:<14} {verdict:<16} {first['reason']}")
        pad = "  " + " " * len(head) + " " * 15
        evidence = [e for e in first["evidence"] if not brief or e["kind"] == "entry"]
        for e in evidence[:1] if brief else evidence:
            lines.append(f"{pad}{'warning: ' if e['kind'] == 'warning' else ''}{e['text']}")
        if first["breaks"]:
            lines.append(f"{pad}breaks: {first['breaks']}")
    return lines
