"""What is fuzzed: each surface takes a source of chance and a folder, and breaks one thing that a stranger wrote.

A case is right if it raises nothing but Qwen35Error, and a command ends with 0, 1 or 2 and calls nothing a bug.
By hand:

    python -m tests.fuzz.surfaces --cases 10000 [--seed 0] [--surface header]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save, save_file

import qwen35_moe as q
from qwen35_moe.checkpoint import Checkpoint
from qwen35_moe.cli.main import main
from qwen35_moe.gate.decide import VARIANTS, decide_layers
from qwen35_moe.oracle.servers.readers import from_bytes
from qwen35_moe.run.prompt import read_ids
from qwen35_moe.trace.file import Trace
from qwen35_moe.trace.folder import State
from qwen35_moe.trace.head import PARTIAL, RESUME
from weights import gate_recipes
from weights.build import build

Chance = random.Random
IDS = (torch.arange(6) * 7919 % 251)[None]
ODD: list[Any] = [None, True, 0, -1, 2**63, 1e308, float("nan"), "", "x", "\x00\x1b[2J", "../../etc", "*", "re:(",
                  "re:(a|a)+b", "re:.*", [], {}, [[]], [None], {"a": 1},
                  "layers.0", "layers.999999999", "bf16", "mxfp4", 3.5]  # fmt: skip

ODD_TENSORS: list[Callable[[torch.Tensor], Any]] = [
    lambda x: x.double() + 1000.5, lambda x: x * torch.nan, lambda x: x.double() * 0 + torch.inf, lambda x: x[:0],
    lambda x: x.flatten()[0], lambda x: x.float().to_sparse(), lambda x: x.to(torch.cfloat), lambda x: x.to("meta"),
    lambda x: "tensor", lambda x: [1, 2], lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
]  # fmt: skip


def broken_json(chance: Chance, value: Any) -> Any:
    """The value with one to three places in it replaced, dropped, doubled or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.randint(1, 3)):
        place = value
        while isinstance(place, dict | list) and place:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = chance.choice(list(keys))
            inner = place[key]
            if not (isinstance(inner, dict | list) and inner) or chance.random() < 0.25:
                _change(chance, place, key)
                break
            place = inner
    return value


def _change(chance: Chance, place: Any, key: Any) -> None:
    kind = chance.randrange(4)
    if kind == 0:
        del place[key]
    elif kind == 1 and isinstance(place, list):
        place.insert(key, place[key])
    elif kind == 1:
        place[str(chance.choice(ODD))] = place.pop(key)
    else:
        place[key] = json.loads(json.dumps(chance.choice(ODD)))


def broken_bytes(chance: Chance, held: bytes) -> bytes:
    """The bytes cut, flipped, doubled or with some put in."""
    held = bytearray(held)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(held) + 1) if chance.random() < 0.5 else chance.randrange(min(len(held), 200) + 1)
        kind = chance.randrange(4)
        if kind == 0:
            del held[at:]
        elif kind == 1 and at < len(held):
            held[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            held[at:at] = chance.randbytes(chance.randrange(1, 9))
        else:
            held[at : at + 8] = chance.choice([b"", b"\xff" * 8, b"\x00" * 8, b"[" * 8])
    return bytes(held)


def broken_text(chance: Chance, value: Any, share: float = 0.5) -> bytes:
    """The value broken, as JSON; in a share of the cases its bytes are broken, too."""
    text = json.dumps(broken_json(chance, value)).encode()
    return broken_bytes(chance, text) if chance.random() < share else text


def command(*arguments: str) -> int:
    """The exit code of a command. Error unless it ends as a command may."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
    if code not in (0, 1, 2) or "a bug in qwen35-moe" in err.getvalue() or "\x1b" in out.getvalue() + err.getvalue():
        raise AssertionError(f"{arguments}: {code}\n{err.getvalue()[-2000:]}")
    return code


class Surfaces:
    """The surfaces, over files that are written once."""

    def __init__(self, folder: Path):
        self.folder, self.work = folder, folder / "case"
        self.tiny = build("tiny", folder / "tiny")
        self.config = json.loads((self.tiny / "config.json").read_text())
        self.configs = [
            dict(gate_recipes.load(r.stem).config) for r in sorted((gate_recipes.HERE / "recipes/gate").iterdir())
        ]
        q.write_truth(self.tiny, IDS, folder / "truth")
        q.play_engine(self.tiny, IDS, folder / "sglang")
        command("trace", str(self.tiny), "--ids", "1,2,3", "--out", str(folder / "begun"), "--layers", "0", "--quiet")
        truth = Trace.open(folder / "truth")
        some = {k: truth[k].float() for k in ("layers.0.mlp_output", "layers.1.moe_router_logits", "next_token_logits")}
        (folder / "plain").mkdir()
        self.plain = folder / "plain" / "a.safetensors"
        save_file({**some, "input_ids": IDS}, self.plain)
        np.savez(folder / "plain" / "b.npz", **{k: v.numpy() for k, v in some.items()})
        np.save(folder / "plain" / "c.npy", some["next_token_logits"].numpy())
        torch.save(some, folder / "plain" / "d.pt")
        data = Path(__file__).parents[1] / "data"
        self._engine_dumps(data / "dumps", truth, folder / "dumps")
        servers = data / "servers"
        self.answers = [file.read_bytes() for file in sorted(servers.glob("*.json"))]

    def _engine_dumps(self, real: Path, truth: Trace, out: Path) -> None:
        """A dump of each format in a folder of its own: those that engines wrote, and small ones after their forms."""
        with tarfile.open(real / "dumps.tar.xz") as archive:
            archive.extractall(out, filter="data")
        for name in ("kl_base", "logits", "hidden", "routed", "atom"):
            (out / name).mkdir()
        shutil.copy(real / "llama_cpp.kld", out / "kl_base")
        truth["next_token_logits"][0, -1].float().numpy().tofile(out / "logits/llamacpp-tiny.bin")
        IDS[0].int().numpy().tofile(out / "logits/llamacpp-tiny-tokens.bin")
        layers = len(self.config["text_config"]["layer_types"])
        states = torch.stack([truth[f"layers.{i}.layer_input"][0].bfloat16() for i in range(layers)], 1)
        save_file({"hidden_states": states, "token_ids": IDS[0]}, out / "hidden/request.safetensors")
        routed = torch.stack([truth[f"layers.{i}.moe_topk_ids"] for i in range(layers)], 1)
        np.save(out / "routed/routed.npy", routed.numpy().astype(np.uint8))
        for name, tap in (("Qwen3_5DecoderLayer", "mlp_output"), ("Qwen3_5GatedDeltaNet", "attn_output")):
            x = truth[f"layers.0.{tap}"].reshape(IDS.numel(), -1)
            torch.save({"hidden": x, "shape": tuple(x.shape)}, out / f"atom/layer00_{name}_rank0_call000.pt")

    def all(self) -> dict[str, Callable[[Chance], None]]:
        return {name: getattr(self, name) for name in NAMES}

    def empty(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()

    def alone(self, name: str, held: bytes) -> Path:
        """The one file of an empty folder."""
        self.empty()
        (self.work / name).write_bytes(held)
        return self.work / name

    def fresh(self, source: Path) -> Path:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(source, self.work, copy_function=shutil.copy)
        return self.work

    def header(self, chance: Chance) -> None:
        held = save({"model.norm.weight": torch.zeros(4), "lm_head.weight": torch.zeros(2, 4)})
        self.alone("model.safetensors", broken_bytes(chance, held))
        (self.work / "config.json").write_text("{}")
        Checkpoint.open(self.work)

    def index(self, chance: Chance) -> None:
        name = "model-00001-of-00001.safetensors"
        index = {"metadata": {"total_size": 16}, "weight_map": {"model.norm.weight": name}}
        self.alone(name, save({"model.norm.weight": torch.zeros(4)}))
        (self.work / "config.json").write_text("{}")
        (self.work / "model.safetensors.index.json").write_bytes(broken_text(chance, index, 0.0))
        Checkpoint.open(self.work)

    def quantisation(self, chance: Chance) -> None:
        config = broken_json(chance, chance.choice(self.configs))
        _, rule, switches = chance.choice(VARIANTS)
        decide_layers(config, rule=rule, **switches)

    def configuration(self, chance: Chance) -> None:
        self.alone("config.json", broken_text(chance, self.config, 0.3))
        command("gate", str(self.work), "--config-only", "--all-rules")
        q.Config.from_pretrained(self.work)

    def sglang_dump(self, chance: Chance) -> None:
        folder = self.fresh(self.folder / "sglang")
        for file in chance.sample(sorted(folder.iterdir()), 3):
            if chance.random() < 0.5:
                file.write_bytes(broken_bytes(chance, file.read_bytes()))
            else:
                held = torch.load(file, weights_only=True)
                held[chance.choice(["value", "meta"])] = chance.choice([*ODD, torch.zeros(0), torch.ones(3)])
                torch.save(held, file)
        self._read(folder)

    def odd_tensor(self, chance: Chance) -> None:
        """A value that is no value of this tap never agrees; nor does a file that says what it cannot be."""
        folder = self.fresh(self.folder / "sglang")
        file = chance.choice([file for file in sorted(folder.iterdir()) if "name=seq_lens" not in file.name])
        held = torch.load(file, weights_only=True)
        if chance.random() < 0.8:
            held["value"] = chance.choice(ODD_TENSORS)(held["value"])
        else:
            held["meta"]["world_size"] = chance.choice([0, 2, 10**9, "x", [2]])
            if not re.search("name=(attn_output|mlp_output)_", file.name):  # others may be replicated, or no piece
                held["value"] = None
        torch.save(held, file)
        found = self._read(folder)
        assert found.exit_code != 0, f"{file.name}: {found.verdict}"

    def engine_dump(self, chance: Chance) -> None:
        folder = self.fresh(chance.choice(sorted((self.folder / "dumps").iterdir())))
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        for file in chance.sample(files, min(3, len(files))):
            held, kind = file.read_bytes(), chance.randrange(8)
            file.unlink()
            if kind == 0:
                os.mkfifo(file)
            elif kind == 1:
                file.symlink_to(chance.choice(["/dev/zero", "/nowhere", file.name, "."]))
            elif kind == 2:
                file.mkdir()
            elif kind > 3:
                file.write_bytes(broken_bytes(chance, held))
        self._read(folder)

    def plain_dump(self, chance: Chance) -> None:
        source = chance.choice(sorted((self.folder / "plain").iterdir()))
        self._read(self.alone(source.name, broken_bytes(chance, source.read_bytes())))

    def _read(self, path: Path, **options: Any) -> Any:
        dump = q.read_dump(path, config=self.config["text_config"], **options)
        for key in dump:
            with contextlib.suppress(q.Qwen35Error):
                dump[key]
        return q.compare(self.folder / "truth", dump, diagnoses=0)

    def name_map(self, chance: Chance) -> None:
        names = {r"layers\.(\d+)\.mlp_output": r"layers.\1.mlp_output", "next_token_logits": "next_token_logits"}
        self._read(self.plain, name_map=self.alone("names.json", broken_text(chance, names)))

    def truth_files(self, chance: Chance) -> None:
        folder = self.fresh(self.folder / "truth")
        file = chance.choice([*folder.iterdir(), folder / "envelope.safetensors"])
        before = file.read_bytes()
        file.write_bytes(broken_bytes(chance, before))
        found = command("verify", str(folder))
        assert found == (0 if file.read_bytes() == before else 2), f"verify: {found} of a changed {file.name}"
        command("compare", str(folder), str(self.plain))

    def truth_by_hand(self, chance: Chance) -> None:
        self.empty()
        for file in (self.folder / "truth").glob("*.safetensors"):
            (self.work / file.name).symlink_to(file)
        head = json.loads((self.folder / "truth" / "trace.json").read_text())
        (self.work / "trace.json").write_bytes(broken_text(chance, head, 0.2))
        q.compare(Trace.open(self.work), q.read_dump(self.plain, config=self.config["text_config"]), diagnoses=0)

    def resume_state(self, chance: Chance) -> None:
        folder = self.fresh(self.folder / "begun")
        (folder / PARTIAL / RESUME).write_bytes(broken_bytes(chance, (folder / PARTIAL / RESUME).read_bytes()))
        State("{}").resumed(folder)

    def ids_file(self, chance: Chance) -> None:
        ids = {"input_ids": [[1, 2, 3], [4, 5]], "attention_mask": [[1, 1, 1], [1, 1]]}
        read_ids(str(self.alone("ids.json", broken_text(chance, ids))), "--ids")

    def server_answer(self, chance: Chance) -> None:
        held = chance.choice(self.answers)
        whole = chance.random() < 0.6
        from_bytes(broken_text(chance, json.loads(held), 0.0) if whole else broken_bytes(chance, held), "answer")

    def arguments(self, chance: Chance) -> None:
        names = "info gate compare diagnose verify dump-config trace --ids 1,2 --out -h --json --html --layer 1-3"
        more = "--limit nan --width 5 --engine x -- --quiet --partial /dev/null sglang --config-only --layers 0-99"
        odd = ["\x1b", "", "a\0b", "9" * 30, "--tokens", "-3", "--checkpoint"]
        paths = [str(self.folder / "truth"), str(self.folder / "nowhere")]
        words = [*names.split(), *more.split(), *odd, *paths]
        command(*chance.choices(words, k=chance.randint(0, 6)))


NAMES = ("header", "index", "quantisation", "configuration", "sglang_dump", "odd_tensor", "plain_dump",
         "engine_dump", "name_map", "truth_by_hand", "truth_files", "resume_state", "ids_file", "server_answer",
         "arguments")  # fmt: skip


def run(surface: Callable[[Chance], None], seed: int) -> float:
    """One case: seconds of CPU that it took (a busy machine is no hang). Raises what is no Qwen35Error."""
    start = time.process_time()
    with contextlib.suppress(q.Qwen35Error):
        surface(Chance(seed))
    return time.process_time() - start


def cli() -> int:
    parser = argparse.ArgumentParser(description="Fuzz everything that strangers write.")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--surface", choices=NAMES, action="append")
    options = parser.parse_args()
    failed: Counter[str] = Counter()
    slowest: dict[str, tuple[float, int]] = {}
    done, end = 0, time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        surfaces = Surfaces(Path(folder)).all()
        names = options.surface or list(surfaces)
        for i in range(options.cases):
            if time.monotonic() > end:
                break
            done += 1
            name = names[i % len(names)]
            try:
                took = run(surfaces[name], options.seed + i)
                slowest[name] = max(slowest.get(name, (0.0, 0)), (took, options.seed + i))
            except Exception as error:
                failed[name] += 1
                print(f"{name} seed {options.seed + i}: {type(error).__name__}: {error}"[:600], file=sys.stderr)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{done} cases, {sum(failed.values())} failed {dict(failed)}, peak memory {memory} MiB")
    print("slowest: " + ", ".join(f"{name} {took:.1f} s (seed {seed})" for name, (took, seed) in slowest.items()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(cli())
