"""How engines name the modules of a Qwen3.5 MoE, and how they rename the entries of a list before they compare."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .module_names import canonical_module

Renames = tuple[tuple[str, str], ...]  # prefix of an entry -> what stands there instead


@dataclass(frozen=True)
class Namespace:
    """One engine's names. nested: of a config.json with a text_config (with a vision tower); flat: of one without.

    An entry is renamed only where it begins with the prefix, so a `re:` entry or a glob keeps the hub's prefix, and
    then matches nothing in an engine that has another.
    """

    nested: str
    flat: str
    source: str
    nested_renames: Renames = ()
    flat_renames: Renames = ()
    key_renames: Renames | None = None  # of keys of layer_quant_config; None: as entries
    anywhere: bool = False  # entries are renamed wherever the prefix stands
    appended_draft: bool = False  # the draft's layers are numbered behind the target's

    def module(self, name: str, nested: bool, layers: int = 0) -> str:
        """The engine's name of a module, given by any spelling. layers: of the target. The draft is `mtp.` to all."""
        core, prefix = canonical_module(name), self.nested if nested else self.flat
        return prefix + core if core.startswith("layers.") else self._draft(core, layers)

    def entry(self, entry: str, nested: bool, layers: int = 0) -> str:
        """An entry of the exclude list as the engine compares it."""
        return self._draft(self._renamed(entry, self.nested_renames if nested else self.flat_renames), layers)

    def key(self, key: str, nested: bool, layers: int = 0) -> str:
        """A key of layer_quant_config as the engine compares it."""
        return self.entry(key, nested, layers) if self.key_renames is None else self._renamed(key, self.key_renames)

    def _renamed(self, entry: str, renames: Renames) -> str:
        for old, new in renames:
            if self.anywhere:
                entry = entry.replace(old, new)
            elif entry.startswith(old):
                return new + entry[len(old) :]
        return entry

    def _draft(self, name: str, layers: int) -> str:
        return DRAFT.sub(lambda n: f"mtp.layers.{layers + int(n[1])}.", name) if self.appended_draft else name


# vLLM's names and those of ATOM's multimodal class, for a checkpoint with a vision tower.
WITH_TOWER = (
    *(("model.visual.", "visual."), ("lm_head.", "language_model.lm_head.")),
    ("model.language_model.", "language_model.model."),
)
DRAFT = re.compile(r"^mtp\.layers\.(\d+)\.")
SGLANG = Namespace(
    "model.language_model.",
    "model.",
    "SGLang 0.5.23 models/qwen3_vl.py:1357, qwen3_5_text.py:75, qwen3_5_mtp.py:141; hf_to_sglang_mapper is None",
)
VLLM = Namespace(
    "language_model.model.",
    "model.",
    "vLLM 0.33 models/qwen3_vl.py:1969, qwen3_5.py:327, qwen3_5.py:524, qwen3_5_mtp.py:234; get_rename_mapper",
    nested_renames=WITH_TOWER,
    flat_renames=(("model.language_model.", "model."),),
)
ATOM = Namespace(
    "model.",
    "model.",
    "ROCm/ATOM atom/config.py: remap_layer_name; models/qwen3_5.py, text only; models/qwen3_5_mtp.py: Qwen3_5MTP",
    nested_renames=(("model.language_model.", "model."),),
    flat_renames=(("model.language_model.", "model."),),  # a text_config alone, with its checkpoint's list
    key_renames=((".shared_expert_gate", ".gate"),),
    anywhere=True,
    appended_draft=True,
)
ATOM_MULTIMODAL = replace(
    ATOM,
    nested="language_model.model.",
    source="ROCm/ATOM 00afbe32 model_engine/model_runner.py: support_model_arch_dict; models/qwen3_5.py",
    nested_renames=WITH_TOWER,
    flat_renames=(),
)
