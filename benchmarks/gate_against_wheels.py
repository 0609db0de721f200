"""The gate's rules against the engines' own code, lifted from their sources: who decides otherwise, and how often?

    python -m benchmarks.gate_against_wheels SOURCES --count 20000

SOURCES is a folder with `sglang-*.whl` and `vllm-*.whl` (`pip download --no-deps sglang==0.5.23`), and for ATOM, which
has no wheel, a folder `atom` (its checkout's root, or what `lifted_atom` names of it). Configurations are drawn
(`drawn_configs`), and those of `weights/recipes/gate` are added; target and draft are asked. A disagreement is printed
with as few entries as it needs. EXPLAINED lists those that stay, with the reason.

Not lifted, and so not compared: platform, all-to-all backends, the `export` section, how vLLM makes a method of an
online target, and whether engines have kernels for a spec (SGLang has none for MXFP4 weights with BF16 inputs).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qwen35_moe.gate.decide import decide_layers
from qwen35_moe.gate.records import GateModel
from weights import gate_recipes

from .drawn_configs import draw
from .lifted_atom import Atom, AtomMultimodal
from .lifted_engines import Answer, Folder, Json, Sglang, Vllm


def sizes(top: Json) -> int:
    """How many sizes experts have: 2 where the shared one is larger."""
    text = top.get("text_config") or top
    return len({text["moe_intermediate_size"], text["shared_expert_intermediate_size"]})


Engine = Sglang | Vllm | Atom
# Why ours differs on purpose, where sizes differ: rule -> reason.
EXPLAINED = {
    "vllm-0.33": "vLLM's gate does not look at sizes, which its fused tensor needs to be equal; ours does",
    "atom-ffdf3bb5": "ATOM's gate does not look at sizes, which its fused tensor needs to be equal; ours does",
    "atom-00afbe32": "ATOM's gate does not look at sizes, which its fused tensor needs to be equal; ours does",
}


def ours(engine: Engine, top: Json, raw: Json, options: Json) -> Answer:
    decisions = decide_layers(GateModel.from_config(top, raw or {}), rule=engine.rule, **options)
    words = ["fused" if d else "no" if d.starts else "stops" for d in decisions]
    mixed = isinstance(engine, Atom) and len(set(words[:-1])) > 1
    return "mixed" if mixed else "stops" if "stops" in words[:-1] else words[0], words[-1]


def recipes() -> Iterator[tuple[Json, Json, Json]]:
    options = {
        "enforce_shared_experts_fusion": False,
        "vllm_opt_in": True,
        "vllm_online_target": "",
        "quantization": "",
    }
    for name in gate_recipes.names():
        config = gate_recipes.load(name).config
        yield config, config.get("quantization_config") or {}, options


def minimised(differs: Callable[[Json], bool], raw: Json) -> Json:
    """The same disagreement with as few entries as possible."""
    lists = ("exclude", "ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules")
    for key in (*lists, "layer_quant_config", "quantized_layers", "dynamic"):
        for entry in list(raw.get(key) or ()):
            kept = raw[key]
            if isinstance(kept, dict):
                less: Any = {k: v for k, v in kept.items() if k != entry}
            else:
                less = [e for e in kept if e != entry]
            if differs(raw | {key: less}):
                raw = raw | {key: less}
    return raw


def compare(engine: Engine, title: str, count: int, seed: int) -> int:
    rng, asked, wrong = random.Random(seed), 0, 0
    answers, explained = Counter[Answer](), Counter[str]()
    for top, raw, options in itertools.chain(recipes(), (draw(rng) for _ in range(count))):
        asked += 1

        def both(changed: Json, top: Json = top, options: Json = options) -> tuple[Answer, Answer]:
            answers = ours(engine, top, changed, options), engine.answer(top, copy.deepcopy(changed), options)
            # An engine that does not start has no draft.
            mine, theirs = (("stops", "stops") if answer[0] == "stops" else answer for answer in answers)
            return mine, theirs

        mine, theirs = both(raw)
        answers[mine] += 1
        if mine == theirs:
            continue
        why = EXPLAINED.get(engine.rule, "") if sizes(top) == 2 else ""
        if why:
            explained[why] += 1
            continue
        wrong += 1
        if wrong <= 12:
            small = minimised(lambda changed: len(set(both(changed))) > 1, raw)
            mine, theirs = both(small)
            print(f"  ours {mine}, theirs {theirs}: {small} {options} nested {'text_config' in top}")
    print(f"{title} against {engine.rule}: {asked} configurations, {wrong} disagreements, "
          f"{sum(explained.values())} explained")  # fmt: skip
    print("".join(f"  {number} x {text}\n" for text, number in explained.items()), end="")
    print("  target, draft: " + ", ".join(f"{a} {b} {n}" for (a, b), n in answers.most_common()))
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    worst, kinds = 0, (Sglang, Vllm, Atom, AtomMultimodal)
    for kind in kinds:
        for file in sorted(args.sources.glob(kind.pattern)):
            if file.is_dir():
                engine: Engine = kind(Folder(args.sources))
            else:
                with zipfile.ZipFile(file) as wheel:
                    engine = kind(wheel)
            worst += compare(engine, file.name, args.count, args.seed)
    return int(worst > 0)


if __name__ == "__main__":
    raise SystemExit(main())
