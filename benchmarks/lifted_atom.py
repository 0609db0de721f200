"""Deciding functions of ATOM, lifted out of a folder with its sources: it has no wheel.

Run on config.py of commit 00afbe32, quant_spec.py of 09e30b6b, models/qwen3_5.py of 15951655, models/qwen3_5_mtp.py of
22da013e and the topK.py of their time. The text-only classes name modules `model.layers.N`, the multimodal class, which
the model_runner.py of 00afbe32 builds of a checkpoint with a vision tower, `language_model.model.layers.N`. Entries of
the exclude list are renamed for both, keys of layer_quant_config are not, so keys with the hub's prefix match nothing.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from types import SimpleNamespace
from typing import Any

from .lifted_engines import Answer, Json, Source, lift

# aiter/utility/dtypes.py: d_dtypes.
DTYPES = {name: name for name in ("fp8", "fp8_e8m0", "fp16", "bf16", "fp32", "i4x2", "fp4x2", "i8", "i16", "i32")}
PARSERS = {"quark": "QuarkParser", "modelopt": "ModelOptParser"}


class Atom:
    """ATOM's chain: parser, renaming, the draft's own numbers, the specs of both blocks. Text only, as its docs say."""

    rule, pattern = "atom-ffdf3bb5", "atom"
    renaming = "_TEXT_ONLY_QUANT_EXCLUDE_NAME_MAPPING"

    def __init__(self, folder: Source):
        kinds = SimpleNamespace(**{n: n for n in ("No", "per_Token", "per_Tensor", "per_1x32", "per_1x128")})
        given: Json = {"re": re, "functools": functools, "QuantType": kinds, "QuantConfigParser": object}
        given |= {"torch": SimpleNamespace(bfloat16="bf16"), "d_dtypes": DTYPES, "fnmatch": fnmatch}
        functions = ("_qscheme_to_quant_type", "_parse_quant_type", "_parse_quant_dtype", "_parse_is_dynamic")
        functions += ("_quark_weight_spec", "_build_quark_layer_spec", "_build_modelopt_layer_spec")
        names = [*functions, "NVFP4_DTYPE", "NVFP4_GROUP_SIZE", "LayerQuantConfig", "ParsedQuantConfig"]
        self.spec = lift(folder, "atom/quant_spec.py", [*names, *PARSERS.values(), "GenericParser"], given)
        methods = ("get_layer_quant_config", "_is_excluded", "_matches_exclude", "remap_layer_name")
        methods += ("apply_exclude_name_mapping",)
        wanted = [f"QuantizationConfig.{m}" for m in methods]
        self.kind = lift(folder, "atom/config.py", wanted, self.spec | given)["QuantizationConfig"]
        maps = ("_QWEN3_5_PACKED_MODULES_MAPPING", self.renaming)
        self.maps = lift(folder, "atom/models/qwen3_5.py", maps, {})
        self.packed = self.maps[maps[0]]
        one = SimpleNamespace(data_parallel_size=1)
        given |= {"get_current_atom_config": lambda: SimpleNamespace(parallel_config=one, enable_dp_attention=False)}
        given |= {"envs": SimpleNamespace(ATOM_DISABLE_MORI_EP=True), "_has_module": lambda _: False}
        name = "is_rocm_aiter_fusion_shared_expert_enabled_for_quant_config"
        self.gate = lift(folder, "atom/model_ops/topK.py", [name], given)[name]

    def answer(self, top: Json, raw: Json, options: Json) -> Answer:
        made, layers = self.kind(), (top.get("text_config") or top)["num_hidden_layers"]
        prefix, renames = self.names("text_config" in top)
        made.torch_dtype = "bf16"
        try:
            parser = self.spec[PARSERS.get(str(raw.get("quant_method")), "GenericParser")]()
            plain = {"global_spec": self.spec["LayerQuantConfig"].no_quant("bf16")}
            found = vars(parser.parse(raw)) if raw else {"layer_pattern_specs": [], "exclude_layers": [], **plain}
        except (ValueError, TypeError):
            return "stops", "stops"
        vars(made).update(found)
        made.remap_layer_name(SimpleNamespace(model_type="qwen3_5_moe_text"), dict(self.packed), {}, renames)
        each = [self.one(made, f"{prefix}.layers.{n}.mlp") for n in range(layers)]
        # models/qwen3_5_mtp.py: Qwen3_5MTP.__init__ counts the draft's layers behind the target's.
        number = re.compile(r"^mtp\.layers\.(\d+)\.")
        made.exclude_layers = [
            number.sub(lambda n: f"mtp.layers.{layers + int(n[1])}.", e) for e in made.exclude_layers
        ]
        return each[0] if len(set(each)) == 1 else "mixed", self.one(made, f"mtp.layers.{layers}.mlp")

    def names(self, nested: bool) -> tuple[str, dict[str, str]]:
        return "model", self.maps[self.renaming]

    def one(self, made: Any, block: str) -> str:
        return "fused" if self.gate(made, f"{block}.shared_expert", f"{block}.experts") else "no"


class AtomMultimodal(Atom):
    """The same with a vision tower. A configuration without one is Qwen3_5MoeForCausalLM's, which renames nothing."""

    rule, renaming = "atom-00afbe32", "_Qwen3_5MultimodalBase.quant_exclude_name_mapping"

    def names(self, nested: bool) -> tuple[str, dict[str, str]]:
        mapping = self.maps["_Qwen3_5MultimodalBase"].quant_exclude_name_mapping
        return ("language_model.model", mapping) if nested else ("model", {})
