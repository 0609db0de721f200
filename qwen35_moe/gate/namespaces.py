"""How engines name the modules of a Qwen3.5 MoE, and how they rename the entries of a list before they compare."""

from __future__ import annotations

from dataclasses import dataclass

from .module_names import canonical

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

    def module(self, name: str, nested: bool) -> str:
        """The engine's name of a module, given by any spelling. The draft is `mtp.` to all of them."""
        core = canonical(name)
        return (self.nested if nested else self.flat) + core if core.startswith("layers.") else core

    def entry(self, entry: str, nested: bool) -> str:
        """An entry of the exclude list, or a key of layer_quant_config, as the engine compares it."""
        for old, new in self.nested_renames if nested else self.flat_renames:
            if entry.startswith(old):
                return new + entry[len(old) :]
        return entry


SGLANG = Namespace(
    "model.language_model.",
    "model.",
    "SGLang 0.5.23 models/qwen3_vl.py:1357, qwen3_5_text.py:75, qwen3_5_mtp.py:141; hf_to_sglang_mapper is None",
)
VLLM = Namespace(
    "language_model.model.",
    "model.",
    "vLLM 0.33 models/qwen3_vl.py:1969, qwen3_5.py:327, qwen3_5.py:524, qwen3_5_mtp.py:234; get_rename_mapper",
    nested_renames=(
        ("model.visual.", "visual."),
        ("lm_head.", "language_model.lm_head."),
        ("model.language_model.", "language_model.model."),
    ),
    flat_renames=(("model.language_model.", "model."),),
)
