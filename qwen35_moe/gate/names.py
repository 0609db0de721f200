"""Names of modules: how checkpoints spell them, how engines do, and what the text of an entry says by itself."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

# Prefixes of checkpoints on the hub, of older vision-language exports and of text-only saves; a longer one first.
TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "language_model.")
# Merged module -> the names under which a checkpoint stores its parts.
MERGED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
    "in_proj_qkvzba": ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
}
MERGED_OF = {part: merged for merged, parts in reversed(MERGED.items()) for part in parts}


def parts_of(name: str) -> tuple[str, ...]:
    """`….mlp.shared_expert.gate_up_proj` -> its parts; () for a module that is not merged."""
    head, dot, last = name.rpartition(".")
    return tuple(head + dot + part for part in MERGED.get(last, ()))


def merged_name(name: str) -> str:
    """`….shared_expert.up_proj` -> the merged module that it is a part of, `….shared_expert.gate_up_proj`; or ""."""
    head, dot, last = name.rpartition(".")
    return head + dot + MERGED_OF[last] if last in MERGED_OF else ""


@lru_cache(maxsize=16384)
def spellings(name: str, num_hidden_layers: int | None = None, shared_word: str = "shared_expert") -> tuple[str, ...]:
    """Every way in which a checkpoint may write a module's name.

    Text modules carry one of four prefixes or none; `mtp.layers.0.x` may also be `model.layers.78.x` with 78 =
    num_hidden_layers (GLM-5.2, sglang #36124). shared_word: what the model calls its shared expert; `*experts*` covers
    DeepSeek's `shared_experts`, and not the `shared_expert` of Qwen.
    """
    core = canonical_module(name).replace(".shared_expert.", f".{shared_word}.")
    if core.startswith(("layers.", "embed_tokens", "norm")):
        return (*(prefix + core for prefix in TEXT_PREFIXES), core)
    if core.startswith("visual."):
        return "model." + core, core
    if core.startswith("lm_head"):
        return core, "language_model." + core
    if (draft := re.match(r"mtp\.layers\.(\d+)\.(.*)", core)) and num_hidden_layers is not None:
        return core, *spellings(f"layers.{num_hidden_layers + int(draft[1])}.{draft[2]}", None, shared_word)
    return (core,)


def shared_word(model_type: object) -> str:
    """What a family of models calls the shared expert: DeepSeek, GLM and Kimi say `shared_experts`, Qwen does not."""
    return "shared_experts" if str(model_type).startswith(("deepseek", "glm", "kimi")) else "shared_expert"


def canonical_module(name: str) -> str:
    """A text module without its prefix: `model.language_model.layers.0.mlp.gate` -> `layers.0.mlp.gate`."""
    for prefix in (*TEXT_PREFIXES, "model.language_model.model."):
        if name.startswith(prefix + "layers.") or name in (prefix + "embed_tokens", prefix + "norm"):
            return name[len(prefix) :]
    return name.removeprefix("model.") if name.startswith("model.visual.") else name


def is_draft_entry(entry: str, num_hidden_layers: int | None = None, num_nextn_predict_layers: int = 0) -> bool:
    """Whether SGLang takes an entry for the draft's: `mtp.`, since #36124 also layers numbered behind the target's.

    `model.language_model.layers.60.…` is taken for the draft's by no version.
    """
    first = num_hidden_layers or 0
    appended = range(first, first + num_nextn_predict_layers) if num_hidden_layers is not None else ()
    return entry.startswith(("mtp.", *(f"model.layers.{i}." for i in appended)))


def mentions_shared_body(entry: str) -> bool:
    """SGLang's test whether an entry means the body: it contains `shared_expert`, and not `shared_expert_gate`.

    Without the exception, no model would fuse (vLLM #53248): every list names the gate vector, which is BF16.
    """
    return "shared_expert" in entry and "shared_expert_gate" not in entry


@lru_cache(maxsize=65536)
def is_plain(entry: str) -> bool:
    """A name and nothing else: no `re:`, no `-:`, no shell pattern."""
    return not entry.startswith(("re:", "-:", "+:")) and not any(c in entry for c in "*?[")


@lru_cache(maxsize=65536)
def tells_experts_apart(entry: str) -> bool:
    """Whether a pattern could name one routed expert and not another; when in doubt, yes.

    Literals, also repeated, `*`, `.*`, `.+` and `\\d+` treat all expert numbers alike. A digit (outside a layer
    number), a class, `?` or a count may not. Where no pattern tells them apart, one question stands for 512 experts.
    """
    regex = re.match(r"re:|-:", entry)
    text = re.sub(r"(\\?\.)?layers\\?\.\d+", "", entry[regex.end() :] if regex else entry)
    alike = r"\\\.|(\.|\\d|\[0-9\])[*+]|\)\+|[A-Za-z_]\+?|[\^$|()-]" if regex else r"[A-Za-z_.*-]"
    return not is_plain(entry) and re.sub(alike, "", text) != ""


Renames = tuple[tuple[str, str], ...]  # prefix of an entry -> what stands there instead


@dataclass(frozen=True)
class Namespace:
    """One engine's names for modules. prefix: what stands before `layers.N`. layers: how many the target has.

    An entry is renamed only where it begins with a prefix to rename. So a `re:` entry or a glob keeps the prefix of
    the checkpoint, and then matches nothing in an engine that has another.
    """

    prefix: str
    renames: Renames = ()
    key_renames: Renames | None = None  # of keys of layer_quant_config; None: as entries
    anywhere: bool = False  # entries are renamed wherever the prefix stands
    appended_draft: bool = False  # the draft's layers are numbered behind the target's
    layers: int = 0
    stars: bool = False  # vLLM 0.33 modelopt.py, apply_vllm_mapper: `path*` is two entries, `path` and `path.*`

    def module(self, name: str) -> str:
        """The engine's name of a module, given by any spelling. The draft is `mtp.` to all."""
        core = canonical_module(name)
        return self.prefix + core if core.startswith("layers.") else self._draft(core)

    def entries(self, entry: str) -> tuple[str, ...]:
        """What the engine compares for one entry of the exclude list."""
        star = self.stars and len(entry) >= 2 and entry.endswith("*") and not entry.endswith(".*")
        return tuple(map(self._entry, (entry[:-1], entry[:-1] + ".*") if star else (entry,)))

    def _entry(self, entry: str) -> str:
        return self._draft(self._renamed(entry, self.renames))

    def key(self, key: str) -> str:
        """A key of layer_quant_config as the engine compares it."""
        return self._entry(key) if self.key_renames is None else self._renamed(key, self.key_renames)

    def _renamed(self, entry: str, renames: Renames) -> str:
        for old, new in renames:
            if self.anywhere:
                entry = entry.replace(old, new)
            elif entry.startswith(old):
                return new + entry[len(old) :]
        return entry

    def _draft(self, name: str) -> str:
        return DRAFT.sub(lambda n: f"mtp.layers.{self.layers + int(n[1])}.", name) if self.appended_draft else name


DRAFT = re.compile(r"^mtp\.layers\.(\d+)\.")
# vLLM's names and those of ATOM's multimodal class, for a checkpoint with a vision tower.
WITH_TOWER = (
    *(("model.visual.", "visual."), ("lm_head.", "language_model.lm_head.")),
    ("model.language_model.", "language_model.model."),
)
TEXT_ONLY = (("model.language_model.", "model."),)
# The names of an engine: for a config.json without a text_config, and for one with it (a vision tower).
Names = tuple[Namespace, Namespace]
# SGLang 0.5.23 models/qwen3_vl.py:1357, qwen3_5_text.py:75, qwen3_5_mtp.py:141; hf_to_sglang_mapper is None
SGLANG = Namespace("model."), Namespace("model.language_model.")
# vLLM 0.33 models/qwen3_vl.py:1969, qwen3_5.py:327, qwen3_5.py:524, qwen3_5_mtp.py:234; get_rename_mapper
VLLM = Namespace("model.", TEXT_ONLY), Namespace("language_model.model.", WITH_TOWER)
# ROCm/ATOM atom/config.py: remap_layer_name; models/qwen3_5.py, text only; models/qwen3_5_mtp.py: Qwen3_5MTP
_atom = Namespace("model.", TEXT_ONLY, ((".shared_expert_gate", ".gate"),), anywhere=True, appended_draft=True)
ATOM = _atom, _atom  # a text_config alone, with its checkpoint's list
# ROCm/ATOM 00afbe32 model_engine/model_runner.py: support_model_arch_dict; models/qwen3_5.py
ATOM_MULTIMODAL = replace(_atom, renames=()), replace(_atom, prefix="language_model.model.", renames=WITH_TOWER)
