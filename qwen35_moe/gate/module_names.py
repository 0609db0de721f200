"""Module names: how checkpoints spell them, which of them engines build as one, and what an entry's words give away."""

from __future__ import annotations

import re
from functools import lru_cache

# Prefixes of the hub, of older vision-language exports and of text-only saves; a longer one before its own beginning.
TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "language_model.")

# Modules that engines build as one, and the names under which a checkpoint stores the parts.
FUSED_NAMES = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
    "in_proj_qkvzba": ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
}


def expand_fused(name: str) -> tuple[str, ...]:
    """`….mlp.shared_expert.gate_up_proj` -> its parts; () for a module that is not fused."""
    head, _, last = name.rpartition(".")
    return tuple(f"{head}.{part}" if head else part for part in FUSED_NAMES.get(last, ()))


FUSED_OF = {part: fused for fused, parts in reversed(FUSED_NAMES.items()) for part in parts}


def fused_name(name: str) -> str:
    """`….shared_expert.up_proj` -> the module that engines build of it and its neighbours, `….gate_up_proj`; or ""."""
    head, _, last = name.rpartition(".")
    return f"{head}.{FUSED_OF[last]}" if last in FUSED_OF else ""


@lru_cache(maxsize=16384)
def spellings(name: str, num_hidden_layers: int | None = None, shared_word: str = "shared_expert") -> tuple[str, ...]:
    """Every way in which a checkpoint may write a module's name.

    Text modules carry one of four prefixes or none; `mtp.layers.0.x` may also be `model.layers.78.x` with 78 =
    num_hidden_layers (GLM-5.2, sglang #36124). shared_word: what the model calls its shared expert; `*experts*` covers
    DeepSeek's `shared_experts`, and not the `shared_expert` of Qwen.
    """
    core = canonical_module(name).replace(".shared_expert.", f".{shared_word}.")
    names = [core]
    if core.startswith(("layers.", "embed_tokens", "norm")):
        names = [p + core for p in TEXT_PREFIXES] + [core]
    elif core.startswith("visual."):
        names = ["model." + core, core]
    elif core.startswith("lm_head"):
        names = [core, "language_model." + core]
    elif (draft := re.match(r"mtp\.layers\.(\d+)\.(.*)", core)) and num_hidden_layers is not None:
        appended = f"layers.{num_hidden_layers + int(draft[1])}.{draft[2]}"
        names += [p + appended for p in TEXT_PREFIXES] + [appended]
    return tuple(names)


def shared_word(model_type: object) -> str:
    """What a family of models calls the shared expert: DeepSeek's and its heirs' `shared_experts`, Qwen's in one."""
    return "shared_experts" if str(model_type).startswith(("deepseek", "glm", "kimi")) else "shared_expert"


def canonical_module(name: str) -> str:
    """A text module without its prefix: `model.language_model.layers.0.mlp.gate` -> `layers.0.mlp.gate`."""
    for prefix in (*TEXT_PREFIXES, "model.language_model.model."):
        if name.startswith(prefix + "layers.") or name in (prefix + "embed_tokens", prefix + "norm"):
            return name[len(prefix) :]
    return name.removeprefix("model.") if name.startswith("model.visual.") else name


def is_draft_entry(entry: str, num_hidden_layers: int | None = None, num_nextn_predict_layers: int = 0) -> bool:
    """Whether an entry names the MTP draft as SGLang 0.5.23 recognises it: `mtp.` or layers appended to the decoder.

    The seed PR knew `mtp.` only, hence #36124. `model.language_model.layers.60.…` is recognised by neither.
    """
    numbers = range(num_hidden_layers or 0, (num_hidden_layers or 0) + num_nextn_predict_layers)
    appended = tuple(f"model.layers.{i}." for i in numbers) if num_hidden_layers is not None else ()
    return entry.startswith(("mtp.", *appended))


def mentions_shared_body(entry: str) -> bool:
    """The substring test of SGLang's gates: `shared_expert`, but not the BF16 gate vector `shared_expert_gate`.

    Without the second half it switches fusion off everywhere (vLLM #53248): every list names the gate vector.
    """
    return "shared_expert" in entry and "shared_expert_gate" not in entry


@lru_cache(maxsize=65536)
def tells_experts_apart(entry: str) -> bool:
    """Whether a pattern could name one routed expert and not another; when in doubt, yes.

    Literals, also repeated, `*`, `.*`, `.+` and `\\d+` treat all expert numbers alike. A digit (outside a layer
    number), a class, `?` or a count may not. Lets a reader of 512 experts ask once instead of 512 times.
    """
    regex = re.match(r"re:|-:", entry)
    text = re.sub(r"(\\?\.)?layers\\?\.\d+", "", entry[regex.end() :] if regex else entry)
    alike = r"\\\.|(\.|\\d|\[0-9\])[*+]|\)\+|[A-Za-z_]\+?|[\^$|()-]" if regex else r"[A-Za-z_.*-]"
    return re.sub(alike, "", text) != ""


def is_plain(entry: str) -> bool:
    """A name and nothing else: no `re:`, no `-:`, no shell pattern."""
    return not entry.startswith(("re:", "-:", "+:")) and not any(c in entry for c in "*?[")
