"""The model's configuration: the fields of config.json by their own names, with the defaults that real files need."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ...errors import MOST_LAYERS, Qwen35Error
from ...untrusted import read_json
from .rope_scaling import RopeScaling

LINEAR, FULL = "linear_attention", "full_attention"
# Qwen3.6 and Qwen3.8 carry the same names.
FAMILY = ("qwen3_5_moe", "qwen3_5_moe_text")
OTHER_MODELS = {
    "qwen4_exp": "Qwen4-Exp has hyper-connections, n-gram embeddings and an indexer",
    "qwen3_8_flash_next": "Qwen3.8-Flash-Next (125B) is Qwen4-Exp: hyper-connections, n-gram embeddings and an indexer",
    "qwen3_next": "Qwen3-Next stores the DeltaNet projections interleaved by head group (in_proj_qkvz)",
    "qwen3_5": "the dense Qwen3.5 has no experts",
    "qwen3_vl_moe": "Qwen3-VL MoE has no DeltaNet layers, and stores its experts transposed",
    "qwen3_moe": "Qwen3 MoE has no DeltaNet layers and no shared expert",
    "qwen2_moe": "Qwen2 MoE has no DeltaNet layers",
}

# Keys of real files that are let pass, in text and vision: they change nothing that is computed here, or are read by
# name (rotary settings, layer types, ids of images, ...).
INERT_KEYS = frozenset(
    """architectures model_type text_config vision_config quantization_config transformers_version torch_dtype dtype
    attention_dropout bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id initializer_range
    router_aux_loss_coef output_router_logits use_cache max_position_embeddings mtp_num_hidden_layers
    mtp_use_dedicated_embeddings image_token_id video_token_id vision_start_token_id vision_end_token_id
    intermediate_size mamba_ssm_dtype full_attention_interval partial_rotary_factor rope_theta rope_scaling
    layer_types language_model_only unsloth_fixed auto_map return_dict output_hidden_states output_attentions
    is_encoder_decoder chunk_size_feed_forward id2label label2id problem_type task_specific_params torchscript
    tie_word_embeddings add_cross_attention cross_attention_hidden_size finetuning_task pruned_heads prefix
    use_bfloat16 is_decoder tf_legacy_loss tokenizer_class name_or_path attn_implementation experts_implementation
    ignore_keys_at_rope_validation min_length max_length do_sample num_beams temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences early_stopping num_beam_groups diversity_penalty forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    tie_encoder_decoder base_model_tp_plan base_model_pp_plan mtp deepstack_visual_indexes rope_parameters""".split()  # noqa: SIM905
)

# Notes of tools: they pass, and one line says so.
HARMLESS = ("unsloth_", "num_nextn_predict_layers", "transformers_", "transformers.", "axolotl_", "llamafactory_",
            "quantization_", "max_window_layers")  # fmt: skip
LOG = logging.getLogger("qwen35_moe")

# No checkpoint of the family has any other value.
ONLY = {"hidden_act": "silu", "attention_bias": False, "attn_output_gate": True}
ROPE_KEYS = ("rope_theta", "partial_rotary_factor", "mrope_section")
ONLY |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "sliding_window": None, "use_sliding_window": False}


@dataclass(frozen=True)
class Config:
    """Text configuration of a Qwen3.5 MoE checkpoint. Fields carry the names of config.json."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    layer_types: tuple[str, ...] = ()
    full_attention_interval: int = 4
    linear_conv_kernel_dim: int = 4
    rms_norm_eps: float = 1e-6
    output_gate_type: str = "silu"
    norm_topk_prob: bool = True
    tie_word_embeddings: bool = False
    rope_theta: float = 10_000_000.0
    partial_rotary_factor: float = 0.25
    mrope_section: tuple[int, ...] = (11, 11, 10)
    mtp_num_hidden_layers: int = 0
    rope_scaling: RopeScaling | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_pretrained(cls, path: str | Path, ignore: Iterable[str] = ()) -> Config:
        """Reads config.json from a folder, or the given JSON file."""
        path = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
        return cls.from_dict(read_json(path), ignore)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], ignore: Iterable[str] = ()) -> Config:
        """From the dictionary of a config.json, nested (`text_config`) or flat. `ignore` names further inert keys."""
        text = raw.get("text_config", raw) if isinstance(raw, Mapping) else raw
        if not isinstance(text, Mapping):
            raise Qwen35Error("not an object", where="config.json", expected="{...}", found=type(text).__name__)
        ignore = tuple(ignore)
        check_family(raw, text, ignore)
        _check_keys(text, ignore)
        own = [f for f in fields(Config) if f.name not in ("raw", "rope_scaling")]
        rope = _rope(text)
        given = {**text, **{key: rope[key] for key in ROPE_KEYS if key in rope}}
        if "tie_word_embeddings" in raw:  # the top level is what loaders obey
            given["tie_word_embeddings"] = raw["tie_word_embeddings"]
        if given.get("layer_types") is None:
            given["layer_types"] = ()
        if missing := [f.name for f in own if f.default is MISSING and f.name not in given]:
            raise Qwen35Error("keys are missing", where="config.json", expected=", ".join(missing), found="absent")
        values = {f.name: _typed(f.name, str(f.type), given[f.name]) for f in own if f.name in given}
        if not values["layer_types"]:
            interval, count = values.get("full_attention_interval", 4), min(values["num_hidden_layers"], MOST_LAYERS)
            values["layer_types"] = tuple(LINEAR if (i + 1) % max(interval, 1) else FULL for i in range(count))
        factor = values.get("partial_rotary_factor", 0.25)
        if "mrope_section" not in values and 0 < factor <= 1 and (half := int(values["head_dim"] * factor) // 2) != 32:
            values["mrope_section"] = (half, 0, 0)  # not the family's heads: one axis, text only
        return cls(**values, rope_scaling=RopeScaling.of(rope, text.get("max_position_embeddings")), raw=raw)

    def __post_init__(self) -> None:
        for key, right, expected in self._rules():
            if not right:
                raise Qwen35Error("bad value", where=f"config.json: {key}", expected=expected, found=vars(self)[key])

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        """(key, whether its value is right, what would be); a rule relies on those before it."""
        for f in fields(self):
            if f.type == "int" and f.name != "mtp_num_hidden_layers":
                yield f.name, vars(self)[f.name] > 0, "a positive integer"
        kinds, layers = self.layer_types, self.num_hidden_layers
        yield "layer_types", len(kinds) == layers, f"{layers} entries, as num_hidden_layers says"
        yield "layer_types", set(kinds) <= {LINEAR, FULL}, f"{LINEAR!r} or {FULL!r} each"
        yield "num_experts_per_tok", self.num_experts_per_tok <= self.num_experts, f"at most {self.num_experts} experts"
        divides = self.num_attention_heads % self.num_key_value_heads == 0
        yield "num_key_value_heads", divides, f"a divisor of num_attention_heads = {self.num_attention_heads}"
        divides = self.linear_num_value_heads % self.linear_num_key_heads == 0
        yield "linear_num_key_heads", divides, f"a divisor of linear_num_value_heads = {self.linear_num_value_heads}"
        yield "partial_rotary_factor", 0 < self.partial_rotary_factor <= 1, "above 0, at most 1"
        R = int(self.head_dim * self.partial_rotary_factor)
        yield "partial_rotary_factor", R > 0 and R % 2 == 0, "an even part of a head"
        right = len(self.mrope_section) == 3 and sum(self.mrope_section) == R // 2
        yield "mrope_section", right, f"three counts that add up to {R // 2}"
        if self.rope_scaling is not None and self.rope_scaling.rope_type == "longrope":
            for key, factors in (("short", self.rope_scaling.short_factor), ("long", self.rope_scaling.long_factor)):
                yield "rope_scaling", len(factors) == R // 2, f"{R // 2} numbers in {key}_factor"
        yield "output_gate_type", self.output_gate_type in ("silu", "swish", "sigmoid"), "silu, swish or sigmoid"

    @property
    def rotary_dim(self) -> int:
        """R: how many elements of a head are rotated."""
        whole = self.rope_scaling is not None and self.rope_scaling.rope_type == "proportional"
        return self.head_dim if whole else int(self.head_dim * self.partial_rotary_factor)

    @property
    def conv_dim(self) -> int:
        """C: channels of the convolution, q and k and v side by side."""
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        return 2 * keys + self.linear_num_value_heads * self.linear_value_head_dim


def _rope(text: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rotary settings: `rope_parameters`, or the flat keys of older files, or the family's defaults."""
    given = [rope for key in ("rope_parameters", "rope_scaling") if (rope := text.get(key))]
    if odd := [rope for rope in given if not isinstance(rope, Mapping)]:
        raise Qwen35Error("wrong type", where="config.json: rope_parameters", expected="an object", found=repr(odd[0]))
    if len(given) == 2 and given[0] != given[1]:  # transformers takes the second, as those expect who add YaRN there
        where, expected = "config.json: rope_parameters and rope_scaling", "one of them, or the same in both"
        raise Qwen35Error("two rotary embeddings", where=where, expected=expected, found=given[1], do="delete one")
    rope = given[0] if given else {}
    if rope.get("mrope_interleaved", True) is not True:
        where, found = "config.json: rope_parameters", f"mrope_interleaved {rope['mrope_interleaved']!r}"
        raise Qwen35Error("unsupported rotary embedding", where=where, expected="interleaved", found=found)
    return rope


def _check_keys(text: Mapping[str, Any], ignore: Iterable[str]) -> None:
    known = {f.name for f in fields(Config)} | INERT_KEYS | ONLY.keys() | set(ignore)
    unknown = sorted(str(key) for key in text if key not in known and not str(key).startswith("_"))
    if passing := [key for key in unknown if key.startswith(HARMLESS)]:
        LOG.warning("config.json: keys that change nothing here: %s", ", ".join(passing))
    if unknown := [key for key in unknown if not key.startswith(HARMLESS)]:
        near = get_close_matches(unknown[0], known, n=1)
        what, found = "unknown keys, which might change what the model computes", ", ".join(unknown)
        do = "if they are harmless, name them: load(..., ignore_config_keys=[...]), or --ignore-config-keys"
        expected = f"{near[0]!r}?" if near else "keys of the Qwen3.5 MoE family"
        raise Qwen35Error(what, where="config.json", expected=expected, found=found, do=do)
    for key, only in ONLY.items():
        if (found := text.get(key, only)) != only:
            raise Qwen35Error("bad value", where=f"config.json: {key}", expected=f"{only!r}; all there is", found=found)


def _typed(name: str, kind: str, value: Any) -> Any:
    """The value in the field's type; a clear error where it has another."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "int" and number and abs(value) < 2**63 and float(value).is_integer():
        return int(value)
    if kind == "float" and number and abs(value) <= sys.float_info.max:
        return float(value)
    if type(value).__name__ == kind in ("bool", "str"):
        return value
    if kind.startswith("tuple") and isinstance(value, (list, tuple)):
        item = str if "str" in kind else int
        if all(type(v) is item for v in value):
            return tuple(value)
    raise Qwen35Error("wrong type", where=f"config.json: {name}", expected=kind, found=repr(value))


def check_family(top: Mapping[str, Any], text: Mapping[str, Any], ignore: Iterable[str]) -> None:
    """Error: `model_type` names another family, or the model is dense. ignore: with "model_type", all pass."""
    if "model_type" in ignore:
        return
    for kind in (top.get("model_type"), text.get("model_type")):
        if kind in (None, "", *FAMILY):
            continue
        why = next((text for name, text in OTHER_MODELS.items() if kind in (name, f"{name}_text")), "")
        what, expected = "a model of another family", " or ".join(FAMILY) + " (Qwen3.5, Qwen3.6 and Qwen3.8 MoE)"
        do = 'if it is the same model under another name, load(..., ignore_config_keys=["model_type"])'
        what, do = (f"{what}: {why}", "") if why else (what, do)
        raise Qwen35Error(what, where="config.json: model_type", expected=expected, found=repr(kind), do=do)
    if "num_experts" not in text and "intermediate_size" in text:
        expected, found = "num_experts and moe_intermediate_size", "intermediate_size and no experts"
        raise Qwen35Error("a dense model", where="config.json", expected=expected, found=found)
