"""A checkpoint: tensors by canonical name, weights by module, experts by layer, all read when asked for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import Qwen35Error
from ..quant.precision import ModuleSpec
from .checksums import Checksum, verify_files, verify_manifest
from .folder import Folder, UsageReport, open_folder, usage_report
from .header import TensorEntry, split_role
from .reader import Reader, Rows
from .recognise import foreign_spec, recognise
from .weight import EXPERT_PROJECTIONS, StoredExperts, StoredWeight

EXPERT_MODULE = re.compile(
    r"(?P<prefix>.+\.mlp\.experts)\.((?P<expert>\d{1,6})\.)?(?P<projection>gate_proj|up_proj|gate_up_proj|down_proj)"
)

SAMPLES_PER_FILE, PIECE = 16, 4096  # of each file, evenly spaced; bytes of each

TensorLayout = tuple[tuple[str, str, tuple[int, ...]], ...]  # (role, dtype, shape) of a module's tensors


class Checkpoint:
    """Opened from headers alone. Tensors are read on demand, from any thread, or mapped (`reader.mapped`).

    with Checkpoint.open(path) as ck:
        ck.read("norm.weight")
        ck.weight("layers.3.self_attn.q_proj").read().decode(torch.float64)
        gate_up, down = ck.experts("layers.0.mlp.experts").read(7)
    """

    def __init__(self, folder: Folder):
        self.path, self.config, self.folder = folder.path, folder.config, folder
        self.tensors: Mapping[str, TensorEntry] = folder.tensors
        # module -> role (".weight", ".weight_scale", ...) -> tensor
        self.modules: dict[str, dict[str, TensorEntry]] = {}
        self.used: set[str] = set()
        self.reader = Reader({header.file: header.state for header in folder.headers})
        self._experts: dict[str, tuple[int, bool]] = {}  # count, and whether fused
        self._expert_names: dict[str, list[str]] = {}  # "layers.0.mlp.experts" -> names of its tensors
        self._expert_ids: dict[str, set[int]] = {}
        self._specs: dict[TensorLayout, ModuleSpec] = {}
        self._expert_specs: dict[str, ModuleSpec | None] = {}
        for name, stored in self.tensors.items():
            module, role = split_role(name)
            self.modules.setdefault(module, {})[role] = stored
        for module, roles in self.modules.items():
            if match := EXPERT_MODULE.fullmatch(module):
                self._expert_names.setdefault(match["prefix"], []).extend(stored.name for stored in roles.values())
                if match["expert"]:
                    self._expert_ids.setdefault(match["prefix"], set()).add(int(match["expert"]))

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """From a folder (with or without an index) or one .safetensors file. Error: headers, index and file sizes
        contradict each other."""
        return cls(open_folder(Path(path)))

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()

    def names(self) -> list[str]:
        return list(self.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def stored(self, name: str) -> TensorEntry:
        """Where the tensor of this canonical name lies."""
        if name not in self.tensors:
            raise self._missing(name)
        return self.tensors[name]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor in its stored dtype, or a run of its rows. If mapped, it is a view of the file."""
        stored = self.stored(name)
        self.used.add(name)
        found = Rows.of(stored).rows(rows).read(self.reader)
        return found if stored.shape else found.view(())

    def weight(self, module: str) -> StoredWeight:
        """The weight of a module, such as `layers.0.self_attn.q_proj` or `layers.0.mlp.experts.3.gate_proj`, which is
        found in a fused tensor as well."""
        weight = self.find(module)
        self.used.update(stored.name for stored in weight.tensors)
        return weight

    def find(self, module: str) -> StoredWeight:
        """As `weight`, without counting it as used."""
        if module in self.modules:
            return recognise(module, self.modules[module], self.reader)
        if (match := EXPERT_MODULE.fullmatch(module)) and match["expert"]:
            whole = "down_proj" if match["projection"] == "down_proj" else "gate_up_proj"
            if f"{match['prefix']}.{whole}" in self.modules:
                weight = self.find(f"{match['prefix']}.{whole}").expert(int(match["expert"]))
                return weight if match["projection"] == whole else weight.half(int(match["projection"] == "up_proj"))
        bare = module.rpartition(".")[2] in ("A_log", "dt_bias")
        raise self._missing(module if bare else f"{module}.weight")

    def experts(self, prefix: str) -> StoredExperts:
        """The routed experts `layers.N.mlp.experts`. All of them count as used, chosen or not."""
        found = self.find_experts(prefix)
        self.used.update(self._expert_names[prefix])
        return found

    def find_experts(self, prefix: str) -> StoredExperts:
        """As `experts`, without counting them as used."""
        if prefix not in self._experts:
            self._experts[prefix] = self._open_experts(prefix)
        return StoredExperts(prefix, *self._experts[prefix], self.find)

    def expert_names(self, prefix: str) -> list[str]:
        """The tensors of a layer's experts."""
        return self._expert_names.get(prefix, [])

    def _open_experts(self, prefix: str) -> tuple[int, bool]:
        fused, own = f"{prefix}.gate_up_proj" in self.modules, self._expert_ids.get(prefix, set())
        if fused and own:
            where, expected = f"{self.path}: {prefix}", "gate_up_proj [E, ...], or 0.gate_proj ..."
            what = "experts are stored both fused and one by one"
            raise Qwen35Error(what, where=where, expected=expected, found="both")
        if fused:
            gate_up, down = (self.find(f"{prefix}.{name}") for name in ("gate_up_proj", "down_proj"))
            for weight in (gate_up, down):
                if len(weight.shape) != 3 or weight.shape[0] != gate_up.shape[0]:
                    raise weight.values.stored.wrong("wrong shape", "[E, 2F, D] and [E, D, F] of one E")
            return gate_up.shape[0], True
        count = max(own, default=0) + 1
        for e in range(count if len(own) == count else min(count, len(own) + 1)):
            for name in EXPERT_PROJECTIONS:
                if f"{prefix}.{e}.{name}" not in self.modules:
                    raise self._missing(f"{prefix}.{e}.{name}.weight")
        return count, False

    def layout(self, module: str) -> TensorLayout:
        """Roles, dtypes and shapes of a module's tensors. What is said of one module holds for all of the same layout:
        a checkpoint has 100,000 modules, nearly all of them experts, and a dozen layouts."""
        return tuple((role, stored.dtype, stored.shape) for role, stored in self.modules[module].items())

    def spec(self, module: str) -> ModuleSpec | None:
        """The precision of a module's bytes, also of foreign formats. None if it is absent, or if its experts
        (`….mlp.experts`) differ."""
        if module in self.modules:
            layout = self.layout(module)
            if layout not in self._specs:
                self._specs[layout] = foreign_spec(self.modules[module]) or self.find(module).spec
            return self._specs[layout]
        match = EXPERT_MODULE.fullmatch(module)
        if match and match["expert"] and match["prefix"] in self._expert_names:
            whole = "down_proj" if match["projection"] == "down_proj" else "gate_up_proj"
            return foreign_spec(self.modules.get(f"{match['prefix']}.{whole}", {})) or self.find(module).spec
        if module in self._expert_specs or module not in self._expert_names:
            return self._expert_specs.get(module)
        parts = dict.fromkeys(split_role(name)[0] for name in self._expert_names[module])
        kinds = {self.layout(part): part for part in parts}.values()
        if not any(foreign_spec(self.modules[part]) for part in kinds):
            self.find_experts(module)  # are they all there?
        specs = {self.spec(part) for part in kinds}
        self._expert_specs[module] = specs.pop() if len(specs) == 1 else None
        return self._expert_specs[module]

    def report(self, aside: Iterable[str] = ("visual.*", "mtp.*")) -> UsageReport:
        """What became of every tensor; `aside` are patterns of those that are left out on purpose."""
        return usage_report(self.folder, self.used, aside)

    def identity(self) -> dict[str, Any]:
        """A fingerprint that needs no full read: sizes, and hashes of config.json, of all headers, and of some pieces
        of each file. Names of files and folder do not matter.

        Two checkpoints with equal headers that differ in a few weights may have one fingerprint; `verify` tells them
        apart.
        """
        digest, parts = hashlib.sha256(), sorted(f"{header.size} {header.sha256}" for header in self.folder.headers)
        for header in sorted(self.folder.headers, key=lambda header: (header.sha256, header.size)):
            try:
                with open(header.file, "rb") as file:
                    for at in range(0, header.size, max(PIECE, header.size // SAMPLES_PER_FILE)):
                        file.seek(at)
                        digest.update(file.read(PIECE))
            except OSError as error:
                raise Qwen35Error("cannot read the file", where=header.file, found=error.strerror or error) from error
        return {
            "headers_sha256": hashlib.sha256("\n".join(parts).encode()).hexdigest(),
            "sample_sha256": digest.hexdigest(),
            "config_sha256": hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest(),
            "bytes": sum(header.size for header in self.folder.headers),
            "files": len(parts),
            "tensors": len(self.tensors),
        }

    def verify(self, manifest: str | Path | None = None) -> Iterator[Checksum]:
        """sha256 of every tensor or file that a manifest names (`sha256 ... name` a line). Without one, of every file,
        against what the hub's downloader has left. Reads everything."""
        known = None if manifest is None else Path(manifest)
        return verify_files(self.folder) if known is None else verify_manifest(self.folder, self.reader, known)

    def _missing(self, name: str) -> Qwen35Error:
        """The error, with a name that differs in one word, and little. Not all of 100,000 names are looked at."""
        words, head, near = name.split("."), name.rsplit(".", 2)[0], list[str]()
        for other in islice((other for other in self.tensors if other.startswith(head)), 50):
            odd = [(a, b) for a, b in zip(words, other.split("."), strict=False) if a != b]
            alike = other.count(".") == name.count(".") and len(odd) == 1
            if alike and get_close_matches(odd[0][1], odd[0][:1], 1, 0.7):
                near.append(other)
        do = f"there is {near[0]}" if near else ""
        return Qwen35Error("a tensor is missing", where=self.path, expected=name, found="absent", do=do)
